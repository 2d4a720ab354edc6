"""Runs test modules in Triton's interpreter.

Each has a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import interpreter


def run(name: str) -> None:
    """Run the tests of the module ``name`` of this folder; AssertionError with their output if one fails."""
    module = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(module)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=module.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def bounds_of_loops_are_numbers(monkeypatch):
    """For modules that import it: loops over a runtime size, which Triton 3.6 cannot interpret with NumPy 2.5.

    The interpreter holds a scalar as an array with one element, and there asks ``int`` to take it as a number.
    """
    prepare = interpreter._patch_lang_tensor

    def prepared(tensor, scope):
        prepare(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", prepared)
