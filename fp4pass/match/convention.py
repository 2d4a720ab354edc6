"""The ways in which NVFP4 weights are written down, and the weight that each means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from fp4pass.errors import ArgumentError
from fp4pass.lowering.layout import LAYOUTS
from fp4pass.lowering.reference import dequantize

aten = torch.ops.aten

GROUP = 16
TILE_ROWS, TILE_GROUPS = 128, 4
LINEAR, TRANSPOSED, SWIZZLED = "linear", "transposed", "swizzled"
MULTIPLY, DIVIDE, ABSENT = "multiply", "divide", "absent"

Call = Callable[..., Any]
"""``call(op, *arguments)``: runs an operation on tensors, or emits it into a graph."""


def run(op: Callable[..., torch.Tensor], *arguments: Any, **named: Any) -> torch.Tensor:
    """`Call` on tensors."""
    return op(*arguments, **named)


@dataclass(frozen=True)
class Arrangement:
    """In which order a weight's bytes are stored, and how many elements share a block scale.

    ``codes`` is LINEAR for ``[..., N, K/2]`` or TRANSPOSED for ``[..., K/2, N]``, both packed along K. ``scales`` is
    LINEAR for ``[..., N, K/group]``, TRANSPOSED for ``[..., K/group, N]``, or SWIZZLED: tiles of 128 rows by 4 blocks,
    padded to whole tiles. ``group`` is a multiple of 16. Each may have any shape that keeps the order of its bytes.
    """

    codes: str = LINEAR
    scales: str = LINEAR
    group: int = GROUP

    def __str__(self) -> str:
        codes = "codes" if self.codes == LINEAR else f"{self.codes} codes"
        return f"{codes}, {self.scales} scales" + ("" if self.group == GROUP else f" of {self.group}")


@dataclass(frozen=True)
class Convention:
    """How codes, block scales and the global scale are to be read.

    ``layout`` orders the bytes as our own modules do (`fp4pass.lowering.layout`), ``global_scale`` says whether it
    multiplies, divides, or is not part of the weight.
    """

    layout: str
    arrangement: Arrangement
    global_scale: str

    def with_global(self, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """``weight [(E,) N, K]`` times, or over, its global scale (one value or one an expert), in place."""
        if self.global_scale == ABSENT:
            return weight
        factor = factor.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
        return weight.mul_(factor) if self.global_scale == MULTIPLY else weight.div_(factor)

    def __str__(self) -> str:
        words = {MULTIPLY: "global scale multiplies", DIVIDE: "global scale divides", ABSENT: "no global scale"}
        return f"{self.layout} {self.arrangement}, {words[self.global_scale]}"


def conventions(arrangement: Arrangement, has_global: bool) -> list[Convention]:
    """Every convention to try, the plainest first."""
    modes = (MULTIPLY, DIVIDE) if has_global else (ABSENT,)
    return [Convention(layout, arrangement, mode) for layout, mode in product(LAYOUTS, modes)]


def codes_by_rows(call: Call, arrangement: Arrangement, codes: Any, shape: list[int]) -> Any:
    """Codes as stored (uint8) -> ``shape``, which is ``[..., N, K/2]``."""
    if arrangement.codes == LINEAR:
        return call(aten.reshape.default, codes, shape)
    *lead, rows, half = shape
    return _turned(call, call(aten.reshape.default, codes, [*lead, half, rows]), len(shape))


def scales_by_rows(call: Call, arrangement: Arrangement, scale: Any, shape: list[int]) -> Any:
    """Block scales as stored (uint8) -> ``shape``, which is ``[..., N, K/16]``.

    Where one scale serves a larger group it is repeated: a sixteenth of a byte more to read for every weight.
    """
    *lead, rows, sixteenths = shape
    groups = sixteenths * GROUP // arrangement.group
    if arrangement.scales == SWIZZLED:
        scale = _unswizzled(call, scale, lead, rows, groups)
    elif arrangement.scales == TRANSPOSED:
        scale = _turned(call, call(aten.reshape.default, scale, [*lead, groups, rows]), len(shape))
    if groups != sixteenths:
        scale = call(aten.reshape.default, scale, [*lead, rows, groups, 1])
        scale = _contiguous(call, call(aten.expand.default, scale, [*lead, rows, groups, sixteenths // groups]))
    return call(aten.reshape.default, scale, shape)


def _contiguous(call: Call, tensor: Any) -> Any:
    return call(aten.clone.default, tensor, memory_format=torch.contiguous_format)


def _turned(call: Call, matrices: Any, rank: int) -> Any:
    order = [*range(rank - 2), rank - 1, rank - 2]
    return _contiguous(call, call(aten.permute.default, matrices, order))


def _unswizzled(call: Call, scale: Any, lead: list[int], rows: int, groups: int) -> Any:
    """Bytes in 128x4 tiles -> ``[*lead, rows, groups]``, the padding cut off.

    A tile holds row r and block c at byte ``(r % 32) * 16 + (r // 32) * 4 + c`` (cuBLAS, "1D block scaling factors").
    """
    tall, wide = tiles(rows, groups)
    e = len(lead)
    found = call(aten.reshape.default, scale, [*lead, tall, wide, 32, TILE_ROWS // 32, TILE_GROUPS])
    found = call(aten.permute.default, found, [*range(e), e, e + 3, e + 2, e + 1, e + 4])
    found = call(aten.reshape.default, found, [*lead, tall * TILE_ROWS, wide * TILE_GROUPS])
    if (rows, groups) == (tall * TILE_ROWS, wide * TILE_GROUPS):
        return found
    found = call(aten.slice.Tensor, call(aten.slice.Tensor, found, e, 0, rows), e + 1, 0, groups)
    return _contiguous(call, found)


def tiles(rows: int, groups: int) -> tuple[int, int]:
    """How many tiles of scales stand one below the other, and side by side."""
    return -(-rows // TILE_ROWS), -(-groups // TILE_GROUPS)


def unscaled(
    layout: str, arrangement: Arrangement, codes: torch.Tensor, scale: torch.Tensor, shape: list[int]
) -> torch.Tensor | None:
    """The weight ``shape`` = ``[(E,) N, K]`` without its global scale, in float32; None if the layout is not for it.

    codes and scale uint8 as the arrangement has them.
    """
    *lead, k = shape
    codes = codes_by_rows(run, arrangement, codes, [*lead, k // 2])
    scale = scales_by_rows(run, arrangement, scale, [*lead, k // GROUP])
    try:
        return dequantize(codes, scale, None, torch.float32, layout)
    except ArgumentError:
        return None
