"""What the operations of other libraries compute, by arithmetic of our own, in float64: nothing here comes from the
twins. And a place where stand-ins for these operations are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fp4pass.lowering.reference import decode_codes, decode_scale

TILE = (128, 4)
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


class StandIns:
    """Registers ops under their own names until `close`. ``calls`` counts what ran."""

    def __init__(self) -> None:
        self._libraries: dict[str, torch.library.Library] = {}

    def define(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
        """An op that runs on the CPU and, unless ``fake`` says more, on fake tensors by the same function."""
        namespace, _, rest = schema.partition("::")
        self._library(namespace).define(rest)
        self.implement(namespace, rest.partition("(")[0], run, fake or run)

    def implement(self, namespace: str, name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        """What an op does that exists already, but neither on the CPU nor on fake tensors."""
        library = self._library(namespace)
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)

    def _library(self, namespace: str) -> torch.library.Library:
        if namespace not in self._libraries:
            self._libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        return self._libraries[namespace]

    def close(self) -> None:
        """Forget all ops."""
        for library in self._libraries.values():
            library._destroy()


# --- FP4.


def to_codes(values: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes of float64 ``[..., K]``, nearest, ties to the even code."""
    size = values.abs().double()
    below, above = torch.bucketize(size, BOUNDS.double()), torch.bucketize(size, BOUNDS.double(), right=True)
    codes = torch.where(below % 2 == 0, below, above).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def in_tiles(scale: torch.Tensor) -> torch.Tensor:
    """Row-major bytes ``[(E,) N, G]`` -> tiles of 128 rows by 4 blocks, padded with zeros, ``[(E,) N', G']``."""
    rows, groups = scale.shape[-2:]
    scale = functional.pad(scale, (0, -groups % 4, 0, -rows % 128))
    *lead, rows, groups = scale.shape
    tiles = scale.reshape(*lead, rows // 128, 4, 32, groups // 4, 4)
    n = len(lead)
    return tiles.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, rows, groups).contiguous()


def in_rows(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `in_tiles`, from any shape of the tiles."""
    found = torch.empty(rows, groups, dtype=torch.uint8)
    flat, wide = scale.contiguous().view(torch.uint8).flatten(), -(-groups // 4)
    for r in range(rows):
        for c in range(groups):
            place = (r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            found[r, c] = flat[place]
    return found


def quantize(x: torch.Tensor, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [..., K]`` times factor, as codes ``[M, K/2]`` and swizzled E4M3 bytes."""
    rows = x.reshape(-1, x.shape[-1]).double()
    if factor is not None:
        rows = rows * (factor.double().reshape(-1, 1) if factor.numel() > 1 else factor.double().reshape(()))
    blocks = rows.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    return to_codes((blocks / scale.double().unsqueeze(-1)).nan_to_num(0).flatten(-2)), in_tiles(
        scale.view(torch.uint8)
    )


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes ``[N, K/2]`` with swizzled scales, in float64."""
    rows, half = codes.shape
    blocks = decode_codes(codes.contiguous(), dtype=torch.float64).unflatten(-1, (-1, 16))
    return (blocks * decode_scale(in_rows(scale, rows, half // 8), torch.float64).unsqueeze(-1)).flatten(-2)


def multiply(codes, weight, scale, weight_scale, alpha, dtype=torch.bfloat16):
    """``alpha * a @ b.T`` in float64, rounded once."""
    return (dense(codes, scale) @ dense(weight, weight_scale).T * alpha.double()).to(dtype)


def fake_codes(x: torch.Tensor, word: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes (in words of ``word`` bytes) and block scales for ``x``."""
    rows, groups = x.numel() // x.shape[-1], x.shape[-1] // 16
    codes = x.new_empty(rows, x.shape[-1] // (2 * word), dtype=torch.uint8 if word == 1 else torch.int32)
    return codes, x.new_empty((rows + 127) // 128 * 128 * ((groups + 3) // 4 * 4), dtype=torch.uint8)


# --- What the norms compute, in float64.


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without any rounding."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group: int, eps: float) -> torch.Tensor:
    """The Mamba mixer's norm without any rounding."""
    wide = (x.double() * functional.silu(gate.double())).unflatten(-1, (-1, group))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight.double()


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU without any rounding."""
    return x.double().relu().square()


def silu_times(x: torch.Tensor) -> torch.Tensor:
    """silu(left half) x right half without any rounding."""
    gate, up = x.double().chunk(2, -1)
    return functional.silu(gate) * up


def silu_times_stored(x: torch.Tensor) -> torch.Tensor:
    """The same in ``x``'s dtype, as a kernel computes it: in float32, so that ties fall as they do anywhere."""
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)
