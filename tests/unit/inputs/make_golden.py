"""make_golden.py ROOT > golden.json: what the real files of fixtures/ say, read with PyYAML, json and an unpickler that
builds empty shells instead of importing anything. A second reading of the files, written apart from the C++ readers."""
import glob
import io
import json
import math
import os
import pickle
import sys
import zipfile

import yaml

# setting name -> keys of the framework's file, as Axolotl @067b021c and LLaMA-Factory @ff6d4d12 define them
HF = {k: k for k in ("gradient_accumulation_steps per_device_train_batch_size bf16 fp16 bf16_full_eval tf32 "
                     "average_tokens_across_devices label_smoothing_factor deepspeed fsdp gradient_checkpointing "
                     "gradient_checkpointing_kwargs max_grad_norm warmup_steps warmup_ratio max_steps learning_rate").split()}
AXOLOTL = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
    "lora_target_linear": "lora_target_linear", "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save", "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit",
    "quantize_moe_experts": "quantize_moe_experts", "tf32": "tf32", "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "sequence_len": "max_length", "max_steps": "max_steps",
    "warmup_steps": "warmup_steps", "warmup_ratio": "warmup_ratio", "learning_rate": "learning_rate",
    "max_grad_norm": "max_grad_norm", "gradient_checkpointing": "gradient_checkpointing", "activation_offloading": "activation_offloading",
    "gradient_checkpointing_kwargs": "gradient_checkpointing_kwargs", "deepspeed": "deepspeed", "fsdp_config": "fsdp",
    "fsdp": "fsdp", "fsdp_version": "fsdp_version", "unfrozen_parameters": "unfrozen_parameters", "revision_of_model": "base_model_revision",
    "sample_packing": "packing", "trust_remote_code": "trust_remote_code"}
AXOLOTL_OTHER = {"model_quantization_config", "base_model", "adapter", "bf16", "fp16", "plugins", "model_config"}
LORA = {k: k for k in ("peft_type r lora_alpha lora_dropout use_rslora target_modules target_parameters exclude_modules "
                       "modules_to_save layers_to_transform rank_pattern alpha_pattern use_dora init_lora_weights").split()}


def number(v):
    """The frameworks take 2e-5, which PyYAML reads as a string, for a number."""
    try:
        return float(v) if isinstance(v, str) else v
    except ValueError:
        return v


def axolotl(d):
    s = {AXOLOTL[k]: (v if k in ("lora_target_modules", "deepspeed", "revision_of_model") else number(v))
         for k, v in d.items() if k in AXOLOTL and v is not None}
    if d.get("adapter"):
        s["peft_type"] = "LORA"
    if d["bf16"] == "auto":
        s["bf16"] = "auto"
    else:
        s["bf16"], s["torch_dtype"] = d["bf16"], "bfloat16" if d["bf16"] else "float32"
        if "fp16" in d:
            s["fp16"] = False
        assert not d.get("fp16") and not d.get("load_in_8bit")
    if "fsdp_version" in (d.get("fsdp_config") or {}) and "fsdp_version" not in d:
        s["fsdp_version"] = d["fsdp_config"]["fsdp_version"]
    for k, v in (d.get("model_config") or {}).items():
        s["model_config." + k] = v
    other = [k for k in d if k not in AXOLOTL and k not in AXOLOTL_OTHER and k != "bnb_config_kwargs"]
    kwargs = d.get("model_quantization_config_kwargs") or {}
    if "dequantize" in kwargs:
        s["quant_dequantize"] = kwargs["dequantize"]
    if kwargs:
        other.remove("model_quantization_config_kwargs")
        other += ["model_quantization_config_kwargs." + k for k in kwargs if k != "dequantize"]
    for k, v in d.get("bnb_config_kwargs", {}).items():
        if k in ("bnb_4bit_quant_type", "llm_int8_skip_modules"):
            s[k] = v
        else:
            other.append("bnb_config_kwargs." + k)
    return dict(framework="axolotl", base=d["base_model"], settings=s, other=sorted(other))


def llama_factory(d):
    names = {**HF, "lora_rank": "r", "lora_alpha": "lora_alpha", "cutoff_len": "max_length", "finetuning_type": "finetuning_type",
             "trust_remote_code": "trust_remote_code", "packing": "packing"}
    s = {names[k]: number(v) for k, v in d.items() if k in names and v is not None}
    if d["finetuning_type"] == "lora":
        s["peft_type"] = "LORA"
        assert d["lora_target"] == "all"
        s["lora_target_linear"] = True
    if "disable_gradient_checkpointing" in d:
        s["gradient_checkpointing"] = not d["disable_gradient_checkpointing"]
    if d.get("neat_packing"):
        s["packing"] = True
    s["block_diagonal_mask"] = bool(d.get("neat_packing")) and d.get("flash_attn") != "fa2"
    special = {"model_name_or_path", "stage", "lora_target", "use_kt", "disable_gradient_checkpointing", "neat_packing", "flash_attn"}
    megatron = "expert_model_parallel_size" in d
    return dict(framework="llama-factory", base=d["model_name_or_path"], settings=s,
                trainer="McaTrainer" if megatron else "KTrainer" if d.get("use_kt") else "",
                other=sorted(k for k in d if k not in names and k not in special))


def run_json(d):
    return dict(framework="transformers", base=d.get("model_name_or_path", ""), settings={k: v for k, v in d.items() if k in HF},
                other=sorted(k for k in d if k not in HF and k != "model_name_or_path"))


class Shell:
    def __new__(cls, *args):
        o = object.__new__(cls)
        o.args, o.state = args, {}
        return o

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return type(f"{module}.{name}", (Shell,), {})


def training_args(path):
    with zipfile.ZipFile(path) as z:
        data = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
    o = Unpickler(io.BytesIO(data)).load()
    names = {**HF, "loss_type": "loss_type", "max_length": "max_length",
             "max_seq_length": "max_length", "packing": "packing", "use_liger_kernel": "use_liger_kernel", "router_aux_loss_coef": "trl.router_aux_loss_coef"}
    s = {names[k]: v for k, v in o.state.items() if k in names and (v is not None or k == "deepspeed")}
    s["world_size"] = o.state["distributed_state"].state["num_processes"]
    return {"class": type(o).__name__, "settings": s}


def plain(v):
    return v if v is None or math.isfinite(v) else "nan"


def trainer_state(path):
    d = json.load(open(path))
    lines = [i + 1 for i, line in enumerate(open(path)) if line == "    {\n"]  # entries of log_history start so
    h = d["log_history"]
    return dict(global_step=d["global_step"], max_steps=d["max_steps"], line=lines[:len(h)],
                **{k: [plain(e.get(k)) for e in h] for k in ("step", "loss", "grad_norm", "eval_loss", "aux_loss", "learning_rate")})


def adapter(path):
    d = json.load(open(path))
    return dict(settings={k: v for k, v in d.items() if k in LORA and v is not None}, base=d["base_model_name_or_path"],
                peft=d.get("peft_version"))


def requirements(path):
    return dict(line.strip().split("==") for line in open(path) if "==" in line)


def main(root):
    os.chdir(root)
    g = dict(configs={}, training_args={}, trainer_state={}, adapter={}, requirements={})
    for p in sorted(glob.glob("fixtures/configs/axolotl/*") + glob.glob("fixtures/runs/*/axolotl.yml")):
        g["configs"][p] = axolotl(yaml.safe_load(open(p)))
    for p in sorted(glob.glob("fixtures/configs/llama-factory/*")):
        if "accelerate__" not in p:
            g["configs"][p] = llama_factory(yaml.safe_load(open(p)))
    for p in sorted(glob.glob("fixtures/runs/*/run.json")):
        g["configs"][p] = run_json(json.load(open(p)))
    for name, read in (("training_args.bin", training_args), ("trainer_state.json", trainer_state), ("adapter_config.json", adapter)):
        for p in sorted(glob.glob(f"fixtures/runs/*/checkpoint-*/{name}")):
            g[name.split(".")[0].removesuffix("_config")][p] = read(p)
    for p in sorted(glob.glob("fixtures/runs/*/requirements.txt")):
        g["requirements"][p] = requirements(p)
    json.dump(g, sys.stdout, indent=0, sort_keys=True)
    print()


main(sys.argv[1])
