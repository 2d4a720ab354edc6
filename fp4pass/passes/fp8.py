"""Products with an FP8 weight, as mixed checkpoints have them beside their NVFP4 ones."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.match.cone import value
from fp4pass.match.fp8 import FP8Weight, Rounded, prove_weight, rounded_from
from fp4pass.match.products import Product
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES, Rewriter

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.fp4pass

_SAME_ELEMENTS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def rewrite_fp8(rewriter: Rewriter) -> None:
    """One matrix in E4M3 with one scale, on the right of the product.

    Given::

        %w   = <e4m3(codes) x scale>                          # [N, K] or its transpose
        %out = aten.mm(%x, %w)                                # or addmm, mv

    Result::

        %out = fp4pass.fp8_linear(%x, %codes, %scale, None, %bias)

    Where %x is ``%a`` rounded to E4M3 by a static scale ``%s`` and decoded again, the op rounds by itself, and
    multiplies in FP8 where the GPU can::

        %out = fp4pass.fp8_linear(%a, %codes, %scale, %s, %bias)
    """
    for product in rewriter.take_eight_bit():
        if product.weight_left and value(product.x).dim() != 1:
            rewriter.refuse(product, Refusal(Reason.EIGHT_BIT, "it stands on the left of the product"))
            continue
        if value(product.x).dtype not in ACTIVATION_DTYPES or value(product.x).dtype != value(product.node).dtype:
            rewriter.refuse(product, Refusal(Reason.DTYPE, f"input {value(product.x).dtype}"))
            continue
        if any(product.node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
            rewriter.refuse(product, Refusal(Reason.EIGHT_BIT, "the product has a factor of its own"))
            continue
        at = product.anchor.left if product.weight_left else product.anchor.right
        with _torch.real_tensors(), torch.no_grad():
            weight = prove_weight(product.node.args[at], product.codes)
            views, x = _without_views(product.x)
            source = rounded_from(x)
        if isinstance(weight, Refusal):
            rewriter.refuse(product, weight)
            continue
        source_text = "E4M3 by a static scale" if source else "as they are"
        rewriter.replace(
            [product],
            product.node,
            "fp4pass.fp8_linear",
            lambda p=product, w=weight, s=source, v=views: _build(rewriter, p, w, s, v),
            source=f"E4M3 with one scale, activations {source_text}",
        )
    # What rounded an activation reads it no more: a block of experts whose sum it was has one user again.
    rewriter.graph.eliminate_dead_code()


def _without_views(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The views that lead to ``node``, last first, and what they are of."""
    views = []
    while node.op == "call_function" and node.target in _SAME_ELEMENTS:
        views.append(node)
        node = node.args[0]
    return views, node


def _build(
    rewriter: Rewriter, product: Product, weight: FP8Weight, source: Rounded | None, views: list[fx.Node]
) -> fx.Node:
    call = rewriter.call
    x, input_scale = product.x, None
    if source is not None:
        x, input_scale = source.source, _number(rewriter, source.scale)
        for view in reversed(views):
            x = call(aten.reshape.default, x, *view.args[1:])
        if value(x).dtype != value(product.x).dtype:
            x = call(prims.convert_element_type.default, x, value(product.x).dtype)
    codes = weight.codes
    if value(codes).dtype != torch.uint8:
        codes = call(aten.view.dtype, codes, torch.uint8)
    # mm sums over the rows of its right operand, mv over the columns of its left one.
    if weight.transposed == product.weight_left:
        codes = call(aten.permute.default, codes, [1, 0])
    scale = call(aten.full.default, [], 1.0) if weight.scale is None else _number(rewriter, weight.scale)
    bias = None if product.anchor.bias is None else product.node.args[product.anchor.bias]
    inside = bias is not None and value(bias).dim() == 1
    out = call(ops.fp8_linear.default, x, codes, scale, input_scale, bias if inside else None)
    return out if inside or bias is None else call(aten.add.Tensor, out, bias)


def _number(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """A scale in float32, of no dimension."""
    if value(node).dtype != torch.float32:
        node = rewriter.call(prims.convert_element_type.default, node, torch.float32)
    return node if value(node).dim() == 0 else rewriter.call(aten.reshape.default, node, [])
