#!/usr/bin/env python3
"""Applying each printed remedy makes its finding go away, and only adds none. The broken run, as it was before the run: its
Axolotl config, base model and lock file. A remedy's first pasted block is merged into the config as YAML; `pip install` goes
into the lock file. Usage: remedies_test.py SOURCE_DIR BINARY"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

try:
    import yaml
except ImportError:
    print("SKIPPED: python3-yaml is not installed")
    sys.exit(77)

root, binary = sys.argv[1], sys.argv[2]
RUN = os.path.join(root, "fixtures/runs/mixtral-qlora-broken")
EXPECTED = {"AD001", "AD002", "BL001", "GA001", "QU001"}


def fresh():
    folder = tempfile.mkdtemp(prefix="moe-audit-remedies-")
    shutil.copytree(os.path.join(RUN, "base"), os.path.join(folder, "base"))
    for name in ("axolotl.yml", "requirements.txt"):
        shutil.copy(os.path.join(RUN, name), folder)
    return folder


def audit(folder):
    process = subprocess.run([binary, "check", folder, "--format", "json", "--static"], capture_output=True, text=True)
    report = json.loads(process.stdout)
    return {f["rule"]: f["remedy"] for f in report["findings"] if f["severity"] != "note"}, process.returncode


def merge(into, new):
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def blocks(remedy):
    """Runs of indented lines: what a user pastes."""
    found, current = [], []
    for line in remedy.split("\n") + [""]:
        if line.startswith("    "):
            current.append(line[4:])
        elif current:
            found.append("\n".join(current))
            current = []
    return found


def apply(folder, block):
    pinned = re.fullmatch(r'pip install "([a-z_-]+)==([^"]+)"', block.strip())
    path = os.path.join(folder, "requirements.txt" if pinned else "axolotl.yml")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    if pinned:
        text, n = re.subn(rf"(?m)^{pinned[1]}==.*$", f"{pinned[1]}=={pinned[2]}", text)
        assert n == 1, f"{pinned[1]} is not in requirements.txt"
    else:
        config = yaml.safe_load(text)
        merge(config, yaml.safe_load(block))
        text = yaml.safe_dump(config, sort_keys=False)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def main():
    folder = fresh()
    before, code = audit(folder)
    shutil.rmtree(folder)
    if set(before) != EXPECTED or code != 1:
        print(f"before any remedy: {sorted(before)}, exit {code}; expected {sorted(EXPECTED)}, exit 1")
        return 1
    bad = 0
    for rule, remedy in before.items():
        choices = blocks(remedy)
        if not choices:
            print(f"{rule}: the remedy has nothing to paste")
            bad += 1
        for block in choices:
            folder = fresh()
            apply(folder, block)
            after, _ = audit(folder)
            shutil.rmtree(folder)
            new = set(after) - set(before)
            if rule in after or new:
                print(f"{rule}: after pasting\n{block}\nthere are still {sorted(after)}")
                bad += 1
    folder = fresh()
    for rule, remedy in before.items():
        apply(folder, blocks(remedy)[0])
    after, code = audit(folder)
    shutil.rmtree(folder)
    if after or code != 0:
        print(f"after all remedies: {sorted(after)}, exit {code}")
        bad += 1
    print(f"{len(before)} findings, {bad} remedies that do not work")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
