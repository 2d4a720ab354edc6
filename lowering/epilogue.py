# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""How a tile of many_rows.py ends: its sums meet those of the programs that share it, and become the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode import undo_factor
from .sharing import owner_of, place, rows_of_block
from .units import activate

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its names in Triton 3.6 and 3.9

GROUPS = gl.constexpr(2)
GROUP_ROWS = gl.constexpr(64)
TILE_COLUMNS = gl.constexpr(128)  # columns of the result, which are rows of the weight


@gluon.constexpr_function
def stored_layout():
    """``[rows of x, 64 columns]`` as they are written: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def finish(acc, tile, tiles, plan, result, GROUP: gl.constexpr, ACTIVATION: gl.constexpr, DOT_ORDER: gl.constexpr):
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
    begin = tile_n * TILE_COLUMNS + GROUP * GROUP_ROWS
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
    value = acc.to(out.dtype.element_ty)
    if DOT_ORDER:
        # Column bits (t, s, j) -> (s, t, j): see natural_position in decode.py.
        value = value.reshape([4, 8, 2, BM]).permute([1, 0, 2, 3]).reshape([GROUP_ROWS, BM])
    value = gl.convert_layout(value.permute([1, 0]), LAYOUT)
    column = begin + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out + row.to(gl.int64)[:, None] * N + column[None, :], value, mask=live[:, None] & (column < N)[None, :])


@gluon.jit
def side_by_side(acc):
    """Sums ``[64, BM]`` as a vector in which a lane's neighbours are its own: 16 bytes of ``parts`` at once."""
    return acc.reshape([4, 2, 8, acc.shape[1] // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5]).reshape([64 * acc.shape[1]])


@gluon.jit
def leave(acc, parts, share, tile, GROUP: gl.constexpr, UNITS: gl.constexpr):
    """Leave the sums to the program that began the tile."""
    sums, counters, each, total = parts
    begin, count, shared, me = share
    mine = side_by_side(acc)
    LAYOUT: gl.constexpr = mine.type.layout
    SIZE: gl.constexpr = mine.shape[0]
    slot = (me * GROUPS + GROUP).to(gl.int64) * SIZE
    gl.store(sums + slot + gl.arange(0, SIZE, layout=LAYOUT), mine)
    barrier()
    gl.atomic_add(counters + owner_of(tile, each, UNITS) * GROUPS + GROUP, 1, sem="release")


@gluon.jit
def collect(acc, parts, share, last, GROUP: gl.constexpr, UNITS: gl.constexpr, RESIDENT: gl.constexpr):
    """``acc`` of the steps before ``last`` plus, in order, what the following programs have left."""
    sums, counters, each, total = parts
    begin, count, shared, me = share
    BM: gl.constexpr = acc.shape[1]
    MMA: gl.constexpr = acc.type.layout
    # So many are on their way at once; registers allow no more.
    AT_ONCE: gl.constexpr = max(1, 256 // BM // RESIDENT // RESIDENT)
    others = gl.cdiv(UNITS - last, each)
    while gl.atomic_cas(counters + me * GROUPS + GROUP, others, 0, sem="acquire") != others:
        pass
    barrier()
    mine = side_by_side(acc)
    LAYOUT: gl.constexpr = mine.type.layout
    SIZE: gl.constexpr = mine.shape[0]
    within = gl.arange(0, SIZE, layout=LAYOUT)
    for first in range(0, others, AT_ONCE):
        for ahead in gl.static_range(AT_ONCE):
            other = first + ahead
            slot = ((me + 1 + other) * GROUPS + GROUP).to(gl.int64) * SIZE
            mine += gl.load(
                sums + slot + within, mask=(within >= 0) & (other < others), other=0.0, cache_modifier=".cg"
            )
    acc = mine.reshape([4, BM // 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([GROUP_ROWS, BM])
    return gl.convert_layout(acc, MMA, assert_trivial=True)
