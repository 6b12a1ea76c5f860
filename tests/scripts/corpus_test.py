#!/usr/bin/env python3
"""Every run, model and shipped config of fixtures/ gives exactly the findings that fixtures/corpus.json defends.
Usage: corpus_test.py SOURCE_DIR BINARY"""
import json
import os
import sys

root, binary = sys.argv[1], sys.argv[2]
sys.path.insert(0, os.path.join(root, "fixtures"))
import corpus  # noqa: E402

with open(os.path.join(root, "fixtures/corpus.json"), encoding="utf-8") as f:
    expected = json.load(f)["inputs"]
bad = 0
for path in corpus.inputs(root):
    if path not in expected:
        print(f"{path}: not in fixtures/corpus.json: say what a careful reviewer would find, and why")
        bad += 1
        continue
    got = corpus.audit(root, binary, path)
    want = expected[path]
    if got["findings"] != sorted(want["findings"]) or got["exit_code"] != want["exit_code"]:
        print(f"{path}: exit {got['exit_code']}, {got['findings']}; expected exit {want['exit_code']}, {want['findings']}")
        bad += 1
for path in set(expected) - set(corpus.inputs(root)):
    print(f"{path}: in fixtures/corpus.json, but not there")
    bad += 1
print(f"{len(expected)} inputs, {bad} differences")
sys.exit(1 if bad else 0)
