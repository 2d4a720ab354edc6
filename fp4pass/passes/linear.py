"""Products with a single quantized matrix."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass.match.cone import value
from fp4pass.match.products import Product
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES, Rewriter

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.fp4pass


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
        if product.anchor is None or product.weight.roles.experts is not None:
            continue
        if value(product.x).dtype not in ACTIVATION_DTYPES or value(product.x).dtype != value(product.node).dtype:
            rewriter.refuse(product, Refusal(Reason.DTYPE, f"input {value(product.x).dtype}"))
            continue
        op = "fp4pass.linear_backward" if product.sums_rows else "fp4pass.linear"
        rewriter.replace([product], product.node, op, lambda p=product: _build(rewriter, p))


def _build(rewriter: Rewriter, product: Product) -> fx.Node:
    call = rewriter.call
    alpha, beta = (product.node.kwargs.get(name, 1) for name in ("alpha", "beta"))
    turned = product.weight_left and value(product.x).dim() > 1
    x = _turned(rewriter, product.x) if turned else product.x
    codes, scale, factor, layout = rewriter.operands(product)
    if alpha != 1:
        factor = call(aten.full.default, [], alpha) if factor is None else call(aten.mul.Tensor, factor, alpha)
    bias = None if product.anchor.bias is None else _times(rewriter, product.node.args[product.anchor.bias], beta)
    fused = bias is not None and _is_one_a_feature(product, bias)
    if product.sums_rows:
        out = call(ops.linear_backward.default, x, codes, scale, factor, layout)
    else:
        inside = rewriter.reordered(aten.reshape.default, bias, [product.weight.roles.n]) if fused else None
        out = call(ops.linear.default, x, codes, scale, factor, inside, layout)
    if turned:
        out = call(aten.clone.default, _turned(rewriter, out))
    return out if fused or bias is None else _cast(rewriter, call(aten.add.Tensor, out, bias), value(out).dtype)


def _turned(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """The transpose of a matrix, or of each in a batch."""
    *lead, rows, columns = range(value(node).dim())
    return rewriter.call(aten.permute.default, node, [*lead, columns, rows])


def _times(rewriter: Rewriter, node: fx.Node, number: float) -> fx.Node:
    """``number * node`` in float32, where the product itself would have been rounded only once."""
    return node if number == 1 else rewriter.call(aten.mul.Tensor, _cast(rewriter, node, torch.float32), number)


def _cast(rewriter: Rewriter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if value(node).dtype == dtype else rewriter.call(prims.convert_element_type.default, node, dtype)


def _is_one_a_feature(product: Product, bias: fx.Node) -> bool:
    """Whether the op can add the bias: one value an output feature."""
    shape = value(bias).shape
    n = product.weight.roles.n
    return not product.sums_rows and not product.weight_left and shape[-1:] == (n,) and shape.numel() == n
