"""Random spellings of an NVFP4 product: one choice for every step of it, drawn independently of the others.

A `Recipe` names the choices; `Recipe.compute` follows them. A `Flaw` planted in a recipe turns it into a near miss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from fp4pass.lowering.layout import PLAIN, PLAIN_HIGH_FIRST, from_plain
from fp4pass.match.convention import ABSENT, DIVIDE, LINEAR, MULTIPLY, SWIZZLED, TRANSPOSED

from . import decodes
from .decodes import BYTES, E2M1, VALUES, blocks
from .flaws import FLAWS, OF_EXPERTS

Pair = tuple[torch.Tensor, torch.Tensor]

# --- One byte -> (low nibble, high nibble), numbers 0..15 of some integer dtype.

HALVES: dict[str, Callable[[torch.Tensor], Pair]] = {
    "mask_and_shift": lambda c: (c & 15, c >> 4),
    "both_masked": lambda c: (c & 0x0F, (c & 0xF0) >> 4),
    "remainder_and_quotient": lambda c: (c % 16, c // 16),
    "in_int32": lambda c: (c.int() & 15, (c.int() >> 4) & 15),
    "shifted_up_and_down": lambda c: ((c << 4) >> 4, c >> 4),
    "what_is_left": lambda c: (c - ((c >> 4) << 4), c >> 4),
    "in_floats": lambda c: (c.float() - (c.float() / 16).floor() * 16, (c.float() / 16).floor()),
    "bitwise": lambda c: (torch.bitwise_and(c, 15), torch.bitwise_right_shift(c, 4)),
}


def written(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    out = torch.empty((*low.shape[:-1], 2 * low.shape[-1]), dtype=low.dtype)
    out[..., 0::2] = low
    out[..., 1::2] = high
    return out


def chosen_by_parity(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    odd = torch.arange(2 * low.shape[-1]) % 2 == 1
    return torch.where(odd, high.repeat_interleave(2, -1), low.repeat_interleave(2, -1))


JOINS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "stack": lambda low, high: torch.stack((low, high), -1).flatten(-2),
    "stack_and_reshape": lambda low, high: torch.stack([low, high], dim=-1).reshape(*low.shape[:-1], -1),
    "cat": lambda low, high: torch.cat((low.unsqueeze(-1), high.unsqueeze(-1)), -1).view(*low.shape[:-1], -1),
    "flat_cat": lambda low, high: torch.cat((low.reshape(-1, 1), high.reshape(-1, 1)), 1).view(*low.shape[:-1], -1),
    "written": written,
    "chosen_by_parity": chosen_by_parity,
}

# --- Numbers 0..15 -> values, with the table that the decode looks them up in.


def by_where(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[(n & 7).long()] * torch.where((n & 8) != 0, -1.0, 1.0)


def by_integers(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    m = n & 7
    doubled = torch.where(m < 4, m, (2 + (m & 1)) << ((m >> 1) - 1).clamp(min=0)).float()
    return torch.where(n > 7, -doubled, doubled) / 2


def by_powers(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    exponent, mantissa = (n >> 1) & 3, (n & 1).float()
    normal = torch.ldexp(1 + mantissa / 2, (exponent - 1).int())
    return torch.where(exponent == 0, mantissa / 2, normal) * (1.0 - (n >> 3) * 2)


def by_steps(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    magnitude = torch.zeros(n.shape)
    for code in range(1, 8):
        magnitude = torch.where((n & 7) == code, VALUES[code], magnitude)
    return torch.where(n >= 8, -magnitude, magnitude)


def by_bits_of_float32(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    n = n.int()
    exponent, mantissa = (n >> 1) & 3, n & 1
    normal = ((exponent + 126) << 23 | mantissa << 22).view(torch.float32)
    return torch.where(exponent == 0, mantissa * 0.5, normal) * torch.where(n > 7, -1.0, 1.0)


def by_bits_of_bfloat16(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    n = n.to(torch.int16)
    return ((n & 7) << 6 | (n & 8) << 12).view(torch.bfloat16).float() * 2.0**126


def by_bits_of_float16(n: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    n = n.to(torch.int16)
    return ((n & 7) << 9 | (n & 8) << 12).view(torch.float16).float() * 2.0**14


DECODES: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "table": (E2M1, lambda n, t: t[n.long()]),
    "int32_into_table": (E2M1, lambda n, t: t[n.int()]),
    "half_table": (E2M1.half(), lambda n, t: t[n.long()].float()),
    "doubled_table": ((2 * E2M1).to(torch.int8), lambda n, t: t[n.long()] * 0.5),
    "take": (E2M1, lambda n, t: torch.take(t, n.long())),
    "gather": (E2M1, lambda n, t: t.gather(0, n.flatten().long()).view(n.shape)),
    "index_select": (E2M1, lambda n, t: t.index_select(0, n.reshape(-1).long()).reshape(n.shape)),
    "embedding": (E2M1.unsqueeze(1), lambda n, t: functional.embedding(n.long(), t).squeeze(-1)),
    "magnitudes_and_where": (E2M1[:8], by_where),
    "magnitudes_and_arithmetic": (E2M1[:8], lambda n, t: t[(n % 8).long()] * (1 - 2 * (n // 8).float())),
    "integers": (E2M1[:0], by_integers),
    "powers": (E2M1[:0], by_powers),
    "steps": (E2M1[:0], by_steps),
    "bits_of_float32": (E2M1[:0], by_bits_of_float32),
    "bits_of_bfloat16": (E2M1[:0], by_bits_of_bfloat16),
    "bits_of_float16": (E2M1[:0], by_bits_of_float16),
    "bytes": (BYTES, lambda c, t: t[c.long()].flatten(-2)),
    "bytes_by_embedding": (BYTES, lambda c, t: functional.embedding(c.int(), t).flatten(-2)),
}
OF_BYTES = {"bytes", "bytes_by_embedding"}
"""These look up a whole byte: they need codes in bytes, the low nibble first."""

# --- Scales: bytes -> floats, and one a block -> one an element.


def e4m3_by_arithmetic(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.view(torch.uint8).int()
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).float()
    magnitude = torch.where(exponent == 0, mantissa * 2.0**-9, torch.ldexp(8 + mantissa, exponent - 10))
    return torch.where(bits > 127, -magnitude, magnitude)


READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cast": lambda s: s.view(torch.float8_e4m3fn).float(),
    "through_bfloat16": lambda s: s.view(torch.float8_e4m3fn).to(torch.bfloat16).float(),
    "through_float16": lambda s: s.view(torch.float8_e4m3fn).half().float(),
    "arithmetic": e4m3_by_arithmetic,
}
SPREADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat_interleave": lambda s: s.repeat_interleave(16, -1),
    "expand": lambda s: s.unsqueeze(-1).expand(*s.shape, 16).reshape(*s.shape[:-1], -1),
    "repeat": lambda s: s.unsqueeze(-1).repeat(*[1] * s.dim(), 16).flatten(-2),
    "column_numbers": lambda s: s[..., torch.arange(16 * s.shape[-1]) // 16],
    "stack": lambda s: torch.stack([s] * 16, -1).flatten(-2),
}
APART = ("as_blocks", *SPREADS)


def to_tiles(scale: torch.Tensor) -> torch.Tensor:
    """``[rows, groups]`` -> 128x4 tiles, padded with zeros to whole ones, in the same dtype."""
    rows, groups = scale.shape
    padded = functional.pad(scale.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    return decodes.swizzle(padded).view(scale.dtype)


def from_tiles(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """128x4 tiles -> ``[rows, groups]``, the padding cut off."""
    tall, wide = -(-rows // 128), -(-groups // 4)
    tiles = scale.view(tall, wide, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(tall * 128, wide * 4)[:rows, :groups]


# --- Products: (weight [(E,) N, K], x, which rows go to which expert, bias).

LINEARS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda w, x, _, b: functional.linear(x, w),
    "with_bias": lambda w, x, _, b: functional.linear(x, w, b.to(x.dtype)),
    "matmul": lambda w, x, _, b: x @ w.t(),
    "on_the_left": lambda w, x, _, b: (w @ x.mT).mT,
    "of_a_contiguous_transpose": lambda w, x, _, b: torch.mm(x, w.t().contiguous()),
    "einsum": lambda w, x, _, b: torch.einsum("sk,nk->sn", x, w),
    "einsum_of_three": lambda w, x, _, b: torch.einsum("bsk,nk->bsn", x.unsqueeze(0), w)[0],
    "twice": lambda w, x, _, b: functional.linear(x, w) + functional.linear(-x, w) * 0.5,
    "addmm": lambda w, x, _, b: torch.addmm(b.to(x.dtype), x, w.mT, beta=0.5),
}
GROUPED: dict[str, Callable[..., torch.Tensor]] = {
    "grouped": lambda w, x, ends, b: torch.ops.transformers.grouped_mm_fallback(x, w.mT, ends),
}
GATHERED: dict[str, Callable[..., torch.Tensor]] = {
    "gathered": lambda w, x, ids, b: torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1),
    "gathered_on_the_right": lambda w, x, ids, b: torch.bmm(x.unsqueeze(1), w[ids].mT).squeeze(1),
    "gathered_by_index_select": lambda w, x, ids, b: torch.bmm(x[:, None], w.index_select(0, ids).mT)[:, 0],
    "gathered_by_einsum": lambda w, x, ids, b: torch.einsum("snk,sk->sn", w[ids], x),
}
# The parts are gathered, not the weight.
GATHERED_FIRST: dict[str, Callable[..., torch.Tensor]] = {
    "gathered_first": lambda w, x, ids, b: torch.bmm(w, x.unsqueeze(-1)).squeeze(-1),
    "gathered_first_on_the_right": lambda w, x, ids, b: torch.bmm(x.unsqueeze(1), w.mT).squeeze(1),
}
OF_MANY = GROUPED | GATHERED | GATHERED_FIRST
PRODUCTS = LINEARS | OF_MANY


@dataclass(frozen=True)
class Recipe:
    """One spelling: a choice for every step, and at most one flaw."""

    shape: tuple[int, int]
    experts: int
    storage: str
    order: str
    halves: str
    join: str
    decode: str
    scales: str
    read: str
    spread: str
    factor: str
    factor_goes: str
    factor_shape: tuple[int, ...]
    through: torch.dtype
    product: str
    dtype: torch.dtype
    seed: int
    flaw: str = ""

    def inputs(self) -> dict[str, torch.Tensor]:
        """x, which, and the parts of a random weight as the recipe wants them stored."""
        random_ = torch.Generator().manual_seed(self.seed)
        lead = (self.experts,) if self.experts else ()
        n, k = self.shape
        numbers = torch.randint(0, 16, (*lead, n, k), generator=random_, dtype=torch.uint8)
        scale = torch.randint(0x30, 0x40, (*lead, n, k // 16), generator=random_, dtype=torch.uint8)
        scale |= torch.randint(0, 2, scale.shape, generator=random_, dtype=torch.uint8) << 7
        factor = torch.rand(lead, generator=random_) + 0.3
        ids = torch.randint(0, max(self.experts, 1), (7,), generator=random_).sort().values
        ends = torch.bincount(ids, minlength=self.experts).cumsum(0).int()
        return {
            "x": torch.randn(7, k, generator=random_).to(self.dtype),
            "which": ends if self.product in GROUPED else ids,
            "codes": self._store_codes(numbers),
            "scale": self._store_scale(scale),
            "factor": factor if self.experts else factor.reshape(self.factor_shape),
            "table": DECODES[self.decode][0].clone(),
            "bias": torch.randn(n, generator=random_),
        }

    def _store_codes(self, numbers: torch.Tensor) -> torch.Tensor:
        packed = from_plain(numbers[..., 0::2] | numbers[..., 1::2] << 4, self.order)
        if self.storage == "transposed":
            return packed.mT.contiguous()
        return packed.view(getattr(torch, self.storage))

    def _store_scale(self, scale: torch.Tensor) -> torch.Tensor:
        if self.scales == SWIZZLED:
            scale = to_tiles(scale)
        if self.scales == TRANSPOSED:
            scale = scale.mT.contiguous()
        return scale if self.read == "arithmetic" else scale.view(torch.float8_e4m3fn)

    def compute(self, x: torch.Tensor, which: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
        """The product ``[7, N]`` as the recipe spells it; takes `inputs`."""
        if self.product in GATHERED_FIRST:
            parts |= {name: parts[name][which] for name in ("codes", "scale", "factor")}
        plant = FLAWS[self.flaw].plant if self.flaw else lambda stage, value, x: value
        weight = self._weight(parts, lambda stage, value: plant(stage, value, x)).to(x.dtype)
        if self.factor_goes == "input":
            x = x * parts["factor"].to(x.dtype)
        out = PRODUCTS[self.product](plant("rounded", weight, x), x, which, parts["bias"])
        return out * parts["factor"].to(x.dtype) if self.factor_goes == "output" else out

    def _weight(
        self, parts: Mapping[str, torch.Tensor], plant: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        values = plant("values", self._values(parts, plant)).to(self.through)
        scale = plant("scale", self._scale(parts)).to(self.through)
        factor = plant("factor", parts["factor"]).to(self.through)
        factor = factor.view(-1, 1, 1) if factor.dim() and self.experts else factor

        def times_factor(tensor: torch.Tensor) -> torch.Tensor:
            return tensor / factor if self.factor == DIVIDE else tensor * factor

        if self.factor_goes == "scale":
            scale = times_factor(scale)
        if self.factor_goes == "values":
            values = times_factor(values)
        if self.spread == "as_blocks":
            weight = (blocks(values) * scale.unsqueeze(-1)).flatten(-2)
        else:
            weight = plant("wide", SPREADS[self.spread](scale)) * values
        return plant("weight", times_factor(weight) if self.factor_goes == "weight" else weight)

    def _values(
        self, parts: Mapping[str, torch.Tensor], plant: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        table, look_up = plant("table", parts["table"]), DECODES[self.decode][1]
        codes = parts["codes"]
        if self.storage == "int32":
            numbers = ((codes.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(-2)
            return look_up(plant("numbers", numbers), table)
        codes = codes.mT if self.storage == "transposed" else codes.view(torch.uint8)
        if self.decode in OF_BYTES:
            return look_up(codes, table)
        low, high = HALVES[self.halves](codes)
        pair = (high, low) if self.order == PLAIN_HIGH_FIRST else (low, high)
        numbers = JOINS[self.join](*pair)
        return look_up(plant("numbers", numbers if self.halves != "in_floats" else numbers.int()), table)

    def _scale(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        n, k = self.shape
        scale = parts["scale"]
        if self.scales == SWIZZLED:
            scale = from_tiles(scale, n, k // 16)
        return READS[self.read](scale.mT if self.scales == TRANSPOSED else scale)

    def exact(self, x: torch.Tensor, which: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
        """The product in float64, from the same steps in their plainest form."""
        plain = replace(self, through=torch.float64, flaw="")
        wide = {name: part.double() if name in ("factor", "bias") else part for name, part in parts.items()}
        return plain.compute(x.double(), which, **wide)


def draw(seed: int, flaw: bool = False) -> Recipe:
    """A recipe; with ``flaw`` a near miss."""
    choose = random.Random(seed).choice
    product = choose((*LINEARS, *LINEARS, *OF_MANY)) if choose((True, True, False)) else choose((*LINEARS,))
    experts = choose((2, 3, 5)) if product in OF_MANY else 0
    storage = choose(("uint8", "uint8", "uint8", "int8", "float4_e2m1fn_x2", "int32", "transposed"))
    if product in GATHERED_FIRST and storage == "float4_e2m1fn_x2":
        storage = "uint8"  # torch indexes no float4
    order = PLAIN if storage == "int32" else choose((PLAIN, PLAIN, PLAIN_HIGH_FIRST))
    decode = choose([d for d in DECODES if d not in OF_BYTES or (storage != "int32" and order == PLAIN)])
    goes = choose(("scale", "scale", "weight", "values", "", *(() if experts else ("output", "input"))))
    scales = choose((LINEAR, LINEAR, LINEAR, TRANSPOSED, *(() if experts else (SWIZZLED,))))
    shapes = ((48, 80), (48, 80), (33, 48), (64, 64), (128, 64), (144, 96))
    recipe = Recipe(
        # Tiles of scales would outnumber the codes of the smallest.
        shape=choose(shapes if scales == SWIZZLED else (*shapes, (16, 64))),
        experts=experts,
        storage=storage,
        order=order,
        halves=choose((*HALVES,)),
        join=choose((*JOINS,)),
        decode=decode,
        scales=scales,
        read=choose((*READS,)),
        spread=choose(APART),
        factor=choose((MULTIPLY, DIVIDE)) if goes in ("scale", "weight", "values") else ABSENT,
        factor_goes=goes,
        factor_shape=choose(((), (1,), (1, 1))),
        through=choose((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        product=product,
        dtype=choose((torch.float32, torch.bfloat16, torch.float16)),
        seed=seed,
    )
    if not flaw:
        return recipe
    fitting = [name for name, each in FLAWS.items() if each.fits(recipe) and (experts or name not in OF_EXPERTS)]
    return replace(recipe, flaw=choose(fitting))
