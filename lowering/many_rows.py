# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""Products with many rows of x on Hopper: a loader and two groups of multipliers work side by side in one program.

The loader's one warp keeps the copy engine busy: codes, scales and rows of x go into a ring of stages in shared memory.
Each group of four warps turns the codes of its 64 weight rows into the left operand of ``wgmma``, in its own registers,
and multiplies it by the rows of x from shared memory. So a decoded weight never goes through shared memory, whose
bandwidth the product needs for x; and while one group decodes, the other's product runs. x comes in the dot order (see
decode.py and gather.py), in which the codes that a lane holds are its own operands.

Programs stay: there is one for each multiprocessor, or two. A *step* is 64 columns of K for one tile. Which tiles and
steps are a program's own is in sharing.py; where several share a tile, the one that begins it adds, in order, the sums
that the others have left in ``parts`` (epilogue.py). It waits only for programs that started before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arch import ManyRows
from .epilogue import GROUP_ROWS, GROUPS, TILE_COLUMNS, collect, finish, leave
from .gather import in_dot_order
from .operands import Schedule, Weight
from .reference import NO_ACTIVATION
from .sharing import locate, place, rows_of_block, shares
from .units import UNIT_SCALES, UNIT_WORDS, decode_units, let_next_begin, wait_for_last

# Its names in Triton 3.6 and 3.9.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

STEP = gl.constexpr(64)
UNITS_OF_TILE = gl.constexpr(8)


@gluon.jit
def stretch(it, share, UNITS: gl.constexpr):
    """(tile, first step, end) of the steps of one tile that follow a program's step ``it``."""
    begin, count, shared, me = share
    tile, first = locate(it, share, UNITS)
    return tile, first, gl.where(it < count, gl.minimum(UNITS, first + count - it), UNITS)


@gluon.jit
def where_from(tile, tiles, plan, N, BM: gl.constexpr):
    """(first row of x, first unit of the weight) of a tile."""
    m, n = place(tile, tiles, plan)
    row = m * BM
    unit = n * UNITS_OF_TILE
    if plan[0] is not None:
        expert, row, end = rows_of_block(m, plan, BM)
        unit += expert * (N // 16)
    return row, unit


@gluon.jit
def load_weight(codes_desc, scale_desc, ring, stage, unit, k):
    """Codes and scales of a step. Its stage is full when x has come, too."""
    tokens, codes, scales, full, empty = ring
    mbarrier.expect(full.index(stage), tokens.shape[1] * STEP * 2 + UNITS_OF_TILE * 576)
    copy_in(codes_desc, [unit, k * UNIT_WORDS], full.index(stage), codes.index(stage))
    copy_in(scale_desc, [unit, k * UNIT_SCALES], full.index(stage), scales.index(stage))


@gluon.jit
def load(x_desc, codes_desc, scale_desc, ring, share, total, tiles, plan, N, UNITS: gl.constexpr):
    """The loader. The first weights are on their way before the kernel that writes x has ended.

    Where a tile lies takes divisions, so that is worked out once for all its steps.
    """
    tokens, codes, scales, full, empty = ring
    STAGES: gl.constexpr = tokens.shape[0]
    BM: gl.constexpr = tokens.shape[1]
    early = 0
    if total > 0:
        tile, first, last = stretch(0, share, UNITS)
        row, unit = where_from(tile, tiles, plan, N, BM)
        early = gl.minimum(last - first, STAGES)
        for it in range(early):
            load_weight(codes_desc, scale_desc, ring, it, unit, first + it)
    wait_for_last()
    it = 0
    while it < total:
        tile, first, last = stretch(it, share, UNITS)
        row, unit = where_from(tile, tiles, plan, N, BM)
        for k in range(first, last):
            stage = it % STAGES
            if it >= early:
                # Of a stage that nothing was in yet, this is over at once.
                mbarrier.wait(empty.index(stage), it // STAGES & 1 ^ 1)
                load_weight(codes_desc, scale_desc, ring, stage, unit, k)
            copy_in(x_desc, [row, k * STEP], full.index(stage), tokens.index(stage))
            it += 1


@gluon.constexpr_function
def sums_layout(bm):
    """Accumulators of a group: 64 rows of the weight by the tile's rows of x."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, bm, 16])


@gluon.constexpr_function
def unit_layout(width):
    """Four units ``[4, width * 32]``: one for each warp, each lane ``width`` neighbours."""
    return gl.BlockedLayout([1, width], [1, 32], [4, 1], [1, 0])


@gluon.jit
def decode(ring, stage, GROUP: gl.constexpr):
    """The group's 64 rows of a stage, ``[64, 64]`` in dot order, where ``wgmma`` takes them."""
    tokens, codes, scales, full, empty = ring
    WORDS: gl.constexpr = unit_layout(4)
    SCALES: gl.constexpr = unit_layout(1)
    words = codes.index(stage).slice(GROUP * 4, 4).load(WORDS).reshape([4, 1, UNIT_WORDS])
    scale = scales.index(stage).slice(GROUP * 4, 4).load(SCALES).reshape([4, 1, UNIT_SCALES])
    weight = decode_units(words, scale, 0, tokens.dtype)
    weight = weight.permute([0, 1, 2, 3, 5, 6, 7, 4, 8]).reshape([GROUP_ROWS, STEP])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, sums_layout(tokens.shape[1]), 2)
    return gl.convert_layout(weight, LEFT, assert_trivial=True)


@gluon.jit
def multiply(
    ring,
    share,
    parts,
    tiles,
    plan,
    result,
    GROUP: gl.constexpr,
    UNITS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DOT_ORDER: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """A group of multipliers.

    It waits for each product before the next decode: the compiler would serialise the products of a step if registers
    of one still on its way were written, and the other group fills the gap.
    """
    tokens, codes, scales, full, empty = ring
    STAGES: gl.constexpr = tokens.shape[0]
    BM: gl.constexpr = tokens.shape[1]
    sums, counters, each, total = parts
    it = 0
    while it < total:
        tile, first, last = stretch(it, share, UNITS)
        acc = gl.zeros([GROUP_ROWS, BM], gl.float32, layout=sums_layout(BM))
        for _ in range(first, last):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), it // STAGES & 1)
            weight = decode(ring, stage, GROUP)
            acc = warpgroup_mma(weight, tokens.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage), count=1)
            it += 1
        if first > 0:
            leave(acc, parts, share, tile, GROUP, UNITS)
        else:
            if last < UNITS:
                acc = collect(acc, parts, share, last, GROUP, UNITS, RESIDENT)
            finish(acc, tile, tiles, plan, result, GROUP, ACTIVATION, DOT_ORDER)


@gluon.jit(do_not_specialize=["M"])
def product_kernel(
    x_desc,
    codes_desc,
    scale_desc,
    global_scale,
    bias,
    weights,
    out,
    parts,
    counters,
    experts,
    order,
    ends,
    block_ends,
    M,
    N,
    EXPERTS,
    global_stride,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DOT_ORDER: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """``out [M, N]`` of a dense product, or the rows of all blocks of experts, x then being sorted by expert.

    parts float32 ``[programs, 128 BM]``, counters int32 ``[programs, 2]`` of zeros: where programs leave sums to each
    other; counters are zero again at the end. With ``weights`` a row goes to ``out[order[row]]``, multiplied. With
    ``DOT_ORDER`` the columns of ``out`` are left in that order.
    """
    let_next_begin()
    UNITS: gl.constexpr = K // STEP
    if experts is None:
        tiles = (gl.cdiv(M, BM), gl.cdiv(N, TILE_COLUMNS))
    else:
        tiles = (gl.load(block_ends + EXPERTS - 1).to(gl.int32), gl.cdiv(N, TILE_COLUMNS))
    share, total, each = shares(tiles[0] * tiles[1], UNITS)
    tokens = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, STEP], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, UNITS_OF_TILE, UNIT_WORDS], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [STAGES, UNITS_OF_TILE, UNIT_SCALES], scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    plan = (experts, ends, block_ends)
    ring = (tokens, codes, scales, full, empty)
    left = (parts, counters, each, total)
    result = (out, M, N, global_scale, global_stride, bias, weights, order)
    gl.warp_specialize(
        [
            (multiply, (ring, share, left, tiles, plan, result, 0, UNITS, ACTIVATION, DOT_ORDER, RESIDENT)),
            (multiply, (ring, share, left, tiles, plan, result, 1, UNITS, ACTIVATION, DOT_ORDER, RESIDENT)),
            (load, (x_desc, codes_desc, scale_desc, ring, share, total, tiles, plan, N, UNITS)),
        ],
        [4, 1],
        [240 if RESIDENT == 1 else 104, 24],
    )


def linear(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: ManyRows,
) -> None:
    """``out [M, N]`` = activation(rows ``[M, K]`` @ weight.T + bias), a weight in ``fragments`` and 16-bit rows."""
    m, k = rows.shape
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(out.shape[1], TILE_COLUMNS.value)
    programs = max(1, min(_programs(rows, launch), tiles * (k // STEP.value) // _FEWEST_STEPS))
    counters = _counters(rows, programs)
    _product(in_dot_order(rows, counters), weight, bias, None, out, None, activation, launch, counters)


def experts(
    plan: Schedule,
    x: torch.Tensor,
    choices: int,
    up: Weight,
    down: Weight,
    routing: torch.Tensor,
    slots: torch.Tensor,
    activation: str,
    launch: ManyRows,
) -> None:
    """Rows of ``slots [tokens * choices, N]``: slot s of token ``s // choices`` through its expert's both products."""
    counters = _counters(x, _programs(x, launch))
    rows = in_dot_order(x, counters, plan, choices)
    hidden = x.new_empty((slots.shape[0], up.codes.shape[-2]))
    _product(rows, up, None, None, hidden, plan, activation, launch, counters, dot_order=True)
    _product(hidden, down, None, routing, slots, plan, NO_ACTIVATION, launch, counters)


def gathered(plan: Schedule, x: torch.Tensor, weight: Weight, out: torch.Tensor, launch: ManyRows) -> None:
    """Rows of ``out``: row r of x by its expert, as ``plan`` has them."""
    counters = _counters(x, _programs(x, launch))
    rows = in_dot_order(x, counters, plan)
    # The routing weights say that each result goes back to its slot.
    _product(rows, weight, None, x.new_ones(len(x)), out, plan, NO_ACTIVATION, launch, counters)


# A program that got fewer steps would be all beginning and end.
_FEWEST_STEPS = 4


def _counters(like: torch.Tensor, programs: int) -> torch.Tensor:
    return like.new_empty((programs, GROUPS.value), dtype=torch.int32)


def _product(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    plan: Schedule | None,
    activation: str,
    launch: ManyRows,
    counters: torch.Tensor,
    *,
    dot_order: bool = False,
) -> None:
    """``rows [M, K]`` in dot order, one row of ``counters`` for each program; it follows a kernel that zeroed them."""
    m, k = rows.shape
    units = UNITS_OF_TILE.value
    product_kernel[(len(counters),)](
        TensorDescriptor.from_tensor(rows, [launch.block_m, STEP.value], _swizzled()),
        TensorDescriptor.from_tensor(weight.words.view(-1, k * 2), [units, UNIT_WORDS.value], _straight(32)),
        TensorDescriptor.from_tensor(weight.scale_pairs.view(-1, k // 2), [units, UNIT_SCALES.value], _straight(16)),
        weight.global_scale,
        bias,
        routing,
        out,
        rows.new_empty(len(counters) * launch.block_m * TILE_COLUMNS.value, dtype=torch.float32),
        counters,
        plan.experts if plan else None,
        plan.order if plan else None,
        plan.ends if plan else None,
        plan.block_ends if plan else None,
        m,
        out.shape[1],
        weight.count,
        weight.global_stride,
        K=k,
        ACTIVATION=activation,
        DOT_ORDER=dot_order,
        launch_pdl=True,
        **launch.constants,
    )


def _programs(like: torch.Tensor, launch: ManyRows) -> int:
    return _multiprocessors(like.device.index) * launch.resident


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _swizzled() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _straight(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
