#!/usr/bin/env python3
"""A trace of many GB is replayed, measured and checked in the memory of one micro-batch: its records name one file, and that file holds
hidden states, a hole that no check reads. Peak resident memory of the process against what one micro-batch takes by its shapes, and
against a trace of four records. Usage: trace_memory_test.py SOURCE_DIR BINARY [--all]"""
import array
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

binary = sys.argv[2]
MB = 1e6
THREADS, EXPERTS, K = 2, 64, 8
bad = 0


def write(folder, tokens, layers, hidden, records):
    """64 random tokens again and again. Returns the size of what all records name."""
    random.seed(3)
    logits = array.array("f", (random.gauss(0, 1) for _ in range(64 * EXPERTS)))
    chosen = array.array("h")
    for t in range(64):
        chosen.extend(sorted(range(EXPERTS), key=lambda e: -logits[t * EXPERTS + e])[:K])
    blobs, header, offset = {"router_logits": ("F32", EXPERTS, logits), "selected_experts": ("I16", K, chosen)}, {}, 0
    for layer in range(layers):
        for name, (dtype, width, block) in blobs.items():
            size = len(block) * block.itemsize * tokens // 64
            header[f"layer.{layer}.{name}"] = {"dtype": dtype, "shape": [tokens, width], "data_offsets": [offset, offset + size]}
            offset += size
    header["layer.0.hidden_states"] = {"dtype": "F32", "shape": [tokens, hidden], "data_offsets": [offset, offset + 4 * tokens * hidden]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.join(folder, "all.safetensors")
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for layer in range(layers):
            for _, _, block in blobs.values():
                f.write(block.tobytes() * (tokens // 64))
        f.truncate(8 + len(text) + offset + 4 * tokens * hidden)
    with open(os.path.join(folder, "trace.json"), "w", encoding="utf-8") as f:
        json.dump({"format": "moe-audit-trace", "version": 1, "packages": {"transformers": "4.57.6"},
                   "model": {"model_type": "olmoe", "hidden_size": hidden, "num_experts": EXPERTS, "top_k": K, "config": {"model_type": "olmoe", "norm_topk_prob": False}},
                   "layers": [{"layer": n} for n in range(layers)]}, f)
    with open(os.path.join(folder, "records.jsonl"), "w", encoding="utf-8") as f:
        for b in range(records):
            f.write(json.dumps({"kind": "micro_batch", "step": b // 4, "micro_batch": b % 4, "file": "all.safetensors", "tokens": tokens,
                                "training": True, "aux_loss": 8.0, "z_loss": 21.0}) + "\n")
    return records * os.path.getsize(path)


def peak(*command):
    """Bytes; the command's exit code must not be 3, nor a signal."""
    process = subprocess.Popen([binary, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}\n{message}")
    return usage.ru_maxrss * 1024


def judge(tokens, layers, hidden, records):
    global bad
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        write(few, tokens, layers, hidden, 4)
        size = write(many, tokens, layers, hidden, records)
        # Of each layer at work 12 float64 values a logit (docs/replay.md: logits, those moved by a rounding, scores and their rounded
        # selves, of one balance loss at a time); the mapped pages of a micro-batch; the program; a kilobyte a record.
        layer, mapped = 8 * tokens * EXPERTS, layers * tokens * (4 * EXPERTS + 2 * K)
        limit = peak("--help") + 8 * MB + THREADS * 12 * layer + mapped + 1000 * records
        for command in (["replay"], ["health"], ["check", "--select", "TR,HE", "--trace"]):
            rest = ["--threads", str(THREADS), "--no-progress", "--device", "cpu"]
            one, got = peak(*command, few, *rest), peak(*command, many, *rest)
            print(f"{command[0]} of {size / 1e9:.1f} GB ({tokens * layers * records / 1e6:.1f} M routed tokens): peak {got / MB:.0f} MB, limit "
                  f"{limit / MB:.0f}; of 4 micro-batches {one / MB:.0f}")
            if got > limit or got > 1.1 * one + 8 * MB + 1000 * records:
                bad += 1
                print("  too much")


judge(2048, 4, 1 << 15, 16)
if "--all" in sys.argv:
    judge(8192, 8, 1 << 15, 200)
sys.exit(1 if bad else 0)
