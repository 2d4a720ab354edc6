"""Runs interpreted_schedule.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_schedules_in_the_interpreter():
    module = Path(__file__).with_name("interpreted_schedule.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(module)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=module.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
