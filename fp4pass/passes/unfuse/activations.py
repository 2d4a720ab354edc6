"""Where a quantized activation comes from: the values before they were quantized, and by what factor they were.

No scale is ever invented. An activation in FP4 is traced to the operation that quantized it; one in FP8 to that or to a
static scale. What cannot be traced is a refusal.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace as Arguments
from typing import Any

import torch
from torch import fx

from fp4pass.match.anchors import called_op
from fp4pass.match.cone import value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES
from fp4pass.passes.unfuse import twins
from fp4pass.passes.unfuse.attention import plain_attention
from fp4pass.passes.unfuse.calls import Call
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.graph import FusedGraph
from fp4pass.passes.unfuse.rows import CODES, SCALES, SUM, VALUE, Attention, Fp8Quantizer, Quantizer
from fp4pass.passes.unfuse.written_out import find_written_out

aten = torch.ops.aten
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view.dtype,
    aten.alias.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
_MOVES = _VIEWS | {
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.constant_pad_nd.default,
}
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Activation:
    """``values`` were multiplied by ``factor`` (None: by 1) before they were rounded to FP4."""

    values: fx.Node
    factor: fx.Node | None


class Activations:
    """The quantized activations of one graph. Twins are emitted when first asked for, before the call they replace."""

    def __init__(self, graph: FusedGraph) -> None:
        self._graph = graph
        self._twins: dict[fx.Node, dict[str, Any] | Refusal] = {}

    def of_codes(self, codes: fx.Node, scale: fx.Node, at: fx.Node) -> Activation | Refusal:
        """What the FP4 operand ``codes`` with block scales ``scale`` of the call ``at`` was made from."""
        made = self._graph.made_by(unviewed(codes))
        if made is None:
            found = find_written_out(codes, scale, self._graph.rewriter.inputs)
            if found is None:
                return Refusal(Reason.FP4_ACTIVATION, f"{codes.name}, {_maker(codes)}")
            return Activation(found.source, found.factor(at))
        call, key = made
        if not isinstance(call.row, (Quantizer, Attention)) or not _same_call(self._graph, call, scale):
            return Refusal(Reason.FP4_ACTIVATION, f"codes and block scales of {codes.name} differ in origin")
        twin = self.twin(call)
        if isinstance(twin, Refusal):
            return twin
        if _roles(call).get(key) != CODES:
            return Refusal(Reason.FP4_ACTIVATION, f"{codes.name} is another result of {call.row.name}")
        return Activation(self._graph.current(twin[VALUE]), self._graph.current(twin["factor"]))

    def twin(self, call: Call) -> dict[str, Any] | Refusal:
        """The plain results of a quantizing call, by what they are: VALUE, SUM, and the factor."""
        if call.node not in self._twins:
            variant = call.row.variant(call.arguments)
            make = self._attention if isinstance(call.row, Attention) else self._quantizer
            self._twins[call.node] = make(call) if not variant else variant_of(call, variant)
        return self._twins[call.node]

    def plain(self, node: fx.Node, at: fx.Node) -> fx.Node | Refusal:
        """``node`` in 16 or 32 bits, before ``at``: as it is, or undone if it is FP8 with a static scale."""
        if value(node).dtype in ACTIVATION_DTYPES:
            return node
        if value(node).dtype != _E4M3:
            return Refusal(Reason.FP8_ACTIVATION, f"{node.name}: {value(node).dtype}, {_maker(node)}")
        made = self._graph.made_by(unviewed(node))
        if made is None:
            return _undone_cast(node, at, self._graph.emulate)
        call, _ = made
        if isinstance(call.row, Attention):
            twin = self.twin(call)
            return twin if isinstance(twin, Refusal) else self._graph.current(twin[VALUE])
        if not isinstance(call.row, Fp8Quantizer):
            return Refusal(Reason.FP8_ACTIVATION, f"{node.name}, {_maker(node)}")
        source, scale = call.arguments[call.row.x], call.arguments.get(call.row.scale)
        if not self._graph.emulate or scale is None:
            return source
        if value(scale).numel() != 1:
            return Refusal(Reason.FP8_ACTIVATION, f"{node.name} has {tuple(value(scale).shape)} scales, not one")
        return emit(at, twins.through_fp8, source, scale)

    def _quantizer(self, call: Call) -> dict[str, Any] | Refusal:
        row, arguments = call.row, call.arguments
        for name in row.activations:
            if arguments[name] is not None:
                plain = self.plain(arguments[name], call.node)
                if isinstance(plain, Refusal):
                    return plain
                arguments[name] = plain
        values, total = emit(call.node, lambda given: row.twin(Arguments(**given)), arguments)
        return {VALUE: values, SUM: total, "factor": arguments.get(row.factor)}

    def _attention(self, call: Call) -> dict[str, Any] | Refusal:
        found = plain_attention(call)
        if isinstance(found, Refusal):
            return found
        return {VALUE: found, SUM: None, "factor": call.arguments[call.row.scale]}


def variant_of(call: Call, seen: str) -> Refusal:
    """The refusal of a call that is not as its row wants it, or of an op that has no twin."""
    reason = Reason.NO_TWIN if call.row.no_twin else Reason.VARIANT
    return Refusal(reason, f"{call.row.name}: {seen}")


def _maker(node: fx.Node) -> str:
    """Where a tensor comes from, in words."""
    node = unviewed(node)
    if node.target is operator.getitem:
        node = node.args[0]
    op = called_op(node)
    return "an input of the graph" if op is None else f"made by {op._schema.name}"


def _roles(call: Call) -> Mapping[Any, str]:
    if isinstance(call.row, Attention):
        return {call.row.output: CODES, call.row.block_scale: SCALES}
    return call.row.results(call.arguments)


def _same_call(graph: FusedGraph, call: Call, scale: fx.Node) -> bool:
    """Whether block scales come from the call that made the codes, whatever was done to their order since."""
    while (made := graph.made_by(scale)) is None and scale.target in _MOVES:
        scale = scale.args[0]
    return made is not None and made[0].node is call.node and _roles(call).get(made[1]) == SCALES


def unviewed(node: fx.Node) -> fx.Node:
    """Back through views that keep elements in their order."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _undone_cast(node: fx.Node, at: fx.Node, emulate: bool) -> fx.Node | Refusal:
    """An FP8 cast written out, ``(x / s).to(e4m3)`` or ``(x * s).to(e4m3)`` with a clamp perhaps: what was cast, times
    s or 1 / s. Only emulation rounds it, and in plain operations: not every GPU's compiler knows the dtype."""
    cast = unviewed(node)
    is_cast = cast.target is torch.ops.prims.convert_element_type.default and value(cast).dtype == _E4M3
    before = scaled = cast.args[0] if is_cast else None
    while isinstance(before, fx.Node) and before.target in _BOUNDS | _VIEWS:
        before = before.args[0]
    if not isinstance(before, fx.Node) or before.target not in (aten.mul.Tensor, aten.div.Tensor):
        return Refusal(Reason.FP8_ACTIVATION, f"{node.name}, {_maker(node)}")
    multiplied = before.target is aten.mul.Tensor
    tries = (before.args, before.args[::-1]) if multiplied else (before.args,)
    x, scale = next((pair for pair in tries if isinstance(pair[1], fx.Node) and _is_static(pair[1])), (None, None))
    if scale is None:
        return Refusal(Reason.FP8_ACTIVATION, f"{node.name}, its scale is no static one")
    dtype = value(x).dtype
    shape = [size if isinstance(size, int) else -1 for size in value(node).shape]

    def undo(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        s = s.float().reciprocal() if multiplied else s.float()
        x = twins.round_to(x.float(), twins.E4M3) if emulate else x.float()
        return (x * s.reshape(())).to(dtype).reshape(shape)

    return emit(at, undo, scaled, scale)


def _is_static(scale: fx.Node) -> bool:
    """Whether a single value is computed from single values that the graph is given."""
    reads = scale.all_input_nodes
    if value(scale) is None or value(scale).numel() != 1:
        return False
    return all(map(_is_static, reads)) if scale.op == "call_function" and reads else scale.op == "placeholder"


_BOUNDS = {
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    torch.ops.prims.convert_element_type.default,
}
