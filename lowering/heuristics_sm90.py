"""Which launch a product gets on Hopper, for heights of its weight and numbers of rows of x."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .launches import ANY, FewRows, InParts, Launch, Launches, ManyRows, taken


def _dense_on_hopper(*launches: tuple[int, FewRows | ManyRows]) -> Launches:
    """These, those for few rows early, and the largest tile for all further rows."""
    early = ((most, replace(each, early=True) if isinstance(each, FewRows) else each) for most, each in launches)
    return (*early, (ANY, _LARGE))


# The fastest of those tried on an H200, each also held against float64 there.
_ONE = FewRows(4, 16, 1)
# Of a low weight two groups share K, and the next kernel begins beside them. The largest tile is the fastest where it
# is full and there are enough of them.
_MIDDLE, _LARGE = ManyRows(128, 4), ManyRows(256, 5, deep=1)
_LOW_ONE = replace(_ONE, room=3)
_LOW_8, _LOW_16, _LOW_32, _LOW_64 = (
    ManyRows(rows, stages, room=2, across=1, split=2) for rows, stages in ((8, 6), (16, 6), (32, 6), (64, 4))
)
_LOW_128 = replace(_MIDDLE, across=1, split=2)
_NARROW = _dense_on_hopper(
    (1, _LOW_ONE),
    (8, FewRows(4, 8, 8, slots=8)),
    (16, FewRows(4, 8, 16, slots=8)),
    (256, FewRows(4, 8, 32, slots=8)),
    (1024, _LOW_32),
    (2048, _MIDDLE),
)
# Of a weight of few columns all that a program reads is on its way at once, while the last kernel still runs elsewhere.
# That is slower where programs have much to read and are too few for all multiprocessors, and for one row (of which any
# number of programs may read) where they are just enough.
_AT_ONCE = (
    (1, FewRows(8, 8, 1, room=1, high=2)),
    (8, FewRows(8, 8, 8, slots=8, room=1, high=2)),
    (16, FewRows(8, 8, 16, slots=4, room=1, high=2)),
)
_BY_AND_BY = (_AT_ONCE[0], (8, _LOW_8), (16, _LOW_16))
_LOW, _LOW_LONG = (
    _dense_on_hopper(
        *few,
        (32, _LOW_32),
        (64, _LOW_64),
        (128, ManyRows(64, 4, room=2)),
        (192, _LOW_64),
        (256, _MIDDLE),
        (384, _LOW_128),
        (1024, _MIDDLE),
    )
    for few in (_AT_ONCE, _BY_AND_BY)
)
_MEDIUM_SHORT, _MEDIUM, _MEDIUM_LONG = (
    _dense_on_hopper(*few, (32, _LOW_32), (128, _LOW_64), (256, _LOW_128), (768, _MIDDLE))
    for few in (((1, _LOW_ONE), *_AT_ONCE[1:]), _AT_ONCE, _BY_AND_BY)
)
_HIGH = _dense_on_hopper((1, _LOW_ONE), (8, _LOW_8), (16, _LOW_16), (32, _LOW_32), (64, _LOW_64), (512, _MIDDLE))
_WIDE_8, _WIDE_16, _WIDE_32, _WIDE_64 = (
    (rows, ManyRows(rows, stages, 2, across=1, split=2)) for rows, stages in ((8, 6), (16, 6), (32, 6), (64, 4))
)
_MANY = (384, _MIDDLE)
_WIDE_ONE, _WIDE_MANY = FewRows(4, 8, 1), ((64, ManyRows(64, 3, 2)), _MANY)
_WIDE_SHORT = _dense_on_hopper((1, _ONE), (8, FewRows(4, 12, 8, slots=4, high=2)), _WIDE_16, _WIDE_32, _WIDE_64, _MANY)
_WIDER_SHORT = _dense_on_hopper((1, _ONE), _WIDE_8, _WIDE_16, _WIDE_32, _WIDE_64, _MANY)
_WIDE = _dense_on_hopper((1, _WIDE_ONE), _WIDE_8, _WIDE_16, _WIDE_32, *_WIDE_MANY)
_WIDE_LONG = _dense_on_hopper(
    (1, FewRows(8, 8, 8, across=2, slots=4)),
    (8, ManyRows(8, 6, split=2)),
    (16, ManyRows(16, 6, split=2)),
    (32, ManyRows(32, 6, split=2)),
    *_WIDE_MANY,
)
# With more than 16 rows of x each program has one tile of 64 rows, or nearly each: nobody adds up, and the next kernel
# begins beside them.
_ONE_EACH_SHORT, _ONE_EACH = (
    _dense_on_hopper((1, one), _WIDE_8, _WIDE_16, (32, _LOW_32), (64, _LOW_64), _MANY) for one in (_ONE, _WIDE_ONE)
)
_HUGE = _dense_on_hopper(
    (8, ManyRows(8, 6, 2)),
    (16, ManyRows(16, 6, 2)),
    (32, ManyRows(32, 5, across=4)),
    (64, ManyRows(64, 5, across=4)),
    (128, _MIDDLE),
)
# Of experts' rows that is how many to expect: some have more. Slots that run by themselves have none.
_EXPERTS = (
    (0, FewRows(4, 4, 1)),
    (8, FewRows(4, 8, 8, across=4, slots=8)),
    (16, ManyRows(16, 8, 2)),
    (32, ManyRows(32, 4, 2)),
    (64, ManyRows(64, 3, 2)),
    (128, _MIDDLE),
    # Some have fewer rows than others, and each a last tile that is not full.
    (ANY, replace(_LARGE, band=64)),
)
# From how many rows on a weight is low, medium and so on; below that it is narrow. Up to medium ones two rows of tiles
# fill the multiprocessors of an H200 at most once; full ones nearly, by 32 rows a program.
_LEAST_LOW, _LEAST_FOR_SIX, _LEAST_MEDIUM, _LEAST_FULL, _LEAST_HIGH = 768, 2561, 3072, 3969, 4225
LEAST_WIDE, _LEAST_WIDER, _LEAST_HUGE = 8192, 10561, 65536
# Up to how many a wide one has a tile of 64 for each multiprocessor of an H200.
_MOST_ONE_EACH = 132 * 64
# From how many columns on it is long and so on.
_LEAST_USUAL, _LEAST_LONG_OF_LOW, _LEAST_LONG = 4096, 6144, 8192
# Where half of the last of the largest tiles would be empty, middle ones: two take longer than a largest one, but one
# of them less than one that is half empty. For 520 and 1,100 rows of x they took 0.76 to 1.02 times as long on an H200.
# With more rows it is a smaller part of the whole.
_MOST_IN_HALVES = 3072
# Tiles of 192 rows, which take 0.86 times as long as those of 256 and 1.7 times as long as those of 128: for rows of x
# that fill one row of them, three or six, where one, three or five of 256, or two, five or nine of 128 would be needed.
_IN_BANDS = ((ANY, ManyRows(192, 5, deep=1, band=64)),)
# How many rows beyond full tiles have a launch of their own, as was fastest on an H200: of a weight with many tiles, or
# where there are many such rows of tiles before; of one with fewer. Low and high weights lose by it.
_MOST_LEFT_OVER, _FEWER_LEFT_OVER, _MANY_TILES = 64, 16, 16
# A weight of so many elements has tiles enough for every multiprocessor, as a wide one has.
_HEAVY = 1 << 26
# Triton 3.6 does not compile many_rows.py for a single step.
_LEAST_DEPTH = 192


# Asked at each call of an op, for the same sizes again and again.
@lru_cache(maxsize=1 << 12)
def launch(rows: int, columns: int, depth: int, *, experts: bool) -> Launch | InParts | None:
    """The launch for ``rows`` of x and a weight ``[columns, depth]``; None where there is none.

    For ``experts`` these are the rows to expect of one.
    """
    in_bands = not experts and _fills_three_quarters(rows, columns, depth)
    table = _EXPERTS if experts else _IN_BANDS if in_bands else _table(columns, depth)
    found = _taken(table, rows, depth)
    if experts or in_bands or not isinstance(found, ManyRows):
        return found
    tiles, left = divmod(rows, _MIDDLE.block_m)
    if 0 < left <= _most_left_over(tiles, columns, depth):
        full = rows - left
        return InParts(full, _taken(table, full, depth), _taken(table, left, depth))
    half_empty = (tiles + (left > 0)) % 2 == 1
    return _MIDDLE if found == _LARGE and half_empty and rows <= _MOST_IN_HALVES else found


def _taken(table: Launches, rows: int, depth: int) -> Launch | None:
    found = taken(table, rows)
    return None if isinstance(found, ManyRows) and depth < _LEAST_DEPTH else found


def _fills_three_quarters(rows: int, columns: int, depth: int) -> bool:
    """Whether rows of x fill one, three or six rows of tiles of 192 and no more of 256, and that is fastest."""
    wide, low = _is_wide(columns, depth), _LEAST_LOW <= columns < _LEAST_MEDIUM
    if 128 < rows <= 192:
        return wide or columns >= _LEAST_HIGH
    if 512 < rows <= 576:
        return low or (columns >= _LEAST_HIGH and not (wide and depth >= _LEAST_LONG))
    # Six rows of tiles of such a weight run at once.
    return 1024 < rows <= 1152 and _LEAST_FOR_SIX <= columns < _LEAST_MEDIUM


def _most_left_over(tiles: int, columns: int, depth: int) -> int:
    """How many rows of x after so many full middle tiles have a launch of their own."""
    # Fewer tiles have other launches; after an odd number of them, half of a largest one takes what is left.
    if tiles <= 1 or tiles % 2:
        return 0
    wide = _is_wide(columns, depth)
    if wide and (depth >= _LEAST_USUAL or columns >= _LEAST_HUGE or tiles >= _MANY_TILES):
        return _MOST_LEFT_OVER
    return _FEWER_LEFT_OVER if wide or _LEAST_MEDIUM <= columns < _LEAST_HIGH else 0


def tables() -> tuple[tuple[Launches, ...], Launches]:
    """Those of dense products, and that of experts."""
    low = (_NARROW, _LOW, _LOW_LONG, _MEDIUM_SHORT, _MEDIUM, _MEDIUM_LONG, _HIGH)
    wide = (_ONE_EACH_SHORT, _ONE_EACH, _WIDE_SHORT, _WIDER_SHORT, _WIDE, _WIDE_LONG, _HUGE)
    return (*low, *wide, _IN_BANDS), _EXPERTS


def _table(columns: int, depth: int) -> Launches:
    wide = _is_wide(columns, depth)
    if columns >= _LEAST_HUGE:
        return _HUGE
    if wide:
        if columns <= _MOST_ONE_EACH and depth < _LEAST_LONG:
            return _ONE_EACH_SHORT if depth < _LEAST_USUAL else _ONE_EACH
        if depth < _LEAST_USUAL:
            return _WIDE_SHORT if columns < _LEAST_WIDER else _WIDER_SHORT
        return _WIDE if depth < _LEAST_LONG else _WIDE_LONG
    if columns < _LEAST_LOW:
        return _NARROW
    if columns >= _LEAST_HIGH:
        return _HIGH
    long = depth >= _LEAST_LONG_OF_LOW and columns < _LEAST_FULL
    if columns < _LEAST_MEDIUM:
        return _LOW_LONG if long else _LOW
    return _MEDIUM_LONG if long else _MEDIUM if depth >= _LEAST_USUAL else _MEDIUM_SHORT


def _is_wide(columns: int, depth: int) -> bool:
    return columns >= LEAST_WIDE or columns * depth >= _HEAVY
