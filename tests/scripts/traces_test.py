#!/usr/bin/env python3
"""The recorded runs of fixtures/traces show what expected.json says of them, by arithmetic on the files alone.
Usage: traces_test.py SOURCE_DIR [BINARY]"""
import glob
import json
import math
import os
import struct
import sys

root = os.path.join(sys.argv[1], "fixtures/traces")
bad = 0


def check(good, what):
    global bad
    if not good:
        bad += 1
        print(what)


def close(a, b, relative):
    return abs(a - b) <= relative * abs(b)


def tensors(path):
    """name -> (shape, values) of the tensors that are used here."""
    with open(path, "rb") as f:
        data = f.read()
    length = struct.unpack("<Q", data[:8])[0]
    out = {}
    for name, t in json.loads(data[8:8 + length]).items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + x for x in t["data_offsets"])
        raw = data[start:end]
        if t["dtype"] == "BF16":
            values = [struct.unpack("<f", b"\0\0" + raw[i:i + 2])[0] for i in range(0, len(raw), 2)]
        else:
            kind, size = {"F32": ("f", 4), "F64": ("d", 8), "U8": ("B", 1), "I16": ("h", 2), "I32": ("i", 4), "I64": ("q", 8)}[t["dtype"]]
            values = list(struct.unpack(f"<{len(raw) // size}{kind}", raw))
        out[name] = (t["shape"], values)
    return out


def rows(tensor):
    (n, width), values = tensor
    return [values[i * width:(i + 1) * width] for i in range(n)]


def balance_loss(head, t, returned):
    """E * sum of f_e P_e over the rows of all layers that are no padding, f with k choices a token (transformers)."""
    counts, mass, tokens, experts = None, None, 0, head["model"]["num_experts"]
    for layer in head["layers"]:
        p = f"layer.{layer['layer']}."
        logits = t.get(p + "returned_router_logits") if returned else None
        mask = t["token_mask"][1]
        if p + "seen" in t:  # one of two routers in a layer
            mask = [mask[i] for i in t[p + "seen"][1]]
        for keep, row in zip(mask, rows(logits or t[p + "router_logits"]), strict=True):
            if not keep:
                continue
            counts, mass, tokens = counts or [0] * experts, mass or [0.0] * experts, tokens + 1
            top = max(row)
            e = [math.exp(x - top) for x in row]
            probabilities = [x / sum(e) for x in e]
            for i in sorted(range(experts), key=lambda i: -row[i])[:layer["top_k"]]:
                counts[i] += 1
            mass = [a + b for a, b in zip(mass, probabilities)]
    return experts * sum(c * m for c, m in zip(counts, mass)) / tokens ** 2


def judge(name, want):
    folder = os.path.join(root, name)
    with open(os.path.join(folder, "trace.json"), encoding="utf-8") as f:
        head = json.load(f)
    check(head["packages"]["trl" if "trl" in name else "transformers"] == name.rsplit("-", 1)[1].lstrip("trlf"), f"{name}: release")
    records = []
    for file in sorted(glob.glob(os.path.join(folder, "records*.jsonl"))):
        with open(file, encoding="utf-8") as f:
            records += [json.loads(line) for line in f]
    for r in records:
        check(os.path.exists(os.path.join(folder, r["file"])), f"{name}: {r['file']}")
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    check(size <= 60_000, f"{name}: {size} bytes")
    first = [(r, tensors(os.path.join(folder, r["file"]))) for r in records if r["kind"] == "micro_batch" and r["step"] == 0 and r["training"]]
    ranks = len({r["rank"] for r, _ in first})
    check(ranks == head["training"]["world_size"], f"{name}: {ranks} ranks")
    coefficient = head["coefficients"]["router_aux_loss_coef"]
    if want.get("aux_factor") is None:
        check(all(r["aux_loss"] is None for r, _ in first), f"{name}: there is a balance loss")
    else:
        factor = sum(r["aux_loss_grad"] or 0 for r, _ in first) / ranks / coefficient
        check(abs(factor - want["aux_factor"]) < 1e-4, f"{name}: the balance loss weighs {factor} coefficients, expected {want['aux_factor']}")
        check(all(r["aux_loss_requires_grad"] == (want["aux_factor"] != 0) for r, _ in first), f"{name}: a graph of the balance loss")
    if "aux_of" in want:
        for r, t in first:
            # bfloat16 logits: the framework takes softmax and sums in bfloat16, too.
            slack = 1e-2 if name.startswith("bf16") else 1e-5
            mine, other = balance_loss(head, t, want["aux_of"] == "returned"), balance_loss(head, t, False)
            check(close(r["aux_loss"], mine, slack), f"{name}: balance loss {r['aux_loss']}, by {want['aux_of']} {mine}")
            if want["aux_of"] == "returned":
                check(not close(r["aux_loss"], other, 1e-3), f"{name}: the logits give the same")
    if want["loss_factor"] is not None:
        # What backward got, less the balance loss with the weight that it was given.
        got = sum(r["loss"] - (r["aux_loss"] or 0) * (r["aux_loss_grad"] or (coefficient or 0) * r["loss_grad"]) for r, _ in first) / ranks
        sums = [sum(t["token_loss"][1]) for _, t in first]
        counts = [sum(t["label_mask"][1]) for _, t in first]
        check([r["label_tokens"] for r, _ in first] == counts, f"{name}: label counts")
        means = sum(s / n for s, n in zip(sums, counts)) / len(sums)
        right = sum(sums) / sum(counts)
        expected = {"mean of means": means, "8 means": 8 * means}.get(want["loss_factor"])
        expected = want["loss_factor"] * right if expected is None else expected
        slack = 5e-3 if name.startswith(("bf16", "fp32-router")) else 2e-6  # logits in bfloat16
        check(close(got, expected, slack), f"{name}: backward got {got}, expected {expected}; the mean over labels is {right}")
        if want["loss_factor"] == "mean of means":
            check(not close(got, right, 1e-4), f"{name}: the mean of means is the mean over labels here")


with open(os.path.join(root, "expected.json"), encoding="utf-8") as f:
    expected = json.load(f)["runs"]
folders = sorted(d for d in os.listdir(root) if os.path.exists(os.path.join(root, d, "trace.json")))
check(folders == sorted(expected), f"folders and expected.json differ: {set(folders) ^ set(expected)}")
with open(os.path.join(root, "README.md"), encoding="utf-8") as f:
    table = f.read()
for one, want in expected.items():
    check(f"| {one} |" in table, f"{one}: not in README.md")
    check(want.get("twin", one) in expected, f"{one}: no such twin")
    judge(one, want)
before, after = {}, {}
for name in ("bias-tf5.23.0", "bias-wrong-way-tf5.23.0"):
    folder = os.path.join(root, name)
    step = tensors(os.path.join(folder, "step0_rank0.safetensors"))
    for layer in (1, 2):
        load = [0] * 8
        for b in range(2):
            got = tensors(os.path.join(folder, f"step0_mb{b}_rank0.safetensors"))[f"layer.{layer}.tokens_per_expert"][1]
            load = [x + y for x, y in zip(load, got)]
        move = [a - b for a, b in zip(step[f"layer.{layer}.correction_bias_after"][1], step[f"layer.{layer}.correction_bias_before"][1])]
        sign = 1 if name == "bias-tf5.23.0" else -1
        for m, n in zip(move, load):
            way = sign * ((sum(load) / 8 > n) - (sum(load) / 8 < n))
            check(abs(m - 0.001 * way) < 1e-7, f"{name}: layer {layer}: moved by {m} at load {n} of {load}")


def routed(folder, step):
    """[layers][tokens] of sets."""
    t = tensors(os.path.join(root, folder, f"step{step}_mb0_rank0.safetensors"))
    return {n: [set(row) for row in rows(t[n])] for n in sorted(t) if n.endswith("selected_experts")}


def array(path):
    """An int16 array that numpy.save wrote: shape and values."""
    with open(path, "rb") as f:
        data = f.read()
    length = struct.unpack("<H", data[8:10])[0]
    shape = eval(data[10:10 + length].decode().split("'shape': ")[1].split(")")[0] + ")")  # noqa: S307
    return shape, struct.unpack(f"<{(len(data) - 10 - length) // 2}h", data[10 + length:])


for name, want in expected.items():
    if "other_sets" in want:
        (tokens_, layers, k), ids = array(os.path.join(root, name, "rollout.npy"))
        mine = [list(routed(name, step).values()) for step in (0, 1)]
        per_step, other = tokens_ // 2, [0, 0, 0]
        for t in range(tokens_):
            sets = [mine[t // per_step][l][t % per_step] for l in range(layers)]
            theirs = [set(ids[(t * layers + l) * k:(t * layers + l + 1) * k]) for l in range(layers)]
            other[0] += sum(a != b for a, b in zip(sets, theirs))
            other[1] += sets != theirs
            other[2] += sum(len(a & b) for a, b in zip(sets, theirs))
        check(other == want["other_sets"], f"{name}: sets, tokens and choices against the rollout: {other}")
    if "outside_groups" in want:
        outside = 0
        for step in (0, 1):
            t = tensors(os.path.join(root, name, f"step{step}_mb0_rank0.safetensors"))
            bias = tensors(os.path.join(root, name, f"step{step}_rank0.safetensors"))["layer.1.correction_bias_before"][1]
            for z, ids in zip(rows(t["layer.1.router_logits"]), rows(t["layer.1.selected_experts"])):
                choice = [1 / (1 + math.exp(-v)) + b for v, b in zip(z, bias)]
                groups = [sum(sorted(choice[g * 2:g * 2 + 2])) for g in range(4)]  # 4 groups of 2, the best 2
                kept = sorted(range(4), key=lambda g: -groups[g])[:2]
                outside += any(e // 2 not in kept for e in ids)
        check(outside == want["outside_groups"], f"{name}: {outside} tokens outside their groups")
print(f"{len(expected)} recorded runs, {bad} differences")
sys.exit(1 if bad else 0)
