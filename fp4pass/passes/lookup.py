"""Rows of a quantized table, as an embedding looks them up."""

from __future__ import annotations

import torch

from fp4pass.lowering.layout import PLAIN, PLAIN_HIGH_FIRST
from fp4pass.lowering.reference import dequantize
from fp4pass.match.cone import value
from fp4pass.match.products import Product
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import Rewriter
from fp4pass.passes.unfuse.emit import emit


def rewrite_lookup(rewriter: Rewriter) -> None:
    """A table decoded whole, for a few of its rows.

    Given::

        %w   = <code x block scale x global scale>            # [V, D]
        %out = aten.embedding(%w, %ids)                       # or index, index_select of dimension 0

    Result: the packed rows are picked first, and only these are decoded, in plain operations::

        %c   = aten.index(%codes, [%ids])
        %s   = aten.index(%scale, [%ids])
        %out = <%c x %s x global scale>
    """
    for product in list(rewriter.products):
        if product.anchor is not None:
            continue
        if product.weight.rows_last or product.weight.roles.experts is not None:
            rewriter.refuse(product, Refusal(Reason.WRONG_AXIS, "columns of the table are looked up"))
        elif product.weight.convention.layout not in (PLAIN, PLAIN_HIGH_FIRST):
            rewriter.refuse(product, Refusal(Reason.MIXED_ROWS, product.weight.convention.layout))
        else:
            rewriter.replace([product], product.node, "gather, then decode", lambda p=product: _build(rewriter, p))


def _build(rewriter: Rewriter, product: Product) -> torch.fx.Node:
    codes, scale, factor, layout = rewriter.operands(product)
    dtype = value(product.node).dtype

    def rows(ids: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        return dequantize(codes[ids], scale[ids], factor, torch.float32, layout).to(dtype)

    return emit(product.node, rows, product.x, codes, scale, factor)
