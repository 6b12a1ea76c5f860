#!/usr/bin/env python3
"""Scaling pairs of fixtures/traces: one ratio a quantity, as upstream and fixtures/oracle have them. Usage: compare_test.py SOURCE_DIR BINARY"""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

root, binary = sys.argv[1], sys.argv[2]
try:
    import jsonschema
    with open(os.path.join(root, "reports/compare.schema.json"), encoding="utf-8") as f:
        validator = jsonschema.Draft202012Validator(json.load(f))
except ImportError:
    validator = None
    print("reports are not validated: python3-jsonschema is not installed")
bad = 0


def complain(*what):
    global bad
    bad += 1
    print(*what)


def compare(a, b, where="fixtures/traces", more=()):
    process = subprocess.run([binary, "compare", os.path.join(where, a), os.path.join(where, b), "--format", "json", *more], cwd=root, capture_output=True, text=True)
    report = json.loads(process.stdout)
    for error in validator.iter_errors(report) if validator else ():
        complain(a, b, error.json_path, error.message[:200])
    return report, process.returncode


# quantity -> (ratio, to within, factor, rule)
SAME = {"cross_entropy": (1, 1e-6, "", None)}
PAIRS = {
    ("ga1-tf4.48.1", "ga8-tf4.48.1"): {"loss": (1, 1e-5, "", None), "cross_entropy_weight": (1, 1e-5, "", None), "grad_norm": (1, 1e-5, "", None),
                                       "router_grad": (1, 1e-5, "", None), "expert_grad": (1, 1e-5, "", None)},
    # 8 times the mean of means, which is 1.0012 times the loss (fixtures/traces/README.md)
    ("ga1-tf4.48.0", "ga8-tf4.48.0"): {"loss": (8 * 1.0012, 1e-3, "M", "TR006"), "cross_entropy_weight": (8 * 1.0012, 1e-3, "M", "TR006"),
                                       "grad_norm": (8, 0.1, "M", "TR006")},
    ("ga8-tf4.48.0", "ga1-tf4.48.0"): {"cross_entropy_weight": (1 / 8 / 1.0012, 1e-4, "M", "TR006")},  # M 8 -> 1: M is 1/8
    ("ga1-tf4.45.2", "ga8-tf4.45.2"): {"cross_entropy_weight": (1.0012, 1e-4, "", None)},
    ("ga1-aux-tf4.57.6", "ga8-aux-tf4.57.6"): {"cross_entropy_weight": (1, 1e-5, "", None), "aux_weight": (8, 1e-5, "M", "TR001")},
    ("aux-on-tf4.57.6", "ddp2-aux-tf4.57.6"): {"cross_entropy_weight": (1, 1e-5, "", None), "aux_weight": (2, 1e-5, "W", "TR001")},
}
# Logs. By hand: the loss at step 1 is 39.3499 / 4.9187 = 8.0000; cross-entropy is of the same batch; recomputed-twice prints each loss twice.
LOGS = {
    ("plain-ga1-tf4.48.0", "plain-ga8-tf4.48.0"): {"loss": (8, 1e-3, "M", "GA001"), "eval_loss": (1, 1e-2, "", None)},
    ("plain-ga1-tf4.48.0", "plain-ga8-tf4.48.1"): {"loss": (1, 1e-4, "", None), "grad_norm": (1, 1e-3, "", None)},
    ("plain-ga8-tf4.48.1", "plain-ga8-tf4.48.0"): {"loss": (8, 1e-3, "M", "GA001")},  # nothing differs but the release
    ("ga1-tf4.57.6/metrics.jsonl", "ga8-tf4.57.6/metrics.jsonl"): {"cross_entropy": (1, 1e-6, "", None), "aux_weight": (8, 0.02, "M", "LG004")},
    ("sft-state-trl0.23.1", "sft-state-ga8-trl0.23.1"): {"aux_weight": (8, 0.05, "M", "LG004")},  # no cross-entropy in these
    ("sft-trl0.23.1/metrics.jsonl", "sft-trl0.23.0/metrics.jsonl"): {"cross_entropy": (1, 1e-6, "", None), "aux_weight": (2, 0.02, "2", "LG004")},
    ("megatron/recomputed-once.log", "megatron/recomputed-twice.log"): {"cross_entropy": (1, 1e-6, "", None), "aux_loss": (2, 1e-6, "recompute", "LG006")},
}
for (a, b), wanted in {**PAIRS, **LOGS}.items():
    report, code = compare(a, b, "fixtures/logs" if (a, b) in LOGS else "fixtures/traces")
    rows = {r["quantity"]: r for r in report["quantities"]}
    if code != 0 or "not_comparable" in report:
        complain(a, b, "exit code", code, report.get("not_comparable"))
    for quantity, (ratio, within, factor, rule) in {**({} if (a, b) in LOGS else SAME), **wanted}.items():
        r = rows.get(quantity, {})
        if not r or abs(r["ratio"] - ratio) > within or r["factor"] != factor or r.get("rule") != rule:
            complain(a, b, quantity, r, "not", (ratio, within, factor, rule))
for a, b, why in (("ga8-tf4.48.1", "ga8-tf4.48.0", "alike"), ("ga1-aux-tf4.57.6", "aux-on-tf4.57.6", "labels"), ("ga1-tf4.48.1", "none", "none could not be opened")):
    report, code = compare(a, b)
    if code != 2 or why not in report.get("not_comparable", ""):
        complain(a, b, "should be no pair:", report.get("not_comparable"), code)
report, code = compare("ga1-aux-tf4.57.6", "ga8-aux-tf5.23.0")  # the same routers and sequences, other weights beside
if "other weights or data" not in report.get("note", "") or "note" in compare("ga1-tf4.48.1", "ga8-tf4.48.1")[0]:
    complain("weights that differ:", report)
with tempfile.TemporaryDirectory() as folder:
    b = os.path.join(folder, "other")
    shutil.copytree(os.path.join(root, "fixtures/traces/ga8-tf4.48.1"), b)
    with open(os.path.join(b, "step0_rank0.safetensors"), "r+b") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        f.seek(8 + length + json.loads(f.read(length))["layer.1.router_weight"]["data_offsets"][0])
        f.write(struct.pack("<64f", *[1.0] * 64))
    report, code = compare("ga1-tf4.48.1", b)
    if code != 2 or "their routers differ before that step (layer 1)" not in report.get("not_comparable", ""):
        complain("routers that differ:", report, code)
# The experts' gradients averaged over the ranks that hold an expert instead of all: 4 times as large (G11).
with tempfile.TemporaryDirectory() as folder:
    b = os.path.join(folder, "ep4")
    shutil.copytree(os.path.join(root, "fixtures/traces/ga1-tf4.48.1"), b)
    with open(os.path.join(b, "trace.json"), encoding="utf-8") as f:
        head = json.load(f)
    head["training"]["expert_parallel_size"] = 4
    with open(os.path.join(b, "trace.json"), "w", encoding="utf-8") as f:
        json.dump(head, f)
    with open(os.path.join(b, "step0_rank0.safetensors"), "r+b") as f:
        data = bytearray(f.read())
        length = struct.unpack_from("<Q", data)[0]
        for name, t in json.loads(data[8:8 + length]).items():
            if name.endswith("expert_grad_norm"):
                kind = {"F32": "f", "F64": "d"}[t["dtype"]]
                for at in range(8 + length + t["data_offsets"][0], 8 + length + t["data_offsets"][1], struct.calcsize(kind)):
                    struct.pack_into("<" + kind, data, at, 4 * struct.unpack_from("<" + kind, data, at)[0])
        f.seek(0)
        f.write(data)
    report, code = compare("ga1-tf4.48.1", b)
    rows = {r["quantity"]: r for r in report["quantities"]}
    if code != 0 or abs(rows["expert_grad"]["ratio"] - 4) > 1e-5 or rows["expert_grad"]["factor"] != "EP" or rows["grad_norm"]["factor"] != "":
        complain("expert_grad", code, report)
report, code = compare("ga1-tf4.57.6/metrics.jsonl", "plain-ga8-tf4.48.0/trainer_state.json", "fixtures/logs", ["--set-a", "M=1,W=1", "--set-b", "M=8,W=4"])
if report["differs"] != ["M 1 -> 8", "W 1 -> 4", "S 8 -> 1"]:
    complain("settings of the command line:", report["differs"])
report, code = compare("ga1-tf4.57.6", "ga8-tf4.57.6", "fixtures/logs")  # folders whose log has a name of its own
if code != 2 or "ga1-tf4.57.6 holds no trainer_state.json" not in report["not_comparable"]:
    complain("folders without a known log:", report)
print(f"{len(PAIRS) + len(LOGS)} pairs, {bad} differences")
sys.exit(1 if bad else 0)
