# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""Products with many rows of x on Hopper: a loader and groups of multipliers work side by side in one program.

The loader's one warp keeps the copy engine busy: codes, scales and rows of x go into a ring of stages in shared memory.
Each group of four warps turns the codes of 64 weight rows into the left operand of ``wgmma``, in its own registers, and
multiplies it by the rows of x from shared memory (bands.py). So no decoded weight goes through shared memory, whose
bandwidth the product needs for x; and while one group decodes, the products of the others run. Some groups lie side by
side along the weight's rows (ACROSS); with few rows of x others take every second step of K (SPLIT).

Programs stay: there is one for each multiprocessor, or two. A *step* is DEEP units, 64 columns of K each, for one tile.
Which tiles and steps are a program's own is in sharing.py; where several share a tile, the one that begins it adds, in
order, the sums that the others have left in ``parts`` (exchange.py). It waits only for programs that started before it.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arch import multiprocessors
from .bands import bands_with, begin_of, in_two_boxes, number_of_bands, product_of, products_with
from .epilogue import GROUP_ROWS, finish, meet, place_to_meet, shared_factor
from .exchange import collect, leave, places
from .gather import by_expert
from .launches import ManyRows
from .loader import load
from .loads import next_power_of_two
from .operands import Schedule, Weight, tensors_of
from .reference import NO_ACTIVATION
from .sharing import extent, place, rows_of_box, shares, stretch, ways
from .start import start
from .units import UNIT_COLUMNS, UNIT_SCALES, UNIT_WORDS, let_next_begin


@gluon.jit
def multiply(
    work,
    GROUP: gl.constexpr,
    PART: gl.constexpr,
    ACROSS: gl.constexpr,
    SPLIT: gl.constexpr,
    STEPS: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """A group of multipliers: number GROUP along the weight's rows, and of the steps every SPLIT-th from PART on."""
    ring, meeting, share, parts, tiles, plan, result = work
    sums, flags, each, total = parts
    out, M, N, global_scale, global_stride, bias, weights, order = result
    BANDS: gl.constexpr = number_of_bands(BM, BAND)
    factor = shared_factor(plan, result)
    it = 0
    turn = 0
    while it < total:
        tile, first, last = stretch(it, share, STEPS)
        tile_m, tile_n = place(tile, tiles, plan)
        expert, row, end = extent(tile_m, M, plan, BM)
        mine = it + (PART + SPLIT - it % SPLIT) % SPLIT
        it += last - first
        # Of a dense product all tiles are nearly full: where a few rows are left over, they have a launch of their own.
        bands = BANDS if plan[0] is None else bands_with(end - row, BM, BAND)
        if plan[0] is not None and in_two_boxes(BM, BAND):
            accs = (product_of(ring, (mine, it), end - row, GROUP, SPLIT, BM),)
        else:
            accs = products_with(ring, (mine, it), bands, GROUP, SPLIT, BM, BAND, BANDS)
        if (first == 0) & (last < STEPS):
            accs = collect(accs, bands, parts, share, last, GROUP, PART, ACROSS, SPLIT, STEPS, BM, BAND, AT_ONCE)
        if SPLIT > 1:
            gl.static_assert(BANDS == 1, "groups that share K have one band")
            accs = (meet(accs[0], meeting, turn, GROUP, PART),)
            turn += 1
        if PART == 0:
            if first > 0:
                leave(accs, bands, parts, share, GROUP, ACROSS, SPLIT, BM, BAND)
            else:
                column = (tile_n * ACROSS + GROUP) * GROUP_ROWS
                for nth in gl.static_range(BANDS):
                    if nth < bands:
                        rows = (expert, row + begin_of(nth, BM, BAND), end)
                        finish(accs[nth], factor, column, rows, plan, result, BM, BAND, ACTIVATION)


@gluon.jit(do_not_specialize=["M", "shared", "each", "apart", "longest"])
def product_kernel(
    x_desc,
    codes_desc,
    scale_desc,
    global_scale,
    bias,
    weights,
    out,
    parts,
    flags,
    experts,
    order,
    ends,
    block_ends,
    M,
    N,
    EXPERTS,
    global_stride,
    shared,
    each,
    apart,
    longest,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    DEEP: gl.constexpr,
    ACROSS: gl.constexpr,
    SPLIT: gl.constexpr,
    LEAD: gl.constexpr,
    IDLE: gl.constexpr,
    AT_ONCE: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER: gl.constexpr,
):
    """``out [M, N]`` of a dense product, or the rows of all blocks of experts, x then being sorted by expert.

    parts float32 ``[programs, 64 ACROSS BM]``, or twice that, and flags int64 ``[programs, ACROSS]``: where programs
    leave sums to each other (exchange.py); they may hold anything. With ``weights`` a row goes to ``out[order[row]]``,
    multiplied. ``shared`` to ``longest``: what `ways` finds for a dense product.
    """
    let_next_begin()
    gl.static_assert(STAGES % SPLIT == 0, "a stage is always read by the same group of those that share K")
    STEPS: gl.constexpr = (K // UNIT_COLUMNS + DEEP - 1) // DEEP
    UNITS_OF_TILE: gl.constexpr = 4 * ACROSS
    columns = gl.cdiv(N, ACROSS * GROUP_ROWS)
    rows = gl.cdiv(M, BM) if experts is None else gl.load(block_ends + EXPERTS - 1).to(gl.int32)
    tiles = (rows, columns)
    if experts is not None:
        shared, each, apart, longest = ways(rows * columns, gl.num_programs(0), STEPS, LEAD, IDLE)
    share, total = shares(rows * columns, (shared, each, apart, longest), STEPS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = next_power_of_two(BM)
    tokens = gl.allocate_shared_memory(x_desc.dtype, [STAGES * DEEP, ROWS, UNIT_COLUMNS], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, UNITS_OF_TILE, DEEP * UNIT_WORDS], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [STAGES, UNITS_OF_TILE, DEEP * UNIT_SCALES], scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=ACROSS)
    meeting = place_to_meet(BM, ACROSS, SPLIT)
    fence_async_shared()
    plan = (experts, ends, block_ends)
    ring = (tokens, codes, scales, full, empty)
    result = (out, M, N, global_scale, global_stride, bias, weights, order)
    work = (ring, meeting, share, (parts, flags, each, total), tiles, plan, result)
    if ACROSS * SPLIT == 2:
        gl.warp_specialize(
            [
                (multiply, (work, 0, 0, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (multiply, (work, 1 % ACROSS, 1 // ACROSS, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (load, (x_desc, codes_desc, scale_desc, ring, share, total, tiles, plan, M, N, STEPS, BM, BAND)),
            ],
            [4, 1],
            [REGISTERS, LOADER],
        )
    else:
        gl.static_assert(ACROSS * SPLIT == 4, "two groups of multipliers or four")
        gl.warp_specialize(
            [
                (multiply, (work, 0, 0, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (multiply, (work, 1 % ACROSS, 1 // ACROSS, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (multiply, (work, 2 % ACROSS, 2 // ACROSS, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (multiply, (work, 3 % ACROSS, 3 // ACROSS, ACROSS, SPLIT, STEPS, BM, BAND, ACTIVATION, AT_ONCE)),
                (load, (x_desc, codes_desc, scale_desc, ring, share, total, tiles, plan, M, N, STEPS, BM, BAND)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, LOADER],
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
    tiles, units = -(-m // launch.block_m) * -(-out.shape[1] // launch.block_n), k // UNIT_COLUMNS.value
    programs = max(1, min(_programs(rows, launch), tiles * units // _FEWEST_UNITS))
    found = ways.fn(tiles, programs, -(-units // launch.deep), launch.lead, launch.idle)
    _product(rows, weight, bias, None, out, None, activation, launch, programs, found)


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
    programs = _programs(x, launch)
    hidden = x.new_empty((slots.shape[0], up.codes.shape[-2]))
    _product(by_expert(x, plan, choices), up, None, None, hidden, plan, activation, launch, programs)
    _product(hidden, down, None, routing, slots, plan, NO_ACTIVATION, launch, programs)


def gathered(plan: Schedule, x: torch.Tensor, weight: Weight, out: torch.Tensor, launch: ManyRows) -> None:
    """Rows of ``out``: row r of x by its expert, as ``plan`` has them."""
    rows = by_expert(x, plan)
    # The routing weights say that each result goes back to its slot.
    _product(rows, weight, None, x.new_ones(len(x)), out, plan, NO_ACTIVATION, launch, _programs(x, launch))


# A program that got fewer would be all beginning and end.
_FEWEST_UNITS = 4


def _product(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    plan: Schedule | None,
    activation: str,
    launch: ManyRows,
    programs: int,
    found: tuple[int, ...] = (0,) * 4,
) -> None:
    """A launch: ``rows [M, K]`` are those of x or, with ``plan``, sorted by expert.

    found: see `ways`; how many tiles experts have, the device alone knows.
    """
    m, k = rows.shape
    if rows.data_ptr() % 16 or rows.stride(0) % 8 or rows.stride(0) < k:
        # The copy engine cannot read such rows; of rows that overlap, as expanded ones do, nobody says that it can.
        rows = rows.clone(memory_format=torch.contiguous_format)
    units, deep, rows_of_units = launch.block_n // 16, launch.deep, weight.count * out.shape[1] // 16
    box = [_rows_of_box(launch.block_m, launch.band), UNIT_COLUMNS.value]
    start(
        product_kernel,
        (programs,),
        _Boxes(rows, m, k, rows.stride(0), box, _swizzled()),
        _Boxes(weight.words, rows_of_units, k * 2, k * 2, [units, deep * UNIT_WORDS.value], _straight(32)),
        _Boxes(weight.scale_pairs, rows_of_units, k // 2, k // 2, [units, deep * UNIT_SCALES.value], _straight(16)),
        weight.global_scale,
        bias,
        routing,
        out,
        *places(rows, programs, launch),
        *tensors_of(plan),
        m,
        out.shape[1],
        weight.count,
        weight.global_stride,
        *found,
        K=k,
        ACTIVATION=activation,
        launch_pdl=True,
        **launch.constants,
    )


def _programs(like: torch.Tensor, launch: ManyRows) -> int:
    return multiprocessors(like.device) * launch.resident


class _Boxes(TensorDescriptor):
    """A tensor as the copy engine reads it, in boxes: as a matrix of contiguous rows, ``stride`` apart.

    Triton would ask of each at each launch whether it can, for a quarter of the time that the rest takes on the host.
    Of a weight `Weight.aligned` says so, and rows that are not fit were copied.
    """

    def __init__(
        self, tensor: torch.Tensor, rows: int, columns: int, stride: int, box: list[int], layout: gl.NVMMASharedLayout
    ) -> None:
        super().__init__(tensor, [rows, columns], [stride, 1], box, layout)

    def __post_init__(self) -> None:
        pass


_rows_of_box = cache(rows_of_box)  # on the host the call of a function for kernels takes 2 us


@cache
def _swizzled() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@cache
def _straight(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
