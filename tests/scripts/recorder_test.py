#!/usr/bin/env python3
"""The recorder changes nothing of a run and records what the model did, on tiny real models.
Usage: recorder_test.py SOURCE_DIR [BINARY [FAMILY...]]

Needs torch, safetensors and transformers: of this Python, or of the one that MOE_AUDIT_PYTHON names; without them exit 77.
Where peft, accelerate or trl is missing, what needs them is left out and said."""
import glob
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

missing = [m for m in ("torch", "safetensors", "transformers") if importlib.util.find_spec(m) is None]
if missing:
    other = os.environ.get("MOE_AUDIT_PYTHON")
    if other and not os.environ.get("MOE_AUDIT_PYTHON_TRIED"):
        os.execve(other, [other, *sys.argv], {**os.environ, "MOE_AUDIT_PYTHON_TRIED": "1"})
    print(f"skipped: {sys.executable} has no {', '.join(missing)} (MOE_AUDIT_PYTHON names a Python that has)")
    sys.exit(77)

root = os.path.abspath(sys.argv[1])
sys.path[:0] = [os.path.join(root, "integrations/python"), os.path.join(root, "fixtures/make")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import FAMILIES, Tokens, build, collate, exists, tokenizer, transformers  # noqa: E402
from moe_audit_recorder import MoeAuditCallback, Recorder, find_routers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

transformers.logging.set_verbosity_error()
TRAINER = importlib.util.find_spec("accelerate") is not None
PEFT = importlib.util.find_spec("peft") is not None
TRL = importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None
MASKS = ("switch_transformers", "nllb_moe")  # encoder and decoder, and routers that return masks: less is recorded
failures, done = [], []


def check(good, what):
    done.append(what)
    if not good:
        failures.append(what)
        print(f"FAILED: {what}", flush=True)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def small(family, **over):
    own = {} if family in ("dbrx", "switch_transformers", "nllb_moe", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text") else {"num_hidden_layers": 2}
    if family in ("jamba", "llama4_text"):  # every second layer has experts
        own = {"num_hidden_layers": 4}
    return build(family, **{**own, **over}).train()


def with_balance_loss(family):
    return small(family, **({} if family in ("deepseek_v3", "deepseek_v2") else {"output_router_logits": True}))


def records(folder, kind="micro_batch", file="records.jsonl"):
    with open(os.path.join(folder, file), encoding="utf-8") as f:
        return [r for r in map(json.loads, f) if r["kind"] == kind]


def tensors(folder, record):
    return load_file(os.path.join(folder, record["file"]))


def numbers():
    return torch.get_rng_state(), random.getstate()


# --- what is recorded is what the model did ------------------------------------------------------------------------------

def one_step(family, folder, rows=3, **options):
    """One optimizer step of two micro-batches, with what the experts were given seen by hooks of this test."""
    model = with_balance_loss(family)
    seen = {}
    for layer in find_routers(model):
        experts = getattr(layer.block, "experts", None)
        if experts is not None and not isinstance(experts, torch.nn.ModuleList):
            experts.register_forward_pre_hook(lambda m, a, n=layer.number: seen.setdefault(n, []).append([t.detach().clone() for t in a]))
        for e, expert in enumerate(experts if isinstance(experts, torch.nn.ModuleList) else []):
            expert.register_forward_pre_hook(lambda m, a, n=layer.number, e=e: seen.setdefault(n, []).append((e, a[0].shape[-2])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, folder, optimizer=optimizer, steps=[0], **options)
    outputs = []
    for b in range(2):
        out = model(**collate(Tokens(rows, (12, 20), seed=b).rows))
        (out.loss / 2).backward()
        outputs.append(out)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    recorder.close()
    check(not torch.overrides._get_current_function_mode_stack(), f"{family}: no mode is left behind")
    left = [h for m in model.modules() for h in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] if "Recorder" in repr(h)]
    check(not left and not recorder.handles, f"{family}: no hook is left {left}")
    return recorder.layers, seen, outputs, grads, before


def what_was_routed(family):
    with tempfile.TemporaryDirectory() as folder:
        layers, seen, outputs, grads, before = one_step(family, folder)
        check(bool(layers), f"{family}: routers found")
        rows = records(folder)
        with open(os.path.join(folder, "trace.json"), encoding="utf-8") as f:
            coefficient = json.load(f)["coefficients"]["router_aux_loss_coef"] or 0
        check([r["micro_batch"] for r in rows] == [0, 1], f"{family}: two micro-batches")
        step = records(folder, "step")
        check(len(step) == 1, f"{family}: one step")
        applied = tensors(folder, step[0])
        total = torch.stack([g.double().norm() for g in grads.values()]).norm()
        check(abs(step[0]["applied_grad_norm"] / total - 1) < 1e-6, f"{family}: gradient norm")
        check(step[0]["clip_coefficient"] is not None and abs(step[0]["clip_coefficient"] - 1) < 1e-12, f"{family}: nothing was clipped")
        for r, out in zip(rows, outputs):
            check(r["returned_loss"] == out.loss.item() and r["loss"] == (out.loss / 2).item() and r["loss_grad"] == 0.5,
                  f"{family}: losses of micro-batch {r['micro_batch']}")
            t = tensors(folder, r)
            if len(out.get("router_logits") or ()) == len(layers):
                for layer, theirs in zip(layers, out.router_logits):
                    p = f"layer.{layer.number}."
                    mine = t.get(p + "returned_router_logits", t[p + "router_logits"])
                    check(same(mine, theirs.detach().reshape(mine.shape)), f"{family}: logits of layer {layer.number} as the model returned them")
            if family in MASKS:
                continue
            per_label = t["token_loss"][t["label_mask"].bool()].double().mean().item()
            without = out.loss.item() - coefficient * (r["aux_loss"] or 0)
            check(abs(per_label - without) < 2e-5, f"{family}: mean token loss {per_label} is the model's {without}")
        for layer in layers:
            if layer.for_images:
                continue  # there are none
            p = f"layer.{layer.number}."
            mine = [tensors(folder, r) for r in rows]
            name = f"{layer.name}.{layer.weight_name}"
            check(same(applied[p + "router_weight"], before[name]) and same(applied[p + "router_grad"], grads[name]),
                  f"{family}: weight and gradient of {name}")
            if family in MASKS:
                continue
            counts = sum(t[p + "tokens_per_expert"] for t in mine)
            chosen = torch.cat([t[p + "selected_experts"] for t in mine]).reshape(-1)
            check(torch.equal(torch.bincount(chosen, minlength=layer.num_experts), counts), f"{family}: counts")
            calls = seen.get(layer.number, [])
            if calls and isinstance(calls[0], tuple):  # a list of experts, each called with its tokens
                got = torch.zeros(layer.num_experts, dtype=torch.int64)
                for e, n in calls:
                    got[e] += n
                check(torch.equal(got, counts), f"{family}: layer {layer.number}: experts were called with as many tokens")
            elif calls and len(calls[0]) == 3:  # hidden states, indices and weights: as the experts used them
                for t, call in zip(mine, calls):
                    ids, weights = (call[1], call[2]) if not call[1].is_floating_point() else (call[2], call[1])
                    check(torch.equal(t[p + "selected_experts"].long(), ids.long()), f"{family}: layer {layer.number}: indices as the experts got them")
                    got = weights if weights.shape == ids.shape else weights.gather(1, ids)
                    check(torch.equal(t[p + "routing_weights"].double(), got.double()), f"{family}: layer {layer.number}: weights as the experts got them")
            # The logits' gradient makes the router's, whatever the loss was made of.
            check(p + "logits_grad" in mine[0], f"{family}: gradient of the logits")


def output_of_the_block(family="mixtral"):
    """Hidden states, selection and weights give the block's own output again."""
    with tempfile.TemporaryDirectory() as folder:
        model = small(family)
        results = {}
        layers = find_routers(model)
        for layer in layers:
            layer.block.register_forward_hook(lambda m, a, o, n=layer.number: results.update({n: (o[0] if isinstance(o, tuple) else o).detach()}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        recorder = Recorder(model, folder, optimizer=optimizer, steps=[0], hidden_states=True)
        model(**collate(Tokens(2, (12, 20)).rows)).loss.backward()
        optimizer.step()
        recorder.close()
        t = tensors(folder, records(folder)[0])
        for layer in layers:
            p = f"layer.{layer.number}."
            x, ids, weights = t[p + "hidden_states"], t[p + "selected_experts"], t[p + "routing_weights"]
            with torch.no_grad():
                if isinstance(layer.block.experts, torch.nn.ModuleList):
                    y = torch.stack([sum(w * layer.block.experts[e](x[i:i + 1])[0] for e, w in zip(ids[i].tolist(), weights[i])) for i in range(len(x))])
                else:
                    y = layer.block.experts(x, ids, weights)
            want = results[layer.number].reshape(y.shape)
            check((y - want).abs().max() < 1e-5 * want.abs().max() + 1e-7, f"{family}: layer {layer.number}: the block's output from what was recorded")
            router = torch.nn.functional.linear(x, layer.weight())
            check((router - t[p + "router_logits"]).abs().max() < 1e-5, f"{family}: layer {layer.number}: hidden states are the router's input")


def routers_out_of_their_block():
    """JetMoE's attention calls its router outside the forward of its experts; Gemma 4 repeats a block's forward without the block's hooks."""
    for family, kw in (("jetmoe", {}), ("gemma4_text", {"gradient_checkpointing": True})):
        if not exists(family):
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = build(family).train()
            if kw:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            recorder = Recorder(model, folder)
            model(**collate(Tokens(2, (12, 12)).rows)).loss.backward()
            recorder.close()
            t = tensors(folder, records(folder)[0])
            wanted = ["router_logits", "logits_grad", "selected_experts", "routing_weights"] + ["recomputed_selected_experts"] * len(kw)
            for layer in recorder.layers:
                missing = [w for w in wanted if f"layer.{layer.number}.{w}" not in t]
                check(not missing, f"{family}: {layer.name}: {missing} not recorded")
                p = f"layer.{layer.number}."
                if kw and not missing:
                    check(same(t[p + "recomputed_selected_experts"], t[p + "selected_experts"]), f"{family}: {layer.name}: the second forward's choice")
            said = [str(w.message) for w in said if "moe_audit_recorder" in str(w.message)]
            check(len(recorder.layers) == (4 if family == "jetmoe" else 2) and not said, f"{family}: every router is recorded {said}")
            check(not torch.overrides._get_current_function_mode_stack(), f"{family}: no mode is left behind")


def two_routers_in_a_layer(family="ernie4_5_vl_moe"):
    """One for text, one for the tokens of images: each is recorded with the tokens that it saw, and together they are what the model returns."""
    if not exists(family):
        return
    for images in (True, False):
        for wanted in (None, 20):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model = build(family, num_hidden_layers=3, output_router_logits=True).train()
                recorder = Recorder(model, folder, max_tokens=wanted)
                batch = collate(Tokens(3, (12, 20)).rows)
                kinds = torch.zeros_like(batch["input_ids"])
                kinds[::2, 2::3] = int(images)
                out = model(**batch, moe_mm_token_type_ids=kinds)
                out.loss.backward()
                recorder.close()
                t = tensors(folder, records(folder)[0])
                check([layer.number for layer in recorder.layers] == [1, 4, 2, 5], f"{family}: {[(layer.number, layer.name) for layer in recorder.layers]}")
                kinds = kinds.reshape(-1) if wanted is None else kinds.reshape(-1)[t["sampled"].long()]
                for n in (1, 2):
                    for number, kind in ((n, 0), (n + 3, 1)):
                        p, rows = f"layer.{number}.", (kinds == kind).nonzero().reshape(-1)
                        all_of_them = kind == 0 and not images
                        check((p + "seen" not in t) if all_of_them else torch.equal(t[p + "seen"].long(), rows), f"{family}: {p}seen")
                        named = [k for k in ("router_logits", "selected_experts", "routing_weights", "logits_grad") if p + k in t]
                        check(len(named) == (4 if len(rows) else 0), f"{family}: of {p} {named}")
                        theirs = out.router_logits[n - 1].detach()
                        theirs = theirs if wanted is None else theirs[t["sampled"].long()]
                        if len(rows):
                            check(same(t[p + "router_logits"], theirs[rows]), f"{family}: {p}router_logits are the rows of its tokens")
                            check(all(len(t[p + k]) == len(rows) for k in named), f"{family}: rows of {p}")
                said = [str(w.message) for w in said if "moe_audit_recorder" in str(w.message)]
                check(not said, f"{family}: no warning {said}")


def router_without_gradient(family="mixtral"):
    """A router whose every output is detached gets no gradient at all: recorded as 0."""
    with tempfile.TemporaryDirectory() as folder:
        model = small(family)
        layers = find_routers(model)
        for layer in layers:
            layer.router.register_forward_hook(lambda m, a, o: tuple(t.detach() for t in o) if isinstance(o, tuple) else o.detach())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        recorder = Recorder(model, folder, optimizer=optimizer, steps=[0])
        model(**collate(Tokens(2, (12, 12)).rows)).loss.backward()
        optimizer.step()
        recorder.close()
        t = tensors(folder, records(folder, "step")[0])
        for layer in layers:
            grad = t.get(f"layer.{layer.number}.router_grad")
            check(grad is not None and grad.shape == layer.weight().shape and not grad.any(), f"{layer.name}: no gradient is a gradient of 0")


def no_router():
    """Adapters of experts beside a module whose class has "MoeGate" in its name, or another matrix, make no router of it."""
    if not exists("qwen3_5_moe_text"):
        return
    import peft
    model = peft.get_peft_model(build("qwen3_5_moe_text"), peft.LoraConfig(r=8, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]))
    names = [layer.name for layer in find_routers(model)]
    check(len(names) == 3 and all(n.endswith("mlp.gate") for n in names), f"qwen3_5_moe_text with LoRA: routers {names}")


# --- nothing of the run changes ------------------------------------------------------------------------------------------

def trained(family, folder, callback, lora=None, over=(), sft=False, **args):
    torch.manual_seed(5)
    random.seed(5)
    model = small(family, **{"attention_dropout": 0.1, "output_router_logits": True, "router_aux_loss_coef": 0.01, **dict(over)})
    if lora:
        import peft
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    known = transformers.TrainingArguments.__dataclass_fields__
    args = {"output_dir": os.path.join(folder, "out"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3,
            "learning_rate": 0.01, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
            "remove_unused_columns": False, "disable_tqdm": True, "seed": 7, **args}
    callbacks = [callback] if callback else []
    if sft:
        import datasets
        import trl
        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_dict({"input_ids": [r["input_ids"] for r in Tokens(16, (10, 16)).rows]})
        trainer = trl.SFTTrainer(model=model, args=trl.SFTConfig(**{**args, "remove_unused_columns": True, "dataset_num_proc": None}),
                                 processing_class=tokenizer(), train_dataset=rows, callbacks=callbacks)
    else:
        trainer = transformers.Trainer(model=model, args=transformers.TrainingArguments(**{k: v for k, v in args.items() if k in known}),
                                       train_dataset=Tokens(16, (10, 16)), eval_dataset=Tokens(4, (10, 16)), data_collator=collate, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    log = [{k: v for k, v in r.items() if "runtime" not in k and "per_second" not in k} for r in trainer.state.log_history]
    return log, {n: p.detach() for n, p in model.state_dict().items()}, numbers()


def nothing_changes(name, family, recorded=2, **kw):
    with tempfile.TemporaryDirectory() as folder:
        plain = trained(family, folder, None, **kw)
        trace = os.path.join(folder, "trace")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            watched = trained(family, folder, MoeAuditCallback(trace, steps=[0, 1], hidden_states=True, evaluation=True), **kw)
        said = [str(w.message) for w in said if "moe_audit_recorder" in str(w.message)]
        check(not said, f"{name}: no warning {said}")
        check(plain[0] == watched[0], f"{name}: every logged number is the same")
        check(plain[1].keys() == watched[1].keys() and all(same(plain[1][k], watched[1][k]) for k in plain[1]), f"{name}: every parameter bit for bit")
        check(torch.equal(plain[2][0], watched[2][0]) and plain[2][1] == watched[2][1], f"{name}: the random states are the same")
        check(torch.autograd.backward.__module__ == "torch.autograd" and not hasattr(torch.autograd.backward, "__wrapped__"), f"{name}: backward is torch's")
        with open(os.path.join(trace, "trace.json"), encoding="utf-8") as f:
            static = json.load(f)
        rows, steps = records(trace), records(trace, "step")
        check(len([r for r in rows if r["training"]]) == 2 * recorded and [s["step"] for s in steps] == list(range(recorded)), f"{name}: {recorded} steps of two micro-batches")
        logged = [r for r in watched[0] if "grad_norm" in r]
        for s in steps:
            check(s["reported"]["loss"] == logged[s["step"]]["loss"], f"{name}: what the trainer reported of step {s['step']}")
            check(s["clip_coefficient"] is not None, f"{name}: the clipping of step {s['step']} was seen")
            if s["clip_coefficient"] is not None:
                expected = min(1, 0.5 / (s["grad_norm"] + 1e-6))
                check(abs(s["clip_coefficient"] / expected - 1) < 1e-4, f"{name}: clipped by {s['clip_coefficient']}, {expected} by the norm")
        return static, [(r, tensors(trace, r)) for r in rows], [(s, tensors(trace, s)) for s in steps]


def accounting(rows, coef=0.01):
    """The model's loss is given on as a multiple, and the balance loss arrives with its coefficient times that."""
    for r, _ in rows:
        if r["training"]:
            check(abs(r["loss"] / (r["loss_grad"] * r["returned_loss"]) - 1) < 1e-6, "back-propagated loss is loss_grad x the returned loss")
            if r["aux_loss_requires_grad"]:
                check(abs(r["aux_loss_grad"] / (coef * r["loss_grad"]) - 1) < 1e-6, "the balance loss goes in with its coefficient")
            else:
                check(r["aux_loss_grad"] is None, "a balance loss without a graph gets no gradient")


def with_trainer():
    static, rows, _ = nothing_changes("trainer", "mixtral")
    accounting(rows)
    check(static["training"]["gradient_accumulation_steps"] == 2 and static["coefficients"]["router_aux_loss_coef"] == 0.01
          and static["output_router_logits"] is True and static["packages"]["transformers"] == transformers.__version__, "trainer: trace.json")
    for kind in (True, False):
        name = f"checkpointing, use_reentrant={kind}"
        _, rows, _ = nothing_changes(name, "qwen3_moe" if exists("qwen3_moe") else "qwen2_moe", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": kind},
                                     over={"num_experts": 8, "num_experts_per_tok": 2})
        accounting(rows)
        if not kind:
            check(all(r["aux_loss_requires_grad"] for r, _ in rows if r["training"]), f"{name}: the balance loss has a graph")
        for r, t in rows:
            again = [k for k in t if k.endswith("recomputed_selected_experts")]
            check(len(again) == 2 and all(same(t[k], t[k.replace("recomputed_", "")]) for k in again) and sum("logits_grad" in k for k in t) == 2,
                  f"{name}: the second forward is recorded as such, and routes as the first")
    _, rows, steps = nothing_changes("bf16 autocast", "mixtral", bf16=True)
    check(rows[0][1]["layer.0.router_logits"].dtype == torch.bfloat16, "bf16 autocast: the logits' dtype")
    _, rows, _ = nothing_changes("evaluation", "mixtral", eval_strategy="steps", evaluation_strategy="steps", eval_steps=1)
    check(any(not r["training"] and r["loss"] is None and "layer.0.router_logits" in t for r, t in rows), "evaluation: recorded as such")
    if exists("deepseek_v3"):
        _, _, steps = nothing_changes("deepseek_v3", "deepseek_v3", over={"output_router_logits": False})
        check(all("layer.1.correction_bias_before" in t for _, t in steps), "deepseek_v3: correction bias")
    if TRL:
        static, _, _ = nothing_changes("trl", "mixtral", sft=True, bf16=False, gradient_checkpointing=False, packing=False)
        check(static["training"]["arguments_class"] == "SFTConfig" and "trl" in static["packages"], f"trl: trace.json {static['training']}")
    else:
        print("left out: trl is missing")
    if not PEFT:
        print("left out: peft is missing")
        return
    static, rows, steps = nothing_changes("lora", "mixtral", lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    check(not static["layers"][0]["trainable"] and not static["layers"][0]["experts_trainable"] and "layer.0.expert_grad_norm" not in steps[0][1],
          "lora: neither router nor experts are trained")
    accounting(rows)
    if transformers.__version__ < "5":
        static, _, steps = nothing_changes("lora on the router", "mixtral", lora={"r": 2, "target_modules": ["q_proj", "gate", "w1"]})
        check(static["layers"][0]["lora"] and static["layers"][0]["module"] == "model.layers.0.block_sparse_moe.gate"
              and float(steps[0][1]["layer.0.expert_grad_norm"].max()) > 0, f"lora on the router: {static['layers'][0]}")


# --- loops, samples, trouble ---------------------------------------------------------------------------------------------

def sampling():
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as part:
        one_step("mixtral", whole)
        one_step("mixtral", part, max_tokens=11)
        for a, b in zip(records(whole), records(part)):
            x, y = tensors(whole, a), tensors(part, b)
            check(b["sampled_tokens"] == 11 and a["sampled_tokens"] is None and y["sampled"].numel() == 11, "sampling: 11 of the tokens")
            rest = {k: v for k, v in y.items() if k != "sampled"}
            check(set(rest) == set(x) and all(same(v, x[k] if "tokens_per_expert" in k else x[k][y["sampled"].long()]) for k, v in rest.items()),
                  "sampling: the same rows as without, and whole counts")


def bias_of_a_loop():
    """A loop that moves the correction bias after each optimizer step, as DeepSeek-V3 was trained."""
    with tempfile.TemporaryDirectory() as folder:
        model = small("deepseek_v3")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recorder = Recorder(model, folder, optimizer=optimizer, steps=[1, 3])
        layer = recorder.layers[0]
        bias, history = layer.correction_bias(), []
        for step in range(5):
            history.append(bias.clone())
            model(**collate(Tokens(2, (12, 12), seed=step).rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                bias += 0.001 * (step + 1)
        recorder.close()
        got = {r["step"]: tensors(folder, r) for r in records(folder, "step")}
        check(sorted(got) == [1, 3] and [r["step"] for r in records(folder)] == [1, 3], "loop: the wanted steps")
        for s, t in got.items():
            p = f"layer.{layer.number}.correction_bias_"
            check(same(t[p + "before"], history[s]) and same(t[p + "after"], history[s + 1]), f"loop: bias before and after step {s}")


def reference_pass():
    """A forward without gradients between forward and backward, as DPO's with the adapter switched off, is no micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        model = small("mixtral", output_router_logits=True)
        recorder = Recorder(model, folder)
        for b in range(2):
            batch = collate(Tokens(2, (12, 12), seed=b).rows)
            out = model(**batch)
            with torch.no_grad():
                model(**batch)
            (out.loss / 2).backward()
        recorder.close()
        rows = records(folder)
        check([r["loss_grad"] for r in rows] == [0.5, 0.5] and all("layer.0.logits_grad" in tensors(folder, r) for r in rows),
              "reference pass: the forward before it got its loss and gradients")


def trouble():
    with tempfile.TemporaryDirectory() as folder:
        blocked = os.path.join(folder, "file")
        open(blocked, "w").close()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            one = one_step("mixtral", os.path.join(blocked, "trace"))[2]
            dense = build("llama", num_hidden_layers=1)
            Recorder(dense, os.path.join(folder, "dense"))
            dense(**collate(Tokens(1).rows)).loss.backward()
        said = [str(w.message) for w in said if "moe_audit_recorder" in str(w.message)]
        check(len(one) == 2 and len(said) == 2 and "training goes on" in said[0] and "no router" in said[1], f"trouble: one warning each: {said}")

        for name in ("see", "routing"):  # an error inside the block, and one at its end
            from moe_audit_recorder import _Layer
            original = getattr(_Layer, name)
            setattr(_Layer, name, lambda *a: 1 / 0)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model = small("mixtral")
                Recorder(model, os.path.join(folder, name))
                for _ in range(2):
                    model(**collate(Tokens(1).rows)).loss.backward()
            setattr(_Layer, name, original)
            said = [str(w.message) for w in said if "moe_audit_recorder" in str(w.message)]
            check(len(said) == 1 and "ZeroDivisionError" in said[0] and not torch.overrides._get_current_function_mode_stack(), f"trouble in {name}: {said}")

        trace = os.path.join(folder, "died")  # a run that dies leaves what it recorded
        model = small("mixtral")
        recorder = Recorder(model, trace)
        for b in range(2):
            model(**collate(Tokens(1, seed=b).rows)).loss.backward()
        check(len(records(trace)) == 2 and os.path.exists(os.path.join(trace, "trace.json")), "records are there before the run ends")
        recorder.close()


def rank(folder, number):
    """One of two ranks of a DDP run."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["MOE_AUDIT_PORT"], RANK=str(number), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    results = []
    for record in (False, True):
        model = small("mixtral", output_router_logits=True)
        ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
        recorder = Recorder(ddp, folder, optimizer=optimizer, steps=[0, 1]) if record else None
        for step in range(2):
            ddp(**collate(Tokens(2, (12, 20), seed=2 * step + number).rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if recorder:
            recorder.close()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*results)), "parameters differ"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def two_ranks():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ["MOE_AUDIT_PORT"] = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, "-W", "ignore", __file__, root, "rank", folder, str(n)], stderr=subprocess.PIPE) for n in range(2)]
        try:
            check([r.wait(120) for r in ranks] == [0, 0], "two ranks: both ran, and with the same parameters as without the recorder")
        finally:
            for r in ranks:
                r.kill()
                if r.returncode:
                    print(r.stderr.read().decode())
        a, b = records(folder), records(folder, file="records_rank1.jsonl")
        check([r["rank"] for r in a + b] == [0, 0, 1, 1] and len(glob.glob(os.path.join(folder, "step*_rank1.safetensors"))) == 4, "two ranks: files of each")
        x, y = (tensors(folder, records(folder, "step", f)[0]) for f in ("records.jsonl", "records_rank1.jsonl"))
        check(same(x["layer.0.router_grad"], y["layer.0.router_grad"]), "two ranks: the gradient of the step is the averaged one")


if len(sys.argv) > 2 and sys.argv[2] == "rank":
    rank(sys.argv[3], int(sys.argv[4]))
    sys.exit(0)
families = [f for f in sys.argv[3:] or ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe") if exists(f)]
for family in families:
    try:
        with_balance_loss(family)(**collate(Tokens(1).rows))
    except Exception as e:  # noqa: BLE001
        print(f"left out: {family}: transformers {transformers.__version__} itself fails, {type(e).__name__}: {str(e)[:90]}")
    else:
        what_was_routed(family)
if not sys.argv[3:]:
    output_of_the_block()
    routers_out_of_their_block()
    two_routers_in_a_layer()
    router_without_gradient()
    if PEFT:
        no_router()
    sampling()
    if exists("deepseek_v3"):
        bias_of_a_loop()
    reference_pass()
    trouble()
    two_ranks()
    if TRAINER:
        with_trainer()
    else:
        print("left out: accelerate is missing, so there is no Trainer")
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(done)} checks, {len(failures)} failed; families {' '.join(families)}")
sys.exit(1 if failures else 0)
