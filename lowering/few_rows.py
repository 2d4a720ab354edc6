# ruff: noqa: ANN001, ANN201, RUF005  (kernels: Triton types the parameters, and compiles no starred tuple)

"""Products with few rows of x: each warp streams its own part of the weight straight into its tensor core's registers.

Few rows are a matter of reading the weight, so nothing stands between memory and the product: a warp loads whole units
of the layout ``fragments`` (16 rows by 64 columns, 512 bytes at once), decodes them in place and multiplies them as
the left operand of ``mma.sync``. Of a program's warps some lie side by side along the weight's rows (ACROSS) and the
others split K (SPLIT); the sums of those meet once, at the end. A warp may take several units at a step, one below the
other (HIGH). x is read as it is, once for all of these rows, through shared memory: one row as a whole, more rows a
step at a time (SLOTS steps of x are there).

For SM80 and later, bfloat16 and float16.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .arch import multiprocessors
from .decode import undo_factor
from .launches import FewRows
from .loads import fetch, first_tokens, memory_layout, next_tokens, rows_layout, steps_along, sums_layout
from .operands import Schedule, Weight, readable, tensors_of
from .start import start
from .units import UNIT_SCALES, activate, decode_units, let_next_begin, wait_for_last


@gluon.constexpr_function
def rows_of_tile(block_m):
    """The tensor core takes eight rows of x at least."""
    return max(8, block_m)


@gluon.jit
def multiply(sums, tiles, tokens, held):
    """Each of ``sums [SPLIT, 16 * rows of units, M]`` plus its units of a step times their columns of x."""
    SPLIT: gl.constexpr = tokens.shape[0]
    MMA: gl.constexpr = sums[0].type.layout
    x = gl.convert_layout(tokens.permute([0, 2, 1]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    larger = ()
    for high in gl.static_range(len(sums)):
        words, scale = tiles[high]
        weight = decode_units(words, scale, held, tokens.dtype).reshape([SPLIT, sums[high].shape[1], 64])
        weight = gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
        larger = larger + (mma_v2(weight, x, sums[high]),)
    return larger


@gluon.constexpr_function
def added_layout(split, across):
    """Of the same where each thread adds up some of them, and then has neighbours along the rows of the weight."""
    return gl.BlockedLayout([split, 2, 1], [1, 8, 4], [1, across, split], [1, 2, 0])


@gluon.jit
def add_up(sums):
    """Each of ``sums [SPLIT, rows, M]`` added up over the warps that split K: several all at once."""
    SPLIT: gl.constexpr = sums[0].shape[0]
    ROWS: gl.constexpr = sums[0].shape[1]
    M: gl.constexpr = sums[0].shape[2]
    whole = ()
    if len(sums) == 1:
        whole = (gl.sum(sums[0], axis=0),)
    else:
        BANKS: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 8 if M > 8 else 4, [2, 1, 0])
        places = ()
        for high in gl.static_range(len(sums)):
            place = gl.allocate_shared_memory(gl.float32, [SPLIT, ROWS, M], BANKS)
            place.store(sums[high])
            places = places + (place,)
        for high in gl.static_range(len(sums)):
            whole = whole + (gl.sum(places[high].load(added_layout(SPLIT, ROWS // 16)), axis=0),)
    return whole


@gluon.jit
def zero_behind_a_barrier(SPLIT: gl.constexpr, ACROSS: gl.constexpr):
    """int32 zeros like a step's scales, that come out of shared memory.

    Loads are issued in order and must stay so: left alone, ptxas moves each next to its use, and a warp then waits for
    memory at every step. What is multiplied therefore waits for such a zero: no load may pass the barrier before it.
    """
    SCALES: gl.constexpr = memory_layout(SPLIT, ACROSS, 1)
    zeros = gl.allocate_shared_memory(gl.int32, [SPLIT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros.store(gl.zeros([SPLIT], gl.int32, layout=gl.BlockedLayout([1], [32], [SPLIT * ACROSS], [0])))
    held = zeros.load(gl.SliceLayout(1, gl.SliceLayout(2, SCALES)))
    like = gl.zeros([SPLIT, ACROSS, UNIT_SCALES], gl.int32, layout=SCALES)
    held, like = gl.broadcast(held[:, None, None], like)
    return held


@gluon.jit
def stream_product(
    x,
    x_rows,
    live,
    weight,
    rows,
    K: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EARLY: gl.constexpr,
    SLOTS: gl.constexpr,
    LEAST_KIB: gl.constexpr,
    HIGH: gl.constexpr,
):
    """HIGH times float32 ``[rows of weight, rows_of_tile]``: code x scale / undo_factor times x.

    ``rows``: see ``fetch``. DEPTH steps of the weight are on their way at any time, and SLOTS - 1 of x, if it has more
    than one row.
    """
    STEPS: gl.constexpr = steps_along(K, SPLIT)
    RING: gl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    ROUNDS: gl.constexpr = (STEPS - RING) // RING
    gl.static_assert(BLOCK_M == 1 or ROUNDS == 0 or RING % SLOTS == 0, "a step's slot is the same in every round")
    ring = ()
    for step in gl.static_range(RING):
        ring = ring + (fetch(weight, rows, step, K, SPLIT, ACROSS, HIGH),)
    if EARLY:
        # Weights are there before any kernel runs; x may be what the last one writes.
        wait_for_last()
    slots = first_tokens(x, x_rows, live, K, SPLIT, ACROSS, BLOCK_M, SLOTS, LEAST_KIB)
    held = zero_behind_a_barrier(SPLIT, ACROSS)
    nothing = gl.zeros([SPLIT, 16 * ACROSS, rows_of_tile(BLOCK_M)], gl.float32, layout=sums_layout(SPLIT, ACROSS))
    sums = (nothing,) * HIGH
    for turn in range(ROUNDS):
        fresh = ()
        for place in gl.static_range(RING):
            now = turn * RING + place
            tokens = next_tokens(slots, x, x_rows, live, now, place, K, SPLIT, ACROSS, BLOCK_M)
            sums = multiply(sums, ring[place], tokens, held)
            fresh = fresh + (fetch(weight, rows, now + RING, K, SPLIT, ACROSS, HIGH),)
        ring = fresh
    DONE: gl.constexpr = ROUNDS * RING
    for step in gl.static_range(DONE + RING, STEPS):
        ring = ring + (fetch(weight, rows, step, K, SPLIT, ACROSS, HIGH),)
    for place in gl.static_range(STEPS - DONE):
        tokens = next_tokens(slots, x, x_rows, live, DONE + place, place, K, SPLIT, ACROSS, BLOCK_M)
        sums = multiply(sums, ring[place], tokens, held)
    return add_up(sums)


@gluon.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    words,
    scale,
    global_scale,
    bias,
    out,
    M,
    N,
    stride_xm,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ACROSS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SLOTS: gl.constexpr,
    EARLY: gl.constexpr,
    LEAST_KIB: gl.constexpr,
    HIGH: gl.constexpr,
):
    """``out [M, N]``, 16 ACROSS HIGH columns of it for BLOCK_M rows of x."""
    SPLIT: gl.constexpr = gl.num_warps() // ACROSS
    if EARLY:
        let_next_begin()
    row = gl.program_id(0) * (ACROSS * HIGH)
    if HIGH > 1:
        # The last program computes again what another does, rather than less than all others.
        row = gl.minimum(row, N // 16 - ACROSS * HIGH)
    first = gl.program_id(1) * BLOCK_M
    factor = undo_factor(True)
    if global_scale is not None:
        factor = factor * gl.load(global_scale)
    m = first
    if BLOCK_M > 1:
        m += gl.arange(0, BLOCK_M, layout=rows_layout(SPLIT, ACROSS))
    live = m < M
    x_rows = m.to(gl.int64) * stride_xm
    rows = (row, N // 16 - row)
    sums = stream_product(
        x, x_rows, live, (words, scale), rows, K, SPLIT, ACROSS, DEPTH, BLOCK_M, EARLY, SLOTS, LEAST_KIB, HIGH
    )
    SUMS: gl.constexpr = sums[0].type.layout
    for high in gl.static_range(HIGH):
        acc = sums[high] * factor
        n = (row + high * ACROSS) * 16 + gl.arange(0, 16 * ACROSS, layout=gl.SliceLayout(1, SUMS))
        m = first + gl.arange(0, rows_of_tile(BLOCK_M), layout=gl.SliceLayout(0, SUMS))
        if bias is not None:
            acc += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        gl.store(
            out + m.to(gl.int64)[None, :] * N + n[:, None],
            acc.to(out.dtype.element_ty),
            mask=(n < N)[:, None] & (m < gl.minimum(M, first + BLOCK_M))[None, :],
        )


@gluon.jit(do_not_specialize=["slots_of_x"])
def experts_kernel(
    x,
    words,
    scale,
    global_scale,
    weights,
    out,
    experts,
    order,
    ends,
    block_ends,
    N,
    EXPERTS,
    slots_of_x,
    stride_xm,
    global_stride,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ACROSS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SLOTS: gl.constexpr,
    CHAINED: gl.constexpr,
    LEAST_KIB: gl.constexpr,
):
    """Rows of ``out [slots, N]`` for block ``program_id(1)`` of a schedule: see ``expert_product_kernel`` in moe.py.

    CHAINED: 1 or 2 for the first or second of two products. The second begins while the first ends. What the schedule
    says is there by then: the first lets no other begin before it has waited for it.
    """
    SPLIT: gl.constexpr = gl.num_warps() // ACROSS
    SUMS: gl.constexpr = gl.SliceLayout(0, sums_layout(SPLIT, ACROSS))
    if CHAINED == 1:
        wait_for_last()
    if CHAINED > 0:
        let_next_begin()
    block = gl.program_id(1)
    expert = gl.load(experts + block).to(gl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        if CHAINED == 2:
            # Whoever waits for this kernel relies on the one before to have ended, too.
            wait_for_last()
        return
    row = gl.program_id(0) * ACROSS
    factor = undo_factor(True)
    if global_scale is not None:
        factor = factor * gl.load(global_scale + expert * global_stride)
    m = gl.arange(0, rows_of_tile(BLOCK_M), layout=gl.SliceLayout(0, SUMS))
    if BLOCK_M == 1:
        gl.static_assert(order is None, "blocks of a schedule have several rows")
        row_of_x = block
        slot = block + m * 0
        present = True
        live = m == 0
    else:
        lane = gl.arange(0, BLOCK_M, layout=rows_layout(SPLIT, ACROSS))
        begin = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        begin += (block - gl.load(block_ends + expert - 1, mask=expert > 0, other=0)) * BLOCK_M
        end = gl.load(ends + expert)
        row_of_x = gl.load(order + gl.minimum(begin + lane, end - 1))
        slot = gl.load(order + gl.minimum(begin + m, end - 1))
        present = begin + lane < end
        live = begin + m < end
    x_rows = (row_of_x // slots_of_x).to(gl.int64) * stride_xm
    weight = (words + expert * N * (K // 8), scale + expert * N * (K // 32))
    rows = (row, N // 16 - row)
    sums = stream_product(
        x, x_rows, present, weight, rows, K, SPLIT, ACROSS, DEPTH, BLOCK_M, CHAINED == 2, SLOTS, LEAST_KIB, 1
    )
    acc = activate(sums[0] * factor, ACTIVATION)
    if weights is not None:
        acc = acc * gl.load(weights + slot).to(gl.float32)[None, :]
    n = row * 16 + gl.arange(0, 16 * ACROSS, layout=gl.SliceLayout(1, SUMS))
    gl.store(
        out + slot.to(gl.int64)[None, :] * N + n[:, None],
        acc.to(out.dtype.element_ty),
        mask=(n < N)[:, None] & live[None, :],
    )


def linear(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: FewRows,
) -> None:
    """``out [M, N]`` = activation(rows ``[M, K]`` @ weight.T + bias), a weight in ``fragments`` and 16-bit rows."""
    m, k = rows.shape
    n = out.shape[1]
    rows = readable(rows)
    constants = launch.constants
    high = max(1, min(launch.high, n // (16 * launch.across)))
    tiles = -(-(n // 16) // (launch.across * high)), -(-m // launch.block_m)
    if launch.room and tiles[0] * tiles[1] > launch.room * multiprocessors(rows.device):
        # Better unevenly than one after the other: that GPU is not as large as the one that the launch was chosen for.
        constants = constants | {"LEAST_KIB": 0}
    start(
        linear_kernel,
        tiles,
        rows,
        weight.words,
        weight.scale_pairs,
        weight.global_scale,
        bias,
        out,
        m,
        n,
        rows.stride(0),
        K=k,
        ACTIVATION=activation,
        EARLY=launch.early,
        HIGH=high,
        launch_pdl=launch.early,
        **constants,
    )


def expert_product(
    plan: Schedule,
    rows: torch.Tensor,
    slots_of_row: int,
    weight: Weight,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: FewRows,
    chained: int = 0,
) -> None:
    """Rows of ``out [slots, N]``: slot s from row ``s // slots_of_row`` by its expert, as ``plan`` has them.

    chained: 1 or 2 for the first or second of two products that follow each other (SM90).
    """
    n = out.shape[1]
    rows = readable(rows)
    start(
        experts_kernel,
        (-(-(n // 16) // launch.across), plan.blocks),
        rows,
        weight.words,
        weight.scale_pairs,
        weight.global_scale,
        routing,
        out,
        *tensors_of(plan),
        n,
        weight.count,
        slots_of_row,
        rows.stride(0),
        weight.global_stride,
        K=rows.shape[1],
        ACTIVATION=activation,
        CHAINED=chained,
        launch_pdl=chained > 0,
        **launch.constants,
    )
