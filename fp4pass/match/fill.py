"""Values for a cone's leaves, chosen so that every code, scale byte and global scale leaves its mark.

Random codes, all 254 finite scale bytes, a global scale of its own for each expert. With powers of two as global
scales every product on the way is exact in any float dtype (E2M1 x E4M3 has six significant bits), so results can be
compared for equality.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import fx

from fp4pass.match.cone import Cone, value
from fp4pass.match.convention import GROUP, TILE_ROWS, Convention, tiles, unscaled
from fp4pass.match.dims import scaled
from fp4pass.match.replay import Replay
from fp4pass.match.roles import Roles, numel
from fp4pass.match.shapes import EXPERTS, GATHERED, PADDED_ROWS, ROWS, Sizes

# Of so many blocks each of the 254 finite scale bytes has four, with other codes in each.
_BLOCKS = 1024
SMALL_EXPERTS, SMALL_GATHERED = (2, 3), (5, 7)
# Finite E4M3 bytes; the extreme ones are zero, the subnormals' ends, a half, one, and the largest, of both signs.
_FINITE = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
_EXTREME = torch.tensor(
    [0x00, 0x80, 0x01, 0x81, 0x07, 0x87, 0x08, 0x88, 0x30, 0xB0, 0x38, 0xB8, 0x7E, 0xFE], dtype=torch.uint8
)
_SMALL = _EXTREME[:10]
# Scale bytes and exponents of global scales at which values in between are large and small. Half precision spans 2^-24
# to 2^16 only; scales up to a half leave more of it to the global scale.
_REACH = ((_EXTREME, 40), (_EXTREME, -40))
_HALF_REACH = ((_EXTREME, 3), (_EXTREME, -3), (_SMALL, 12), (_SMALL, -12))
# Halfway between numbers of five bits, and so far enough from every number of fewer.
_UNEVEN = 1 + (2 * torch.arange(8, dtype=torch.float64) + 1) / 32


@dataclass(frozen=True)
class Fill:
    """Values for every leaf, and the sizes to run at (None: the traced ones)."""

    leaves: dict[fx.Node, torch.Tensor]
    sizes: Sizes | None
    exact: bool = True

    def of(self, node: fx.Node | None) -> torch.Tensor | None:
        """The value of one leaf."""
        return None if node is None else self.leaves[node]


def runs(roles: Roles, replay: Replay) -> list[Sizes | None]:
    """The sizes to run at: two small ones, or the traced ones as often as it takes to see every scale byte."""
    if replay.why_full:
        return [None] * max(2, _BLOCKS // numel(roles.scale))
    return [_sizes(roles, replay, which) for which in (0, 1)]


def fills(cone: Cone, roles: Roles, replay: Replay) -> Iterator[Fill]:
    """The fills to try in turn, cheapest and most telling first."""
    generator = torch.Generator().manual_seed(0x4E5646)
    each_size = runs(roles, replay)

    def fill(sizes: Sizes | None, scale_bytes: torch.Tensor, factors: torch.Tensor, exact: bool = True) -> Fill:
        return Fill(_leaves(roles, replay, sizes, generator, scale_bytes, factors), sizes, exact)

    # Never 2^0, with which multiplying and dividing are the same.
    for sizes, factors in zip(each_size, cycle((_powers(1, 2, 3), -_powers(-3, -2, -1))), strict=False):
        yield fill(sizes, _FINITE, factors)
    first, second, *_ = each_size
    # A bound on any value in between would show where they are large or small.
    for scale_bytes, exponent in _HALF_REACH if _in_half(cone, roles) else _REACH:
        yield fill(first, scale_bytes, _powers(exponent))
    yield fill(second, _FINITE, _UNEVEN, exact=False)


def _in_half(cone: Cone, roles: Roles) -> bool:
    """Whether something that the global scale is part of is held in half precision."""
    parts = {roles.global_scale}
    for node in cone.nodes:
        if parts.intersection(node.all_input_nodes):
            parts.add(node)
    found = (value(node) for node in parts if node is not None)
    return any(tensor is not None and tensor.dtype == torch.float16 for tensor in found)


def _powers(*exponents: int) -> torch.Tensor:
    return torch.exp2(torch.tensor(exponents, dtype=torch.float64))


def _sizes(roles: Roles, replay: Replay, which: int) -> Sizes:
    """Small sizes; the two choices share no factor but what they must, and there are rows enough for every byte."""
    rows = max(3, _BLOCKS * GROUP // (roles.k * replay.needs.get(ROWS, 1))) + which
    wanted = {ROWS: rows, EXPERTS: SMALL_EXPERTS[which], GATHERED: SMALL_GATHERED[which]}
    sizes = {name: wanted[name] * needs for name, needs in replay.needs.items() if name != PADDED_ROWS}
    if PADDED_ROWS in replay.needs:
        sizes[PADDED_ROWS] = tiles(sizes[ROWS], 1)[0] * TILE_ROWS
    return sizes


def _leaves(
    roles: Roles,
    replay: Replay,
    sizes: Sizes | None,
    generator: torch.Generator,
    scale_bytes: torch.Tensor,
    factors: torch.Tensor,
) -> dict[fx.Node, torch.Tensor]:
    """Random codes; scale bytes and global scales from those given, each as often as any other, in random places."""
    full = {symbol.name: symbol.full for symbol in roles.symbols().values()}

    def shape(node: fx.Node) -> list[int]:
        return [scaled(dim, sizes or full) for dim in replay.leaf_shapes[node]]

    def picked(choices: torch.Tensor, node: fx.Node) -> torch.Tensor:
        sizes = shape(node)
        start = torch.randint(0, len(choices), (), generator=generator)
        each_in_turn = torch.randperm(math.prod(sizes), generator=generator) + start
        return choices[each_in_turn.reshape(sizes) % len(choices)]

    *lead, last = shape(roles.codes)
    packed = [*lead, last * value(roles.codes).element_size()]
    codes = torch.randint(0, 256, packed, generator=generator, dtype=torch.uint8)
    leaves = {
        roles.codes: codes.view(value(roles.codes).dtype),
        roles.scale: picked(scale_bytes, roles.scale).view(value(roles.scale).dtype),
        **dict(roles.tables),
    }
    if roles.global_scale is not None:
        leaves[roles.global_scale] = picked(factors, roles.global_scale).to(value(roles.global_scale).dtype)
    if roles.ids is not None:
        ids = torch.randint(0, (sizes or full).get(EXPERTS, 1), shape(roles.ids), generator=generator)
        leaves[roles.ids] = ids.to(value(roles.ids).dtype)
    return leaves


class Meant:
    """What the leaves of a fill mean under each convention. For conventions in turn a layout is decoded once."""

    def __init__(self, roles: Roles, fill: Fill) -> None:
        self._roles, self._fill = roles, fill
        self._layout, self._weight = "", None

    def __call__(self, convention: Convention) -> torch.Tensor | None:
        """The weight in float64, ``[(E,) N, K]`` or ``[S, N, K]``, or None where the layout is not for its shape."""
        if convention.layout != self._layout:
            self._layout, self._weight = convention.layout, None  # one at a time is held
            self._weight = self._without_global(convention.layout)
        if self._weight is None:
            return None
        weight, ids, factor = self._weight.double(), self._roles.ids, self._roles.global_scale
        if factor is not None:
            weight = convention.with_global(weight, self._fill.of(factor))
        return weight if ids is None else weight[self._fill.of(ids)]

    def explains(self, found: torch.Tensor, convention: Convention) -> bool:
        """Whether ``found`` (float64) is the weight that ``convention`` makes of the leaves."""
        rows, columns = weight_shape(self._roles, self._fill.sizes)[-2:]
        if found.shape[-2:] != (rows, columns):
            return False
        wanted = self(convention)
        if wanted is None or wanted.shape != found.shape:
            return False
        return torch.equal(found, wanted) if self._fill.exact else torch.allclose(found, wanted, rtol=2**-6, atol=0)

    def _without_global(self, layout: str) -> torch.Tensor | None:
        codes, scale = (as_bytes(self._fill.of(leaf)) for leaf in (self._roles.codes, self._roles.scale))
        return unscaled(layout, self._roles.arrangement, codes, scale, weight_shape(self._roles, self._fill.sizes))


def weight_shape(roles: Roles, sizes: Sizes | None) -> list[int]:
    """``[(E,) N, K]`` at these sizes."""
    sizes = sizes or {}
    return [*(sizes.get(EXPERTS, size) for size in roles.lead), sizes.get(ROWS, roles.n), roles.k]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage as uint8."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def decoded(roles: Roles, replay: Replay, fill: Fill) -> torch.Tensor:
    """What the cone makes of a fill, in float64. A batch of one matrix, over and over, counts as the matrix."""
    found = replay(fill.leaves, fill.sizes).to(torch.float64)
    is_batch = roles.experts is None and found.dim() == 3 and len(found) > 0
    return found[0] if is_batch and bool((found == found[:1]).all()) else found
