"""Launches of the kernels of the layout ``fragments``: what each kind has to choose. heuristics_*.py choose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
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
    K. ``band``: rows of x in the last band of a tile (bands.py); all of them, unless given.
    """

    block_m: int
    stages: int
    resident: int = 1
    room: int = 1
    deep: int = 2
    across: int = 2
    split: int = 1
    band: int = 0

    def __post_init__(self) -> None:
        if not self.band:
            object.__setattr__(self, "band", self.block_m)

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

    @cached_property
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
            "BAND": self.band,
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
class MmaRows:
    """A launch of mma_rows.py: rows of x in a tile, steps of x in shared memory, warps.

    ``high``: how many units of the weight each warp takes at a step, one below the other. ``ahead``: how many steps of
    the weight are on their way. ``registers``: how many a thread has at most, 0 for as many as it takes: with fewer, a
    multiprocessor has room for one program more.
    """

    block_m: int
    slots: int = 3
    warps: int = 4
    high: int = 2
    ahead: int = 1
    registers: int = 0

    def __str__(self) -> str:
        at_most = f", {self.registers} registers" if self.registers else ""
        return f"mma rows: {self.block_m}x{self.block_n}, {self.slots} slots{at_most}"

    @property
    def block_n(self) -> int:
        """Rows of the weight in a tile."""
        return 16 * self.warps * self.high

    @cached_property
    def constants(self) -> dict[str, int]:
        """Keywords for its kernel."""
        return {
            "BLOCK_M": self.block_m,
            "HIGH": self.high,
            "SLOTS": self.slots,
            "AHEAD": self.ahead,
            "num_warps": self.warps,
            **({"maxnreg": self.registers} if self.registers else {}),
        }


Launch = FewRows | ManyRows | MmaRows


@dataclass(frozen=True)
class InParts:
    """Two launches of a dense product: for the ``full`` first rows of x, which fill tiles, and for the rest.

    A tile with few rows of its own takes as long as a full one does.
    """

    full: int
    first: Launch
    rest: Launch

    def __str__(self) -> str:
        return f"{self.first}; {self.rest}"


Launches = tuple[tuple[int, Launch], ...]
"""Launches by the most rows of x that each is meant for."""


def taken(table: Launches, rows: int) -> Launch | None:
    """The first that is meant for so many rows; None where there are more than any is for."""
    return next((each for most, each in table if rows <= most), None)
