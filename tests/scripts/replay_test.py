#!/usr/bin/env python3
"""Every recorded run of fixtures/traces/expected.json: what is wrong in it, and nothing else, is named, by `moe-audit replay` and by the
rules. The factors are those that expected.json has from the upstream issues. Usage: replay_test.py SOURCE_DIR BINARY"""
import copy
import json
import os
import subprocess
import sys

root, binary = sys.argv[1], sys.argv[2]
with open(os.path.join(root, "fixtures/traces/expected.json"), encoding="utf-8") as f:
    runs = json.load(f)["runs"]
# What each wrong run is called: (quantity, formula, factor), rule, severity. Runs that are not here have nothing wrong that a replay sees.
NAMES = {
    "ga8-tf4.45.2": (("loss_weight", "G1", ""), "TR006", "warning"),
    "ga8-tf4.48.0": (("loss_weight", "G1", "M"), "TR006", "error"),
    "first-label-tf4.57.6": (("loss_weight", "G0", ""), "TR006", "warning"),
    "ga8-aux-tf4.57.6": (("aux_weight", "A22", "M"), "TR001", "error"),
    "ga8-aux-tf5.23.0": (("aux_weight", "A22", "M"), "TR001", "error"),
    "ddp2-aux-tf4.57.6": (("aux_weight", "A32", "W"), "TR001", "error"),
    "sft-aux-trl0.23.0": (("aux_weight", "A28", "2"), "TR001", "error"),
    "checkpointing-tf4.57.6": (("aux_weight", "A30", "0"), "TR003", "error"),
    "qwen3_moe-aux-tf5.5.4": (("aux_loss", "A8", ""), "TR002", "error"),
    "gpt_oss-aux-tf4.57.6": (("aux_loss", "A9", ""), "TR002", "error"),
    "bias-wrong-way-tf5.23.0": (("bias_step", "B1", ""), "TR011", "error"),
}
# Seen in the config that was recorded, not in a number; adapters are no part of a replay.
SILENT = {"aux-off-tf4.57.6", "lora-missed-tf5.23.0"}
bad = 0


def complain(*what):
    global bad
    bad += 1
    print(*what)


def run(*arguments):
    process = subprocess.run([binary, *arguments, "--format", "json"], cwd=root, capture_output=True, text=True)
    return json.loads(process.stdout), process.returncode


validator = None
try:
    import jsonschema
    with open(os.path.join(root, "reports/replay.schema.json"), encoding="utf-8") as f:
        validator = jsonschema.Draft202012Validator(json.load(f))
except ImportError:
    print("reports are not validated: python3-jsonschema is not installed")

for name, facts in runs.items():
    path = f"fixtures/traces/{name}"
    report, code = run("replay", path)
    if code != 0:
        complain(name, "replay: exit code", code)
    for error in validator.iter_errors(report) if validator else ():
        complain(name, error.json_path, error.message[:200])
    rows = report["quantities"]
    differing = {(r["quantity"], r.get("found", {}).get("formula"), r.get("found", {}).get("factor")) for r in rows if r["outcome"] == "differs"}
    want = {NAMES[name][0]} if name in NAMES else set()
    if differing != want:
        complain(name, "differs in", differing, "not", want)
    for r in rows:
        if r["outcome"] == "agrees" and r["quantity"] not in ("selection", "recomputed_selection", "router_grad") and r["distance"] > 1:
            complain(name, r["quantity"], "agrees at", r["distance"], "bands")
        if "found" in r and r["found"]["fit"] > 1:
            complain(name, r["quantity"], "is named at", r["found"]["fit"], "bands")
    value = {r["quantity"]: r for r in rows}
    if facts.get("aux_factor") is not None and abs(value["aux_weight"]["recorded"] - facts["aux_factor"]) > 1e-5:
        complain(name, "aux_weight", value["aux_weight"]["recorded"], "not", facts["aux_factor"])
    if "wrong" in facts and name not in NAMES and name not in SILENT:
        complain(name, "is wrong by expected.json, and replay_test.py does not say how")

    report, code = run("check", path, "--select", "TR")
    found = sorted((f["rule"], f["severity"]) for f in report["findings"])
    off = value.get("aux_weight", {}).get("missing", "").startswith("no balance loss")  # the coefficient is there, the flag is not
    want = [("TR005", "warning")] * off + ([NAMES[name][1:]] if name in NAMES else [])
    if found != sorted(want):
        complain(name, "rules say", found, "not", want)

if validator:
    good = run("replay", "fixtures/traces/sft-aux-trl0.23.0")[0]
    spoilt = 0
    for mutate in (lambda r: r.pop("quantities"), lambda r: r["quantities"][0].update(outcome="fine"), lambda r: r["quantities"][0].update(extra=1)):
        report = copy.deepcopy(good)
        mutate(report)
        spoilt += not validator.is_valid(report)
    if spoilt != 3:
        complain("the schema accepts a spoilt report")
print(f"{len(runs)} recorded runs, {len(NAMES)} with a fault, {bad} differences")
sys.exit(1 if bad else 0)
