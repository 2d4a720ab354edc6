"""Products with a single quantized matrix."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass.match.cone import value
from fp4pass.match.products import Product
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES, Rewriter

aten, ops = torch.ops.aten, torch.ops.fp4pass


def rewrite_linear(rewriter: Rewriter) -> None:
    """One matrix, multiplied over K (a Linear) or over its rows N (that Linear's backward).

    Given::

        %w   = <code x block scale x global scale>            # [N, K] or its transpose
        %out = aten.mm(%x, %w)                                # or addmm, mv, bmm of batch 1; or %w on the left

    Result::

        %out = fp4pass.linear(%x, %codes, %scale, %global, %bias, layout)        # sums over K
        %out = fp4pass.linear_backward(%x, %codes, %scale, %global, layout)      # sums over N
    """
    for product in list(rewriter.products):
        if product.weight.roles.experts is not None:
            continue
        if value(product.x).dtype not in ACTIVATION_DTYPES or value(product.x).dtype != value(product.node).dtype:
            rewriter.refuse(product, Refusal(Reason.DTYPE, f"input {value(product.x).dtype}"))
            continue
        op = "fp4pass.linear_backward" if product.sums_rows else "fp4pass.linear"
        rewriter.replace([product], product.node, op, lambda p=product: _build(rewriter, p))


def _build(rewriter: Rewriter, product: Product) -> fx.Node:
    call = rewriter.call
    turned = product.weight_left and value(product.x).dim() > 1
    x = _turned(rewriter, product.x) if turned else product.x
    codes, scale, factor, layout = rewriter.operands(product)
    bias = _fusable_bias(product)
    if product.sums_rows:
        out = call(ops.linear_backward.default, x, codes, scale, factor, layout)
    else:
        out = call(ops.linear.default, x, codes, scale, factor, bias, layout)
    if turned:
        out = call(aten.clone.default, _turned(rewriter, out))
    return out if bias is not None or product.anchor.bias is None else _add_bias(rewriter, product, out)


def _turned(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """The transpose of a matrix, or of each in a batch."""
    *lead, rows, columns = range(value(node).dim())
    return rewriter.call(aten.permute.default, node, [*lead, columns, rows])


def _fusable_bias(product: Product) -> fx.Node | None:
    """The bias where the op can add it: one value an output feature, unscaled."""
    if product.anchor.bias is None or product.sums_rows or product.weight_left or product.node.kwargs:
        return None
    bias = product.node.args[product.anchor.bias]
    return bias if tuple(value(bias).shape) == (product.weight.roles.n,) else None


def _add_bias(rewriter: Rewriter, product: Product, out: fx.Node) -> fx.Node:
    """``beta * bias + alpha * out``, as addmm defines it."""
    bias = product.node.args[product.anchor.bias]
    for name in ("alpha", "beta"):
        factor = product.node.kwargs.get(name, 1)
        if factor != 1 and name == "alpha":
            out = rewriter.call(aten.mul.Tensor, out, factor)
        elif factor != 1:
            bias = rewriter.call(aten.mul.Tensor, bias, factor)
    return rewriter.call(aten.add.Tensor, out, bias)
