# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Rows of x for many_rows.py: in the dot order of decode.py, and gathered by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .operands import Schedule


@triton.jit(do_not_specialize=["M"])
def dot_order_kernel(
    x,
    out,
    order,
    count,
    counters,
    M,
    COUNTERS,
    choices,
    stride_xm,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Row r of ``out [M, K]`` is row r of x, or row ``order[r] // choices`` for the first ``count[0]`` r.

    ``counters`` are set to zero.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < M
    source = row
    if order is not None:
        live = row < tl.load(count)
        source = tl.load(order + row, mask=live, other=0) // choices
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = live[:, None] & (column < K)[None, :]
    value = tl.load(x + source.to(tl.int64)[:, None] * stride_xm + column[None, :], mask=inside)
    # Column bits (t, s, j) -> (s, t, j): see natural_position in decode.py.
    value = value.reshape([ROWS, BLOCK // 64, 4, 8, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, BLOCK])
    tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], value, mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for first in range(0, COUNTERS, BLOCK):
            which = first + tl.arange(0, BLOCK)
            tl.store(counters + which, 0, mask=which < COUNTERS)


def in_dot_order(
    x: torch.Tensor, counters: torch.Tensor, plan: Schedule | None = None, choices: int = 1
) -> torch.Tensor:
    """Rows of ``x [M, K]`` (K a multiple of 64) in the dot order; ``counters`` int32 are set to zero beside.

    With ``plan`` there is a row for each slot, the valid ones first and sorted by expert: slot s has row
    ``s // choices`` of x. The other rows hold anything.
    """
    m, k = x.shape
    rows = m if plan is None else m * choices
    out = x.new_empty((rows, k))
    # Of experts' rows it may not begin early: what comes after it reads the schedule that was made before it.
    early = plan is None and x.is_cuda
    # As fast as a copy on an H200; smaller tiles take up to twice the time.
    few, block = 8, 512
    dot_order_kernel[(triton.cdiv(rows, few), triton.cdiv(k, block))](
        x,
        out,
        plan.order if plan else None,
        plan.ends[-1:] if plan else None,
        counters,
        rows,
        counters.numel(),
        choices,
        x.stride(0),
        K=k,
        ROWS=few,
        BLOCK=block,
        EARLY=early,
        num_warps=8,
        launch_pdl=early,
    )
    return out
