#!/usr/bin/env python3
"""The factors of fixtures/oracle/accumulation.json (gradients of real runs against a reference) derived again from traces that the recorder
made of the same runs, by `moe-audit replay --format json` alone: how often the cross-entropy and the balance loss count, and by which
formula the latter was computed. Rows without a trace are counted, with the reason. Usage: multipliers_test.py SOURCE_DIR BINARY"""
import collections
import json
import os
import subprocess
import sys
import tarfile
import tempfile

root, binary = sys.argv[1], sys.argv[2]
oracle = os.path.join(root, "fixtures/oracle")
bad = 0
KEY = ("trainer", "trl", "transformers", "model_type", "peft_wrapped", "world_size", "variant", "gradient_accumulation_steps")
FORMULAS = {"": "hf", "A8": "double_softmax", "A9": "topk_scores"}


def complain(*what):
    global bad
    bad += 1
    print(*what)


def key(row):
    average = row.get("average_tokens_across_devices") if row["world_size"] != 1 else None  # shows where there are ranks
    return tuple(str(v if v is not None else "") for v in [*(row.get(k) for k in KEY), average])


def derived(folder):
    """(factor of the cross-entropy, times the balance loss counts in all, its formula) as the replay has them."""
    process = subprocess.run([binary, "replay", folder, "--format", "json", "--device", "cpu"], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{folder}: exit code {process.returncode}\n{process.stdout[-2000:]}{process.stderr}")
    rows = {r["quantity"]: r for r in json.loads(process.stdout)["quantities"]}
    ce, aux, loss = rows.get("loss_weight", {}), rows.get("aux_weight", {}), rows.get("aux_loss", {})
    formula = FORMULAS.get(loss.get("found", {}).get("formula", "")) if loss.get("outcome") == "differs" else "hf" if loss.get("compared") else None
    # aux_weight is relative to the cross-entropy's factor, where that has a name.
    scale = ce.get("found", {}).get("factor_value", 1.0)
    return ce.get("recorded"), aux["recorded"] * scale if aux.get("compared") else 0.0, formula


with open(os.path.join(oracle, "accumulation.json"), encoding="utf-8") as f:
    table = {key(row): row for row in json.load(f)["derived"]}
partly = []
missing = {k: "not recorded: " + ("PEFT" if r["peft_wrapped"] else "gradient checkpointing" if "checkpointing" in r.get("variant", "") else
                                  "two ranks" if r["world_size"] == 2 else r["model_type"]) for k, r in table.items()}
checked = collections.Counter()
with tempfile.TemporaryDirectory() as folder:
    with tarfile.open(os.path.join(oracle, "traces.tar.xz")) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    with open(os.path.join(folder, "runs.jsonl"), encoding="utf-8") as f:
        runs = {run["name"]: run for run in map(json.loads, f)}
    for name, run in runs.items():
        k = key(run)
        want = table.get(k)
        if want is None:
            complain(name, "is no row of the table")
            continue
        if "error" in run:
            missing[k] = "the run fails: " + run["error"].split("\n")[0]
            if want.get("aux_multiplier"):
                complain(name, missing[k], "and the table has a factor")
            continue
        ce, aux, formula = derived(os.path.join(folder, name))
        missing.pop(k, None)
        checked[run["model_type"]] += 1
        # phimoe draws its routing at random in training (sparsemixer): the table's gradients of it are noisy, the weights in a trace are not.
        # "SFT defaults" train in bfloat16, and so does the table's gradient of a term that is small beside the rest.
        slack = 0.06 if run["model_type"] == "phimoe" or run["variant"] == "SFT defaults" else 5e-3
        near = lambda a, b: a is not None and b is not None and abs(a - b) <= slack * max(abs(a), abs(b))
        if ce is None and run["trainer"] == "SFTTrainer":  # TRL computes its own loss: the recorder sees no gradient of the model's
            partly.append(name)
        elif not near(ce, want["ce_factor_vs_reference"]):
            complain(name, "cross-entropy", ce, "table", want["ce_factor_vs_reference"])
        if want["aux_formula"] == "none":
            if aux != 0:
                complain(name, "balance loss", aux, "table: no gradient")
        else:
            by = {"hf": "", "double_softmax": "_double_softmax", "topk_scores": "_topk_scores"}.get(want["aux_formula"])
            times = want.get("aux_multiplier" + by) if by is not None else None  # else: phimoe's noise
            with open(os.path.join(folder, name, "trace.json"), encoding="utf-8") as f:
                coefficient = json.load(f)["coefficients"]["router_aux_loss_coef"]
            if times is not None and "coefficient_used" in want:  # TRL 1.7 to 1.13 put their own in place of the model's
                times *= want["coefficient_used"] / coefficient
            if times is not None and not near(aux, times):
                complain(name, "balance loss", aux, "table", times)
            if by is not None and formula != want["aux_formula"]:
                complain(name, "formula", formula, "table", want["aux_formula"])
print(f"{sum(checked.values())} of {len(table)} rows derived from traces:", ", ".join(f"{m} {n}" for m, n in sorted(checked.items())))
print(f"  of these {len(partly)} of TRL by their balance loss alone: it computes the cross-entropy itself, so the trace has no gradient of the model's")
for reason, n in collections.Counter(missing.values()).most_common():
    print(f"  without a trace: {n}, {reason}")
sys.exit(1 if bad else 0)
