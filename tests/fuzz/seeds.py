"""seeds.py ROOT OUT: start corpora for the fuzzers from the fixtures, OUT/<target>/..., and a dictionary for each."""
import glob
import json
import os
import sys
import zipfile

root, out = sys.argv[1:3]


def write(target, items):
    os.makedirs(f"{out}/{target}", exist_ok=True)
    for i, data in enumerate(items):
        with open(f"{out}/{target}/seed{i:05d}", "wb") as f:
            f.write(data)
    print(f"{target}: {len(items)} seeds")


def files(pattern, most=60_000):
    found = [open(p, "rb").read() for p in sorted(glob.glob(f"{root}/fixtures/{pattern}", recursive=True))]
    return list(dict.fromkeys(b for b in found if len(b) <= most))


with open(f"{root}/fixtures/text/yaml_golden.json", encoding="utf-8") as f:
    yaml_texts = [c["yaml"].encode() for c in json.load(f)["cases"]]
with open(f"{root}/fixtures/tensors/safetensors_golden.json", encoding="utf-8") as f:
    tensors = [bytes.fromhex(c["bytes"]) for c in json.load(f)["cases"]]
zips = files("**/training_args.bin")
pickles = []
for path in sorted(glob.glob(f"{root}/fixtures/**/training_args.bin", recursive=True)):
    with zipfile.ZipFile(path) as z:
        pickles += [z.read(n) for n in z.namelist() if n.endswith("data.pkl")]
small = [b"\x80\x02](K\x01G\x3f\xf0\0\0\0\0\0\0\x8c\x01ae.", b"\x80\x04\x95\x08\0\0\0\0\0\0\0\x8f\x94(K\x01\x90.", b"\x80\x05\x96\x01\0\0\0\0\0\0\0x.",
         b"\x80\x02ctorch\ndevice\nq\0X\x03\0\0\0cpuq\1\x85q\2Rq\3."]
write("json_fuzz", files("**/*.json", 20_000))
write("yaml_fuzz", yaml_texts + files("**/*.y*ml"))
write("safetensors_fuzz", tensors)
write("pickle_fuzz", small + pickles)
write("zip_fuzz", zips)


def numpy_text(shape, count):
    header = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"".join((i % 5).to_bytes(2, "little") for i in range(count))


def safetensors_text(tensors):
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


head = {"format": "moe-audit-trace", "version": 1, "packages": {"torch": "2.13.0"}, "model": {"model_type": "mixtral", "num_experts": 3, "top_k": 2, "config": {}},
        "training": {"world_size": 1, "mixed_precision": "bf16"}, "coefficients": {"router_aux_loss_coef": 0.02}, "layers": [{"layer": 0, "logits_dtype": "float32"}, {"layer": 1}]}
record = {"kind": "micro_batch", "step": 0, "micro_batch": 1, "rank": 0, "file": "a.safetensors", "tokens": 4, "batch": [2, 2], "sampled_tokens": 2, "training": True, "loss": 2.5}
step = {"kind": "step", "step": 0, "rank": 0, "file": "a.safetensors", "grad_norm": 1.5, "reported": {"loss": 2.5}}
tensors = {"token_mask": ("U8", [4], bytes(4)), "sampled": ("I32", [4], bytes(range(4)) * 4), "layer.0.router_logits": ("F32", [4, 3], bytes(48)),
           "layer.0.selected_experts": ("I16", [4, 2], bytes(16)), "layer.0.routing_weights": ("BF16", [4, 2], bytes(16)), "layer.0.dropped": ("U8", [4, 2], bytes(8)),
           "layer.1.tokens_per_expert": ("I64", [3], bytes(24)), "layer.1.router_weight": ("F32", [3, 2], bytes(24)), "layer.1.correction_bias_after": ("F32", [3], bytes(12))}
trace = [b"\0" + json.dumps(head).encode(), b"\1" + (json.dumps(record) + "\n" + json.dumps(step) + "\n").encode(), b"\2" + safetensors_text(tensors)]
trace += [b"\3" + b[:6000] for b in files("traces/megatron-router-trace/*.jsonl")]
trace += [b"\4" + b for b in files("traces/megatron-tokens-per-expert/**/*.jsonl")]
trace += [b"\5" + numpy_text("(3, 2, 2)", 12), b"\xc5" + numpy_text("(2, 3, 2)", 12)]
trace += [b"\6" + b for b in files("expert_counts/*.json")]
trace += [b"\7" + b for b in files("health/*.npz")] + [b"\x08" + b for b in files("health/*.safetensors")]
write("trace_fuzz", trace)
words = {
    "json_fuzz": ["null", "true", "false", "NaN", "Infinity", "-Infinity", "1e5", "\\\\u0041", "\\\\ud83d\\\\ude00", "{}", "[]"],
    "yaml_fuzz": ["- ", ": ", "? ", "---\\x0a", "...\\x0a", "&a ", "*a", "<<: ", "!!str ", "!!int ", "!!float ", "|\\x0a ", ">-\\x0a ", "%TAG ", "%YAML 1.1\\x0a", "1:30", "0x1", "0b1",
                  "1e3", "1.0e+3", ".inf", "2001-01-01", "\\xe2\\x80\\xa8", "\\xc2\\x85", "\\xef\\xbb\\xbf"],
    "trace_fuzz": ["\\\"layer\\\":", "\\\"layers\\\":", "\\\"top_indices\\\":", "\\\"tpe\\\":", "\\\"kind\\\":", "\\\"step\\\":", "\\\"logit_bytes\\\":", "\\\"mtp_idx\\\":",
                   "layer.1.router_logits", "'shape': ", "<i8", "|u1", "F32", "I64", "65536", "1e9", "NaN", "\\x0a"],
    "safetensors_fuzz": ["\\\"dtype\\\":", "\\\"shape\\\":", "\\\"data_offsets\\\":", "\\\"__metadata__\\\":", "F32", "BF16", "F4", "F6_E2M3", "F8_E4M3", "18446744073709551615", "[0,0]"],
}
for target, entries in words.items():
    with open(f"{out}/{target}.dict", "w") as f:
        f.write("".join(f'"{w}"\n' for w in entries))
