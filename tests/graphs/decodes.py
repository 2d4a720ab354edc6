"""Decodes of an NVFP4 weight in plain PyTorch. Each takes a `Packed` module and a dtype and gives ``[(E,) N, K]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from fp4pass.lowering.layout import INTERLEAVED, to_plain
from fp4pass.lowering.reference import dequantize

if TYPE_CHECKING:
    from .spellings import Packed

VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
E2M1 = torch.tensor(VALUES)
BYTES = torch.stack([E2M1[torch.arange(256) & 15], E2M1[torch.arange(256) >> 4]], -1)
"""The two values of every byte, ``[256, 2]``."""


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 in natural order, the low nibble first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def blocks(values: torch.Tensor) -> torch.Tensor:
    """``[..., K] -> [..., K/16, 16]``."""
    return values.unflatten(-1, (-1, 16))


def per_expert(m: Packed) -> torch.Tensor:
    """The global scale, ready to multiply ``[(E,) N, K/16]``."""
    return m.factor.view(-1, 1, 1) if m.factor.dim() else m.factor


def scaled(m: Packed, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values times (scale times global scale)."""
    return (blocks(values) * (m.scale.float() * per_expert(m)).unsqueeze(-1)).flatten(-2).to(dtype)


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Row-major scales ``[N, G]`` -> the same shape filled in tiles of 128 rows by 4 blocks, one tile after another."""
    rows, groups = scale.shape
    tiles = torch.zeros(rows // 128, groups // 4, 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(groups):
            place = (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            tiles[r // 128, c // 4, place] = scale.view(torch.uint8)[r, c]
    return tiles.view(rows, groups).view(torch.float8_e4m3fn)


# --- Decodes: how the codes become values.


def table_of_16(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, m.table[nibbles(m.codes).long()], dtype)


def table_literal(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, torch.tensor(VALUES)[nibbles(m.codes).int()], dtype)


def table_by_index_select(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes)
    return scaled(m, m.table.index_select(0, numbers.flatten().long()).view(numbers.shape), dtype)


def table_by_gather(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes).long()
    return scaled(m, m.table.expand(numbers.shape[0], 16).gather(1, numbers), dtype)


def shifts_by_column_number(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    shifts = (torch.arange(2 * m.codes.shape[-1]) % 2 * 4).to(torch.uint8)
    return scaled(m, m.table[((m.codes.repeat_interleave(2, -1) >> shifts) & 15).long()], dtype)


def table_of_8_sign_by_where(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes)
    return scaled(m, m.table[(numbers & 7).long()] * torch.where((numbers & 8).bool(), -1.0, 1.0), dtype)


def table_of_8_sign_by_arithmetic(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes)
    return scaled(m, m.table[(numbers % 8).long()] * (1 - 2 * (numbers // 8).float()), dtype)


def table_of_bytes_by_embedding(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, functional.embedding(m.codes.int(), m.table).flatten(-2), dtype)


def table_of_bytes_by_index(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, m.table[m.codes.long()].flatten(-2), dtype)


def table_in_target_dtype(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    values = m.table.to(dtype)[nibbles(m.codes).long()]
    return (blocks(values) * (m.scale.to(dtype) * m.factor.to(dtype)).unsqueeze(-1)).flatten(-2)


def arithmetic_on_integers(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes)
    magnitude = (numbers & 7).to(torch.int8)
    doubled = torch.where(magnitude < 4, magnitude, (2 + (magnitude & 1)) << ((magnitude >> 1) - 1))
    return scaled(m, torch.where(numbers >= 8, -doubled, doubled).float() * 0.5, dtype)


def arithmetic_on_powers(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes).int()
    exponent, mantissa = (numbers >> 1) & 3, (numbers & 1).float()
    normal = (1 + mantissa / 2) * torch.exp2((exponent - 1).float())
    return scaled(m, torch.where(exponent == 0, mantissa / 2, normal) * (1.0 - (numbers >> 3) * 2), dtype)


def bits_of_bfloat16(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    numbers = nibbles(m.codes).to(torch.int16)
    bits = (numbers & 7) << 6 | (numbers & 8) << 12
    return scaled(m, bits.view(torch.bfloat16).float() * 2.0**126, dtype)


def shifts_from_a_table(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    shifts = torch.tensor([0, 4], dtype=torch.uint8)
    return scaled(m, E2M1[((m.codes.unsqueeze(-1) >> shifts) & 15).flatten(-2).long()], dtype)


def remainder_and_quotient(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    pairs = torch.stack((m.codes % 16, m.codes // 16), -1).reshape(m.codes.shape[0], -1)
    return scaled(m, m.table[pairs.long()], dtype)


def concatenated_nibbles(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    flat = m.codes.view(-1, 1)
    pairs = torch.cat((flat & 15, (flat & 0xF0) >> 4), dim=1)
    return scaled(m, m.table[pairs.view(m.codes.shape[0], -1).long()], dtype)


def written_by_slices(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    rows, half = m.codes.shape
    values = torch.empty(rows, 2 * half)
    values[:, 0::2] = m.table[(m.codes & 15).long()]
    values[:, 1::2] = m.table[(m.codes >> 4).long()]
    return scaled(m, values, dtype)


def high_nibble_first(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, m.table[torch.stack((m.codes >> 4, m.codes & 15), -1).flatten(-2).long()], dtype)


def interleaved_undone(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return scaled(m, m.table[nibbles(to_plain(m.codes, INTERLEAVED)).long()], dtype)


def as_our_modules_do(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    bytes_ = m.scale.view(torch.uint8)
    return dequantize(m.codes, bytes_, m.factor, torch.float32, m.spelling.layout).to(dtype)


# --- Decodes: how the scales are applied.


def values_of(m: Packed) -> torch.Tensor:
    """Unscaled values in float32."""
    return m.table[nibbles(m.codes).long()]


def scales_repeated(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (values_of(m) * m.scale.float().repeat_interleave(16, -1) * m.factor).to(dtype)


def scales_expanded(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    rows, groups = m.scale.shape
    wide = m.scale.float().unsqueeze(-1).expand(rows, groups, 16).reshape(rows, groups * 16)
    return (m.factor * wide * values_of(m)).to(dtype)


def scales_by_column_number(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    columns = torch.arange(2 * m.codes.shape[-1]) // 16
    return (values_of(m) * m.scale.float()[:, columns] * m.factor).to(dtype)


def scales_gathered(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    values = values_of(m)
    columns = (torch.arange(values.shape[-1]) // 16).expand(values.shape)
    return (values * m.scale.float().gather(1, columns) * m.factor).to(dtype)


def scales_by_interpolation(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (values_of(m) * functional.interpolate(m.scale.float()[None], scale_factor=16)[0] * m.factor).to(dtype)


def scales_from_a_table(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The value of every E4M3 byte, looked up."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale = table[m.scale.view(torch.uint8).long()] * m.factor
    return (blocks(values_of(m)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def global_on_the_weight(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    weight = (blocks(values_of(m)) * m.scale.float().unsqueeze(-1)).flatten(-2)
    return (weight * m.factor).to(dtype)


def global_on_the_values(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (blocks(values_of(m) * m.factor) * m.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def global_divides(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (blocks(values_of(m)) * (m.scale.float() / m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def divided_by_the_reciprocal(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (blocks(values_of(m)) * (m.scale.float() / (1 / m.factor)).unsqueeze(-1)).flatten(-2).to(dtype)


def without_global(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (blocks(values_of(m)) * m.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def in_float64(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    return (blocks(values_of(m).double()) * (m.scale.double() * m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def scales_in_tiles(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    rows, groups = m.scale.shape
    tiles = m.scale.float().view(rows // 128, groups // 4, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(rows, groups)
    return (blocks(values_of(m)) * plain.unsqueeze(-1) * m.factor).flatten(-2).to(dtype)
