#!/usr/bin/env python3
"""Runs every benchmark, prints a table and writes BUILD/bench.json. Medians of 5. Usage: report.py BUILD

Besides the Google Benchmark programs it times the command line itself: --help, and a static audit of a Mixtral-8x7B-shaped
directory (93 GB in 19 sparse shards; the router tensors hold real bytes), warm."""
import glob
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time


def mixtral(folder, layers=32, experts=8, hidden=4096, width=14336, vocab=32000, shards=19):
    """A directory as transformers 4 saves Mixtral-8x7B, sparse but for the routers."""
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
                if n.endswith("gate.weight"):  # bf16 of a Gaussian of width 0.02
                    f.seek(8 + len(text) + header[n]["data_offsets"][0])
                    f.write(b"".join(struct.pack("<f", random.gauss(0, 0.02))[2:] for _ in range(s[0] * s[1])))
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
    results = {"command_line": [{"name": n, "median_seconds": s, "note": note} for n, s, note in rows], "benchmarks": {}}
    for n, s, note in rows:
        print(f"{n:<44} {s * 1e3:>10.2f} ms   {note}")
    for program in sorted(glob.glob(os.path.join(build, "bin/bench_*"))):
        name = os.path.basename(program)
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


if __name__ == "__main__":
    main()
