# ruff: noqa: ANN001, ANN201, RUF005, RUF059  (kernels: Triton types the parameters, and compiles no starred tuple)

"""Products with many rows of x before Hopper, by ``mma.sync``: each warp decodes rows of the weight of its own.

A program has a tile: HIGH rows of units of the weight for each of its warps, and BLOCK_M rows of x. At a step each warp
decodes its units of 64 columns into the left operand of ``mma.sync``, where they stay while the step's columns of x
pass by, CHUNK rows at a time, from one of SLOTS slots in shared memory. So no decoded weight goes through shared
memory, and each is decoded once for all rows of the tile. AHEAD steps of the weight are on their way, SLOTS - 1 of x.

For SM80 and later, bfloat16 and float16. The weight is an NVFP4 one in layout ``fragments``, or has 8-bit numbers in
rows (fp8_units.py), as ``scale`` None says.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fp4pass.errors import ArgumentError

from .decode import to_dot_order, undo_factor
from .fp8_units import decode_bytes, fetch_bytes
from .launches import MmaRows
from .loads import copy_async, copy_layout, fetch, rows_layout, slot_layout, steps_along, sums_layout, tokens_layout
from .operands import Schedule, Weight, readable, tensors_of
from .reference import NO_ACTIVATION
from .sharing import place, rows_of_block
from .start import start
from .units import UNIT_COLUMNS, activate, decode_units

# Rows of x that are in registers at once.
CHUNK = gl.constexpr(64)
# How many of the last rows are read for those that a tile lacks.
LAST = gl.constexpr(16)


@gluon.jit
def rows_of_tile(first, end, plan, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """(row, whether it is there) of a tile's rows from ``first`` to ``end``: slots, where there is a ``plan``.

    Rows that are not there are read as several of the last: one alone all programs would read at the same time.
    """
    at = first + gl.arange(0, BLOCK_M, layout=LAYOUT)
    row = gl.where(at < end, at, gl.maximum(end - 1 - at % LAST, 0))
    if plan[3] is not None:
        row = gl.load(plan[3] + row)
    return row, at < end


@gluon.jit
def copy_step(slot, x, x_rows, step, STEPS: gl.constexpr):
    """A step's columns of x on their way into a slot, if there is such a step."""
    if step < STEPS:
        LAYOUT: gl.constexpr = copy_layout(1, gl.num_warps())
        column = gl.arange(0, UNIT_COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
        copy_async(slot, x + step * UNIT_COLUMNS + (x_rows.to(gl.int64) * 8)[None, :, None] + column)
    async_copy.commit_group()


@gluon.jit
def fetch_step(weight, units, step, K: gl.constexpr, HIGH: gl.constexpr):
    """What each warp decodes at a step, HIGH times: units and their scales, or rows of bytes."""
    words, scale, N = weight
    if scale is None:
        return fetch_bytes(words, units[0], N, step, K, HIGH)
    else:
        return fetch((words, scale), units, step, K, 1, gl.num_warps(), HIGH)


@gluon.jit
def decode(fetched, ROWS: gl.constexpr, DTYPE: gl.constexpr):
    """The left operand ``[1, ROWS, 64]``."""
    if len(fetched) == 1:
        return decode_bytes(fetched[0], DTYPE).reshape([1, ROWS, UNIT_COLUMNS])
    else:
        return decode_units(fetched[0], fetched[1], 0, DTYPE).reshape([1, ROWS, UNIT_COLUMNS])


@gluon.jit
def multiply(sums, units, slot, CHUNKS: gl.constexpr):
    """``sums``, those of each chunk of rows and in it of each row of units, plus a step's units times its slot."""
    HIGH: gl.constexpr = len(units)
    MMA: gl.constexpr = sums[0].type.layout
    ROWS: gl.constexpr = sums[0].shape[1]
    M: gl.constexpr = sums[0].shape[2]
    weights = ()
    for high in gl.static_range(HIGH):
        weight = decode(units[high], ROWS, slot.dtype)
        weights = weights + (gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True),)
    larger = ()
    for chunk in gl.static_range(CHUNKS):
        tokens = slot.slice(chunk * M, M, dim=1).load(tokens_layout(1, gl.num_warps(), M))
        x = gl.convert_layout(tokens.permute([0, 2, 1]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
        for high in gl.static_range(HIGH):
            larger = larger + (mma_v2(weights[high], x, sums[chunk * HIGH + high]),)
    return larger


@gluon.jit
def take_step(state, slots, at, step, x, x_rows, weight, units, K: gl.constexpr, HIGH: gl.constexpr):
    """(sums, the units of ``step`` and of some that follow), one step on. ``at``: the number of the step's slot."""
    sums, units_ahead = state
    AHEAD: gl.constexpr = len(units_ahead)
    STEPS: gl.constexpr = steps_along(K, 1)
    SLOTS: gl.constexpr = len(slots)
    following = ()
    for later in gl.static_range(1, AHEAD):
        following = following + (units_ahead[later],)
    following = following + (fetch_step(weight, units, gl.minimum(step + AHEAD, STEPS - 1), K, HIGH),)
    # Behind the wait stands a barrier: every warp's copies are there, and every warp has read the step before.
    async_copy.wait_group(SLOTS - 2)
    copy_step(slots[(at + SLOTS - 1) % SLOTS], x, x_rows, step + SLOTS - 1, STEPS)
    return multiply(sums, units_ahead[0], slots[at], len(sums) // HIGH), following


@gluon.constexpr_function
def stored_layout(across):
    """Of ``[16 * across, rows]`` numbers as they are written, eight neighbours of a row of the result a lane."""
    return gl.BlockedLayout([8, 1], [2 * across, 16 // across], [1, across], [0, 1])


@gluon.jit
def store(acc, n, rows, live, bias, weights, out, N, ACTIVATION: gl.constexpr):
    """``acc``, columns of the result from ``n`` on, to ``rows`` of it that are ``live``."""
    if bias is not None:
        column = n + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[:, None]
    STORED: gl.constexpr = stored_layout(gl.num_warps())
    value = gl.convert_layout(activate(acc, ACTIVATION).to(out.dtype.element_ty), STORED)
    if weights is not None:
        value *= gl.load(weights + rows, mask=live, other=0.0).to(out.dtype.element_ty)[None, :]
    column = n + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORED))
    where = rows.to(gl.int64)[None, :] * N + column[:, None]
    gl.store(out + where, value, mask=(column < N)[:, None] & live[None, :])


@gluon.jit(do_not_specialize=["M", "slots_of_x"])
def product_kernel(
    x,
    words,
    scale,
    global_scale,
    bias,
    weights,
    out,
    experts,
    order,
    ends,
    block_ends,
    M,
    N,
    EXPERTS,
    slots_of_x,
    stride_xm,
    global_stride,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HIGH: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """A tile of ``out [M, N]``, or of the rows of one block of experts: see ``expert_product_kernel`` in moe.py."""
    ACROSS: gl.constexpr = gl.num_warps()
    STEPS: gl.constexpr = steps_along(K, 1)
    STORED: gl.constexpr = gl.SliceLayout(0, stored_layout(ACROSS))
    M_AT_ONCE: gl.constexpr = min(CHUNK, BLOCK_M)
    plan = (experts, ends, block_ends, order)
    tiles = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, 16 * ACROSS * HIGH))
    tile_m, tile_n = place(gl.program_id(0), tiles, plan)
    factor = 1.0 if scale is None else undo_factor(True)
    first, end, matrix = tile_m * BLOCK_M, M, 0
    if experts is not None:
        expert = gl.load(experts + tile_m)
        if (expert < 0) | (expert >= EXPERTS):
            return
        expert, first, end = rows_of_block(tile_m, plan[:3], BLOCK_M)
        matrix = expert.to(gl.int64)
    if global_scale is not None:
        factor = factor * gl.load(global_scale + matrix * global_stride)
    unit = tile_n * (ACROSS * HIGH)
    weight = (words, scale, N)
    if experts is not None:
        weight = (words + matrix * N * (K // 8), scale + matrix * N * (K // 32), N)
    units = (unit, N // 16 - unit)
    x_rows, there = rows_of_tile(first, end, plan, BLOCK_M, rows_layout(1, ACROSS))
    x_rows = x_rows // slots_of_x * (stride_xm // 8)
    slots = ()
    for _ in gl.static_range(SLOTS):
        slots = slots + (gl.allocate_shared_memory(x.dtype.element_ty, [1, BLOCK_M, UNIT_COLUMNS], slot_layout()),)
    for step in gl.static_range(SLOTS - 1):
        copy_step(slots[step], x, x_rows, step, STEPS)
    nothing = gl.zeros([1, 16 * ACROSS, M_AT_ONCE], gl.float32, layout=sums_layout(1, ACROSS))
    units_ahead = ()
    for step in gl.static_range(AHEAD):
        units_ahead = units_ahead + (fetch_step(weight, units, min(step, STEPS - 1), K, HIGH),)
    state = ((nothing,) * (HIGH * BLOCK_M // M_AT_ONCE), units_ahead)
    # Of a loop of one turn Triton 3.6 makes none, and then does not compile what is left.
    TURNS: gl.constexpr = STEPS // SLOTS if STEPS >= 2 * SLOTS else 0
    for turn in range(TURNS):
        for at in gl.static_range(SLOTS):
            state = take_step(state, slots, at, turn * SLOTS + at, x, x_rows, weight, units, K, HIGH)
    for at in gl.static_range(TURNS * SLOTS, STEPS):
        state = take_step(state, slots, at % SLOTS, at, x, x_rows, weight, units, K, HIGH)
    sums = state[0]
    for part in gl.static_range(len(sums)):
        acc = gl.sum(sums[part], axis=0) * factor
        rows, live = rows_of_tile(first + part // HIGH * M_AT_ONCE, end, plan, M_AT_ONCE, STORED)
        n = (unit + part % HIGH * ACROSS) * 16
        store(acc, n, rows, live, bias, weights, out, N, ACTIVATION)


def linear(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: MmaRows,
) -> None:
    """``out [M, N]`` = activation(rows ``[M, K]`` @ weight.T + bias), a weight in ``fragments`` and 16-bit rows."""
    operands = weight.words, weight.scale_pairs, weight.global_scale, bias, None, out
    _product(readable(rows), *operands, K=rows.shape[1], ACTIVATION=activation, launch=launch)


def expert_product(
    plan: Schedule,
    rows: torch.Tensor,
    slots_of_row: int,
    weight: Weight,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: MmaRows,
) -> None:
    """Rows of ``out [slots, N]``: slot s from row ``s // slots_of_row`` by its expert, as ``plan`` has them."""
    operands = weight.words, weight.scale_pairs, weight.global_scale, None, routing, out, plan, slots_of_row
    experts = weight.count, weight.global_stride
    _product(readable(rows), *operands, *experts, K=rows.shape[1], ACTIVATION=activation, launch=launch)


def fp8_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    launch: MmaRows,
) -> None:
    """``out [M, N]`` = rows ``[M, K]`` @ weight.T * weight_scale + bias; 16-bit rows, see `reads_bytes_of`."""
    operands = weight.view(torch.int32), None, weight_scale, bias, None, out
    _product(to_dot_order(rows), *operands, K=weight.shape[1], ACTIVATION=NO_ACTIVATION, launch=launch)


def reads_bytes_of(weight: torch.Tensor) -> bool:
    """Whether the kernel can read an 8-bit weight ``[N, K]``: 16 bytes at once, row after row."""
    return weight.is_contiguous() and weight.shape[1] % 16 == 0 and weight.data_ptr() % 16 == 0


# Where a row begins is kept in 32 bits, in units of eight numbers.
_MOST_NUMBERS = 1 << 34


def _product(
    rows: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    plan: Schedule | None = None,
    slots_of_row: int = 1,
    count: int = 1,
    global_stride: int = 0,
    *,
    launch: MmaRows,
    **constants: Any,
) -> None:
    if (reach := rows.shape[0] * rows.stride(0)) > _MOST_NUMBERS:
        raise ArgumentError(
            "the last rows of x lie too far behind the first",
            seen=f"{rows.shape[0]} rows, {rows.stride(0)} numbers apart: {reach} numbers",
            expected=f"{_MOST_NUMBERS} numbers at most, before SM90",
            do="multiply some of the rows at a time",
        )
    m, n = out.shape
    blocks = plan.blocks if plan else -(-m // launch.block_m)
    start(
        product_kernel,
        (blocks * -(-n // launch.block_n),),
        rows,
        words,
        scale,
        global_scale,
        bias,
        routing,
        out,
        *tensors_of(plan),
        m,
        n,
        count,
        slots_of_row,
        rows.stride(0),
        global_stride,
        **constants,
        **launch.constants,
    )
