# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""The loader of many_rows.py: one warp that has the copy engine fill the ring of stages in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .sharing import box_at, extent, place, rows_of_box, stretch
from .units import UNIT_BYTES, UNIT_COLUMNS, UNIT_WORDS, wait_for_last

# Its names in Triton 3.6 and 3.9.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def where_from(tile, tiles, plan, M, N, UNITS_OF_TILE: gl.constexpr, BM: gl.constexpr, BAND: gl.constexpr):
    """(first row of x, how many boxes of them are needed, first row of units of the weight) of a tile."""
    m, n = place(tile, tiles, plan)
    expert, row, end = extent(m, M, plan, BM)
    BOX: gl.constexpr = rows_of_box(BM, BAND)
    return row, gl.minimum(gl.cdiv(end - row, BOX), BM // BOX), n * UNITS_OF_TILE + expert * (N // 16)


@gluon.jit
def load_weight(
    codes_desc, scale_desc, ring, stage, unit, k, boxes, BOX: gl.constexpr, FEWEST: gl.constexpr, MOST: gl.constexpr
):
    """Codes and scales of a step. Its stage is full when so many boxes of x have come, too: FEWEST to MOST."""
    tokens, codes, scales, full, empty = ring
    WORDS: gl.constexpr = codes.shape[2]
    SCALES: gl.constexpr = scales.shape[2]
    DEEP: gl.constexpr = WORDS // UNIT_WORDS
    WEIGHT: gl.constexpr = codes.shape[1] * UNIT_BYTES
    # How many bytes to wait for is a constant of the instruction.
    for number in gl.static_range(FEWEST, MOST + 1):
        chosen = boxes == number if FEWEST < MOST else True
        mbarrier.expect(full.index(stage), DEEP * (number * BOX * UNIT_COLUMNS * 2 + WEIGHT), pred=chosen)
    copy_in(codes_desc, [unit, k * WORDS], full.index(stage), codes.index(stage))
    copy_in(scale_desc, [unit, k * SCALES], full.index(stage), scales.index(stage))


@gluon.jit
def load(
    x_desc,
    codes_desc,
    scale_desc,
    ring,
    share,
    total,
    tiles,
    plan,
    M,
    N,
    STEPS: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
):
    """The loader. The first weights are on their way before the kernel that writes x has ended.

    Where a tile lies takes divisions, so that is worked out once for all its steps. What lies past the end of K comes
    as zeros.
    """
    tokens, codes, scales, full, empty = ring
    STAGES: gl.constexpr = codes.shape[0]
    DEEP: gl.constexpr = tokens.shape[0] // STAGES
    BOX: gl.constexpr = rows_of_box(BM, BAND)
    MOST: gl.constexpr = BM // BOX
    FEWEST: gl.constexpr = MOST if plan[0] is None else 1
    early = 0
    if total > 0:
        tile, first, last = stretch(0, share, STEPS)
        row, boxes, unit = where_from(tile, tiles, plan, M, N, codes.shape[1], BM, BAND)
        early = gl.minimum(last - first, STAGES)
        for it in range(early):
            load_weight(codes_desc, scale_desc, ring, it, unit, first + it, boxes, BOX, FEWEST, MOST)
    wait_for_last()
    it = 0
    while it < total:
        tile, first, last = stretch(it, share, STEPS)
        row, boxes, unit = where_from(tile, tiles, plan, M, N, codes.shape[1], BM, BAND)
        for k in range(first, last):
            stage = it % STAGES
            if it >= early:
                # Of a stage that nothing was in yet, this is over at once.
                mbarrier.wait(empty.index(stage), it // STAGES & 1 ^ 1)
                load_weight(codes_desc, scale_desc, ring, stage, unit, k, boxes, BOX, FEWEST, MOST)
            for half in gl.static_range(DEEP):
                column = (k * DEEP + half) * UNIT_COLUMNS
                for box in gl.static_range(MOST):
                    rows = tokens.index(stage * DEEP + half).slice(box * BOX, BOX)
                    where = [box_at(row + box * BOX, M, plan, BM, BAND), column]
                    needed = True if box < FEWEST else box < boxes
                    copy_in(x_desc, where, full.index(stage), rows, pred=needed)
            it += 1
