#!/usr/bin/env python3
"""Health reports of the fixtures are valid against reports/health.schema.json, recorded traces against
reports/trace.schema.json, and both refuse what is spoilt. Usage: trace_schema_test.py SOURCE_DIR BINARY"""
import copy
import glob
import json
import os
import subprocess
import sys

try:
    import jsonschema
except ImportError:
    print("SKIPPED: python3-jsonschema is not installed")
    sys.exit(77)

root, binary = sys.argv[1], sys.argv[2]
bad = 0


def schema(name):
    with open(os.path.join(root, "reports", name), encoding="utf-8") as f:
        text = json.load(f)
    jsonschema.Draft202012Validator.check_schema(text)
    return text


def complain(what, validator, value):
    global bad
    for error in validator.iter_errors(value):
        bad += 1
        print(f"{what}: {error.json_path}: {error.message[:200]}")


def health(*arguments):
    process = subprocess.run([binary, "health", *arguments, "--format", "json"], cwd=root, capture_output=True, text=True)
    return json.loads(process.stdout), process.returncode


report_validator = jsonschema.Draft202012Validator(schema("health.schema.json"))
traces = sorted(glob.glob("fixtures/expert_counts/*.json", root_dir=root)) + sorted(glob.glob("fixtures/traces/*", root_dir=root))
traces += [os.path.dirname(p) for p in glob.glob("fixtures/**/trace.json", root_dir=root, recursive=True) if not p.startswith("fixtures/traces/")]
traces = [t for t in traces if t.startswith("fixtures/expert_counts/") or os.path.isdir(os.path.join(root, t))]
for trace in traces:
    report, code = health(trace)
    complain(trace, report_validator, report)
    if code != 0 or not report["layers"]:
        bad += 1
        print(f"{trace}: exit code {code}, {len(report['layers'])} layers, {report['problems']}")
    for layer in report["layers"]:  # a healthy model is not said to have dead experts, nor is any trace of some hundred tokens
        dead = layer["metrics"]["dead_experts"]
        if dead["outcome"] == "measured" and dead["value"] > 0:
            bad += 1
            print(f"{trace}, layer {layer['layer']}: {dead}")
for arguments in (["no/such/trace"], ["fixtures/expert_counts/olmoe-1b-7b_c4.json", "--expert-parallel", "8", "--hidden-size", "2048"],
                  ["fixtures/expert_counts/olmoe-1b-7b_c4.json", "--expert-parallel", "7"],
                  ["fixtures/expert_counts/mixtral-8x7b_c4.json", "--device-speeds", "1,1,0.5,1"],
                  ["fixtures/traces/megatron-router-trace", "--co-activation", "--against", "fixtures/traces/megatron-router-trace"]):
    complain(arguments, report_validator, health(*arguments)[0])

good = health("fixtures/traces/megatron-router-trace")[0]
for mutate in (lambda r: r.pop("layers"), lambda r: r["layers"][0]["metrics"].update(x={"value": 1}), lambda r: r["layers"][0].update(load=[-1]),
               lambda r: r["layers"][0]["metrics"].update(x={"value": 1, "outcome": "cannot_tell"}), lambda r: r.update(outcome="passed")):
    spoilt = copy.deepcopy(good)
    mutate(spoilt)
    if report_validator.is_valid(spoilt):
        bad += 1
        print("the schema of the health report accepts a spoilt one")

trace_schema = schema("trace.schema.json")
head_validator = jsonschema.Draft202012Validator(trace_schema)
record_validator = jsonschema.Draft202012Validator({"$defs": trace_schema["$defs"], "$ref": "#/$defs/record"})
recorded = glob.glob("fixtures/**/trace.json", root_dir=root, recursive=True)
for path in recorded:
    with open(os.path.join(root, path), encoding="utf-8") as f:
        complain(path, head_validator, json.load(f))
    with open(os.path.join(root, os.path.dirname(path), "records.jsonl"), encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            complain(f"{path}, record {number}", record_validator, json.loads(line))
for spoilt in ({"format": "moe-audit-trace", "version": 2}, {"format": "moe-audit-trace", "version": 1, "layers": [{}]},
               {"format": "moe-audit-trace", "version": 1, "training": {"world_size": "two"}}):
    if head_validator.is_valid(spoilt):
        bad += 1
        print(f"the schema accepts {spoilt}")
for spoilt in ({"kind": "step"}, {"kind": "micro_batch", "step": 0}, {"kind": "micro_batch", "step": 0, "micro_batch": 0, "file": "x.pt"}):
    if record_validator.is_valid(spoilt):
        bad += 1
        print(f"the schema accepts {spoilt}")
print(f"{len(traces)} traces, {len(recorded)} of them recorded, {bad} violations")
sys.exit(1 if bad else 0)
