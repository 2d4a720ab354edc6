"""What the nodes of a MoE block compute, found by running them.

The two products are proven already, so matrices of small whole numbers stand in for them, narrow ones: only the columns
are scaled down, the tokens and their routing stay as they are. Whole numbers keep every step exact in any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from fp4pass.lowering.reference import ACTIVATIONS
from fp4pass.match.cone import value
from fp4pass.match.dims import Symbol, plain
from fp4pass.match.products import Product
from fp4pass.match.replay import Part, Replay, StandIn
from fp4pass.match.shapes import concrete

aten = torch.ops.aten

FILLS, MOST_IDS = 3, 4096
NARROW = {"H": 4, "I": 6, "O": 5}
_BOUNDS = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.minimum.default}
_BOUNDS |= {aten.maximum.default, aten.hardtanh.default}


@dataclass(frozen=True)
class Frame:
    """A block's sizes: tokens, choices a token, and the three widths."""

    tokens: int
    choices: int
    hidden: int
    inner: int
    out: int


@dataclass(frozen=True)
class Region:
    """The nodes of what may be a block, from (hidden, ids, weights) to ``end``, around its two products."""

    nodes: Sequence[fx.Node]
    hidden: fx.Node
    ids: fx.Node
    weights: fx.Node
    end: fx.Node
    up: Product
    down: Product
    frame: Frame

    @property
    def leaves(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """(hidden, ids, weights)."""
        return self.hidden, self.ids, self.weights


class Stranger(Enum):
    """What an id that is no expert's number stands for."""

    NOTHING = "nothing"
    NEAREST = "the nearest expert"
    FROM_THE_END = "an expert counted from the end"


@dataclass(frozen=True)
class Meaning:
    """What a block computes: its activation, and what ids below zero and beyond the last expert stand for."""

    activation: str
    below: Stranger
    beyond: Stranger


def row_inputs(product: Product) -> list[fx.Node]:
    """What a product needs beside its weight: its rows, and which expert each belongs to."""
    ids = product.weight.roles.ids
    return [product.x, ids if ids is not None else product.node.args[product.anchor.offsets]]


def explain(region: Region) -> Meaning | None:
    """How the region computes ``sum over k of weights * down(activation(up(hidden)))``, or None if it does not."""
    trial = _Trial(region)
    half = torch.float16 in trial.dtypes
    if trial.replay.why_full is not None or (half and any(map(_bounds, region.nodes))):
        return None
    # A bound on the values in between would show where they are large or small; for half precision see `_bounds`.
    reach = 2.0**4 if half else 2.0**20
    fills = list(trial.fills())
    first = fills[0]
    fills += [{**first, region.hidden: first[region.hidden] * factor} for factor in (reach, 1 / reach)]
    for name in ACTIVATIONS:
        usual = Meaning(name, Stranger.NOTHING, Stranger.NOTHING)
        if all(trial.agrees(each, usual) for each in fills):
            return trial.with_strangers(first, name)
    return None


def _bounds(node: fx.Node) -> bool:
    """Whether the node bounds floats: too near to the end of half precision to be told by trying."""
    return node.target in _BOUNDS and value(node).is_floating_point()


class _Trial:
    """A region that can be run, and the whole-number matrices that stand for its weights."""

    def __init__(self, region: Region) -> None:
        frame = region.frame
        self._region, self._frame, self._experts = region, frame, region.up.weight.roles.experts
        self._random = torch.Generator().manual_seed(0x4D6F45)
        self._w_up = self._whole(self._experts, NARROW["I"], NARROW["H"])
        self._w_down = self._whole(self._experts, NARROW["O"], NARROW["I"])
        widths = (("H", frame.hidden), ("I", frame.inner), ("O", frame.out))
        hidden, inner, out = symbols = [Symbol(name, size) for name, size in widths]
        stand_ins = {
            region.up.node: _stand_in(region.up, self._w_up, inner),
            region.down.node: _stand_in(region.down, self._w_down, out),
        }
        routing = (plain(frame.tokens), plain(frame.choices))
        shapes = {region.hidden: (plain(frame.tokens), (hidden,)), region.ids: routing, region.weights: routing}
        self.replay = Replay(Part(region.nodes, region.end, shapes, symbols, stand_ins=stand_ins))
        values = [value(n) for n in region.nodes if value(n) is not None]
        self.dtypes = {tensor.dtype for tensor in values if tensor.is_floating_point()}

    def _whole(self, *size: int, low: int = -1, high: int = 2) -> torch.Tensor:
        return torch.randint(low, high, size, generator=self._random).double()

    def fills(self) -> Iterator[dict[fx.Node, torch.Tensor]]:
        """Every id comes by in every place where there are few; routing weights of every kind.

        Weights stay within 2^-4 and 2^4: the sums then have fewer bits than a float32, and are exact in any order.
        """
        tokens, choices = size = self._frame.tokens, self._frame.choices
        ids = torch.randint(0, self._experts, size, generator=self._random)
        for number in range(self._experts if tokens * self._experts <= MOST_IDS else FILLS):
            scales = torch.exp2(self._whole(tokens, choices, low=-2, high=3) * (1 if number % 2 else 2))
            signs = self._whole(tokens, choices) if number % 2 else 1
            yield self._typed(self._whole(tokens, NARROW["H"]), (ids + number) % self._experts, scales * signs)

    def _typed(self, *leaves: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
        pairs = zip(self._region.leaves, leaves, strict=True)
        return {node: tensor.to(value(node).dtype) for node, tensor in pairs}

    def with_strangers(self, fill: Mapping[fx.Node, torch.Tensor], activation: str) -> Meaning | None:
        """What ids below zero and beyond the last expert stand for, or None if it is nothing that we know."""
        experts, ids = self._experts, fill[self._region.ids]
        is_strange = torch.arange(ids.numel()).reshape(ids.shape) % 2 == 0

        def agrees(strangers: tuple[int, ...], below: Stranger, beyond: Stranger) -> bool:
            meaning = Meaning(activation, below, beyond)
            tries = ({**fill, self._region.ids: torch.where(is_strange, each, ids).to(ids.dtype)} for each in strangers)
            return all(self.agrees(each, meaning, strange=True) for each in tries)

        too_high, too_low = (experts, experts + 1, 2 * experts + 1), (-1, -2, 1 - experts, -experts, -experts - 1)
        usual = Stranger.NOTHING
        beyond = next((b for b in (usual, Stranger.NEAREST) if agrees(too_high, usual, b)), None)
        below = next((b for b in Stranger if agrees(too_low, b, usual)), None)
        return None if below is None or beyond is None else Meaning(activation, below, beyond)

    def agrees(self, fill: Mapping[fx.Node, torch.Tensor], meaning: Meaning, strange: bool = False) -> bool:
        """Whether the region gives on ``fill`` what ``meaning`` says, up to rounding.

        ``strange``: some ids name no expert. A region that fails or has undefined numbers then was not made for them.
        """
        try:
            found = self.replay(fill, NARROW)
        except (IndexError, RuntimeError):
            return strange
        if strange and not found.isfinite().all():
            return True
        want = self._meant(fill, meaning)
        # Whole numbers and powers of two: exact up to the one rounding of the result.
        tolerance = 0.0 if meaning.activation == "relu2" else max(torch.finfo(dtype).eps for dtype in self.dtypes)
        bound = tolerance * float(want.abs().max())
        return torch.allclose(found.double(), want.to(found.dtype).double(), rtol=2 * tolerance, atol=2 * bound)

    def _meant(self, fill: Mapping[fx.Node, torch.Tensor], meaning: Meaning) -> torch.Tensor:
        hidden, ids, weights = (fill[leaf] for leaf in self._region.leaves)
        ids, last = ids.long(), self._experts - 1
        counts = ((ids >= 0) | (meaning.below != Stranger.NOTHING)) & (
            (ids <= last) | (meaning.beyond != Stranger.NOTHING)
        )
        if meaning.below == Stranger.FROM_THE_END:
            ids = torch.where(ids < 0, ids + self._experts, ids)
        ids = ids.clamp(0, last)
        inner = ACTIVATIONS[meaning.activation](torch.einsum("th,tkih->tki", hidden.double(), self._w_up[ids]))
        shares = torch.where(counts, weights.double(), 0).unsqueeze(-1)
        return (torch.einsum("tki,tkoi->tko", inner, self._w_down[ids]) * shares).sum(1)


def _stand_in(product: Product, matrices: torch.Tensor, columns: Symbol) -> StandIn:
    """The product with whole-number ``matrices [E, N, K]`` in its weight's place, in the shape that it gives."""
    experts, ids = product.weight.roles.experts, product.weight.roles.ids
    rows_node = row_inputs(product)[1]
    dtype = value(product.node).dtype

    def compute(values: Mapping[fx.Node, Any]) -> torch.Tensor:
        x = values[product.x].double()
        rows = x.reshape(-1, x.shape[-2] if product.weight_left else x.shape[-1])
        owner = values[rows_node].long()
        if ids is None:  # where each expert's rows end; those behind the last end belong to none
            owner = torch.searchsorted(owner, torch.arange(len(rows)), right=True)
        known = torch.where(owner < 0, owner + experts, owner)  # as indexing counts
        out = torch.einsum("sk,snk->sn", rows, matrices[known.clamp(0, experts - 1)])
        out[(known < 0) | (known >= experts)] = torch.nan
        out = out.to(dtype)
        if ids is None:
            return out
        return out.unsqueeze(-1 if product.weight_left else -2)

    sizes = concrete(list(value(product.node).shape))
    shape: list[Any] = [plain(size) for size in sizes]
    shape[-2 if ids is not None and product.weight_left else -1] = (columns,)
    return StandIn(tuple(row_inputs(product)), tuple(shape), compute)
