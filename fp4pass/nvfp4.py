"""The NVFP4 format: quantize a dense weight and turn it back.

A weight ``[..., N, K]`` is stored as 4-bit codes, one E4M3 scale for every 16 neighbours along K and one float32 global
scale for the whole matrix: ``weight = e2m1(code) * scale * global_scale``. The names and the arithmetic are those of
ModelOpt's checkpoints, so that tensors made here can stand in one of them.
"""

from __future__ import annotations

import torch

from fp4pass.errors import ArgumentError
from fp4pass.lowering import reference

BLOCK = 16
"""Neighbours along K that share one scale."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # the smallest positive E4M3 number, a subnormal

# Halfway points between neighbouring magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. A tie goes to the even code: where that is
# the upper one, the bound is moved down by one float32 step, so that the tie itself counts as above it.
_HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` [N, K] or [E, N, K] (any float dtype, finite, K a multiple of 16) to NVFP4.

    Returns ``(codes, scale, global_scale)``: codes uint8 [..., N, K/2] with the even k in the low nibble, scale
    float8_e4m3fn [..., N, K/16], global_scale float32 [] or [E] (one for each expert). The global scale is
    amax / (6 * 448); a block's scale is its own amax / 6 in units of it, clamped to E4M3's positive range.

    Raises ArgumentError for another rank, dtype or K, and for NaN or infinite values.
    """
    _check_weight(weight)
    dense = weight.detach().float()
    if not bool(torch.isfinite(dense).all()):
        raise ArgumentError(
            "nvfp4.quantize: the weight has values that are not finite",
            seen="NaN or Inf (after conversion to float32)",
            expected="finite values",
            do="find the layer that diverged, or clamp its weight before quantizing",
        )
    blocks = dense.unflatten(-1, (-1, BLOCK))
    block_amax = blocks.abs().amax(-1)
    amax = block_amax.amax((-2, -1))
    # An all-zero matrix has no range of its own; any positive global scale describes it.
    tiny = torch.finfo(torch.float32).tiny
    global_scale = torch.where(amax > 0, (amax / (E2M1_MAX * E4M3_MAX)).clamp(min=tiny), 1.0)
    per_block = global_scale[..., None, None]
    # ModelOpt gives an all-zero block the scale 1 before it divides by the global scale.
    wanted = torch.where(block_amax > 0, block_amax / E2M1_MAX, 1.0) / per_block
    scale = wanted.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = _round_to_e2m1(blocks / (scale.float() * per_block)[..., None]).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale, global_scale


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Turn NVFP4 tensors (as ``quantize`` returns them) back into a dense weight [..., N, K] of ``dtype``.

    code x scale is exact; the product with the global scale is taken in float32 (float64 for that ``dtype``) and
    rounded to ``dtype`` once. Raises ArgumentError if shapes or dtypes do not belong together.
    """
    _check_packed(codes, scale, global_scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return reference.dequantize(codes, scale.view(torch.uint8), global_scale, wide).to(dtype)


def _round_to_e2m1(value: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code of each float32 ``value``, ties to even, saturating at 6; uint8, sign in bit 3."""
    bounds = torch.tensor(_HALFWAY, device=value.device)
    bounds[1::2] = torch.nextafter(bounds[1::2], bounds.new_zeros(()))
    magnitude = torch.bucketize(value.abs().contiguous(), bounds, out_int32=True).to(torch.uint8)
    return magnitude | (value.signbit().to(torch.uint8) << 3)


def _check_weight(weight: torch.Tensor) -> None:
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ArgumentError(
            "nvfp4.quantize: the weight is not a dense float tensor",
            seen=str(weight.dtype),
            expected="bfloat16, float16, float32 or float64",
            do="dequantize it first if it is stored in 8 or 4 bits",
        )
    if weight.ndim not in (2, 3) or weight.numel() == 0 or weight.shape[-1] % BLOCK:
        raise ArgumentError(
            "nvfp4.quantize: the weight has a shape that NVFP4 cannot hold",
            seen=str(list(weight.shape)),
            expected=f"[N, K] or [experts, N, K], not empty, K a multiple of {BLOCK}",
            do="pad K with zeros, or keep this layer in bfloat16",
        )


def _check_packed(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> None:
    dtypes = (codes.dtype, scale.dtype, global_scale.dtype)
    if dtypes != (torch.uint8, torch.float8_e4m3fn, torch.float32):
        raise ArgumentError(
            "nvfp4.dequantize: a tensor has the wrong dtype",
            seen=f"codes {dtypes[0]}, scale {dtypes[1]}, global_scale {dtypes[2]}",
            expected="uint8, float8_e4m3fn, float32",
            do="pass the tensors as quantize() returns them; scale.view(torch.float8_e4m3fn) turns bytes into E4M3",
        )
    experts = codes.shape[:-2]
    belongs = (
        codes.ndim in (2, 3)
        and scale.shape[:-1] == codes.shape[:-1]
        and scale.shape[-1] * (BLOCK // 2) == codes.shape[-1]
        and global_scale.shape in (experts, torch.Size([1]))
    )
    if not belongs:
        raise ArgumentError(
            "nvfp4.dequantize: the shapes do not belong together",
            seen=f"codes {list(codes.shape)}, scale {list(scale.shape)}, global_scale {list(global_scale.shape)}",
            expected="[..., N, K/2], [..., N, K/16] and [] or [experts]",
            do="pass the three tensors of one layer, with unpadded scales in row-major order",
        )
