"""Python code run in a process of its own, for what importing loads and leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys


def printed_by(code: str) -> str:
    """What the code prints, without the last line's end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")
