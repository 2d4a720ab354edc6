# ruff: noqa: ANN001, ANN201, RUF005, RUF059  (kernels: Triton types the parameters, and compiles no starred tuple)

"""How a tile of many_rows.py ends: the sums of the groups that share K meet, and become the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .decode import undo_factor
from .sharing import box_at, rows_of_box
from .units import activate

GROUP_ROWS = gl.constexpr(64)  # of the weight, which are columns of the result


@gluon.constexpr_function
def sums_layout(bm):
    """Accumulators of a group: 64 rows of the weight by the tile's rows of x."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, bm, 16])


@gluon.jit
def shared_factor(plan, result):
    """What all sums are multiplied by: without a plan the global scale as well, of which there is one."""
    out, M, N, global_scale, global_stride, bias, weights, order = result
    factor = undo_factor(True)
    if plan[0] is None and global_scale is not None:
        factor = factor * gl.load(global_scale)
    return factor


@gluon.jit
def finish(acc, factor, begin, rows, plan, result, BM: gl.constexpr, BAND: gl.constexpr, ACTIVATION: gl.constexpr):
    """Global scale, bias, activation and routing weight, then 64 columns of ``out`` from ``begin`` on, of a band.

    rows: (expert, first row of the band, end of the tile's rows).
    """
    out, M, N, global_scale, global_stride, bias, weights, order = result
    expert, first, end = rows
    if plan[0] is not None and global_scale is not None:
        factor = factor * gl.load(global_scale + expert * global_stride)
    acc = acc * factor
    if bias is not None:
        column = begin + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[:, None]
    store_rows(activate(acc, ACTIVATION), begin, first, end, plan, result, BM, BAND)


@gluon.constexpr_function
def stored_layout(bits):
    """``[rows of x, 64 columns]`` of numbers of so many bits as they are written: 16 bytes a thread."""
    lanes = GROUP_ROWS.value * bits // 128
    return gl.BlockedLayout([1, 128 // bits], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def rows_at_once(box, bm, bits):
    """How many rows of 64 numbers a group turns in shared memory at a time: 16 KiB of a high tile, else 4.

    No more than a box has, whose rows follow each other.
    """
    return min(box, ((16 if bm >= 128 else 4) << 13) // (GROUP_ROWS.value * bits))


@gluon.jit
def halves(acc):
    """``acc [64, BM]`` as two tiles ``[64, BM / 2]``: the first rows of x, and the others."""
    return gl.split(acc.reshape([GROUP_ROWS, 2, acc.shape[1] // 2]).permute([0, 2, 1]))


@gluon.jit
def joined(first, others):
    """The inverse of ``halves``."""
    BM: gl.constexpr = 2 * first.shape[1]
    both = gl.join(first, others).permute([0, 2, 1]).reshape([GROUP_ROWS, BM])
    return gl.convert_layout(both, sums_layout(BM), assert_trivial=True)


@gluon.jit
def pieces(acc, ROWS: gl.constexpr):
    """``acc [64, BM]`` as tiles ``[64, ROWS]``."""
    if acc.shape[1] == ROWS:
        return (acc,)
    else:
        left, right = halves(acc)
        return pieces(left, ROWS) + pieces(right, ROWS)


@gluon.jit
def store_rows(acc, begin, first, end, plan, result, BM: gl.constexpr, BAND: gl.constexpr):
    """``acc [64, rows of a band]``, columns from ``begin`` on, to the rows of ``out`` from ``first`` to ``end``.

    With ``weights`` to those that ``order`` says, and multiplied. Left to itself, the compiler turns 2 KiB at a time.
    """
    out, M, N, global_scale, global_stride, bias, weights, order = result
    DTYPE: gl.constexpr = out.dtype.element_ty
    BOX: gl.constexpr = rows_of_box(BM, BAND)
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    ROWS: gl.constexpr = rows_at_once(BOX, BM, BITS)
    STORED: gl.constexpr = stored_layout(BITS)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    parts = pieces(acc.to(DTYPE), ROWS)
    rows, routing = (), ()
    for part in gl.static_range(len(parts)):
        box = first + part * ROWS // BOX * BOX
        row = box_at(box, M, plan, BM, BAND) + part * ROWS % BOX + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
        live = (row >= box) & (row < end)
        if weights is not None:
            row = gl.load(order + row, mask=live, other=-1).to(gl.int32)
            routing = routing + (gl.load(weights + row, mask=live, other=0.0).to(gl.float32),)
        else:
            row = gl.where(live, row, -1)
        rows = rows + (row,)
    turned = gl.allocate_shared_memory(DTYPE, [ROWS, GROUP_ROWS], SWIZZLED)
    column = begin + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(0, STORED))
    for part in gl.static_range(len(parts)):
        turned.store(parts[part].permute([1, 0]))
        value = turned.load(STORED)
        if weights is not None:
            value = (value * routing[part][:, None]).to(DTYPE)
        where = rows[part].to(gl.int64)[:, None] * N + column[None, :]
        gl.store(out + where, value, mask=(rows[part] >= 0)[:, None] & (column < N)[None, :])


@gluon.jit
def side_by_side(acc):
    """Sums ``[64, BM]`` as a vector in which a lane's neighbours are its own: 16 bytes of ``parts`` at once.

    Those of the first rows of x come first: a half of a tile is a half of the vector.
    """
    return acc.reshape([4, 2, 8, acc.shape[1] // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([64 * acc.shape[1]])


@gluon.jit
def in_registers(sums, like):
    """The inverse: a tile as that of ``like``."""
    acc = sums.reshape([like.shape[1] // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape(like.shape)
    return gl.convert_layout(acc, like.type.layout, assert_trivial=True)


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
    return in_registers(mine, acc)
