"""Products with the matrices of many experts that are no part of a whole MoE block."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass.match.block import never_negative
from fp4pass.match.cone import value
from fp4pass.match.products import Product
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES, Rewriter

aten, ops = torch.ops.aten, torch.ops.fp4pass


def rewrite_experts(rewriter: Rewriter) -> None:
    """Rows sorted by expert times their experts' matrices, or each row times the one its id picks.

    Given::

        %out = aten._grouped_mm(%x, %w, %offsets)             # %w [E, K, N]; or transformers' fallback op
        %out = aten.bmm(%w[%ids], %x)                         # %w [E, N, K], %x [S, K, 1]; ids picked before or after
                                                              # the decode; or %x [S, 1, K] on the left

    Result::

        %out = fp4pass.grouped_linear(%x, %codes, %scale, %global, %offsets, layout)
        %out = fp4pass.gathered_linear(%x, %codes, %scale, %global, %ids, layout)
    """
    for product in list(rewriter.products):
        if product.weight.roles.experts is None:
            continue
        refusal = _refusal(product)
        if refusal is not None:
            rewriter.refuse(product, refusal)
        elif product.anchor.offsets is not None:
            rewriter.replace([product], product.node, "fp4pass.grouped_linear", lambda p=product: _grouped(rewriter, p))
        else:
            rewriter.replace(
                [product], product.node, "fp4pass.gathered_linear", lambda p=product: _gathered(rewriter, p)
            )


def _refusal(product: Product) -> Refusal | None:
    x = value(product.x)
    if product.sums_rows or value(product.node) is None:
        return Refusal(Reason.BACKWARD)
    if x.dtype not in ACTIVATION_DTYPES or x.dtype != value(product.node).dtype:
        return Refusal(Reason.DTYPE, f"input {x.dtype}")
    ids = product.weight.roles.ids
    if product.anchor.offsets is not None:
        plain = ids is None and not product.weight_left and x.dim() == 2 and _offsets(product) is not None
        return None if plain else Refusal(Reason.BATCHED, f"{product.node.target} on input of {x.dim()} dimensions")
    if ids is None or value(ids).dim() != 1 or product.anchor.bias is not None or x.dim() != 3:
        return Refusal(Reason.BATCHED)
    one_row = x.shape[2] if product.weight_left else x.shape[1]
    return (
        None if isinstance(one_row, int) and one_row == 1 else Refusal(Reason.BATCHED, f"{one_row} rows an expert id")
    )


def _offsets(product: Product) -> fx.Node | None:
    """Where each expert's rows end, if the product has nothing else (a bias, another output dtype)."""
    position = product.anchor.offsets
    others = [*product.node.args[position + 1 :], *(v for k, v in product.node.kwargs.items() if k != "offs")]
    found = product.node.args[position] if len(product.node.args) > position else product.node.kwargs.get("offs")
    return found if all(other is None for other in others) else None


def _grouped(rewriter: Rewriter, product: Product) -> fx.Node:
    codes, scale, factor, layout = rewriter.operands(product)
    return rewriter.call(ops.grouped_linear.default, product.x, codes, scale, factor, _offsets(product), layout)


def counted_from_the_front(rewriter: Rewriter, ids: fx.Node, experts: int) -> fx.Node:
    """Indexing counts negative ids from the last expert; the op gives zero for them."""
    if never_negative(ids):
        return ids
    negative = rewriter.call(aten.lt.Scalar, ids, 0)
    return rewriter.call(aten.where.self, negative, rewriter.call(aten.add.Tensor, ids, experts), ids)


def _gathered(rewriter: Rewriter, product: Product) -> fx.Node:
    unit = 2 if product.weight_left else 1
    rows = rewriter.call(aten.squeeze.dim, product.x, unit)
    codes, scale, factor, layout = rewriter.operands(product)
    ids = counted_from_the_front(rewriter, product.weight.roles.ids, product.weight.roles.experts)
    out = rewriter.call(ops.gathered_linear.default, rows, codes, scale, factor, ids, layout)
    return rewriter.call(aten.unsqueeze.default, out, unit)
