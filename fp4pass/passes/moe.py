"""Whole MoE blocks as one op."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass.match.block import Block, find_blocks
from fp4pass.match.cone import value
from fp4pass.match.reasons import Apart
from fp4pass.match.trial import Stranger
from fp4pass.passes.experts import counted_from_the_front
from fp4pass.passes.rewriter import ACTIVATION_DTYPES, Rewriter

aten, ops = torch.ops.aten, torch.ops.fp4pass


def rewrite_moe(rewriter: Rewriter) -> None:
    """Routing, both products, the activation between them, the routing weights and the sum over choices.

    Given, in any of the forms of transformers' experts (sorted and grouped, or gathered)::

        %up = <product of %hidden's rows with the experts that %ids name>
        %down = <product of act(%up) with the same experts>
        %out = sum over choices of %weights * %down

    Result::

        %out = fp4pass.experts(%hidden, %ids, %weights, %up codes, scale, global, %down ..., activation, layout)
    """
    blocks, rewriter.apart = find_blocks(rewriter.products)
    for block in blocks:
        region = block.region
        products = [region.up, region.down]
        dtype = value(region.hidden).dtype
        one_layout = region.up.weight.convention.layout == region.down.weight.convention.layout
        if one_layout and dtype in ACTIVATION_DTYPES and value(region.end).dtype == dtype:
            rewriter.replace(products, region.end, "fp4pass.experts", lambda b=block: _build(rewriter, b))
        else:
            rewriter.apart |= dict.fromkeys((region.up.node, region.down.node), Apart.DTYPE)


def _build(rewriter: Rewriter, block: Block) -> fx.Node:
    region, meaning = block.region, block.meaning
    *up, layout = rewriter.operands(region.up)
    *down, _ = rewriter.operands(region.down)
    experts = region.up.weight.roles.experts
    ids = region.ids
    if meaning.below == Stranger.FROM_THE_END:
        ids = counted_from_the_front(rewriter, ids, experts)
    if meaning.below == Stranger.NEAREST:
        ids = rewriter.call(aten.clamp_min.default, ids, 0)
    if meaning.beyond == Stranger.NEAREST:
        ids = rewriter.call(aten.clamp_max.default, ids, experts - 1)
    return rewriter.call(
        ops.experts.default, region.hidden, ids, region.weights, *up, *down, meaning.activation, layout
    )
