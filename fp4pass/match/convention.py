"""The ways in which NVFP4 weights are written down, and the weight that each means."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from fp4pass.lowering.layout import LAYOUTS
from fp4pass.lowering.reference import decode_codes, decode_scale

GROUP = 16
LINEAR, SWIZZLED = "linear", "swizzled"
MULTIPLY, DIVIDE, ABSENT = "multiply", "divide", "absent"


@dataclass(frozen=True)
class Convention:
    """How codes, block scales and the global scale are to be read.

    ``layout`` orders the codes' bits (`fp4pass.lowering.layout`), ``scales`` says row by row or in tiles of 128 rows by
    4 blocks, ``global_scale`` whether it multiplies, divides, or is not part of the weight.
    """

    layout: str
    scales: str
    global_scale: str

    def __str__(self) -> str:
        words = {MULTIPLY: "global scale multiplies", DIVIDE: "global scale divides", ABSENT: "no global scale"}
        return f"{self.layout} codes, {self.scales} scales, {words[self.global_scale]}"


def conventions(has_global: bool) -> list[Convention]:
    """Every convention to try, the plainest first."""
    modes = (MULTIPLY, DIVIDE) if has_global else (ABSENT,)
    return [Convention(*choice) for choice in product(LAYOUTS, (LINEAR, SWIZZLED), modes)]


def unswizzle(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Bytes in 128x4 tiles -> ``[..., rows, groups]``. Traceable; ``rows`` a multiple of 128, ``groups`` of 4.

    A tile holds row r and block c at byte ``(r % 32) * 16 + (r // 32) * 4 + c`` (cuBLAS, "1D block scaling factors").
    """
    lead = scale.shape[:-2]
    tiles = scale.reshape(-1, rows // 128, groups // 4, 32, 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(*lead, rows, groups)


def canonical(
    convention: Convention,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """The weight ``[..., N, K]`` in float64 that the leaves mean, or None where the convention cannot hold them.

    codes uint8 ``[(E,) N, K/2]``, scale uint8 of ``N * K/16`` bytes an expert, global_scale one value or one an expert,
    ids of any shape pick experts.
    """
    *lead, rows, half = codes.shape
    groups = 2 * half // GROUP
    if convention.scales == SWIZZLED:
        if rows % 128 or groups % 4:
            return None
        scale = unswizzle(scale.reshape(*lead, rows, groups), rows, groups)
    scale = scale.reshape(*lead, rows, groups)
    blocks = decode_codes(codes, convention.layout, torch.float64).unflatten(-1, (groups, GROUP))
    weight = (blocks * decode_scale(scale, torch.float64).unsqueeze(-1)).flatten(-2)
    if convention.global_scale != ABSENT:
        factor = (
            global_scale.to(torch.float64).reshape(-1, 1, 1) if lead else global_scale.to(torch.float64).reshape(())
        )
        weight = weight * factor if convention.global_scale == MULTIPLY else weight / factor
    return weight if ids is None else weight[ids]
