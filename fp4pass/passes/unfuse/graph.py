"""The graph while it is un-fused: its calls of known ops, and what was done with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fp4pass import _torch
from fp4pass.match.anchors import called_op
from fp4pass.match.cone import value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.options import EMULATE
from fp4pass.passes.rewriter import Rewriter, alike
from fp4pass.passes.unfuse.calls import Call, Key, pick
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.products import EXPERT_BLOCKS, PRODUCTS
from fp4pass.passes.unfuse.quantizers import ATTENTIONS, FP8_QUANTIZERS, QUANTIZERS, ROUND_TRIPS
from fp4pass.passes.unfuse.rows import Row
from fp4pass.report import Entry

ROWS: Mapping[str, Row] = {
    row.name: row
    for table in (QUANTIZERS, FP8_QUANTIZERS, ROUND_TRIPS, ATTENTIONS, PRODUCTS, EXPERT_BLOCKS)
    for row in table
}
"""Every row by the name of its op."""


class FusedGraph:
    """The known calls of one graph, in its order, and how to replace or refuse them."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.emulate = rewriter.activations == EMULATE
        self.calls: list[Call] = []
        for node in rewriter.graph.nodes:
            op = called_op(node)
            if op is not None and op._schema.name in ROWS:
                self.calls.append(Call(node))
        self._made_by = {n: (c, key) for c in self.calls for key, nodes in c.results.items() for n in nodes}
        self._refused: set[fx.Node] = set()
        self._replaced: dict[fx.Node, fx.Node] = {}

    def made_by(self, node: fx.Node) -> tuple[Call, Key] | None:
        """The known call of which ``node`` is a result, and which result."""
        return self._made_by.get(node)

    def put(self, call: Call, key: Key, new: fx.Node) -> None:
        """Let ``new`` stand for a result of ``call``; where the call wrote into a larger buffer, in that buffer."""
        place = call.place(key)
        for old in call.results.get(key, ()):
            if place is not None:
                new = emit(call.node, place.embed, new, place.base)
            new = shaped_like(call.node, new, old)
            old.replace_all_uses_with(new)
            self._replaced[old] = new

    def current(self, node: fx.Node | None) -> fx.Node | None:
        """What stands for ``node`` now."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def done(self, call: Call, op: str, weight: Matrix) -> None:
        """Record a product as rewritten to ``op``."""
        self.rewriter.rewritten.append(_entry(call, op, weight, lowering=self.rewriter.lowering))

    def refuse(self, call: Call, refusal: Refusal, weight: Matrix | None = None) -> None:
        """Leave a call, with the reason; once."""
        if call.node not in self._refused:
            self._refused.add(call.node)
            why = {"reason": str(refusal), "remedy": refusal.reason.remedy}
            self.rewriter.refused.append(_entry(call, call.name, weight, **why))


@dataclass(frozen=True)
class Matrix:
    """What a report says of a weight: its codes, rows N, columns K, and experts (0: a single matrix)."""

    codes: fx.Node
    n: int
    k: int
    experts: int

    @classmethod
    def of(cls, codes: fx.Node, transposed: bool = False) -> Matrix:
        """From codes ``[(E,) N, K/2]``, or ``[(E,) K/2, N]``."""
        *lead, n, half = value(codes).shape
        n, half = (half, n) if transposed else (n, half)
        return cls(codes, n, 2 * half, lead[0] if lead else 0)


def _entry(call: Call, op: str, weight: Matrix | None, **more: str) -> Entry:
    shape = {} if weight is None else {"n": weight.n, "k": weight.k, "experts": weight.experts}
    named = call.node.all_input_nodes if weight is None else [origin(weight.codes)]
    positions = [_torch.input_position(node) for node in named if node.op == "placeholder"]
    return Entry("", op, source=call.name, inputs=tuple(p for p in positions if p is not None), **shape, **more)


def variant(row: Row, arguments: Mapping[str, Any]) -> Refusal | None:
    """Why a call is not what its row describes; None if it is."""
    wanted = getattr(row, "wanted", {})
    for name, want in wanted.items():
        given = pick(arguments, name)
        if name.partition(".")[0] in arguments and given is not None and given != want:
            return Refusal(Reason.VARIANT, f"{row.name} with {name}={given}")
    return None


def origin(node: fx.Node) -> fx.Node:
    """Back through operations on one tensor alone: views, casts, slices."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def shaped_like(at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the shape of ``like``; it must have the dtype already, and the elements."""
    if not alike(value(node), value(like)):
        shape = [size if isinstance(size, int) else -1 for size in value(like).shape]
        node = emit(at, lambda tensor: tensor.reshape(shape), node)
    if not alike(value(node), value(like)):
        raise AssertionError(f"{like} is {value(like).dtype} {value(like).shape}, its twin {value(node).dtype}")
    return node
