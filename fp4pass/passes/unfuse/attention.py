"""An attention that quantizes its output, called again without: the same op with a plain output and no scales."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fp4pass.match.cone import value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.unfuse.calls import Call
from fp4pass.passes.unfuse.emit import emit, origin_of
from fp4pass.passes.unfuse.rows import Attention


def plain_attention(call: Call) -> fx.Node | Refusal:
    """The output of ``call`` in the dtype and shape of its query, from a new call in its place.

    Everything else that the old call wrote to (a cache) is taken from the new one.
    """
    row: Attention = call.row
    query, buffer = call.arguments[row.like], call.arguments[row.output]
    packed = 2 if value(buffer).dtype in (torch.uint8, torch.float4_e2m1fn_x2) else 1
    same_size = value(buffer).numel() * packed == value(query).numel()
    if call.place(row.output) is not None or not same_size or "_all_bases" not in call.node.kwargs:
        return Refusal(Reason.VARIANT, f"{row.name} writes its output into part of a buffer, or in another size")
    rank = value(buffer).dim()
    plain = emit(call.node, lambda q: torch.empty_like(q.flatten(rank - 1)), query)
    bases = list(call.node.kwargs["_all_bases"])
    at = call.node.kwargs[f"_{row.output}_base_index"]
    bases[at] = plain
    kwargs = {**call.node.kwargs, "_all_bases": bases, row.scale: None}
    dropped = kwargs.get(f"_{row.block_scale}_base_index")
    if dropped is not None:
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith(f"_{row.block_scale}_")}
        kwargs = {k: v - (v > dropped) if k.endswith("_base_index") and v is not None else v for k, v in kwargs.items()}
        kwargs |= {f"_{row.block_scale}_base_index": None, "_all_bases": bases[:dropped] + bases[dropped + 1 :]}
    return _again(call, kwargs, at - (dropped is not None and at > dropped), dropped)


def _again(call: Call, kwargs: dict, output: int, dropped: int | None) -> fx.Node:
    """Call the op with other keywords; its results stand for the old ones, but for the output and the block scales."""
    graph = call.node.graph
    with graph.inserting_before(call.node):
        new = graph.call_function(call.node.target, call.node.args, kwargs)
        values = [value(base) for base in kwargs["_all_bases"]]
        new.meta = {**origin_of(call.node), "val": (None, *values)}
        results = []
        for i, each in enumerate(values):
            results.append(graph.call_function(operator.getitem, (new, i + 1)))
            results[-1].meta["val"] = each
    for user in list(call.node.users):
        old = user.args[1] - 1
        here = old - (dropped is not None and old > dropped)
        if old >= 0 and old != dropped and here != output:
            user.replace_all_uses_with(results[here])
    return results[output]
