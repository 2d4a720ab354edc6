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
def shares(tiles, STEPS: gl.constexpr, LEAD: gl.constexpr, IDLE: gl.constexpr):
    """How this program's part of the work is made up, the number of its steps, and how long a shared range is.

    The first ``shared`` tiles are cut into ranges of steps, this program's being ``count`` from ``begin`` on; the
    others are handed round whole. Ranges are equal, but for a tile's first one where no range reaches into two tiles.
    """
    programs = gl.num_programs(0)
    rest = tiles % programs
    # Where programs would be idle for no more than IDLE steps each, whole tiles are better: none has to add up, and
    # neighbours work on neighbours.
    full = (gl.cdiv(tiles, programs) * programs - tiles) * STEPS <= IDLE * programs
    shared = gl.where(full, 0, gl.where(tiles < programs, tiles, rest + programs))
    me = programs - 1 - gl.program_id(0)
    share = gl.cdiv(shared * STEPS, programs)
    begin = gl.minimum(me * share, shared * STEPS)
    end = gl.minimum(begin + share, shared * STEPS)
    # Where it costs but an eighth more, no program works on two tiles. Who begins one does LEAD steps more than the
    # others, whose sums are on their way meanwhile.
    apart = gl.maximum(programs // gl.maximum(tiles, 1), 1)
    if (shared == tiles) & (tiles <= programs) & (gl.cdiv(STEPS, apart) * 8 <= share * 9):
        longest = gl.cdiv(STEPS + LEAD * (apart - 1), apart)
        share = gl.maximum(gl.cdiv(STEPS - longest, gl.maximum(apart - 1, 1)), 1)
        tile, nth = me // apart, me % apart
        first = gl.where(nth == 0, 0, gl.minimum(longest + (nth - 1) * share, STEPS))
        last = gl.minimum(longest + nth * share, STEPS)
        begin = tile * STEPS + first
        end = gl.where(tile < tiles, tile * STEPS + last, begin)
    count = end - begin
    own = gl.cdiv(gl.maximum(tiles - shared - me, 0), programs)
    return (begin, count, shared, me), count + own * STEPS, share


@gluon.jit
def place(tile, tiles, plan):
    """(row of tiles, column of tiles) of a dense product; (block, column of tiles) of one of experts."""
    tiles_m, tiles_n = tiles
    if plan[0] is not None:
        return tile // tiles_n, tile % tiles_n
    width = TOGETHER * tiles_n
    first = tile // width * TOGETHER
    size = gl.minimum(tiles_m - first, TOGETHER)
    return first + tile % width % size, tile % width // size


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
