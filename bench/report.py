#!/usr/bin/env python3
"""Runs every benchmark, prints a table and writes BUILD/bench.json. Medians of 5. Usage: report.py BUILD [--big]

Besides the Google Benchmark programs it times the command line itself: --help; a static audit of a Mixtral-8x7B-shaped
directory (93 GB in 19 sparse shards; the router tensors hold real bytes), warm; and `check --full` of a Mixtral-shaped
checkpoint with weights in every byte: 3.4 GB, warm, and with --big 15.2 GB, cold where the page cache can be dropped. The
checkpoints are kept in $MOE_AUDIT_BENCH_DIR (default: moe-audit-bench in the folder for temporary files); made if absent.
With $MOE_AUDIT_BENCH_PYTHON, a Python that has torch and safetensors, the loop that people write is timed, too. Last `replay` and
`health` of a trace against trace_loop.py: 1e5 tokens, with --big 1e6."""
import array
import glob
import json
import math
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time


PYTHON_LOOP = """
import glob, sys, time, torch
from safetensors import safe_open
torch.set_num_threads(int(sys.argv[2]))
start, bad, size = time.perf_counter(), [], 0
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(path, "pt") as f:
        for name in f.keys():
            t = f.get_tensor(name)
            if not torch.isfinite(t).all() or t.abs().max() == 0 or t.float().norm() == 0:
                bad.append(name)
            size += t.numel() * t.element_size()
print(time.perf_counter() - start, size, torch.__version__, len(bad))
"""


def mixtral(folder, layers=32, experts=8, hidden=4096, width=14336, vocab=32000, shards=19, whole=False):
    """A directory as transformers 4 saves Mixtral-8x7B; but for the routers sparse, unless `whole`."""
    tensors = [("model.embed_tokens.weight", [vocab, hidden]), ("lm_head.weight", [vocab, hidden]), ("model.norm.weight", [hidden])]
    for l in range(layers):
        p = f"model.layers.{l}."
        tensors += [(p + "input_layernorm.weight", [hidden]), (p + "post_attention_layernorm.weight", [hidden])]
        tensors += [(p + f"self_attn.{n}_proj.weight", [1024 if n in "kv" else hidden, hidden]) for n in "qkvo"]
        tensors += [(p + "block_sparse_moe.gate.weight", [experts, hidden])]
        for e in range(experts):
            q = p + f"block_sparse_moe.experts.{e}."
            tensors += [(q + "w1.weight", [width, hidden]), (q + "w2.weight", [hidden, width]), (q + "w3.weight", [width, hidden])]
    size = lambda shape: 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
    total = sum(size(s) for _, s in tensors)
    random.seed(7)
    gauss = lambda n: b"".join(struct.pack("<f", random.gauss(0, 0.02))[2:] for _ in range(n))  # bf16 of width 0.02
    block = gauss(1 << 20) if whole else b""
    weight_map, rest, written = {}, list(tensors), 0
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine, here = [], 0
        while rest and (i == shards - 1 or here + size(rest[0][1]) <= total // shards + 200_000_000):
            mine.append(rest.pop(0))
            here += size(mine[-1][1])
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for n, s in mine:
            header[n] = {"dtype": "BF16", "shape": s, "data_offsets": [offset, offset + size(s)]}
            offset += size(s)
            weight_map[n] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, name), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for n, s in mine:
                f.seek(8 + len(text) + header[n]["data_offsets"][0])
                if n.endswith("gate.weight"):
                    f.write(gauss(s[0] * s[1]))
                left = size(s) if whole and not n.endswith("gate.weight") else 0
                turn = 2 * random.randrange(1 << 20)  # no two tensors are equal
                turned = block[turn:] + block[:turn]
                while left > 0:
                    left -= f.write(turned[:left])
            f.truncate(8 + len(text) + offset)
        written += offset
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": written}, "weight_map": weight_map}, f, indent=2)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": width,
                   "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": experts,
                   "num_experts_per_tok": 2, "vocab_size": vocab, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}, f, indent=2)
    return written


def timed(command, runs=11, codes=(0,)):
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        process = subprocess.run(command, capture_output=True)
        seconds.append(time.perf_counter() - start)
        if process.returncode not in codes:
            raise SystemExit(f"{command}: exit code {process.returncode}\n{process.stdout.decode()}{process.stderr.decode()}")
    return statistics.median(seconds[1:])  # the first warms the page cache


def measured(command, drop=None):
    """Seconds and peak resident bytes of one run."""
    if drop:
        for path in glob.glob(drop + "/*.safetensors"):
            with open(path, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{command}: exit code {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def full_scans(binary, big):
    """check --full of checkpoints on the disk; rows for the table."""
    home = os.environ.get("MOE_AUDIT_BENCH_DIR", os.path.join(tempfile.gettempdir(), "moe-audit-bench"))
    rows = []
    for name, layers, shards in [("mixtral-3gb", 1, 2)] + ([("mixtral-15gb", 5, 6)] if big else []):
        folder = os.path.join(home, name)
        if not os.path.exists(os.path.join(folder, "config.json")):
            os.makedirs(folder, exist_ok=True)
            if shutil.disk_usage(folder).free < layers * 8e9:
                rows.append((f"check --full, {name}", float("nan"), f"skipped: no room in {home}"))
                continue
            mixtral(folder, layers=layers, shards=shards, whole=True)
        size = sum(os.path.getsize(p) for p in glob.glob(folder + "/*.safetensors"))
        rate = lambda s: f"{size / s / 1e9:.2f} GB/s of {size / 1e9:.1f} GB"
        scan = lambda threads: [binary, "check", folder, "--full", "--select", "CK001", "--no-progress", "--threads", str(threads)]
        cold, peak = measured(scan(2), drop=folder)
        rows.append((f"check --full, {name}, 2 threads, cold", cold, f"{rate(cold)}; peak {peak / 1e6:.0f} MB resident, limit 300"))
        read, _ = measured(["sh", "-c", f"cat {folder}/*.safetensors > /dev/null"], drop=folder)
        rows.append((f"  cat > /dev/null of the same, cold", read, rate(read)))
        if big and layers > 1:
            continue  # warm only where everything fits
        warm = {n: statistics.median(measured(scan(n))[0] for _ in range(5)) for n in (1, 2)}
        for n, s in warm.items():
            rows.append((f"check --full, {name}, {n} thread{'s' * (n > 1)}, warm", s, rate(s) + (f", {warm[1] / s:.2f}x one thread" if n > 1 else "")))
        python = os.environ.get("MOE_AUDIT_BENCH_PYTHON")
        if python:
            for n in (1, 2):
                out = subprocess.run([python, "-c", PYTHON_LOOP, folder, str(n)], capture_output=True, text=True, check=True).stdout.split()
                s = float(out[0])
                rows.append((f"  Python, safetensors and torch {out[2]}, {n} thread{'s' * (n > 1)}", s, f"{rate(s)}; moe-audit is {s / warm[n]:.1f}x"))
    return rows


def trace(folder, tokens, batch=4000, layers=16, experts=64, k=8):
    """A trace of OLMoE's shape. All records name one file, whose choices and losses are right."""
    os.makedirs(folder, exist_ok=True)
    random.seed(11)
    header, blobs, offset = {}, [], 0
    loads, mass, z = [0] * experts, [0.0] * experts, 0.0
    for layer in range(layers):
        likes = [random.gauss(0, 0.3) for _ in range(experts)]
        logits, chosen = array.array("f", (random.gauss(like, 1) for _ in range(batch) for like in likes)), array.array("h")
        for t in range(batch):
            row = logits[t * experts:(t + 1) * experts]
            powers = [math.exp(x) for x in row]
            total = math.fsum(powers)
            z += math.log(total) ** 2
            mass = [m + p / total for m, p in zip(mass, powers)]
            best = sorted(range(experts), key=lambda e: -row[e])[:k]
            chosen.extend(best)
            for e in best:
                loads[e] += 1
        for name, dtype, shape, data in (("router_logits", "F32", [batch, experts], logits), ("selected_experts", "I16", [batch, k], chosen)):
            header[f"layer.{layer}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data) * data.itemsize]}
            blobs.append(data)
            offset += len(data) * data.itemsize
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "all.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for data in blobs:
            data.tofile(f)
    rows = batch * layers
    record = {"kind": "micro_batch", "step": 0, "file": "all.safetensors", "tokens": batch, "training": True, "z_loss": z / rows,
              "aux_loss": experts * math.fsum(n / rows * m / rows for n, m in zip(loads, mass))}
    with open(os.path.join(folder, "trace.json"), "w", encoding="utf-8") as f:
        json.dump({"format": "moe-audit-trace", "version": 1, "packages": {"transformers": "4.57.6"},
                   "model": {"model_type": "olmoe", "num_experts": experts, "top_k": k, "config": {"norm_topk_prob": False}},
                   "layers": [{"layer": n} for n in range(layers)]}, f)
    with open(os.path.join(folder, "records.jsonl"), "w", encoding="utf-8") as f:
        for b in range(tokens // batch):
            f.write(json.dumps({**record, "micro_batch": b}) + "\n")


def wall_and_cpu(command):
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command}: {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, out


def replays(binary, tokens):
    """replay and health of a trace, and a script that computes the same, in turn."""
    python = next((p for p in (os.environ.get("MOE_AUDIT_BENCH_PYTHON"), os.environ.get("MOE_AUDIT_PYTHON"), sys.executable)
                   if p and not subprocess.run([p, "-c", "import numpy"], capture_output=True).returncode), None)
    loop = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trace_loop.py")
    rows, name, peer = [], f"{tokens:.0e} tokens x 16 layers, E = 64, k = 8".replace("e+0", "e"), ""
    with tempfile.TemporaryDirectory() as folder:
        trace(folder, tokens)
        for n in (1, 2):
            took = {"replay": [], "health": [], "script": []}
            for _ in range(3):
                for command in ("replay", "health"):
                    took[command].append(wall_and_cpu([binary, command, folder, "--device", "cpu", "--no-progress", "--threads", str(n)])[:2])
                if python:
                    *seconds, out = wall_and_cpu([python, loop, folder, str(n)])
                    got = json.loads(out)
                    if got["tokens_that_differ"] or got["largest_difference_of_a_loss"] > 1e-9:
                        raise SystemExit(f"trace_loop.py: {got}")
                    took["script"].append((got["seconds"], seconds[1]))
                    peer = got["peer"]
            wall, cpu = ({c: statistics.median(s[i] for s in list_) for c, list_ in took.items() if list_} for i in (0, 1))
            threads = f"{n} thread{'s' * (n > 1)}"
            for command in ("replay", "health"):
                rows.append((f"{command}, {name}, {threads}", wall[command], f"CPU {cpu[command]:.2f} s; {tokens * 16 / wall[command] / 1e6:.1f} M routed tokens/s"))
            if python:
                ratio = [t["script"] / (t["replay"] + t["health"]) for t in (wall, cpu)]
                rows.append((f"  both by {peer}, {threads}", wall["script"],
                             f"CPU {cpu['script']:.2f} s; the two commands are {ratio[0]:.1f}x as fast, by CPU time {ratio[1]:.1f}x"))
    if not peer.startswith("torch"):
        rows.append(("  torch: skipped", 0, "no Python with torch: MOE_AUDIT_PYTHON names one" + ("" if peer else "; nor with NumPy")))
    return rows


def main():
    build = sys.argv[1]
    binary = os.path.join(build, "bin/moe-audit")
    rows = []
    spawn = timed(["/bin/true"])
    rows.append(("spawn of /bin/true", spawn, "the floor of the rows below"))
    rows.append(("moe-audit --help", timed([binary, "--help"]), "limit 10 ms"))
    with tempfile.TemporaryDirectory() as folder:
        size = mixtral(folder)
        rows.append(("check --static, Mixtral-8x7B shape", timed([binary, "check", folder, "--static"]), f"limit 50 ms; {size / 1e9:.1f} GB"))
        rows.append(("check, the same with router replay", timed([binary, "check", folder, "--no-progress"], 3), "aim 3 s on two cores"))
    rows += full_scans(binary, "--big" in sys.argv)
    rows += replays(binary, 1_000_000 if "--big" in sys.argv else 100_000)
    results = {"command_line": [{"name": n, "median_seconds": s, "note": note} for n, s, note in rows], "benchmarks": {}}
    for n, s, note in rows:
        print(f"{n:<52} {s * 1e3:>10.2f} ms   {note}")
    failed = []
    for program in sorted(glob.glob(os.path.join(build, "bin/bench_*"))):
        name = os.path.basename(program)
        if name.startswith("bench_cuda_"):  # timed by CUDA events, in words of their own; 77: there is no device
            done = subprocess.run([program], stdout=subprocess.PIPE, text=True)
            results["benchmarks"][name] = {"exit_code": done.returncode, "output": done.stdout}
            print(f"\n{name}\n  " + done.stdout.rstrip().replace("\n", "\n  "))
            failed += [name] if done.returncode not in (0, 77) else []
            continue
        out = subprocess.run([program, "--benchmark_format=json", "--benchmark_repetitions=5", "--benchmark_report_aggregates_only=true"],
                             capture_output=True, text=True, check=True).stdout
        data = json.loads(out)
        results["benchmarks"][name] = data
        print(f"\n{name}")
        for b in data["benchmarks"]:
            if b.get("aggregate_name") != "median":
                continue
            known = {"name", "run_name", "run_type", "repetitions", "threads", "aggregate_name", "aggregate_unit", "iterations", "real_time",
                     "cpu_time", "time_unit", "family_index", "per_family_instance_index", "label", "repetition_index"}
            extra = "  ".join(f"{k}={v:.3g}" for k, v in b.items() if k not in known)
            print(f"  {b['run_name']:<42} {b['real_time']:>10.3f} {b['time_unit']}  {extra}  {b.get('label', '')}")
    with open(os.path.join(build, "bench.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
