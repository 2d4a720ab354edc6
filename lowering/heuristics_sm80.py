"""Which launch a product gets on Ampere and Ada, for heights of its weight and numbers of rows of x.

Chosen by what SM80's kernels take on an H200 (older.py), beside each other: no GPU of these generations was at hand.
"""

from __future__ import annotations

from functools import lru_cache

from .launches import ANY, FewRows, Launch, Launches, MmaRows, taken

_ONE = FewRows(4, 16, 1)
_LOW = (
    (1, _ONE),
    (8, FewRows(8, 8, 8, across=2, slots=4)),
    (16, FewRows(8, 8, 16, slots=4, high=2)),
    (32, FewRows(8, 4, 32, across=2, slots=4)),
)
_HIGH = (
    (1, _ONE),
    (8, FewRows(4, 8, 8, slots=8)),
    (16, FewRows(8, 8, 16, across=2, slots=4)),
    (32, FewRows(8, 4, 32, across=2, slots=4)),
)
_WIDE_SHORT = (
    (1, _ONE),
    (8, FewRows(4, 8, 8, across=2, slots=4)),
    (16, FewRows(4, 8, 16, across=2, slots=4)),
    (32, FewRows(4, 4, 32, across=2, slots=4)),
)
# Of experts' rows that is how many to expect: some have more. Slots that run by themselves have none.
_EXPERTS = (
    (0, FewRows(4, 4, 1)),
    (8, FewRows(4, 8, 8, across=4, slots=8)),
    (16, FewRows(4, 8, 16, across=4, slots=8)),
    (32, MmaRows(32, registers=128)),
    (ANY, MmaRows(64, registers=168)),
)
# Where there are fewer tiles of 64 x 64 than multiprocessors, warps share K; with half as many, more of them.
_SHARED, _MORE_SHARED = FewRows(8, 4, 64, across=4, slots=4), FewRows(8, 4, 32, across=2, slots=4)
Timed = tuple[MmaRows, tuple[float, ...]]
# Else tiles, and what a step of 64 columns takes, in microseconds, where a multiprocessor has one, two, ... of them.
_SMALLER_TILES: tuple[Timed, ...] = (
    (MmaRows(64, high=1), (0.43, 0.53, 0.73, 0.96, 1.2)),
    (MmaRows(64, ahead=2), (0.55, 0.8)),
)
_TILES = (
    *_SMALLER_TILES,
    (MmaRows(32, registers=128), (0.49, 0.6, 0.74, 0.93)),
    (MmaRows(64, registers=168), (0.57, 0.83, 1.16)),
    (MmaRows(128, warps=8), (1.5,)),
)
# 8-bit weights take longer to decode, for which the largest tile has the fewest warps, and fewer registers are too few.
_TILES_OF_BYTES = (*_SMALLER_TILES, (MmaRows(128), (1.03, 1.52)))
_SMALLEST = _TILES[0][0]
_LEAST_HIGH, _LEAST_WIDE, _LEAST_USUAL = 3072, 8192, 4096
# A weight of so many elements has tiles enough for every multiprocessor, as a high one has.
_HEAVY = 1 << 26


# Asked at each call of an op, for the same sizes again and again.
@lru_cache(maxsize=1 << 12)
def launch(rows: int, columns: int, depth: int, *, experts: bool, multiprocessors: int) -> Launch:
    """The launch for ``rows`` of x and a weight ``[columns, depth]``; for ``experts`` the rows to expect of one."""
    if experts:
        return taken(_EXPERTS, rows)
    if found := taken(_table(columns, depth), rows):
        return found
    tiles = _tiles(rows, columns, _SMALLEST)
    if tiles > multiprocessors:
        return _fastest(_TILES, rows, columns, multiprocessors)
    return _MORE_SHARED if 2 * tiles <= multiprocessors else _SHARED


def fp8_launch(rows: int, columns: int, multiprocessors: int) -> MmaRows | None:
    """That for an 8-bit weight of ``columns`` rows; None for tiles, which split K where there is one row of them."""
    if rows <= 32 or (rows <= 64 and _tiles(rows, columns, _SMALLEST) <= multiprocessors):
        return None
    return _fastest(_TILES_OF_BYTES, rows, columns, multiprocessors)


def _fastest(tiles: tuple[Timed, ...], rows: int, columns: int, multiprocessors: int) -> MmaRows:
    def time(timed: Timed) -> float:
        tile, steps = timed
        rounds, rest = divmod(-(-_tiles(rows, columns, tile) // multiprocessors), len(steps))
        return rounds * steps[-1] + (steps[rest - 1] if rest else 0)

    return min(tiles, key=time)[0]


def _tiles(rows: int, columns: int, tile: MmaRows) -> int:
    return -(-rows // tile.block_m) * -(-columns // tile.block_n)


def _table(columns: int, depth: int) -> Launches:
    if columns < _LEAST_HIGH and columns * depth < _HEAVY:
        return _LOW
    return _WIDE_SHORT if columns >= _LEAST_WIDE and depth < _LEAST_USUAL else _HIGH


def tables() -> tuple[tuple[Launches, ...], Launches]:
    """Those of dense products, and that of experts."""
    many = (*(tile for tile, _ in _TILES), _SHARED, _MORE_SHARED)
    return (_LOW, _HIGH, _WIDE_SHORT, tuple((ANY, each) for each in many)), _EXPERTS
