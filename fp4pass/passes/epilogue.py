"""What follows a linear product, done before its result is stored."""

from __future__ import annotations

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.lowering.reference import NO_ACTIVATION
from fp4pass.match.cone import value
from fp4pass.match.epilogue import VIEWS, Epilogue, find_epilogue
from fp4pass.passes.rewriter import Rewriter

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.fp4pass


def rewrite_epilogue(rewriter: Rewriter) -> None:
    """Bias, activation and cast of a linear product.

    Given, in any spelling, with no other use of what is in between::

        %out = fp4pass.linear(%x, %codes, %scale, %global, None, layout)
        %end = activation(%out + %bias)                       # relu2 or silu, or neither
        %end = prims.convert_element_type(%end, dtype)        # of a result of the graph, as float32 logits are

    Result, which rounds once, where the given rounds after each step::

        %end = fp4pass.linear(%x, %codes, %scale, %global, %bias, layout, activation, dtype)

    A residual is left to Inductor, which adds it in the kernel of the norm that follows. Inside of the product it would
    save that kernel one of five passes over the activations, and no launch. Tried on an H200, Nano's out_proj and the
    norm together took 6 % longer with it at 128 tokens and 1 % at 256 and 1,024, and 1 to 2 % less at 512, 2,048 and
    4,096: to read it costs the product nearly what the norm gains. Graphs with a backward stay as they are: it reads
    what comes before the activation.
    """
    if _torch.is_training(rewriter.graph):
        return
    for product in rewriter.graph.find_nodes(op="call_function", target=ops.linear.default):
        if len(product.args) > 6:  # has one already
            continue
        may_add = _adds_nothing if product.args[4] is not None else lambda node: _is_constant(rewriter, node)
        found = find_epilogue(product, may_add)
        if found is not None:
            rewriter.absorb(
                product, found.end, _described(product, found), lambda p=product, e=found: _build(rewriter, p, e)
            )


def _build(rewriter: Rewriter, product: fx.Node, found: Epilogue) -> fx.Node:
    x, codes, scale, factor, bias, layout = product.args
    if found.bias is not None:
        bias = rewriter.reordered(aten.reshape.default, found.bias, [value(product).shape[-1]])
    dtype = _cast_to(product, found)
    more = [found.activation] if dtype is None else [found.activation, dtype]
    out = rewriter.call(ops.linear.default, x, codes, scale, factor, bias, layout, *more)
    for view in found.views:
        out = rewriter.call(view.target, out, *view.args[1:], **view.kwargs)
    return out


def _described(product: fx.Node, found: Epilogue) -> str:
    """For the report: ``bias, relu2, float32``."""
    dtype = _cast_to(product, found)
    parts = ["bias" if found.bias is not None else ""]
    parts.append(found.activation if found.activation != NO_ACTIVATION else "")
    parts.append("" if dtype is None else str(dtype).removeprefix("torch."))
    return ", ".join(filter(None, parts))


def _cast_to(product: fx.Node, found: Epilogue) -> torch.dtype | None:
    dtype = value(found.end).dtype
    return None if dtype == value(product).dtype else dtype


def _adds_nothing(node: fx.Node) -> bool:
    return False


def _is_constant(rewriter: Rewriter, node: fx.Node) -> bool:
    """Whether a tensor belongs to the model, as a bias does and a residual does not."""
    while node.target in VIEWS or node.target is prims.convert_element_type.default:
        node = node.args[0]
    return node.op in ("placeholder", "get_attr") and rewriter.inputs.is_constant(node)
