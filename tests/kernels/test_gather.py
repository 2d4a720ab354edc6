"""The kernel that puts rows of x into the order of the products' operands."""

import pytest

pytest.importorskip("triton")

from . import interpreting


def test_rows_by_expert_in_the_interpreter():
    interpreting.run("interpreted_gather")
