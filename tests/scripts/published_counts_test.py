#!/usr/bin/env python3
"""Every published count of a healthy model (fixtures/expert_counts), whole and as smaller samples of the same loads: no error,
no warning, no dead expert. Usage: published_counts_test.py SOURCE_DIR BINARY"""
import glob
import json
import os
import random
import subprocess
import sys
import tempfile

root, binary = sys.argv[1], sys.argv[2]
bad, layers_seen = 0, 0


def run(*arguments):
    process = subprocess.run([binary, *arguments, "--format", "json", "--no-progress"], capture_output=True, text=True)
    return json.loads(process.stdout)


def judge(path, what, whole):
    global bad
    for finding in run("check", "--trace", path)["findings"]:
        if finding["severity"] != "note" or whole:
            bad += 1
            print(f"{what}: {finding['rule']} {finding['severity']}: {finding['message']}")


files = sorted(glob.glob(os.path.join(root, "fixtures/expert_counts/*.json")))
with tempfile.TemporaryDirectory() as folder:
    for path in files:
        name = os.path.basename(path)
        judge(path, name, whole=True)
        for layer in run("health", path)["layers"]:
            layers_seen += 1
            dead = layer["metrics"]["dead_experts"]
            if dead["outcome"] != "measured" or dead["value"] != 0:
                bad += 1
                print(f"{name}, layer {layer['layer']}: {dead}")
        with open(path, encoding="utf-8") as f:
            counts = json.load(f)
        for share in (100, 1000, 10000):  # choices an expert: an even dozen of samples that chance makes of these loads
            numbers = random.Random(share)
            for draw in range(2):
                sample = dict(counts, layers={})
                for layer, loads in counts["layers"].items():
                    drawn = [0] * len(loads)
                    for expert in numbers.choices(range(len(loads)), weights=loads, k=share * len(loads)):
                        drawn[expert] += 1
                    sample["layers"][layer] = drawn
                place = os.path.join(folder, "counts.json")
                with open(place, "w", encoding="utf-8") as f:
                    json.dump(sample, f)
                judge(place, f"{name}, {share} choices an expert, draw {draw}", whole=False)
print(f"{len(files)} files, {layers_seen} layers, {bad} that should not be")
sys.exit(1 if bad or layers_seen != 39 else 0)
