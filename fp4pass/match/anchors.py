"""The matrix products that a quantized weight can feed, each with where its operands stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """Operand positions of one product op; ``left`` and ``right`` multiply as ``left @ right``."""

    left: int
    right: int
    bias: int | None = None
    offsets: int | None = None


ANCHORS: dict[torch._ops.OpOverload, Anchor] = {
    aten.mm.default: Anchor(0, 1),
    aten.mv.default: Anchor(0, 1),
    aten.addmm.default: Anchor(1, 2, bias=0),
    aten.bmm.default: Anchor(0, 1),
    aten.baddbmm.default: Anchor(1, 2, bias=0),
    aten._grouped_mm.default: Anchor(0, 1, offsets=2),
}

# Registered by transformers when its experts are imported; no import of ours may pull transformers in.
_BY_NAME = {
    "transformers::grouped_mm_fallback": Anchor(0, 1, offsets=2),
    "transformers::grouped_mm_fallback_backward": Anchor(0, 1, offsets=2),
}


def anchor_of(node: fx.Node) -> Anchor | None:
    """The operand positions of ``node`` if it is a product, else None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    return ANCHORS.get(node.target) or _BY_NAME.get(node.target._schema.name)
