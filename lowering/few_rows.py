# ruff: noqa: ANN001, ANN201, RUF005, SIM300  (kernels: Triton types the parameters, and compiles no starred tuple)

"""Products with few rows of x: each warp streams its own part of the weight straight into its tensor core's registers.

Few rows are a matter of reading the weight, so nothing stands between memory and the product: a warp loads whole units
of the layout ``fragments`` (16 rows by 64 columns, 512 bytes at once), decodes them in place and multiplies them as
the left operand of ``mma.sync``. Warps of a program split K; their sums meet once, at the end. x is read as it is: in
the order in which a unit is multiplied a lane's columns are neighbours.

Written in Gluon, because the point is which thread holds what; every conversion between layouts is asserted to move
nothing. For SM80 and later, bfloat16 and float16.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .arch import FewRows
from .decode import fragments_assembly, scale_assembly, undo_factor
from .operands import Schedule, Weight

UNIT_WORDS, UNIT_SCALES = gl.constexpr(128), gl.constexpr(64)


@gluon.constexpr_function
def memory_layout(warps, rows, width):
    """Units as memory has them: ``[warps, rows, width * 32]``, each lane ``width`` neighbours."""
    return gl.BlockedLayout([1, rows, width], [1, 1, 32], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def tokens_layout(warps, block_m):
    """x ``[warps, block_m, 64]``: lane ``4 g + t`` holds block t of rows g, g + 8, ...: what its product takes."""
    columns = [[0, 0, 1 << bit] for bit in range(4)]
    rows = [[0, 8 << bit, 0] for bit in range((block_m // 8).bit_length() - 1)]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        columns + rows, lanes, [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)], [], [warps, block_m, 64]
    )


@gluon.jit
def load_unit(
    pointer, row, step, live, UNITS: gl.constexpr, WARPS: gl.constexpr, ROWS: gl.constexpr, SIZE: gl.constexpr
):
    """Unit ``step * WARPS + warp`` of ROWS neighbouring rows of units, ``[WARPS, ROWS, SIZE]``; zero outside."""
    LAYOUT: gl.constexpr = memory_layout(WARPS, ROWS, SIZE // 32)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    extra = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    element = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    unit = step * WARPS + warp
    where = pointer + (row.to(gl.int64) * UNITS) * SIZE + (extra * UNITS + unit) * SIZE + element
    # The codes are read once: they need not stay near.
    NEAR: gl.constexpr = "" if SIZE == UNIT_SCALES else ".cg"
    if ROWS == 1 and UNITS % WARPS == 0:
        return gl.load(where, cache_modifier=NEAR)
    return gl.load(where, mask=(extra < live) & (unit < UNITS), other=0, cache_modifier=NEAR)


@gluon.jit
def load_tokens(x, x_rows, step, K: gl.constexpr, WARPS: gl.constexpr, BLOCK_M: gl.constexpr):
    """The 64 columns of x that belong to the units of ``step``: ``[WARPS, BLOCK_M, 64]``; zero outside."""
    LAYOUT: gl.constexpr = tokens_layout(WARPS, BLOCK_M)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    k = (step * WARPS + warp) * 64 + column
    return gl.load(x + x_rows[None, :, None] + k, mask=k < K, other=0.0)


@gluon.jit
def decode_units(words, scale, held, DTYPE: gl.constexpr):
    """words int32 ``[W, R, 128]``, scale uint8 ``[W, R, 64]`` as memory has them -> ``DTYPE``, times 1 / undo_factor.

    The result is ``[W, R, 2, 8, 4, 2, 2, 2, 2]``: rows of a unit in two dimensions, its columns in five. ``held`` is a
    zero that the result waits for.
    """
    WARPS: gl.constexpr = words.shape[0]
    ROWS: gl.constexpr = words.shape[1]
    HALF: gl.constexpr = DTYPE == gl.float16
    SCALE_ASSEMBLY: gl.constexpr = scale_assembly(HALF)
    CODES_ASSEMBLY: gl.constexpr = fragments_assembly(HALF)
    # Lane (g, t) owns block t of the rows g and g + 8 (half h): two words (q) and one scale for each.
    word = words.reshape([WARPS, ROWS, 8, 4, 2, 2]).permute([0, 1, 4, 2, 3, 5])  # W, R, h, g, t, q
    byte = (scale.to(gl.int32) | held).reshape([WARPS, ROWS, 8, 4, 2]).permute([0, 1, 4, 2, 3])  # W, R, h, g, t
    factor = gl.inline_asm_elementwise(SCALE_ASSEMBLY, "=r,r", [byte], dtype=gl.int32, is_pure=True, pack=1)
    factor = gl.convert_layout(gl.join(factor, factor), word.type.layout, assert_trivial=True)
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        CODES_ASSEMBLY,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [word, factor],
        dtype=(gl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    even = gl.join(gl.join(p0, p4), gl.join(p2, p6))
    odd = gl.join(gl.join(p1, p5), gl.join(p3, p7))
    # W, R, h, g, t, q, k bit 2, k bit 1, k bit 0
    return gl.join(even, odd).to(DTYPE, bitcast=True)


@gluon.jit
def multiply(acc, tile, tokens, held):
    """``acc [W, 16 R, M]`` plus a step's units times their columns of x."""
    WARPS: gl.constexpr = tokens.shape[0]
    BLOCK_M: gl.constexpr = tokens.shape[1]
    MMA: gl.constexpr = acc.type.layout
    # The tensor core takes columns in the dot order of decode.py: in it, a lane's own columns are its operands.
    weight = decode_units(tile[0], tile[1], held, tokens.dtype).permute([0, 1, 2, 3, 5, 6, 7, 4, 8])
    weight = weight.reshape([WARPS, acc.shape[1], 64])
    weight = gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    x = tokens.reshape([WARPS, BLOCK_M, 4, 4, 2, 2]).permute([0, 3, 4, 2, 5, 1]).reshape([WARPS, 64, BLOCK_M])
    return mma_v2(weight, gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True), acc)


@gluon.jit
def fetch(words, scale, row, step, live, UNITS: gl.constexpr, WARPS: gl.constexpr, ROWS: gl.constexpr):
    return (
        load_unit(words, row, step, live, UNITS, WARPS, ROWS, UNIT_WORDS),
        load_unit(scale, row, step, live, UNITS, WARPS, ROWS, UNIT_SCALES),
    )


@gluon.jit
def let_next_begin():
    """Programmatic dependent launch: the next kernel may begin, as far as its ``wait_for_last``."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_last():
    """Until the kernel before has ended and what it wrote is there."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def stream_product(
    x,
    x_rows,
    words,
    scale,
    row,
    live_rows,
    K: gl.constexpr,
    WARPS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EARLY: gl.constexpr,
):
    """float32 ``[16 ROWS, BLOCK_M]``: code x scale / undo_factor times x, for the units' rows from ``row`` on.

    DEPTH steps of the weight are on their way at any time. Loads are issued in order and must stay so: left alone,
    ptxas moves each next to its use, and a warp then waits for memory at every step. What is multiplied therefore waits
    for a zero (``held``) that comes out of shared memory behind a barrier, which no load may pass.
    """
    UNITS: gl.constexpr = K // 64
    STEPS: gl.constexpr = (UNITS + WARPS - 1) // WARPS
    RING: gl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    ROUNDS: gl.constexpr = (STEPS - RING) // RING
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    SCALES: gl.constexpr = memory_layout(WARPS, ROWS, 2)
    zeros = gl.allocate_shared_memory(gl.int32, [WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros.store(gl.zeros([WARPS], gl.int32, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))
    ring = ()
    for step in gl.static_range(RING):
        ring = ring + (fetch(words, scale, row, step, live_rows, UNITS, WARPS, ROWS),)
    if EARLY:
        # Weights are there before any kernel runs; x may be what the last one writes.
        wait_for_last()
    tokens = (load_tokens(x, x_rows, 0, K, WARPS, BLOCK_M),)
    held = zeros.load(gl.SliceLayout(1, gl.SliceLayout(2, SCALES)))
    held, _ = gl.broadcast(held[:, None, None], gl.zeros([WARPS, ROWS, UNIT_SCALES], gl.int32, layout=SCALES))
    acc = gl.zeros([WARPS, 16 * ROWS, BLOCK_M], gl.float32, layout=MMA)
    for turn in range(ROUNDS):
        fresh = ()
        for slot in gl.static_range(RING):
            now = turn * RING + slot
            tokens = tokens + (load_tokens(x, x_rows, now + 1, K, WARPS, BLOCK_M),)
            acc = multiply(acc, ring[slot], tokens[slot], held)
            fresh = fresh + (fetch(words, scale, row, now + RING, live_rows, UNITS, WARPS, ROWS),)
        ring = fresh
        tokens = tokens[RING:]
    DONE: gl.constexpr = ROUNDS * RING
    for step in gl.static_range(DONE + RING, STEPS):
        ring = ring + (fetch(words, scale, row, step, live_rows, UNITS, WARPS, ROWS),)
    for slot in gl.static_range(STEPS - DONE):
        if DONE + slot + 1 < STEPS:
            tokens = tokens + (load_tokens(x, x_rows, DONE + slot + 1, K, WARPS, BLOCK_M),)
        acc = multiply(acc, ring[slot], tokens[slot], held)
    return gl.sum(acc, axis=0)


@gluon.jit
def activate(acc, ACTIVATION: gl.constexpr):
    """The activation of a sum; not homogeneous, so it comes after the global scale."""
    if ACTIVATION == "relu2":
        acc = gl.where(acc < 0.0, 0.0, acc)  # which keeps NaN
        acc = acc * acc
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + gl.exp(-acc))
    else:
        gl.static_assert(ACTIVATION == "none", "unknown activation")
    return acc


@gluon.constexpr_function
def sums_layout(warps):
    """Of a finished tile ``[16 ROWS, BLOCK_M]``."""
    return gl.SliceLayout(
        0, gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
    )


@gluon.constexpr_function
def rows_layout(warps, block_m):
    """Of the rows of x that a tile reads, ``[BLOCK_M]``."""
    return gl.SliceLayout(0, gl.SliceLayout(2, tokens_layout(warps, block_m)))


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
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EARLY: gl.constexpr,
):
    """``out [M, N]``, 16 ROWS columns of it for BLOCK_M rows of x."""
    WARPS: gl.constexpr = gl.num_warps()
    if EARLY:
        let_next_begin()
    row = gl.program_id(0) * ROWS
    first = gl.program_id(1) * BLOCK_M
    factor = undo_factor(True)
    if global_scale is not None:
        factor = factor * gl.load(global_scale)
    # Rows past the end read the last one again; they are not stored.
    m = gl.minimum(first + gl.arange(0, BLOCK_M, layout=rows_layout(WARPS, BLOCK_M)), M - 1)
    x_rows = m.to(gl.int64) * stride_xm
    acc = stream_product(x, x_rows, words, scale, row, N // 16 - row, K, WARPS, ROWS, DEPTH, BLOCK_M, EARLY)
    acc = acc * factor
    n = row * 16 + gl.arange(0, 16 * ROWS, layout=gl.SliceLayout(1, sums_layout(WARPS)))
    m = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, sums_layout(WARPS)))
    if bias is not None:
        acc += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    acc = activate(acc, ACTIVATION)
    gl.store(
        out + m.to(gl.int64)[None, :] * N + n[:, None],
        acc.to(out.dtype.element_ty),
        mask=(n < N)[:, None] & (m < M)[None, :],
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
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Rows of ``out [slots, N]`` for block ``program_id(1)`` of a schedule: see ``expert_product_kernel`` in moe.py."""
    WARPS: gl.constexpr = gl.num_warps()
    block = gl.program_id(1)
    expert = gl.load(experts + block).to(gl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    row = gl.program_id(0) * ROWS
    factor = undo_factor(True)
    if global_scale is not None:
        factor = factor * gl.load(global_scale + expert * global_stride)
    lane = gl.arange(0, BLOCK_M, layout=rows_layout(WARPS, BLOCK_M))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, sums_layout(WARPS)))
    if order is None:
        source = block + lane * 0
        slot = block + m * 0
        live = m == 0
    else:
        begin = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        begin += (block - gl.load(block_ends + expert - 1, mask=expert > 0, other=0)) * BLOCK_M
        end = gl.load(ends + expert)
        source = gl.load(order + gl.minimum(begin + lane, end - 1))
        slot = gl.load(order + gl.minimum(begin + m, end - 1))
        live = begin + m < end
    x_rows = (source // slots_of_x).to(gl.int64) * stride_xm
    words += expert * N * (K // 8)
    scale += expert * N * (K // 16)
    acc = stream_product(x, x_rows, words, scale, row, N // 16 - row, K, WARPS, ROWS, DEPTH, BLOCK_M, False)
    acc = activate(acc * factor, ACTIVATION)
    if weights is not None:
        acc = acc * gl.load(weights + slot).to(gl.float32)[None, :]
    n = row * 16 + gl.arange(0, 16 * ROWS, layout=gl.SliceLayout(1, sums_layout(WARPS)))
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
    linear_kernel[(triton.cdiv(n // 16, launch.rows), triton.cdiv(m, launch.block_m))](
        rows,
        weight.words,
        weight.scale,
        weight.global_scale,
        bias,
        out,
        m,
        n,
        rows.stride(0),
        K=k,
        ACTIVATION=activation,
        EARLY=launch.early,
        launch_pdl=launch.early,
        **launch.constants,
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
) -> None:
    """Rows of ``out [slots, N]``: slot s from row ``s // slots_of_row`` by its expert, as ``plan`` has them."""
    n = out.shape[1]
    experts_kernel[(triton.cdiv(n // 16, launch.rows), plan.blocks)](
        rows,
        weight.words,
        weight.scale,
        weight.global_scale,
        routing,
        out,
        plan.experts,
        plan.order,
        plan.ends,
        plan.block_ends,
        n,
        weight.count,
        slots_of_row,
        rows.stride(0),
        weight.global_stride,
        K=rows.shape[1],
        ACTIVATION=activation,
        **launch.constants,
    )
