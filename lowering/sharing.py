# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""Which tiles of a product, and which steps of K in them, a program that stays works on.

Tiles are handed round whole as long as they fill whole rounds, or nearly. What is left over, and one round more, is
shared out in equal ranges of steps ("stream-K"), so that all programs end together. Tiles of experts come from a
schedule made on the device (schedule.py): a *plan* is (experts of blocks, ends, block ends), or three times None for a
dense product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Tiles of this many rows of tiles are walked together: x is four times as wide as the codes, so what runs at one time
# should share it, and meet it in the L2 cache.
TOGETHER = gl.constexpr(4)


@gluon.jit
def locate(it, share, STEPS: gl.constexpr):
    """The tile and the step of K that a program's step ``it`` belongs to. ``share``: see ``shares``."""
    begin, count, shared, me = share
    together = it < count
    own = gl.maximum(it - count, 0)
    tile = gl.where(together, (begin + it) // STEPS, shared + own // STEPS * gl.num_programs(0) + me)
    return tile, gl.where(together, (begin + it) % STEPS, own % STEPS)


@gluon.jit
def stretch(it, share, STEPS: gl.constexpr):
    """(tile, first step, end) of the steps of one tile that follow a program's step ``it``."""
    begin, count, shared, me = share
    tile, first = locate(it, share, STEPS)
    return tile, first, gl.where(it < count, gl.minimum(STEPS, first + count - it), STEPS)


@gluon.jit
def ways(tiles, programs, STEPS, LEAD, IDLE):
    """How tiles are shared out, in four numbers, for ``shares``.

    (how many are cut into ranges of steps, how long a range is, how many programs each of them has to itself, how long
    the first range is then): the last two 0 where ranges reach from one tile into the next.

    A chain of divisions, before which nothing is read: of a dense product the host does them, in Python. So this is
    written in what both languages have, and nothing is negative.
    """
    rounds = (tiles + programs - 1) // programs
    shared = tiles if tiles < programs else tiles % programs + programs
    # Where programs would be idle for no more than IDLE steps each, whole tiles are better: none has to add up, and
    # neighbours work on neighbours.
    if (rounds * programs - tiles) * STEPS <= IDLE * programs:
        shared = 0
    share = (shared * STEPS + programs - 1) // programs
    apart, first = 0, 0
    if (shared == tiles) & (tiles > 0) & (tiles <= programs):
        most = programs // tiles
        # Where it costs but an eighth more, no program works on two tiles. Who begins one does LEAD steps more than the
        # others, whose sums are on their way meanwhile.
        if (STEPS + most - 1) // most * 8 <= share * 9:
            apart = most
            first = (STEPS + LEAD * (apart - 1) + apart - 1) // apart
            share = (STEPS - first + apart - 2) // (apart - 1) if first < STEPS else 1
    return shared, share, apart, first


@gluon.jit
def shares(tiles, found, STEPS: gl.constexpr):
    """How this program's part of the work is made up, and the number of its steps. ``found``: see ``ways``.

    The first tiles are cut into ranges of steps, this program's being ``count`` from ``begin`` on; the others are
    handed round whole.
    """
    shared, share, apart, longest = found
    programs = gl.num_programs(0)
    me = programs - 1 - gl.program_id(0)
    begin = gl.minimum(me * share, shared * STEPS)
    end = gl.minimum(begin + share, shared * STEPS)
    if apart > 0:
        tile, nth = me // apart, me % apart
        first = gl.where(nth == 0, 0, gl.minimum(longest + (nth - 1) * share, STEPS))
        last = gl.minimum(longest + nth * share, STEPS)
        begin = tile * STEPS + first
        end = gl.where(tile < tiles, tile * STEPS + last, begin)
    count = end - begin
    own = 0
    if shared + me < tiles:
        own = gl.cdiv(tiles - shared - me, programs)
    return (begin, count, shared, me), count + own * STEPS


@gluon.jit
def place(tile, tiles, plan):
    """(row of tiles, column of tiles) of a dense product; (block, column of tiles) of one of experts."""
    tiles_m, tiles_n = tiles
    if plan[0] is not None:
        return tile // tiles_n, tile % tiles_n
    m, n = 0, tile
    if tiles_m > 1:
        width = TOGETHER * tiles_n
        first = tile // width * TOGETHER
        size = gl.minimum(tiles_m - first, TOGETHER)
        m, n = first + tile % width % size, tile % width // size
    return m, n


@gluon.jit
def rows_of_block(block, plan, BM: gl.constexpr):
    """(expert, first row of x, end of its rows) of a block of the schedule."""
    experts, ends, block_ends = plan
    expert = gl.load(experts + block).to(gl.int32)
    first = gl.load(ends + expert - 1, mask=expert > 0, other=0).to(gl.int32)
    before = gl.load(block_ends + expert - 1, mask=expert > 0, other=0).to(gl.int32)
    return expert, first + (block - before) * BM, gl.load(ends + expert).to(gl.int32)


@gluon.jit
def extent(tile_m, M, plan, BM: gl.constexpr):
    """(expert, first row of x, end of its rows, or M) of a row of tiles; of a dense product it is expert 0."""
    if plan[0] is None:
        return 0, tile_m * BM, M
    else:
        return rows_of_block(tile_m, plan, BM)


@gluon.constexpr_function
def rows_of_box(bm, band):
    """How many rows of x the copy engine takes at a time for a tile of ``bm``, whose last band has ``band``.

    Of a single band of 64 or more it is half of them: tiles are chosen for more rows of x than that.
    """
    return band if band < bm else bm // 2 if bm >= 64 else bm


@gluon.jit
def box_at(row, M, plan, BM: gl.constexpr, BAND: gl.constexpr):
    """Where the box begins that holds the rows of x from ``row`` on.

    What lies past the end of x the copy engine fills with zeros, slowly: so the last box of a dense product's high tile
    begins early instead, and holds rows of the one before it as well. Past a block of experts other experts' rows lie.
    """
    BOX: gl.constexpr = rows_of_box(BM, BAND)
    if BOX == BM or plan[0] is not None:
        return row
    else:
        return gl.maximum(gl.minimum(row, M - BOX), 0)
