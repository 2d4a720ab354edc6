"""Rows of x in the dot order, in Triton's interpreter. Run by test_gather.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering.decode import to_dot_order
from fp4pass.lowering.gather import in_dot_order
from fp4pass.lowering.schedule import schedule

from .interpreting import bounds_of_loops_are_numbers  # noqa: F401  (a fixture that all tests here have)
from .operands import activations


def counters(count=5):
    return torch.full((count, 2), 7, dtype=torch.int32)


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (7, 576), (9, 512), (17, 1088)])
def test_rows_of_a_dense_product_at_any_distance(rows, k):
    wide = activations(rows, k + 24, dtype=torch.float16)
    for x in (wide[:, :k], wide[:, 24:]):
        left = counters()
        assert torch.equal(in_dot_order(x, left), to_dot_order(x))
        assert not left.any()


def test_more_counters_than_a_program_has_columns():
    left = counters(600)
    in_dot_order(activations(2, 64), left)
    assert not left.any()


@pytest.mark.parametrize("choices", (1, 3))
def test_rows_gathered_by_expert(choices):
    x = activations(40, 192, dtype=torch.float16)
    ids = torch.randint(-1, 6, (40 * choices,), generator=torch.Generator().manual_seed(0))
    plan = schedule(ids, 5, 16)
    left = counters()
    rows = in_dot_order(x, left, plan, choices)
    live = int(plan.ends[-1])
    assert rows.shape == (40 * choices, 192) and 0 < live < len(rows) and not left.any()
    assert torch.equal(rows[:live], to_dot_order(x)[plan.order[:live].long() // choices])
