"""Rows of x by expert, in Triton's interpreter. Run by test_gather.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering.gather import by_expert
from fp4pass.lowering.schedule import schedule

from .interpreting import bounds_of_loops_are_numbers  # noqa: F401  (a fixture that all tests here have)
from .operands import activations


@pytest.mark.parametrize("choices", (1, 3))
@pytest.mark.parametrize("k", (64, 576, 1088))
def test_rows_gathered_by_expert(k, choices):
    x = activations(40, k + 24, dtype=torch.float16)[:, 24:]
    ids = torch.randint(-1, 6, (40 * choices,), generator=torch.Generator().manual_seed(0))
    plan = schedule(ids, 5, 16)
    rows = by_expert(x, plan, choices)
    live = int(plan.ends[-1])
    assert rows.shape == (40 * choices, k) and 0 < live < len(rows)
    assert torch.equal(rows[:live], x[plan.order[:live].long() // choices])
