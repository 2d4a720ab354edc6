"""Launches of few_rows.py and many_rows.py, kernels of the layout ``fragments``: all there are, and which to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

ANY = 1 << 62

# KiB of shared memory that a multiprocessor of SM90 has for all its programs.
_SHARED_KIB = 228


@dataclass(frozen=True)
class FewRows:
    """A launch of few_rows.py: warps, steps under way at once, rows of x (1, or a multiple of 8).

    ``across``: how many of the warps lie side by side along the weight's rows; the others split K. ``slots``: steps of
    x in shared memory where it has several rows. ``room``: how many programs a multiprocessor of SM90 takes at most, 0
    for as many as fit: more of them come unevenly to where the last kernel ended first. ``early``: it begins to read
    its weight while the kernel before it ends (programmatic dependent launch, SM90). ``high``: how many units each warp
    takes at a step, one below the other; it is for dense products, which read x less often then.
    """

    warps: int
    depth: int
    block_m: int
    across: int = 1
    slots: int = 0
    room: int = 0
    early: bool = False
    high: int = 1

    def __str__(self) -> str:
        return f"few rows: {self.block_m}x{16 * self.across * self.high}, {self.warps} warps"

    @property
    def constants(self) -> dict[str, int]:
        """Keywords for its kernels. ``LEAST_KIB``: of shared memory, to be taken by a program."""
        return {
            "ACROSS": self.across,
            "DEPTH": self.depth,
            "BLOCK_M": self.block_m,
            "SLOTS": self.slots,
            "LEAST_KIB": -(-_SHARED_KIB // (self.room + 1)) if self.room else 0,
            "num_warps": self.warps,
        }


@dataclass(frozen=True)
class ManyRows:
    """A launch of many_rows.py: rows of x in a tile, stages of its ring, programs on a multiprocessor.

    ``room``: for how many programs a multiprocessor has registers; where for more than it gets of one kernel, those of
    the next one load their first weights while it ends. ``deep``: how many times 64 columns a stage has. ``across``:
    groups of multipliers side by side along the weight's rows, 64 each; ``split``: 2 where two such share the steps of
    K.
    """

    block_m: int
    stages: int
    resident: int = 1
    room: int = 1
    deep: int = 2
    across: int = 2
    split: int = 1

    def __str__(self) -> str:
        return f"many rows: {self.block_m}x{self.block_n}, {self.stages} stages"

    @property
    def block_n(self) -> int:
        """Rows of the weight in a tile."""
        return 64 * self.across

    @property
    def lead(self) -> int:
        """How many steps of a tile its first program does more than the others, whose sums it then finds there.

        The fastest of those tried on an H200. Sums of up to 16 rows travel fast enough, and where a multiprocessor has
        two programs, one works while the other waits.
        """
        return 4 // self.deep if self.block_m > 16 and self.resident == 1 else 0

    @property
    def idle(self) -> int:
        """For how many steps, on average, programs may be idle at the end before tiles are shared to prevent it.

        On an H200 sharing took as long as 6 to 10 steps of 128 columns do, in tiles of 128 rows as in those of 256;
        lower ones, whose sums are less, have half of that.
        """
        return (16 if self.block_m >= 128 else 8) // self.deep

    @property
    def constants(self) -> dict[str, int]:
        """Keywords for its kernel. The warps are those of one group of multipliers.

        ``maxnreg``: the groups of four warps, the loader's counted whole, share what a program gets. LOADER is what
        REGISTERS for each of the others leaves, 24 at least. AT_ONCE of the sums of other programs, block_m / 2
        registers each, fit in.
        """
        groups = self.across * self.split
        share = min(255, 65536 // (128 * (groups + 1) * max(self.resident, self.room))) // 8 * 8
        registers = min(240, (share * (groups + 1) - 24) // groups // 8 * 8)
        return {
            "BM": self.block_m,
            "STAGES": self.stages,
            "DEEP": self.deep,
            "ACROSS": self.across,
            "SPLIT": self.split,
            "LEAD": self.lead,
            "IDLE": self.idle,
            "AT_ONCE": max(1, (256 if registers > 160 else 64) // self.block_m),
            "REGISTERS": registers,
            "LOADER": share * (groups + 1) - registers * groups,
            "num_warps": 4,
            "maxnreg": share,
        }


@dataclass(frozen=True)
class InParts:
    """Two launches of a dense product: for the ``full`` first rows of x, which fill tiles, and for the rest.

    A tile with few rows of its own takes as long as a full one does.
    """

    full: int
    first: FewRows | ManyRows
    rest: FewRows | ManyRows

    def __str__(self) -> str:
        return f"{self.first}; {self.rest}"


Launches = tuple[tuple[int, FewRows | ManyRows], ...]
"""Launches by the most rows of x that each is meant for."""


def _dense_on_hopper(*launches: tuple[int, FewRows | ManyRows]) -> Launches:
    """These, those for few rows early, and the largest tile for all further rows."""
    early = ((most, replace(each, early=True) if isinstance(each, FewRows) else each) for most, each in launches)
    return (*early, (ANY, _LARGE))


# The fastest of those tried on an H200, each also held against float64 there. GPUs without wgmma have launches that are
# compiled for them but not measured; more rows they take in tiles.
_ONE = FewRows(4, 16, 1)
_MMA_LOW = (
    (1, _ONE),
    (8, FewRows(8, 8, 8, slots=4)),
    (16, FewRows(8, 8, 16, slots=4)),
    (32, FewRows(4, 8, 32, slots=4)),
)
_MMA = (
    (1, _ONE),
    (8, FewRows(8, 8, 8, across=2, slots=4)),
    (16, FewRows(8, 8, 16, across=2, slots=4)),
    (32, FewRows(4, 4, 32, slots=4)),
    (64, FewRows(4, 8, 64, across=4, slots=4)),
)
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
_WIDE_FEW = ((8, ManyRows(8, 6, 2, across=1, split=2)), (16, ManyRows(16, 6, 2, across=1, split=2)))
_MORE_OF_SHORT = ((32, ManyRows(32, 4, 2)), (64, ManyRows(64, 4, room=2)), (384, _MIDDLE))
_WIDE_SHORT = _dense_on_hopper(
    (1, _ONE),
    (8, FewRows(4, 12, 8, slots=4, high=2)),
    (16, FewRows(4, 12, 16, slots=4, high=2)),
    *_MORE_OF_SHORT,
)
_WIDER_SHORT = _dense_on_hopper((1, _ONE), *_WIDE_FEW, *_MORE_OF_SHORT)
_WIDE_MANY = ((64, ManyRows(64, 3, 2)), (384, _MIDDLE))
_WIDE = _dense_on_hopper((1, FewRows(4, 8, 1)), *_WIDE_FEW, (32, ManyRows(32, 6, 2, across=1, split=2)), *_WIDE_MANY)
_WIDE_LONG = _dense_on_hopper(
    (1, FewRows(8, 8, 8, across=2, slots=4)),
    (8, ManyRows(8, 6, split=2)),
    (16, ManyRows(16, 6, split=2)),
    (32, ManyRows(32, 6, split=2)),
    *_WIDE_MANY,
)
_HUGE = _dense_on_hopper(
    (8, ManyRows(8, 6, 2)),
    (16, ManyRows(16, 6, 2)),
    (32, ManyRows(32, 5, across=4)),
    (64, ManyRows(64, 5, across=4)),
    (128, _MIDDLE),
)
# Of experts' rows that is how many to expect: some have more. Slots that run by themselves have none.
_FEW_OF_EXPERTS = ((0, FewRows(4, 4, 1)), (8, FewRows(4, 8, 8, across=4, slots=8)))
_MMA_EXPERTS = (
    *_FEW_OF_EXPERTS,
    (16, FewRows(4, 8, 16, across=4, slots=8)),
    (32, FewRows(4, 8, 32, across=4, slots=4)),
)
_EXPERTS = (
    *_FEW_OF_EXPERTS,
    (12, FewRows(4, 8, 16, across=4, slots=8)),
    (16, ManyRows(16, 8, 2)),
    (32, ManyRows(32, 4, 2)),
    (64, ManyRows(64, 3, 2)),
    (128, _MIDDLE),
    (ANY, _LARGE),
)
# From how many rows on a weight is low, medium and so on; below that it is narrow. Up to medium ones two rows of tiles
# fill the multiprocessors of an H200 at most once; full ones nearly, by 32 rows a program.
_LEAST_LOW, _LEAST_MEDIUM, _LEAST_FULL, _LEAST_HIGH = 768, 3072, 3969, 4225
LEAST_WIDE, _LEAST_WIDER, _LEAST_HUGE = 8192, 10561, 65536
# Its columns.
_LEAST_USUAL, _LEAST_LONG_OF_LOW, _LEAST_LONG = 4096, 6144, 8192
# Where half of the last of the largest tiles would be empty, middle ones: two take longer than a largest one, but one
# of them less than one that is half empty. For 520 and 1,100 rows of x they took 0.76 to 1.02 times as long on an H200.
# With more rows it is a smaller part of the whole.
_MOST_IN_HALVES = 3072
# How many rows beyond full tiles have a launch of their own, as was fastest on an H200: of a weight with many tiles, or
# where there are many such rows of tiles before; of one with fewer. Low and high weights lose by it.
_MOST_LEFT_OVER, _FEWER_LEFT_OVER, _MANY_TILES = 64, 16, 16
# Up to so many rows of a weight two rows of its tiles run at once, which is as fast as one and the rest, unless K is
# long and the rest is little.
_MOST_FOR_TWO = 8448
# A weight of so many elements has tiles enough for every multiprocessor, as a wide one has.
_HEAVY = 1 << 26
# Triton 3.6 does not compile many_rows.py for a single step.
_LEAST_DEPTH = 192


def launch(rows: int, columns: int, depth: int, *, experts: bool, wgmma: bool) -> FewRows | ManyRows | InParts | None:
    """The launch for ``rows`` of x and a weight ``[columns, depth]``; None where there is none.

    For ``experts`` these are the rows to expect of one. ``wgmma``: whether the GPU has it.
    """
    table = _table(columns, depth, experts=experts, wgmma=wgmma)
    taken = _taken(table, rows, depth)
    if experts or not isinstance(taken, ManyRows):
        return taken
    tiles, left = divmod(rows, _MIDDLE.block_m)
    if 0 < left <= _most_left_over(tiles, columns, depth):
        full = rows - left
        return InParts(full, _taken(table, full, depth), _taken(table, left, depth))
    half_empty = (tiles + (left > 0)) % 2 == 1
    return _MIDDLE if taken == _LARGE and half_empty and rows <= _MOST_IN_HALVES else taken


def _taken(table: Launches, rows: int, depth: int) -> FewRows | ManyRows | None:
    for most, found in table:
        if isinstance(found, ManyRows) and depth < _LEAST_DEPTH:
            return None
        if rows <= most:
            return found
    return None


def _most_left_over(tiles: int, columns: int, depth: int) -> int:
    """How many rows of x after so many full middle tiles have a launch of their own."""
    # Alone they have one anyway; after an odd number of tiles, half of a largest one takes them.
    if tiles == 0 or (tiles > 1 and tiles % 2):
        return 0
    wide, two_at_once = _is_wide(columns, depth), tiles == 1 and columns <= _MOST_FOR_TWO
    if two_at_once:
        return _FEWER_LEFT_OVER if wide and depth >= _LEAST_LONG else 0
    if wide and (depth >= _LEAST_USUAL or columns >= _LEAST_HUGE or tiles >= _MANY_TILES):
        return _MOST_LEFT_OVER
    return _FEWER_LEFT_OVER if wide or _LEAST_MEDIUM <= columns < _LEAST_HIGH else 0


def launches(*, wgmma: bool) -> Iterator[tuple[bool, FewRows | ManyRows]]:
    """Every launch that there is for such GPUs, once: (of experts, launch)."""
    low = (_NARROW, _LOW, _LOW_LONG, _MEDIUM_SHORT, _MEDIUM, _MEDIUM_LONG, _HIGH)
    wide = (_WIDE_SHORT, _WIDER_SHORT, _WIDE, _WIDE_LONG, _HUGE)
    dense = (*low, *wide) if wgmma else (_MMA_LOW, _MMA)
    tables = [(False, table) for table in dense] + [(True, _EXPERTS if wgmma else _MMA_EXPERTS)]
    yield from sorted({(experts, found) for experts, table in tables for _, found in table}, key=str)


def _table(columns: int, depth: int, *, experts: bool, wgmma: bool) -> Launches:
    if experts:
        return _EXPERTS if wgmma else _MMA_EXPERTS
    wide = _is_wide(columns, depth)
    if not wgmma:
        return _MMA_LOW if columns < _LEAST_MEDIUM and not wide else _MMA
    if columns >= _LEAST_HUGE:
        return _HUGE
    if wide:
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
