"""What each GPU generation gets: limits, tiles, splits, and the support matrix that the README prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from fp4pass.errors import DeviceError

from .layout import FRAGMENTS

FIRST_SM, FIRST_NATIVE_SM = 80, 100
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """One launch configuration: rows of x, rows of weight and depth of a tile; warps; stages of the load pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"tiles: {self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages"

    @property
    def constants(self) -> dict[str, int]:
        """Keywords for a kernel that has these block sizes as constants."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class FewRows:
    """A launch of few_rows.py: warps, steps under way at once, rows of x.

    ``across``: how many of the warps lie side by side along the weight's rows; the others split K. ``slots``: steps of
    x in shared memory, for all warps at once; with 0 each reads its own. ``early``: it begins to read its weight while
    the kernel before it ends (programmatic dependent launch, SM90).
    """

    warps: int
    depth: int
    block_m: int
    across: int = 1
    slots: int = 0
    early: bool = False

    def __str__(self) -> str:
        return f"few rows: {self.block_m}x{16 * self.across}, {self.warps} warps"

    @property
    def constants(self) -> dict[str, int]:
        """Keywords for its kernels."""
        return {
            "ACROSS": self.across,
            "DEPTH": self.depth,
            "BLOCK_M": self.block_m,
            "SLOTS": self.slots,
            "num_warps": self.warps,
        }


@dataclass(frozen=True)
class ManyRows:
    """A launch of many_rows.py: rows of x in a tile, stages of its ring, programs on a multiprocessor.

    ``deep``: how many times 64 columns a stage has. ``across``: groups of multipliers side by side along the weight's
    rows, 64 each; ``split``: 2 where two such share the steps of K.
    """

    block_m: int
    stages: int
    resident: int = 1
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
    def constants(self) -> dict[str, int]:
        """Keywords for its kernel. The warps are those of one group of multipliers.

        ``maxnreg``: the groups of four warps, the loader's counted whole, share what a program gets; REGISTERS is what
        LOADER leaves for each of the others. AT_ONCE of the sums of other programs, block_m / 2 registers each, fit in.
        """
        groups = self.across * self.split
        share = min(255, 65536 // (128 * (groups + 1) * self.resident)) // 8 * 8
        loader = 24
        registers = min(240, (share * (groups + 1) - loader) // groups // 8 * 8)
        return {
            "BM": self.block_m,
            "STAGES": self.stages,
            "DEEP": self.deep,
            "ACROSS": self.across,
            "SPLIT": self.split,
            "AT_ONCE": max(1, (256 if registers > 160 else 64) // self.block_m),
            "REGISTERS": registers,
            "LOADER": loader,
            "num_warps": 4,
            "maxnreg": share,
        }


Tiles = tuple[tuple[int, Tile], ...]
"""Tiles by the most rows of x that each is meant for."""

_ANY = 1 << 62
_FEW_ROWS = ((16, Tile(16, 64, 128, 4, 4)), (32, Tile(32, 64, 128, 4, 4)))
# With wgmma: the fastest of those tried on an H200, each also held against float64 there. Experts seldom fill a wide
# tile to its end.
_WGMMA = (*_FEW_ROWS, (64, Tile(64, 64, 128, 4, 3)), (128, Tile(128, 64, 128, 4, 3)), (_ANY, Tile(128, 128, 64, 4, 3)))
_WGMMA_EXPERTS = (*_FEW_ROWS, (_ANY, Tile(64, 128, 64, 4, 4)))
# One row of a wide weight reads it faster in taller tiles.
_WGMMA_FEW_ROWS_WIDE, _WIDE = Tile(16, 128, 128, 4, 3), 8192
# Without: x is in registers too, so that the wide tiles need 8 warps or less width. Chosen to compile without spills.
_MMA = (*_FEW_ROWS, (64, Tile(64, 64, 128, 4, 3)), (_ANY, Tile(128, 128, 64, 8, 3)))
_MMA_EXPERTS = (*_FEW_ROWS, (_ANY, Tile(64, 64, 128, 4, 3)))
# float32 products run on the ordinary multipliers, where a wide tile only costs registers.
_SINGLE = ((16, Tile(16, 64, 32, 4, 2)), (_ANY, Tile(32, 64, 32, 4, 2)))
# The product over N: block_n is the depth there and block_k the width.
_BACKWARD_HALF = Tile(64, 32, 64, 4, 2)
_BACKWARD_SINGLE = Tile(32, 32, 64, 4, 2)

# Launches for the layout ``fragments``, each for so many rows of x at most: the fastest of those tried on an H200, each
# also held against float64 there. One row is read by each warp; more go through shared memory.
_ONE = FewRows(4, 8, 8)
_FEW_LOW = ((8, FewRows(8, 8, 8, slots=4)),)
_FEW = ((8, FewRows(8, 8, 8, across=2, slots=4)),)
# GPUs without wgmma go on with these, which are compiled for them but not measured; more rows they take in tiles.
_MMA_LOW = (*_FEW_LOW, (16, FewRows(8, 8, 16, slots=4)), (32, FewRows(4, 8, 32, slots=4)))
_MMA_FEW = (
    *_FEW,
    (16, FewRows(8, 8, 16, across=2, slots=4)),
    (32, FewRows(4, 4, 32, slots=4)),
    (64, FewRows(4, 8, 64, across=4, slots=4)),
)
_MMA_WIDE = ((1, _ONE), *_MMA_FEW)
# Where tiles are few, groups share K; where they are many, one program decodes while the other multiplies, or four
# groups share x. The largest tile is the fastest where it is full, but for the depth of its stages.
_MIDDLE, _LARGE = ManyRows(128, 4), ManyRows(256, 5, deep=1)
_MANY = (
    (16, ManyRows(16, 4, 2, across=1, split=2)),
    (32, ManyRows(32, 4, 2, across=1, split=2)),
    (64, ManyRows(64, 5)),
    (128, ManyRows(64, 4, split=2)),
    (512, _MIDDLE),
    (_ANY, _LARGE),
)
_MANY_WIDE = (
    (16, ManyRows(16, 6, 2)),
    (32, ManyRows(32, 4, 2)),
    (64, ManyRows(64, 3, 2)),
    (128, _MIDDLE),
    (256, _LARGE),
    (384, _MIDDLE),
    (_ANY, _LARGE),
)
_EIGHT = (8, ManyRows(8, 6, split=2))
_WGMMA_LOW = _FEW_LOW + _MANY
_WGMMA_MIDDLE = _FEW + _MANY
_WGMMA_WIDE_SHORT = ((1, _ONE), (8, FewRows(8, 8, 8, across=4, slots=4)), _MANY[0], *_MANY_WIDE[1:])
_WGMMA_WIDE = ((1, _ONE), _EIGHT, *_MANY_WIDE)
_WGMMA_WIDE_LONG = (*_FEW, (16, ManyRows(16, 6, split=2)), (32, ManyRows(32, 6, split=2)), *_MANY_WIDE[2:])
_WGMMA_HUGE = (
    (4, ManyRows(8, 8, 2)),
    _EIGHT,
    (16, ManyRows(16, 8, 2)),
    (32, ManyRows(32, 5, across=4)),
    (64, ManyRows(64, 5, across=4)),
    (128, _MIDDLE),
    (_ANY, _LARGE),
)
# Of experts' rows that is how many to expect: some have more. Slots that run by themselves have none.
_FEW_EXPERTS = ((0, FewRows(4, 4, 8)), (8, FewRows(4, 8, 8, across=4, slots=8)))
_MMA_FEW_EXPERTS = (
    *_FEW_EXPERTS,
    (16, FewRows(4, 8, 16, across=4, slots=8)),
    (32, FewRows(4, 8, 32, across=4, slots=4)),
)
_WGMMA_MANY_EXPERTS = (
    *_FEW_EXPERTS,
    (12, FewRows(4, 8, 16, across=4, slots=8)),
    (16, ManyRows(16, 8, 2)),
    *_MANY_WIDE[1:4],
    (_ANY, _LARGE),
)
_LOW, _HUGE = 3072, 65536
_SHORT, _LONG = 4096, 8192
# A weight of so many elements has tiles enough for every multiprocessor, as a wide one has.
_HEAVY = 1 << 26
# Triton 3.6 does not compile many_rows.py for a single step.
_LEAST_DEPTH = 192
# Up to here a program for each slot is cheaper than sorting, although two may read the same weight.
_MOST_DIRECT_SLOTS = 32

_MOST_SPLITS = 8
_FEWEST_STEPS_A_SPLIT = 2
# Few rows are a matter of reading the weight, which wants so many rows of it in work on a multiprocessor at once; with
# more rows the sums grow large, and two programs are enough.
_WEIGHT_ROWS_FOR_FEW_ROWS, _PROGRAMS = 512, 2


@dataclass(frozen=True)
class Arch:
    """One GPU generation. ``shared_memory`` is the most bytes a block may have."""

    sm: int
    example: str
    shared_memory: int
    multiprocessors: int
    wgmma: bool

    def tile(self, rows: int, dtype: torch.dtype, *, experts: bool = False, columns: int = 0) -> Tile:
        """The tile of a product over K with ``rows`` rows of x (expected rows an expert, for ``experts``).

        columns: how many rows the weight has, where that is known.
        """
        if columns >= _WIDE and rows <= 16 and self.wgmma and not experts and dtype != torch.float32:
            return _WGMMA_FEW_ROWS_WIDE
        return next(tile for most, tile in self.tiles(dtype, experts=experts) if rows <= most)

    def tiles(self, dtype: torch.dtype, *, experts: bool = False) -> Tiles:
        """The tiles that ``tile`` picks from."""
        if dtype == torch.float32:
            return _SINGLE
        if self.wgmma:
            return _WGMMA_EXPERTS if experts else _WGMMA
        return _MMA_EXPERTS if experts else _MMA

    def launch(
        self, rows: int, dtype: torch.dtype, layout: str, *, columns: int, depth: int, experts: bool = False
    ) -> FewRows | ManyRows | Tile:
        """What a product over K runs with on a GPU: ``rows`` of x, a weight ``[N, K]``.

        For ``experts`` these are the rows to expect of one, see `rows_of_expert`.
        Which of the three says which kernel: see few_rows.py, many_rows.py, and linear.py or moe.py for tiles.
        """
        if layout == FRAGMENTS and dtype != torch.float32:
            for most, launch in _launches_of(self, columns, depth, experts=experts):
                if isinstance(launch, ManyRows) and depth < _LEAST_DEPTH:
                    break
                if rows <= most:
                    early = isinstance(launch, FewRows) and self.wgmma and not experts
                    return replace(launch, early=True) if early else launch
        return self.tile(rows, dtype, experts=experts, columns=columns)

    def backward_tile(self, dtype: torch.dtype) -> Tile:
        """The tile of a product over N."""
        return _BACKWARD_SINGLE if dtype == torch.float32 else _BACKWARD_HALF

    def splits(self, tiles: int, steps: int, tile: Tile) -> int:
        """Into how many parts to cut a K of ``steps`` blocks, so that ``tiles`` output tiles fill the GPU.

        All parts but the last are equally long, and none is empty.
        """
        few = tile.block_m <= 16
        programs = self.multiprocessors * (_WEIGHT_ROWS_FOR_FEW_ROWS // tile.block_n if few else _PROGRAMS)
        wanted = max(1, min(programs // max(1, tiles), steps // _FEWEST_STEPS_A_SPLIT, _MOST_SPLITS))
        longest = -(-steps // wanted)
        return -(-steps // longest)


def rows_of_expert(slots: int, experts: int) -> int:
    """How many of so many slots to expect for an expert; 0 where each runs by itself, without being sorted."""
    return 0 if slots <= min(_MOST_DIRECT_SLOTS, experts) else -(-slots // experts)


def _launches_of(arch: Arch, columns: int, depth: int, *, experts: bool) -> tuple[tuple[int, FewRows | ManyRows], ...]:
    """What there is for weights ``[columns, depth]``, each with the most rows of x that it is meant for."""
    if experts:
        return _WGMMA_MANY_EXPERTS if arch.wgmma else _MMA_FEW_EXPERTS
    wide = columns >= _WIDE or columns * depth >= _HEAVY
    if not arch.wgmma:
        return _MMA_WIDE if wide else _MMA_LOW if columns < _LOW else _MMA_FEW
    if not wide:
        return _WGMMA_LOW if columns < _LOW else _WGMMA_MIDDLE
    if columns >= _HUGE:
        return _WGMMA_HUGE
    return _WGMMA_WIDE_SHORT if depth < _SHORT else _WGMMA_WIDE if depth < _LONG else _WGMMA_WIDE_LONG


ARCHS = {
    arch.sm: arch
    for arch in (
        Arch(80, "A100", 163 << 10, 108, wgmma=False),
        Arch(86, "A10, RTX 3090", 99 << 10, 84, wgmma=False),
        Arch(89, "L40S, RTX 4090", 99 << 10, 142, wgmma=False),
        Arch(90, "H100, H200", 227 << 10, 132, wgmma=True),
    )
}
"""The generations with kernels, by SM number."""


def target(device: torch.device | int) -> Arch:
    """The generation of a CUDA device, or of an SM number such as 90.

    An SM between two known ones (87, say) gets the settings of the one below. Raises DeviceError below SM80, from SM100
    on (native FP4), and for a device that is no GPU.
    """
    sm = device if isinstance(device, int) else _sm_of(device)
    if sm < FIRST_SM:
        raise DeviceError(
            "the kernels do not run on this GPU: it is below SM80",
            seen=f"SM{sm}",
            expected=f"SM{FIRST_SM} to SM{FIRST_NATIVE_SM - 1}; bfloat16 tensor cores came with SM{FIRST_SM}",
            do="use a GPU of the Ampere generation or later, or the CPU",
        )
    if sm >= FIRST_NATIVE_SM:
        raise DeviceError(
            "the kernels are not for this GPU: it has native FP4",
            seen=f"SM{sm}",
            expected=f"SM{FIRST_SM} to SM{FIRST_NATIVE_SM - 1}",
            do="run the checkpoint without fp4pass: the GPU multiplies FP4 itself",
        )
    return ARCHS[max(known for known in ARCHS if known <= sm)]


def _sm_of(device: torch.device) -> int:
    if device.type != "cuda":
        raise DeviceError(
            "the kernels need a CUDA device",
            seen=f"operands on {device}",
            expected="operands on a CUDA device",
            do="move them there, or call torch.ops.fp4pass.*, which has an implementation for the CPU",
        )
    return _sm_of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _sm_of_index(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def configurations(arch: Arch) -> Iterator[tuple[str, torch.dtype, Tile]]:
    """Every (regime, dtype, tile) that a call on ``arch`` can pick, once.

    The regime is ``product`` (dense, over K), ``experts`` (theirs, over K) or ``backward`` (dense, over N).
    """
    for dtype in DTYPES:
        yield from (("product", dtype, tile) for _, tile in arch.tiles(dtype))
        if (wide := arch.tile(1, dtype, columns=_WIDE)) != arch.tile(1, dtype):
            yield "product", dtype, wide
        yield from (("experts", dtype, tile) for _, tile in arch.tiles(dtype, experts=True))
        yield "backward", dtype, arch.backward_tile(dtype)


def launches(arch: Arch) -> Iterator[tuple[bool, FewRows | ManyRows]]:
    """Every launch of few_rows.py and many_rows.py that a call on ``arch`` can pick, once: (of experts, launch)."""
    shapes = [(columns, depth) for columns in (_LOW - 16, _LOW, _WIDE, _HUGE) for depth in (_SHORT - 64, _SHORT, _LONG)]
    found = {
        (experts, arch.launch(rows, torch.bfloat16, FRAGMENTS, columns=columns, depth=depth, experts=experts))
        for columns, depth in shapes
        for experts in (False, True)
        for rows in (0, 1, 4, 8, 12, 16, 32, 64, 128, 256, 384, 512, _ANY)
    }
    yield from sorted(((experts, each) for experts, each in found if not isinstance(each, Tile)), key=str)


def support_matrix() -> str:
    """The README's table of GPUs, in Markdown."""
    lines = ["| GPU | SM | NVFP4 weights | activations | tensor core products |", "| --- | --- | --- | --- | --- |"]
    lines.append(f"| before Ampere | < {FIRST_SM} | refused | | |")
    for arch in ARCHS.values():
        products = "wgmma (bf16, fp16)" if arch.wgmma else "mma.sync (bf16, fp16)"
        lines.append(f"| {arch.example} | {arch.sm} | fused Triton kernels | bf16, fp16, fp32 | {products} |")
    lines.append(f"| Blackwell and later | >= {FIRST_NATIVE_SM} | left to the GPU's own FP4 | | |")
    lines.append("| none | CPU | reference kernels | bf16, fp16, fp32 | |")
    return "\n".join(lines)
