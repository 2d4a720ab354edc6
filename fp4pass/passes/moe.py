"""Whole MoE blocks as one op."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass.match.block import Block, find_blocks
from fp4pass.match.cone import value
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
    for block in find_blocks(rewriter.products):
        layouts = {p.weight.convention.layout for p in (block.up, block.down)}
        dtype = value(block.hidden).dtype
        if len(layouts) == 1 and dtype in ACTIVATION_DTYPES and value(block.end).dtype == dtype:
            rewriter.replace([block.up, block.down], block.end, "fp4pass.experts", lambda b=block: _build(rewriter, b))


def _build(rewriter: Rewriter, block: Block) -> fx.Node:
    *up, layout = rewriter.operands(block.up)
    *down, _ = rewriter.operands(block.down)
    ids = block.ids
    if block.clamps_ids:
        ids = rewriter.call(aten.clamp_min.default, ids, 0)
        ids = rewriter.call(aten.clamp_max.default, ids, block.up.weight.roles.experts - 1)
    return rewriter.call(ops.experts.default, block.hidden, ids, block.weights, *up, *down, block.activation, layout)
