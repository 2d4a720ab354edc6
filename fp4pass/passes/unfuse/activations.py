"""Where a quantized activation comes from: the values before they were quantized, and by what factor they were.

No scale is ever invented. An activation in FP4 is traced to the operation that quantized it; one in FP8 to that or to a
static scale. What cannot be traced is a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace as Arguments
from typing import Any

import torch
from torch import fx

from fp4pass.match.cone import value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import ACTIVATION_DTYPES
from fp4pass.passes.unfuse import twins
from fp4pass.passes.unfuse.attention import plain_attention
from fp4pass.passes.unfuse.calls import Call, pick
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.graph import ROWS, FusedGraph, variant
from fp4pass.passes.unfuse.rows import CODES, SCALES, SUM, VALUE, Attention, Fp8Quantizer, Quantizer
from fp4pass.passes.unfuse.written_out import Written, find_written_out

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
            return _of_written_out(found, at) if found is not None else Refusal(Reason.FP4_ACTIVATION, codes.name)
        call, key = made
        row = ROWS[call.name]
        if not isinstance(row, (Quantizer, Attention)) or not _same_call(self._graph, call, scale):
            return Refusal(Reason.FP4_ACTIVATION, f"codes and block scales of {codes.name} differ in origin")
        twin = self.twin(call)
        if isinstance(twin, Refusal):
            return twin
        if _roles(row, call).get(key) != CODES:
            return Refusal(Reason.FP4_ACTIVATION, codes.name)
        return Activation(self._graph.current(twin[VALUE]), self._graph.current(twin["factor"]))

    def twin(self, call: Call) -> dict[str, Any] | Refusal:
        """The plain results of a quantizing call, by what they are: VALUE, SUM, and the factor."""
        if call.node not in self._twins:
            row = ROWS[call.name]
            make = self._attention if isinstance(row, Attention) else self._quantizer
            self._twins[call.node] = make(call, row)
        return self._twins[call.node]

    def plain(self, node: fx.Node, at: fx.Node) -> fx.Node | Refusal:
        """``node`` in 16 or 32 bits, before ``at``: as it is, or undone if it is FP8 with a static scale."""
        if value(node).dtype in ACTIVATION_DTYPES:
            return node
        if value(node).dtype != _E4M3:
            return Refusal(Reason.FP8_ACTIVATION, f"{node.name}: {value(node).dtype}")
        made = self._graph.made_by(unviewed(node))
        if made is None:
            return _undone_cast(node, at)
        call, _ = made
        row = ROWS[call.name]
        if isinstance(row, Attention):
            twin = self.twin(call)
            return twin if isinstance(twin, Refusal) else self._graph.current(twin[VALUE])
        if not isinstance(row, Fp8Quantizer):
            return Refusal(Reason.FP8_ACTIVATION, node.name)
        source = pick(call.bound(row.argument_names), row.x)
        if not (self._graph.emulate and row.scale):
            return source
        dtype, scale = value(source).dtype, pick(call.bound(row.argument_names), row.scale)
        return emit(at, lambda x, s: twins.from_fp8(x, s, dtype), node, scale)

    def _quantizer(self, call: Call, row: Quantizer) -> dict[str, Any] | Refusal:
        arguments = call.bound(row.argument_names)
        refusal = variant(row, arguments)
        if refusal is not None:
            return refusal
        for name in row.activations:
            if arguments[name] is not None:
                plain = self.plain(arguments[name], call.node)
                if isinstance(plain, Refusal):
                    return plain
                arguments[name] = plain
        factor = arguments[row.factor]
        values, total = emit(call.node, lambda given: row.twin(Arguments(**given)), _tensors(arguments))
        if factor is not None and row.divides:
            factor = emit(call.node, torch.reciprocal, factor)
        return {VALUE: values, SUM: total, "factor": factor}

    def _attention(self, call: Call, row: Attention) -> dict[str, Any] | Refusal:
        found = plain_attention(call, row)
        if isinstance(found, Refusal):
            return found
        return {VALUE: found, SUM: None, "factor": call.arguments[row.scale]}


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a twin may read; buffers that the op only writes to are kept out by their dtype."""
    return {
        name: given
        for name, given in arguments.items()
        if not isinstance(given, fx.Node) or value(given).dtype in (*ACTIVATION_DTYPES, torch.int32, torch.int64)
    }


def _roles(row: Quantizer | Attention, call: Call) -> Mapping[Any, str]:
    if isinstance(row, Attention):
        return {row.output: CODES, row.block_scale: SCALES}
    return row.results(call.bound(row.argument_names))


def _same_call(graph: FusedGraph, call: Call, scale: fx.Node) -> bool:
    """Whether block scales come from the call that made the codes, whatever was done to their order since."""
    while (made := graph.made_by(scale)) is None and scale.op == "call_function" and len(scale.all_input_nodes) == 1:
        scale = scale.all_input_nodes[0]
    return made is not None and made[0].node is call.node and _roles(ROWS[call.name], call).get(made[1]) == SCALES


def unviewed(node: fx.Node) -> fx.Node:
    """Back through views that keep elements in their order."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _of_written_out(found: Written, at: fx.Node) -> Activation:
    return Activation(found.source, found.factor(at))


def _undone_cast(node: fx.Node, at: fx.Node) -> fx.Node | Refusal:
    """An FP8 cast written out, ``(x / s).to(e4m3)`` or ``(x * s).to(e4m3)`` with a clamp perhaps: times s, or 1 / s."""
    cast = unviewed(node)
    before = cast.args[0] if cast.op == "call_function" and cast.all_input_nodes else None
    while isinstance(before, fx.Node) and before.target in _BOUNDS | _VIEWS:
        before = before.args[0]
    if not isinstance(before, fx.Node) or before.target not in (aten.mul.Tensor, aten.div.Tensor):
        return Refusal(Reason.FP8_ACTIVATION, node.name)
    scale = before.args[1]
    if not isinstance(scale, fx.Node) or not _is_static(scale):
        return Refusal(Reason.FP8_ACTIVATION, f"{node.name}, its scale is no static one")
    multiplied, dtype = before.target is aten.mul.Tensor, value(before.args[0]).dtype

    def undo(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return twins.from_fp8(x, s.float().reciprocal() if multiplied else s, dtype)

    return emit(at, undo, node, scale)


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
