"""The Triton kernels on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from . import interpreting


def test_the_kernels_in_the_interpreter():
    interpreting.run("interpreted")
