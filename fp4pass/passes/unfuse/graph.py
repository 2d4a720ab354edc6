"""The graph while it is un-fused: its calls of known ops, and what was done with each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from fp4pass import _torch
from fp4pass.match.anchors import called_op
from fp4pass.match.cone import origin, value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.options import EMULATE
from fp4pass.passes.rewriter import Rewriter, alike
from fp4pass.passes.unfuse.calls import Call, Key
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.products import EXPERT_BLOCKS, PRODUCTS
from fp4pass.passes.unfuse.quantizers import ATTENTIONS, FP8_QUANTIZERS, QUANTIZERS, ROUND_TRIPS
from fp4pass.passes.unfuse.rows import Attention, Experts, Product, Quantizer, Row, pick
from fp4pass.report import Entry

ROWS: Mapping[str, Row] = {
    row.name: row
    for table in (QUANTIZERS, FP8_QUANTIZERS, ROUND_TRIPS, ATTENTIONS, PRODUCTS, EXPERT_BLOCKS)
    for row in table
}
"""Every row by the name of its op."""

log = logging.getLogger("fp4pass.passes")


class FusedGraph:
    """The known calls of one graph, in its order, and how to replace or refuse them."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.emulate = rewriter.activations == EMULATE
        self.calls = list(_known_calls(rewriter.graph))
        self._made_by = {n: (c, key) for c in self.calls for key, nodes in c.results.items() for n in nodes}
        self._refused: set[fx.Node] = set()
        self._replaced: dict[fx.Node, fx.Node] = {}

    def each(self, kind: type[Row], handle: Callable[[Call], Refusal | None]) -> None:
        """``handle`` every call of one kind; what it refuses, or fails at, leaves only this call."""
        for call in self.calls:
            if isinstance(call.row, kind):
                try:
                    refusal = handle(call)
                except Exception as error:  # whatever went wrong, uses are moved last: the graph is whole
                    log.exception("un-fusing %s failed", call.node)
                    refusal = Refusal(Reason.FAILED, f"{type(error).__name__}: {error}")
                if refusal is not None:
                    self.refuse(call, refusal)

    def made_by(self, node: fx.Node) -> tuple[Call, Key] | None:
        """The known call of which ``node`` is a result, and which result."""
        return self._made_by.get(node)

    def put(self, call: Call, key: Key, new: fx.Node) -> None:
        """Let ``new`` stand for a result of ``call``; where the call wrote into a larger buffer, in that buffer."""
        place, olds = call.place(key), call.results.get(key, ())
        if place is not None and olds:
            new = emit(call.node, place.embed, new, place.base)
        for old in olds:
            self._stand_for(call, old, new)

    def put_untouched(self, call: Call, key: Key) -> None:
        """Let a buffer that ``call`` may write to, but does not, stand for what it is afterwards."""
        for old in call.results.get(key, ()):
            self._stand_for(call, old, call.arguments[key])

    def _stand_for(self, call: Call, old: fx.Node, new: fx.Node) -> None:
        new = shaped_like(call.node, new, old)
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def current(self, node: fx.Node | None) -> fx.Node | None:
        """What stands for ``node`` now."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def done(self, call: Call, op: str) -> None:
        """Record a product as rewritten to ``op``."""
        self.rewriter.rewritten.append(_entry(call, op, lowering=self.rewriter.lowering))

    def refuse(self, call: Call, refusal: Refusal) -> None:
        """Leave a call, with the reason; once."""
        if call.node not in self._refused:
            self._refused.add(call.node)
            self.rewriter.refused.append(_refusal(call, refusal))


def list_unknown(rewriter: Rewriter) -> None:
    """List what other libraries call FP4 and no row describes: it is not ours to judge, and not to pass unseen."""
    for node in rewriter.graph.nodes:
        op = called_op(node)
        name = "" if op is None else op._schema.name
        is_known = name in ROWS or name.startswith("fp4pass::")
        if "fp4" in name.lower() and "mxfp4" not in name.lower() and not is_known:
            why = Reason.UNKNOWN_FP4
            read = _positions([n for n in node.all_input_nodes if rewriter.inputs.is_constant(n)])
            rewriter.refused.append(Entry("", name, reason=why.sentence, remedy=why.remedy, inputs=read))


def refuse_products(rewriter: Rewriter, refusal: Refusal) -> None:
    """List every known product as left, where the un-fusing did not run."""
    for call in _known_calls(rewriter.graph):
        if isinstance(call.row, (Product, Experts)):
            entry = _refusal(call, refusal)
            rewriter.refused.append(replace(entry, lost=entry.lost and refusal.reason is Reason.FAILED))


def _known_calls(graph: fx.Graph) -> Iterator[Call]:
    for node in graph.nodes:
        op = called_op(node)
        row = None if op is None else ROWS.get(op._schema.name)
        if row is not None and row.applies((call := Call(node, row)).arguments):
            yield call


def _refusal(call: Call, refusal: Refusal) -> Entry:
    row, reason = call.row, refusal.reason
    in_fp4 = isinstance(row, (Quantizer, Attention)) or (isinstance(row, Product) and bool(row.x_scale))
    lost = in_fp4 or reason is Reason.FP8_ACTIVATION
    return _entry(call, row.name, reason=str(refusal), remedy=reason.remedy, lost=lost)


def _entry(call: Call, op: str, **more: str | bool) -> Entry:
    """A product's entry measures its weight, from codes ``[(E,) N, K/2]`` or ``[(E,) K/2, N]``; of a list of experts
    the first's. Any other's names what the call reads."""
    row = call.row
    if not isinstance(row, (Product, Experts)):
        return Entry("", op, source=row.name, inputs=_positions(call.node.all_input_nodes), **more)
    codes = pick(call.arguments, row.codes)
    *lead, n, half = value(codes).shape
    if isinstance(row, Product) and row.transposed:
        n, half = half, n
    experts = lead[0] if lead else 0
    return Entry("", op, n, 2 * half, experts, source=row.name, inputs=_positions([origin(codes)]), **more)


def _positions(nodes: Sequence[fx.Node]) -> tuple[int, ...]:
    positions = (_torch.input_position(node) for node in nodes if node.op == "placeholder")
    return tuple(position for position in positions if position is not None)


def shaped_like(at: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the shape of ``like``; it must have the dtype already, and the elements."""
    if not alike(value(node), value(like)):
        shape = [size if isinstance(size, int) else -1 for size in value(like).shape]
        node = emit(at, lambda tensor: tensor.reshape(shape), node)
    if not alike(value(node), value(like)):
        raise AssertionError(f"{like} is {value(like).dtype} {value(like).shape}, its twin {value(node).dtype}")
    return node
