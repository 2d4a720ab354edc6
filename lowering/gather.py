# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Rows of x for many_rows.py, sorted by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .operands import Schedule
from .start import start


@triton.jit
def rows_kernel(x, out, order, count, choices, stride_xm, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row r of ``out [M, K]`` is row ``order[r] // choices`` of x, for the first ``count[0]`` r."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(count)
    source = tl.load(order + row, mask=live, other=0) // choices
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = live[:, None] & (column < K)[None, :]
    value = tl.load(x + source.to(tl.int64)[:, None] * stride_xm + column[None, :], mask=inside)
    tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], value, mask=inside)


def by_expert(x: torch.Tensor, plan: Schedule, choices: int = 1) -> torch.Tensor:
    """A row of ``x [M, K]`` for each slot, the valid ones first and sorted by expert: slot s has row ``s // choices``.

    The other rows hold anything. The kernel does not begin early: what comes after it reads the schedule that was made
    before it.
    """
    m, k = x.shape
    out = x.new_empty((m * choices, k))
    # As fast as a copy on an H200; smaller tiles take up to twice the time.
    few, block = 8, 512
    start(
        rows_kernel,
        (-(-m * choices // few), -(-k // block)),
        x,
        out,
        plan.order,
        plan.ends[-1:],
        choices,
        x.stride(0),
        K=k,
        ROWS=few,
        BLOCK=block,
        num_warps=8,
    )
    return out
