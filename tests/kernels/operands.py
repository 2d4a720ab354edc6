"""Operands for the tests of this folder, and tables of the number format written out by hand."""

from __future__ import annotations

import torch

from fp4pass.lowering import layout

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NAN_BYTES = (0x7F, 0xFF)


def e4m3(byte: int) -> float:
    """The value of one E4M3 byte by its fields: sign, four exponent bits (bias 7), three mantissa bits."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte & 0x80 else magnitude


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 ``[..., K]`` in natural order -> plain codes uint8 ``[..., K/2]``."""
    low, high = nibbles.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def every_product() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 4,064 finite products: plain codes ``[256, 128]``, scale ``[256, 16]``, expected float64 ``[256, 256]``.

    Row n has the scale byte n (the two NaN bytes are replaced by 0). Block j holds the 16 codes rotated by j, so that
    every slot of a word sees every code.
    """
    nibbles = (torch.arange(16)[:, None] + torch.arange(16)) % 16
    codes = pack(nibbles.flatten()).repeat(256, 1)
    scales = [0 if byte in NAN_BYTES else byte for byte in range(256)]
    scale = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, 16)
    values = torch.tensor([e4m3(byte) for byte in scales], dtype=torch.float64)
    table = torch.tensor(E2M1, dtype=torch.float64)
    return codes, scale, values[:, None] * table[nibbles.flatten()]


def weight(
    *shape: int, seed: int = 0, order: str = layout.PLAIN, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random weight ``[..., N, K]`` in ``order``: codes, scale bytes of both signs near 1, global scale(s)."""
    random = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, **random)
    scale = torch.randint(0x28, 0x48, (*lead, k // 16), dtype=torch.uint8, **random)
    scale |= torch.randint(0, 2, scale.shape, dtype=torch.uint8, **random) << 7
    # One block in eight gets an odd scale: zero, or subnormal.
    rare = torch.randint(0, 8, scale.shape, dtype=torch.uint8, **random) == 0
    scale = torch.where(rare, scale & 0x87, scale)
    count = () if len(lead) == 1 else (lead[0],)
    global_scale = torch.rand(count, **random) * 0.01 + 0.001
    return *stored(codes, scale, order), global_scale


def stored(codes: torch.Tensor, scale: torch.Tensor, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain codes and scale bytes of a weight -> the same in ``order``."""
    return layout.from_plain(codes, order), layout.scale_from_plain(scale, order)


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu") -> torch.Tensor:
    """Normal random activations."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``, in float64; 0 for two empty or two zero tensors."""
    difference = (result.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp_min(1e-300)).item() if exact.numel() else 0.0


def assert_within(result: torch.Tensor, exact: torch.Tensor, limit: float, what: object = "") -> None:
    """Shapes agree and the relative error is below ``limit``, which holds for many results.

    The error of a few roundings spreads, so the limit is wider for them: by half for 16 results.
    """
    assert result.shape == exact.shape
    allowed = limit * (1 + 2 / max(result.numel(), 1) ** 0.5)
    error = relative_error(result, exact)
    assert error < allowed, f"relative error {error:.2e}, allowed {allowed:.2e} {what}"
