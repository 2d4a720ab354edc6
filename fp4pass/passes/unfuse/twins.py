"""What the fused operations of other libraries compute, in plain PyTorch.

Every function takes and gives tensors and is traced into the graph in the place of the operation. Whole or unrounded
arithmetic is in float32, as in the model; an activation ``[..., K]`` keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from fp4pass.lowering.layout import PLAIN
from fp4pass.lowering.reference import GROUP, relu2

E2M1_MAX, E4M3_MAX = 6.0, 448.0
E2M1 = (1, 0, E2M1_MAX)
E4M3 = (3, -6, E4M3_MAX)
"""A small float format: bits of its mantissa, its smallest normal exponent, its largest value."""

TILE_ROWS, TILE_GROUPS = 128, 4

ops = torch.ops.fp4pass


# --- Norms and activations.


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; the weight multiplies in float32, before the only cast (Nemotron-H's norm)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group: int, eps: float) -> torch.Tensor:
    """The Mamba mixer's norm: ``x * silu(gate)`` in float32, normed in groups of ``group`` columns, cast, then weighted
    (Nemotron-H casts this one before it multiplies the weight)."""
    wide = (x.float() * functional.silu(gate.float())).unflatten(-1, (-1, group))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.flatten(-2).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(left half) * right half`` of the last dimension, in float32, cast once."""
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)


# --- Formats.


def round_to(x: torch.Tensor, form: tuple[int, int, float]) -> torch.Tensor:
    """float32 -> the nearest values of a small float format, ties to even, saturating; still float32.

    In float32 and integers only: neither FP4 nor FP8 need exist on the GPU.
    """
    bits, exponent, largest = form
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2.0**exponent) * 2.0**-bits
    return (torch.round(x / step) * step).clamp(-largest, largest)


def quantized(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """``x [..., K]`` as NVFP4 sees it: code x block scale, without the global scale, exact in ``x``'s dtype.

    factor: what values are multiplied by before they are quantized, 448 * 6 / amax; None for 1. A block's scale is
    its amax / 6, rounded to E4M3; a block whose scale rounds to zero is zero.
    """
    blocks = x.float().unflatten(-1, (-1, GROUP))
    if factor is not None:
        blocks = blocks * per_row(factor, blocks)
    scale = round_to(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX, E4M3)
    codes = round_to(torch.where(scale > 0, blocks / scale, 0.0), E2M1)
    return (codes * scale).flatten(-2).to(x.dtype)


def quantized_and_back(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to NVFP4 with the factor ``factor`` (see `quantized`), in its own units and dtype."""
    return (quantized(x.float(), factor) / factor).to(x.dtype)


def per_row(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One factor for all, or one for each row, ready to multiply ``like [rows, ...]``."""
    wide = factor.float()
    if wide.numel() > 1:
        return wide.reshape(-1, *[1] * (like.dim() - 1))
    return wide.reshape(()) if wide.dim() else wide


def through_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x`` divided by its static scale, rounded to E4M3 and multiplied again, in its own dtype."""
    unit = scale.float().reshape(())
    return (round_to(x.float() / unit, E4M3) * unit).to(x.dtype)


def row_major(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Block scales as bytes ``[(E,) N, K/16]``, contiguous, from bytes or E4M3 in 128x4 tiles.

    Tiles come padded to whole ones; a tile holds row r and block c at byte ``(r % 32) * 16 + (r // 32) * 4 + c``
    (cuBLAS, "1D block scaling factors"). What counts is where bytes lie: a transposed view means the same tiles.
    """
    *lead, rows, groups = shape
    if scale.dim() > 1 and not scale.is_contiguous():
        scale = scale.mT
    scale = scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)
    padded_rows, padded_groups = _padded(rows, TILE_ROWS), _padded(groups, TILE_GROUPS)
    tiles = scale.reshape(*lead, padded_rows // TILE_ROWS, padded_groups // TILE_GROUPS, 32, 4, TILE_GROUPS)
    n = len(lead)
    tiles = tiles.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4)
    return tiles.reshape(*lead, padded_rows, padded_groups)[..., :rows, :groups].contiguous()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# --- Products.


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x [..., K]`` times codes ``[N, K/2]`` with scales in tiles; ``factor`` multiplies the sums, bias ``[N]``."""
    scale = row_major(scale, (codes.shape[0], 2 * codes.shape[1] // GROUP))
    return ops.linear(x, codes, scale, factor, bias, PLAIN)


def grouped(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor | None,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Rows ``x [S, K]`` by expert, cumulative ``ends [E]``, times codes ``[E, N, K/2]`` with scales in tiles."""
    scale = row_major(scale, (*codes.shape[:2], 2 * codes.shape[2] // GROUP))
    return ops.grouped_linear(x, codes, scale, factor, ends, PLAIN)


class Weight(NamedTuple):
    """The matrices of E experts: codes uint8 ``[E, N, K/2]``, scale uint8 ``[E, N, K/16]`` in rows, alpha and the
    factor of its input's quantization float32, one or one an expert."""

    codes: torch.Tensor
    scale: torch.Tensor
    alpha: torch.Tensor
    factor: torch.Tensor

    def operands(self, emulate: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the ops take them; emulation leaves the activation's factor to be undone with the weight's."""
        alpha = self.alpha.float().reshape(-1)
        return self.codes, self.scale, alpha if emulate else alpha * self.factor.float().reshape(-1)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    sides: Sequence[Weight],
    activation: str,
    emulate: bool,
) -> torch.Tensor:
    """A block of experts on ``x [..., H]`` with ids and routing weights ``[T, k]``.

    sides: up and down, or gate (w1), up (w3) and down. activation: relu2, silu, or swiglu, for which up without a gate
    before it holds the gate in the second half of its rows. emulate: round both products' inputs to FP4.
    """
    rows = x.reshape(-1, x.shape[-1])
    if activation == "swiglu" or emulate:
        return _by_steps(rows, ids, weights, sides, activation, emulate).to(x.dtype).reshape(x.shape)
    up, down = (side.operands(emulate) for side in sides)
    return ops.experts(rows, ids, weights, *up, *down, activation, PLAIN).reshape(x.shape)


def _by_steps(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    sides: Sequence[Weight],
    activation: str,
    emulate: bool,
) -> torch.Tensor:
    """Each choice as a row of its own, through both products; the sum over choices in float32."""
    picked = ids.reshape(-1)

    def product(x: torch.Tensor, side: Weight) -> torch.Tensor:
        if emulate:
            factor = side.factor.float().reshape(-1)
            # An id of no expert here counts as nothing, with any factor.
            x = quantized(x, factor[picked.clamp(0, factor.numel() - 1)])
        return ops.gathered_linear(x, *side.operands(emulate), picked, PLAIN)

    first = rows.repeat_interleave(ids.shape[1], 0)
    *ups, down = sides
    hidden = [product(first, side).float() for side in ups]
    if activation != "swiglu":
        hidden = {"relu2": relu2, "silu": functional.silu}[activation](hidden[0])
    else:
        # Two tensors are w1 (the gate) and w3; one holds w3's rows before w1's.
        gate, up = hidden if len(hidden) == 2 else reversed(hidden[0].chunk(2, -1))
        hidden = functional.silu(gate) * up
    result = product(hidden.to(rows.dtype), down).unflatten(0, ids.shape)
    return (result.float() * weights.float().unsqueeze(-1)).sum(1)
