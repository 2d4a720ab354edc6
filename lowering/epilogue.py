# ruff: noqa: ANN001, ANN201  (kernels: Triton types the parameters)

"""How a tile of many_rows.py ends: the sums of the groups that share K meet, and become the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .decode import undo_factor
from .sharing import place, rows_of_block
from .units import activate

GROUP_ROWS = gl.constexpr(64)  # of the weight, which are columns of the result


@gluon.constexpr_function
def sums_layout(bm):
    """Accumulators of a group: 64 rows of the weight by the tile's rows of x."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, bm, 16])


@gluon.constexpr_function
def stored_layout():
    """``[rows of x, 64 columns]`` as they are written: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def finish(acc, tile, tiles, plan, result, GROUP: gl.constexpr, ACROSS: gl.constexpr, ACTIVATION: gl.constexpr):
    """Global scale, bias, activation and routing weight, then the group's columns of the tile's rows of ``out``."""
    out, M, N, global_scale, global_stride, bias, weights, order = result
    BM: gl.constexpr = acc.shape[1]
    MMA: gl.constexpr = acc.type.layout
    LAYOUT: gl.constexpr = stored_layout()
    tile_m, tile_n = place(tile, tiles, plan)
    factor = undo_factor(True)
    expert = 0
    first = tile_m * BM
    end = M
    if plan[0] is not None:
        expert, first, end = rows_of_block(tile_m, plan, BM)
    if global_scale is not None:
        factor = factor * gl.load(global_scale + expert * global_stride)
    acc = acc * factor
    begin = (tile_n * ACROSS + GROUP) * GROUP_ROWS
    if bias is not None:
        column = begin + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, MMA))
        acc += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[:, None]
    acc = activate(acc, ACTIVATION)
    row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    live = row < end
    if weights is not None:
        row = gl.load(order + row, mask=live, other=0).to(gl.int32)
        routing = gl.load(weights + row, mask=live, other=0.0).to(gl.float32)
        acc = acc * gl.convert_layout(routing, gl.SliceLayout(0, MMA))[None, :]
    value = gl.convert_layout(acc.to(out.dtype.element_ty).permute([1, 0]), LAYOUT)
    column = begin + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out + row.to(gl.int64)[:, None] * N + column[None, :], value, mask=live[:, None] & (column < N)[None, :])


@gluon.jit
def side_by_side(acc):
    """Sums ``[64, BM]`` as a vector in which a lane's neighbours are its own: 16 bytes of ``parts`` at once."""
    return acc.reshape([4, 2, 8, acc.shape[1] // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5]).reshape([64 * acc.shape[1]])


@gluon.jit
def in_registers(sums, BM: gl.constexpr):
    """The inverse."""
    acc = sums.reshape([4, BM // 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([GROUP_ROWS, BM])
    return gl.convert_layout(acc, sums_layout(BM), assert_trivial=True)


@gluon.jit
def place_to_meet(BM: gl.constexpr, ACROSS: gl.constexpr, SPLIT: gl.constexpr):
    """Shared memory for ``meet``, if two groups share K: for each pair the sums of the second, and two barriers."""
    if SPLIT == 1:
        return ()
    else:
        gl.static_assert(SPLIT == 2, "two groups share K at most")
        sums = gl.allocate_shared_memory(gl.float32, [ACROSS, GROUP_ROWS * BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        there = gl.allocate_shared_memory(gl.int64, [ACROSS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [ACROSS, 1], mbarrier.MBarrierLayout())
        for group in gl.static_range(ACROSS):
            mbarrier.init(there.index(group), count=1)
            mbarrier.init(taken.index(group), count=1)
        return sums, there, taken


@gluon.jit
def meet(acc, meeting, turn, GROUP: gl.constexpr, PART: gl.constexpr):
    """Sums of the two groups of a program that share K come together in the first."""
    sums, there, taken = meeting
    mine = side_by_side(acc)
    if PART == 1:
        mbarrier.wait(taken.index(GROUP), turn & 1 ^ 1)
        sums.index(GROUP).store(mine)
        mbarrier.arrive(there.index(GROUP), count=1)
        return acc
    mbarrier.wait(there.index(GROUP), turn & 1)
    mine += sums.index(GROUP).load(mine.type.layout)
    mbarrier.arrive(taken.index(GROUP), count=1)
    return in_registers(mine, acc.shape[1])
