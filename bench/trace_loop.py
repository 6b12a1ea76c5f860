"""What `moe-audit replay` and `moe-audit health` compute of a trace, as one would write it in torch, or in NumPy where there is no torch:
the choice against the float64 top k, the balance loss, the z-loss, and the numbers of docs/health.md with their intervals.
Prints a JSON line. Usage: trace_loop.py TRACE THREADS"""
import json
import mmap
import os
import struct
import sys
import time

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = sys.argv[2]
import numpy as np

try:
    import torch
    torch.set_num_threads(int(sys.argv[2]))
    peer = "torch " + torch.__version__
except ImportError:
    torch = None
    peer = "NumPy " + np.__version__

DTYPES = {"F32": np.float32, "I16": np.int16}
RANDOM = np.random.default_rng(7)


def tensors(path):
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes writable memory only
    size = struct.unpack("<Q", data[:8])[0]
    for name, t in json.loads(data[8:8 + size]).items():
        if name != "__metadata__":
            array = np.frombuffer(data, DTYPES[t["dtype"]], (t["data_offsets"][1] - t["data_offsets"][0]) // np.dtype(DTYPES[t["dtype"]]).itemsize,
                                  8 + size + t["data_offsets"][0]).reshape(t["shape"])
            yield name, torch.from_numpy(array) if torch else array


def in_torch(logits, recorded, k):
    logits = logits.double()
    experts = logits.shape[1]
    p = torch.softmax(logits, -1)
    lse = torch.logsumexp(logits, -1)
    top, ids = torch.topk(p, k + 1)
    chosen = recorded.long()
    hot = torch.zeros_like(p, dtype=torch.float32).scatter_(1, chosen, 1)
    near = torch.gather(logits, 1, ids[:, k - 1:])
    spacing = torch.exp2(torch.floor(torch.log2(near.abs())) - 7)
    return {"differ": (chosen.sort(-1).values != ids[:, :k].sort(-1).values).any(-1).sum().item(),
            "loads": torch.bincount(ids[:, :k].reshape(-1), minlength=experts).numpy(), "mass": p.sum(0).numpy(), "z": (lse ** 2).sum().item(),
            "counts": torch.stack([torch.bincount(c.reshape(-1), minlength=experts) for c in chosen.chunk(16)]).numpy(),
            "entropy": -torch.special.xlogy(p, p).sum().item(), "confidence": top[:, :k].sum().item(), "margin": (near[:, 0] - near[:, 1]).numpy(),
            "near": (near[:, 0] - near[:, 1] <= 0.5 * spacing.sum(-1)).sum().item(), "pairs": (hot.T @ hot).numpy()}


def in_numpy(logits, recorded, k):
    logits = logits.astype(np.float64)
    experts, row = logits.shape[1], np.arange(len(logits))[:, None]
    shift = logits.max(-1, keepdims=True)
    e = np.exp(logits - shift)
    total = e.sum(-1, keepdims=True)
    p, lse = e / total, (np.log(total) + shift)[:, 0]
    ids = np.argpartition(-p, k, -1)[:, :k + 1]
    ids = ids[row, np.argsort(-p[row, ids], -1)]
    chosen = recorded.astype(np.int64)
    hot = np.zeros(p.shape, np.float32)
    hot[row, chosen] = 1
    near = logits[row, ids[:, k - 1:]]
    spacing = np.exp2(np.floor(np.log2(np.abs(near))) - 7)
    return {"differ": (np.sort(chosen, -1) != np.sort(ids[:, :k], -1)).any(-1).sum(),
            "loads": np.bincount(ids[:, :k].reshape(-1), minlength=experts), "mass": p.sum(0), "z": (lse ** 2).sum(),
            "counts": np.stack([np.bincount(c.reshape(-1), minlength=experts) for c in np.array_split(chosen, 16)]),
            "entropy": -(p * np.log(p)).sum(), "confidence": p[row, ids[:, :k]].sum(), "margin": near[:, 0] - near[:, 1],
            "near": (near[:, 0] - near[:, 1] <= 0.5 * spacing.sum(-1)).sum(), "pairs": hot.T @ hot}


def violation(counts):
    return counts.max(-1) / counts.mean(-1) - 1


def interval(blocks):
    """Bootstrap over blocks of tokens, as the report's intervals are."""
    while len(blocks) > 512:  # as `health` does
        blocks = blocks[:len(blocks) // 2 * 2].reshape(-1, 2, blocks.shape[1]).sum(1)
    draws = RANDOM.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), 1000).astype(np.float64) @ blocks
    return np.quantile(violation(draws), (0.025, 0.975))


def main():
    start = time.perf_counter()
    with open(sys.argv[1] + "/trace.json", encoding="utf-8") as f:
        head = json.load(f)
    with open(sys.argv[1] + "/records.jsonl", encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    k, layers = head["model"]["top_k"], [layer["layer"] for layer in head["layers"]]
    sums, off = {n: {} for n in layers}, 0.0
    for r in records:
        t = dict(tensors(os.path.join(sys.argv[1], r["file"])))
        loads, mass, z = 0, 0, 0
        for n in layers:
            got = (in_torch if torch else in_numpy)(t[f"layer.{n}.router_logits"], t[f"layer.{n}.selected_experts"], k)
            loads, mass, z = loads + got["loads"], mass + got["mass"], z + got["z"] / r["tokens"]
            got["violation"] = violation(got["counts"].sum(0))
            for key, value in got.items():
                sums[n].setdefault(key, []).append(value)
        rows = r["tokens"] * len(layers)
        aux = len(loads) * float((loads / rows) @ (mass / rows))
        off = max(off, abs(aux / r["aux_loss"] - 1), abs(z / len(layers) / r["z_loss"] - 1))
    health = []
    for s in sums.values():
        counts = np.concatenate(s["counts"])
        load, tokens, mass, pairs = counts.sum(0), sum(map(len, s["margin"])), sum(s["mass"]), sum(s["pairs"])
        share, p = load / load.sum(), mass / mass.sum()
        health.append({"violation": violation(load), "interval": list(interval(counts)), "micro": np.mean(s["violation"]), "cv": load.std() / load.mean(),
                       "entropy": -(share * np.log(share)).sum() / np.log(len(share)), "importance": p.std() / p.mean(), "least": load.min() / load.mean(),
                       "token_entropy": sum(s["entropy"]) / tokens, "mutual": -(p * np.log(p)).sum() - sum(s["entropy"]) / tokens,
                       "margin": list(np.quantile(np.concatenate(s["margin"]), (0, .01, .1, .5))), "near": sum(s["near"]), "off": int(sum(s["differ"])),
                       "confidence": sum(s["confidence"]) / tokens, "lift": (pairs * tokens / np.outer(load, load)).max()})
    print(json.dumps({"seconds": time.perf_counter() - start, "peer": peer, "largest_difference_of_a_loss": off,
                      "tokens_that_differ": sum(h["off"] for h in health), "max_violation": [float(h["violation"]) for h in health]}))


main()
