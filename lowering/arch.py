"""What each GPU generation gets: limits, tiles, splits, and the support matrix that the README prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from fp4pass.errors import DeviceError

from . import heuristics_sm80, heuristics_sm90
from .heuristics_sm90 import LEAST_WIDE
from .launches import ANY, InParts, Launch
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


Tiles = tuple[tuple[int, Tile], ...]
"""Tiles by the most rows of x that each is meant for."""

_FEW_ROWS = ((16, Tile(16, 64, 128, 4, 4)), (32, Tile(32, 64, 128, 4, 4)))
# With wgmma: the fastest of those tried on an H200, each also held against float64 there. Experts seldom fill a wide
# tile to its end.
_WGMMA = (*_FEW_ROWS, (64, Tile(64, 64, 128, 4, 3)), (128, Tile(128, 64, 128, 4, 3)), (ANY, Tile(128, 128, 64, 4, 3)))
_WGMMA_EXPERTS = (*_FEW_ROWS, (ANY, Tile(64, 128, 64, 4, 4)))
# One row of a wide weight reads it faster in taller tiles.
_WGMMA_FEW_ROWS_WIDE = Tile(16, 128, 128, 4, 3)
# Without: x is in registers too, so that the wide tiles need 8 warps or less width. Chosen to compile without spills.
_MMA = (*_FEW_ROWS, (64, Tile(64, 64, 128, 4, 3)), (ANY, Tile(128, 128, 64, 8, 3)))
_MMA_EXPERTS = (*_FEW_ROWS, (ANY, Tile(64, 64, 128, 4, 3)))
# float32 products run on the ordinary multipliers, where a wide tile only costs registers.
_SINGLE = ((16, Tile(16, 64, 32, 4, 2)), (ANY, Tile(32, 64, 32, 4, 2)))
# The product over N: block_n is the depth there and block_k the width.
_BACKWARD_HALF = Tile(64, 32, 64, 4, 2)
_BACKWARD_SINGLE = Tile(32, 32, 64, 4, 2)

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
        if columns >= LEAST_WIDE and rows <= 16 and self.wgmma and not experts and dtype != torch.float32:
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
    ) -> Launch | InParts | Tile:
        """What a product over K runs with on a GPU: ``rows`` of x, a weight ``[N, K]``.

        For ``experts`` these are the rows to expect of one, see `rows_of_expert`. Which it is says which kernel: see
        few_rows.py, many_rows.py, mma_rows.py, and linear.py or moe.py for tiles.
        """
        found = None
        if layout == FRAGMENTS and dtype != torch.float32:
            if self.wgmma:
                found = heuristics_sm90.launch(rows, columns, depth, experts=experts)
            else:
                size = {"experts": experts, "multiprocessors": self.multiprocessors}
                found = heuristics_sm80.launch(rows, columns, depth, **size)
        if found is not None:
            return found
        return self.tile(rows, dtype, experts=experts, columns=columns)

    def launches(self) -> Iterator[tuple[bool, Launch]]:
        """Every launch that `launch` picks from, once: (of experts, launch)."""
        dense, of_experts = (heuristics_sm90 if self.wgmma else heuristics_sm80).tables()
        tables = [(False, table) for table in dense] + [(True, of_experts)]
        yield from sorted({(experts, found) for experts, table in tables for _, found in table}, key=str)

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
    """The generation of a CUDA device, with its own number of multiprocessors, or of an SM number such as 90.

    An SM between two known ones (87, say) gets the settings of the one below. Raises DeviceError below SM80, from SM100
    on (native FP4), and for a device that is no GPU.
    """
    if not isinstance(device, int):
        return _of_index(_index(device))
    sm = device
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


def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has."""
    return target(device).multiprocessors


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        raise DeviceError(
            "the kernels need a CUDA device",
            seen=f"operands on {device}",
            expected="operands on a CUDA device",
            do="move them there, or call torch.ops.fp4pass.*, which has an implementation for the CPU",
        )
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _of_index(index: int) -> Arch:
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return replace(target(_sm_of_index(index)), multiprocessors=count)


def _sm_of_index(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def configurations(arch: Arch) -> Iterator[tuple[str, torch.dtype, Tile]]:
    """Every (regime, dtype, tile) that a call on ``arch`` can pick, once.

    The regime is ``product`` (dense, over K), ``experts`` (theirs, over K) or ``backward`` (dense, over N).
    """
    for dtype in DTYPES:
        yield from (("product", dtype, tile) for _, tile in arch.tiles(dtype))
        if (wide := arch.tile(1, dtype, columns=LEAST_WIDE)) != arch.tile(1, dtype):
            yield "product", dtype, wide
        yield from (("experts", dtype, tile) for _, tile in arch.tiles(dtype, experts=True))
        yield "backward", dtype, arch.backward_tile(dtype)


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
