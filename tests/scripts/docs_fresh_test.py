#!/usr/bin/env python3
"""docs/generated and the rule table of the README are what the sources say. Usage: docs_fresh_test.py SOURCE_DIR BINARY"""
import subprocess
import sys

sys.exit(subprocess.run([sys.executable, f"{sys.argv[1]}/docs/generate.py", sys.argv[1], sys.argv[2], "--check"]).returncode)
