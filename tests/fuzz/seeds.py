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
words = {
    "json_fuzz": ["null", "true", "false", "NaN", "Infinity", "-Infinity", "1e5", "\\\\u0041", "\\\\ud83d\\\\ude00", "{}", "[]"],
    "yaml_fuzz": ["- ", ": ", "? ", "---\\x0a", "...\\x0a", "&a ", "*a", "<<: ", "!!str ", "!!int ", "!!float ", "|\\x0a ", ">-\\x0a ", "%TAG ", "%YAML 1.1\\x0a", "1:30", "0x1", "0b1",
                  "1e3", "1.0e+3", ".inf", "2001-01-01", "\\xe2\\x80\\xa8", "\\xc2\\x85", "\\xef\\xbb\\xbf"],
    "safetensors_fuzz": ["\\\"dtype\\\":", "\\\"shape\\\":", "\\\"data_offsets\\\":", "\\\"__metadata__\\\":", "F32", "BF16", "F4", "F6_E2M3", "F8_E4M3", "18446744073709551615", "[0,0]"],
}
for target, entries in words.items():
    with open(f"{out}/{target}.dict", "w") as f:
        f.write("".join(f'"{w}"\n' for w in entries))
