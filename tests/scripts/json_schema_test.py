#!/usr/bin/env python3
"""Every report the fixtures give is valid against reports/schema.json, and the schema refuses a spoilt one.
Usage: json_schema_test.py SOURCE_DIR BINARY"""
import copy
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
sys.path.insert(0, os.path.join(root, "fixtures"))
import corpus  # noqa: E402

with open(os.path.join(root, "reports/schema.json"), encoding="utf-8") as f:
    schema = json.load(f)
validator = jsonschema.Draft202012Validator(schema)
jsonschema.Draft202012Validator.check_schema(schema)

commands = [path.split() for path in corpus.inputs(root)]
commands += [["fixtures/runs/mixtral-qlora-broken", "--all"], ["no/such/path"]]
bad = 0
for arguments in commands:
    process = subprocess.run([binary, "check", *arguments, "--format", "json", "--static"], cwd=root, capture_output=True, text=True)
    report = json.loads(process.stdout)
    for error in validator.iter_errors(report):
        bad += 1
        print(f"{arguments}: {error.json_path}: {error.message[:200]}")

spoilt = 0
for mutate in (lambda r: r.pop("outcome"), lambda r: r.update(exit_code=7), lambda r: r["checks"].update(extra=1),
               lambda r: r["facts"].update({"x.y": {"value": 1, "origin": "guessed", "source": {"role": "none"}}})):
    report = copy.deepcopy(json.loads(subprocess.run([binary, "check", "fixtures/runs/mixtral-qlora-broken", "--format", "json", "--static"],
                                                     cwd=root, capture_output=True, text=True).stdout))
    mutate(report)
    spoilt += not validator.is_valid(report)
if spoilt != 4:
    print("the schema accepts a spoilt report")
    bad += 1
print(f"{len(commands)} reports, {bad} violations")
sys.exit(1 if bad else 0)
