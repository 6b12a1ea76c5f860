#!/usr/bin/env python3
"""Holds the include arrows of docs/architecture.md: which room may include which. Usage: layers_test.py SOURCE_DIR [BINARY]"""
import os
import re
import sys

# room -> rooms it may include besides itself
ALLOWED = {
    "audit/facts": set(),
    "audit/text": set(),
    "audit/tensors": {"audit/facts", "audit/text", "kernels"},
    "audit/families": {"audit/facts"},
    "audit/behaviours": {"audit/facts"},
    "audit/traces": {"audit/facts", "audit/text", "audit/tensors"},
    "audit/inputs": {"audit/facts", "audit/text", "audit/tensors", "audit/traces", "audit/families", "audit/behaviours"},
    "audit/measures": {"audit/facts", "audit/tensors", "audit/traces", "audit/families", "audit/behaviours", "audit/variants", "kernels"},
    "audit/variants": {"audit/facts", "kernels"},
    "audit/rules": {"audit/facts"},
    "audit/engine": {"audit/facts", "audit/rules", "audit/measures", "audit/inputs"},
    "reports": {"audit/facts"},
    "kernels": set(),
    "reference": set(),
    "cli": {"audit/facts", "audit/inputs", "audit/traces", "audit/measures", "audit/engine", "audit/rules", "reports", "audit/families", "audit/behaviours", "kernels"},
}
# headers from outside that a room must not touch
FORBIDDEN = {
    "audit/rules": re.compile(r"fstream|filesystem|yaml-cpp|nlohmann|chrono|torch|ATen"),
    "audit/facts": re.compile(r"fstream|filesystem|yaml-cpp|nlohmann|torch|ATen"),
    "audit": re.compile(r"torch|ATen|c10|CLI/"),
    "kernels": re.compile(r"torch|ATen|c10|yaml-cpp|nlohmann"),
    "cli": re.compile(r"torch|ATen|c10"),
    "reports": re.compile(r"torch|ATen|yaml-cpp"),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def room_of(path):
    for room in sorted(ALLOWED, key=len, reverse=True):
        if path.startswith(room + "/"):
            return room
    return None


def violations(root):
    found, seen = [], 0
    for room in ALLOWED:
        for folder, _, files in os.walk(os.path.join(root, room)):
            for name in files:
                if not name.endswith((".h", ".cc", ".cu", ".cuh", ".inc")):
                    continue
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                if room_of(relative) != room:
                    continue
                seen += 1
                with open(path, encoding="utf-8") as f:
                    for number, line in enumerate(f, 1):
                        m = INCLUDE.match(line)
                        if not m:
                            continue
                        target = room_of(m.group(2)) if m.group(1) == '"' else None
                        if target and target != room and target not in ALLOWED[room]:
                            found.append(f"{relative}:{number}: {room} must not include {target} ({m.group(2)})")
                        for prefix, pattern in FORBIDDEN.items():
                            if (room == prefix or room.startswith(prefix + "/")) and pattern.search(m.group(2)):
                                found.append(f"{relative}:{number}: {prefix} must not include {m.group(2)}")
    return found, seen


def missing_sources(root):
    """Sources that the fuzzers name and that are not there: no other build would tell."""
    lists = "tests/fuzz/CMakeLists.txt"
    with open(os.path.join(root, lists), encoding="utf-8") as f:
        named = re.findall(r"\$\{CMAKE_SOURCE_DIR\}/([\w/]+\.cc)", f.read())
    return [f"{lists}: no such file: {path}" for path in named if not os.path.isfile(os.path.join(root, path))] if named else [f"{lists}: names no sources"]


def main():
    found, seen = violations(sys.argv[1])
    absent = missing_sources(sys.argv[1])
    for line in absent:
        print(line)
    for line in found:
        print(line)
    if seen < 50:
        print(f"only {seen} files were looked at: the script looks in the wrong place")
        return 1
    # The script itself must be able to fail.
    import tempfile
    with tempfile.TemporaryDirectory() as probe:
        os.makedirs(os.path.join(probe, "audit/rules/x"))
        with open(os.path.join(probe, "audit/rules/x/bad.cc"), "w", encoding="utf-8") as f:
            f.write('#include "audit/inputs/inputs.h"\n#include <fstream>\n')
        if len(violations(probe)[0]) != 2:
            print("the probe file with two forbidden includes was not caught")
            return 1
    print(f"{seen} files, {len(found)} forbidden includes")
    return 1 if found or absent else 0


if __name__ == "__main__":
    sys.exit(main())
