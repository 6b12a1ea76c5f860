#!/usr/bin/env python3
"""Every formula of the catalogue that a trace can show is named: synthetic traces of fixtures/make/synthetic_traces.py, which shares no code
with what is tested, for two shapes and two seeds each in float32, and once with logits in bfloat16, where misses are published. The result is docs/naming.json, from which docs/generate.py makes the table of
docs/detection.md. Usage: naming_test.py SOURCE_DIR BINARY [--write]"""
import collections
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile

root, binary = sys.argv[1], sys.argv[2]
sys.path.insert(0, os.path.join(root, "fixtures/make"))
import synthetic_routing  # noqa: E402
import synthetic_traces  # noqa: E402

MAKERS = (synthetic_traces, synthetic_routing)
ROWS = [row for maker in MAKERS for row in maker.rows()]
MAKER = [maker for maker in MAKERS for _ in maker.rows()]
RIGHT = "right"
# What a wrong quantity makes differ with it: other weights have another sum, and an epsilon in the scores shows in both.
ALONG = {"selection": {"weights"}, "weights": {"selection", "weight_sum"}, "aux_loss": {"weight_sum"}}


def replay(job):
    index, shape, seed, narrow = job
    with tempfile.TemporaryDirectory() as folder:
        MAKER[index].write(ROWS[index], shape, seed, folder, narrow)
        process = subprocess.run([binary, "replay", folder, "--format", "json"], capture_output=True, text=True)
    return job, json.loads(process.stdout)["quantities"] if process.returncode == 0 else None


def main():
    jobs = [(i, shape, seed) for i in range(len(ROWS)) for shape in synthetic_traces.SHAPES for seed in (0, 1)]
    jobs = [(*job, False) for job in jobs] + [(i, "A", 0, True) for i in range(len(ROWS))]
    narrow_named = collections.defaultdict(collections.Counter)
    bad, named, also, tried = 0, collections.defaultdict(collections.Counter), collections.defaultdict(set), collections.Counter()
    with concurrent.futures.ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for (index, shape, seed, narrow), quantities in pool.map(replay, jobs, chunksize=8):
            id, quantity, settings, _ = ROWS[index]
            where = f"{id or RIGHT} {quantity} {settings} shape {shape} seed {seed}"
            row = f"{quantity} {id or RIGHT}"
            tried[row] += not narrow
            if quantities is None:
                bad += 1
                print(where, ": not replayed")
                continue
            mine = [q for q in quantities if q["quantity"] == quantity]
            differ = [q for q in mine if q["outcome"] == "differs"]
            found = [q["found"]["formula"] for q in differ if "found" in q] or ([] if differ else [q["found"]["formula"] for q in mine if "found" in q])
            others = {i for q in (differ or mine) for i in re.findall(r"\b[ABCGWXZ]\d+\b", q.get("found", {}).get("also", ""))}
            name = found[0] if found else ("none" if differ else RIGHT if mine and any(q["compared"] for q in mine) else "not compared")
            if name == "A0" or (not name and not differ):  # another of the known conventions
                name = RIGHT
            right = name == RIGHT if not id else name == id or id in others
            if narrow:  # a band of 1e-2: what is right must stay right, a name may be missed
                narrow_named[row][RIGHT if right and (not id) else "named" if name == id else "among others" if right else
                                  "within the band" if name == RIGHT else name] += 1
                if right or id:
                    continue
            named[row][name] += not narrow
            also[row] |= others - {id}
            if not right:
                bad += 1
                print(f"{where}: named {name}", "" if not others else f"or {sorted(others)}")
            # What is right everywhere else must be called right: a wrong balance loss is no wrong z-loss.
            stray = {q["quantity"] for q in quantities if q["outcome"] == "differs"} - {quantity, *ALONG.get(quantity, ())}
            if stray:
                bad += 1
                print(f"{where}: also differs in {sorted(stray)}")
    result = {"what": "Synthetic traces (fixtures/make/synthetic_traces.py), what is wrong in them, and what `moe-audit replay` calls it. Written by "
                      "tests/scripts/naming_test.py --write.",
              "shapes": synthetic_traces.SHAPES,
              "rows": {row: {"traces": tried[row], "named": dict(sorted(named[row].items())), "also": sorted(also[row]), "bfloat16": dict(sorted(narrow_named[row].items()))} for row in sorted(tried)}}
    path = os.path.join(root, "docs/naming.json")
    text = json.dumps(result, indent=1) + "\n"
    if "--write" in sys.argv:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
    else:
        with open(path, encoding="utf-8") as f:
            if f.read() != text:
                bad += 1
                print("docs/naming.json is not what was measured: run tests/scripts/naming_test.py SOURCE_DIR BINARY --write, then ./run docs")
    print(f"{len(jobs)} synthetic traces of {len(ROWS)} rows, {bad} differences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
