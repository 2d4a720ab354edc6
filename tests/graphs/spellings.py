"""Many ways to write down one thing: an NVFP4 weight, decoded in plain PyTorch, in a product.

Each `Spelling` names the decode, the product and what the match must find in it. The weight that a module means is kept
beside it in float64, computed from numbers and not by any decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers.integrations.moe  # noqa: F401  (registers transformers::grouped_mm_fallback)
from torch import nn
from torch.nn import functional

from fp4pass.lowering.layout import (
    FRAGMENTS,
    INTERLEAVED,
    LAYOUTS,
    PLAIN,
    PLAIN_HIGH_FIRST,
    from_plain,
    scale_from_plain,
)
from fp4pass.match.convention import ABSENT, DIVIDE, LINEAR, MULTIPLY, SWIZZLED

from . import decodes
from .decodes import E2M1, table_of_16, without_global

N, K, EXPERTS = 48, 80, 3
"""Multiples of 16 but not of 64."""
IN_UNITS = {"layout": FRAGMENTS, "shape": (N, 192)}

Decode = Callable[["Packed", torch.dtype], torch.Tensor]
Multiply = Callable[["Packed", torch.Tensor, torch.Tensor], torch.Tensor]


class Packed(nn.Module):
    """One random NVFP4 weight ``[(E,) N, K]`` as a spelling wants it stored, and the product that the spelling names.

    ``codes`` uint8 ``[(E,) N, K/2]``, ``scale`` E4M3 ``[(E,) N, K/16]`` of both signs, ``factor`` float32 ``[]`` or
    ``[E]``, ``table`` a buffer; ``exact`` is the weight in float64.
    """

    def __init__(self, spelling: Spelling, bias: bool = False, seed: int = 0, device: str = "cpu") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        lead = (spelling.experts,) if spelling.experts else ()
        n, k = spelling.shape
        numbers = torch.randint(0, 16, (*lead, n, k), generator=random, dtype=torch.uint8)
        scale = torch.randint(0x30, 0x40, (*lead, n, k // 16), generator=random, dtype=torch.uint8)
        scale |= torch.randint(0, 2, scale.shape, generator=random, dtype=torch.uint8) << 7
        scale = scale.view(torch.float8_e4m3fn)
        factor = torch.rand(lead, generator=random) + 0.3
        dense = E2M1.double()[numbers.long()] * scale.double().repeat_interleave(16, -1)
        if spelling.global_scale != ABSENT or spelling.scaled_output:
            wide = factor.double().view(-1, 1, 1) if lead else factor.double()
            dense = dense / wide if spelling.global_scale == DIVIDE else dense * wide
        self.exact = dense
        self.spelling = spelling
        packed = from_plain(numbers[..., 0::2] | numbers[..., 1::2] << 4, spelling.layout)
        scale = decodes.swizzle(scale) if spelling.scales == SWIZZLED else scale_from_plain(scale, spelling.layout)
        for name, tensor in (("codes", packed), ("scale", scale), ("factor", factor)):
            self.register_parameter(name, nn.Parameter(tensor.to(device), requires_grad=False))
        self.register_buffer("table", spelling.table.clone().to(device))
        self.bias = nn.Parameter(torch.randn(n, generator=random).to(device)) if bias else None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The decoded weight, as the spelling has it."""
        return self.spelling.decode(self, dtype)

    def forward(self, x: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """x ``[..., K]``; for experts ``which`` holds the rows' expert ids, or the experts' cumulative ends."""
        return self.spelling.multiply(self, x, which)

    def exact_product(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """What the product should be, in float64; ``ids [S]`` are the rows' experts."""
        if ids is not None:
            return torch.einsum("snk,sk->sn", self.exact[ids], x.double())
        return x.double() @ self.exact.mT + (0 if self.bias is None else self.bias.double())


@dataclass(frozen=True)
class Spelling:
    """A decode and a product; ``op``, ``layout``, ``scales`` and ``global_scale`` are what a match must report."""

    decode: Decode
    multiply: Multiply
    op: str = "fp4pass.linear"
    table: torch.Tensor = E2M1
    shape: tuple[int, int] = (N, K)
    experts: int = 0
    layout: str = PLAIN
    scales: str = LINEAR
    global_scale: str = MULTIPLY
    scaled_output: bool = False

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


# --- Products.


def linear(m: Packed, x: torch.Tensor, which: None) -> torch.Tensor:
    return functional.linear(x, m.weight(x.dtype), None if m.bias is None else m.bias.to(x.dtype))


def matmul(m: Packed, x: torch.Tensor, which: None) -> torch.Tensor:
    return x @ m.weight(x.dtype).t()


def weight_on_the_left(m: Packed, x: torch.Tensor, which: None) -> torch.Tensor:
    return (m.weight(x.dtype) @ x.mT).mT


def stored_transposed(m: Packed, x: torch.Tensor, which: None) -> torch.Tensor:
    return x @ m.weight(x.dtype).t().contiguous()


def scaled_output(m: Packed, x: torch.Tensor, which: None) -> torch.Tensor:
    return functional.linear(x, m.weight(x.dtype)) * m.factor.to(x.dtype)


def grouped(m: Packed, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(x, m.weight(x.dtype).mT, offs=ends)


def grouped_by_transformers(m: Packed, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, m.weight(x.dtype).mT, ends)


def gathered_after_decode(m: Packed, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.bmm(m.weight(x.dtype)[ids], x.unsqueeze(-1)).squeeze(-1)


def gathered_on_the_right(m: Packed, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.unsqueeze(1), m.weight(x.dtype)[ids].mT).squeeze(1)


def gathered_before_decode(m: Packed, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    values = E2M1[decodes.nibbles(m.codes[ids]).long()]
    weight = decodes.blocks(values) * (m.scale[ids].float() * m.factor[ids].view(-1, 1, 1)).unsqueeze(-1)
    return torch.bmm(weight.flatten(-2).to(x.dtype), x.unsqueeze(-1)).squeeze(-1)


def gathered_by_index_select(m: Packed, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.unsqueeze(1), m.weight(x.dtype).index_select(0, ids).mT).squeeze(1)


_GROUPED = {"op": "fp4pass.grouped_linear", "experts": EXPERTS}
# torch's own grouped product is traced in bfloat16 only.
_GROUPED_BY_TORCH = _GROUPED | {"dtypes": (torch.bfloat16,)}
_GATHERED = {"op": "fp4pass.gathered_linear", "experts": EXPERTS}


def _held(layout: str) -> dict[str, object]:
    """What a spelling of ``layout`` needs, its shape included."""
    return IN_UNITS if layout == FRAGMENTS else {"layout": layout}


LINEARS: dict[str, Spelling] = {
    decode.__name__: Spelling(decode, linear, **more)
    for decode, more in (
        (table_of_16, {}),
        (decodes.table_literal, {}),
        (decodes.table_by_index_select, {}),
        (decodes.table_by_gather, {}),
        (decodes.table_of_8_sign_by_where, {"table": E2M1[:8]}),
        (decodes.table_of_8_sign_by_arithmetic, {"table": E2M1[:8]}),
        (decodes.table_of_bytes_by_embedding, {"table": decodes.BYTES}),
        (decodes.table_of_bytes_by_index, {"table": decodes.BYTES}),
        (decodes.table_in_target_dtype, {}),
        (decodes.arithmetic_on_integers, {}),
        (decodes.arithmetic_on_powers, {}),
        (decodes.bits_of_bfloat16, {}),
        (decodes.shifts_from_a_table, {}),
        (decodes.shifts_by_column_number, {}),
        (decodes.remainder_and_quotient, {}),
        (decodes.concatenated_nibbles, {}),
        (decodes.written_by_slices, {}),
        (decodes.high_nibble_first, {"layout": PLAIN_HIGH_FIRST}),
        (decodes.interleaved_undone, {"layout": INTERLEAVED}),
        (decodes.scales_repeated, {}),
        (decodes.scales_expanded, {}),
        (decodes.scales_by_column_number, {}),
        (decodes.scales_gathered, {}),
        (decodes.scales_by_interpolation, {}),
        (decodes.scales_from_a_table, {}),
        (decodes.global_on_the_weight, {}),
        (decodes.global_on_the_values, {}),
        (decodes.global_divides, {"global_scale": DIVIDE}),
        (decodes.divided_by_the_reciprocal, {}),
        (without_global, {"global_scale": ABSENT}),
        (decodes.in_float64, {}),
        (decodes.scales_in_tiles, {"scales": SWIZZLED, "shape": (128, 192)}),
    )
}
LINEARS |= {f"our_modules_{layout}": Spelling(decodes.as_our_modules_do, linear, **_held(layout)) for layout in LAYOUTS}
LINEARS |= {
    f"our_modules_of_{n}x{k}": Spelling(decodes.as_our_modules_do, linear, **IN_UNITS | {"shape": (n, k)})
    for n, k in ((64, 64), (16, 64), (16, 1024))
}
LINEARS |= {
    multiply.__name__: Spelling(table_of_16, multiply) for multiply in (matmul, weight_on_the_left, stored_transposed)
}
LINEARS["scaled_output"] = Spelling(without_global, scaled_output, global_scale=ABSENT, scaled_output=True)
LINEARS["square"] = Spelling(table_of_16, linear, shape=(K, K))

PRODUCTS_OF_EXPERTS: dict[str, Spelling] = {
    multiply.__name__: Spelling(table_of_16, multiply, **more)
    for multiply, more in (
        (grouped, _GROUPED_BY_TORCH),
        (grouped_by_transformers, _GROUPED),
        (gathered_after_decode, _GATHERED),
        (gathered_on_the_right, _GATHERED),
        (gathered_before_decode, _GATHERED),
        (gathered_by_index_select, _GATHERED),
    )
}
PRODUCTS_OF_EXPERTS |= {
    f"{multiply.__name__}_{layout}": Spelling(decodes.as_our_modules_do, multiply, **_held(layout), **more)
    for multiply, more in ((grouped, _GROUPED_BY_TORCH), (gathered_after_decode, _GATHERED))
    for layout in LAYOUTS
}
