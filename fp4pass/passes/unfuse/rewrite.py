"""The rules of un-fusing, in any order: each does what it can without the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace as Arguments
from typing import Any

import torch
from torch import fx

from fp4pass.lowering.reference import expert_of_row
from fp4pass.match.anchors import anchor_of
from fp4pass.match.cone import code_tainted, origin, value
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.passes.rewriter import Rewriter
from fp4pass.passes.unfuse import twins
from fp4pass.passes.unfuse.activations import Activation, Activations, variant_of
from fp4pass.passes.unfuse.calls import Call
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.graph import FusedGraph, list_unknown, shaped_like
from fp4pass.passes.unfuse.rows import (
    GROUPED,
    SUM,
    UNCHANGED,
    VALUE,
    Attention,
    Experts,
    Product,
    Quantizer,
    RoundTrip,
    pick,
)
from fp4pass.passes.unfuse.written_out import casts_to_e4m3, find_round_trip

aten = torch.ops.aten
_VIEWED_AS = (torch.float4_e2m1fn_x2, torch.float8_e4m3fn)

Rule = Callable[[FusedGraph, Activations], None]


def unfuse(rewriter: Rewriter) -> None:
    """Operations that need SM100, as their plain twins with the product behind them in 16-bit activations.

    Given, for one of the rows of the tables (see `fp4pass.passes.unfuse.quantizers` and ``products``)::

        %normed, %codes, %scales = auto_deploy.trtllm_rms_norm_quant_nvfp4(%x, %weight, eps, %factor)
        %out = trtllm.nvfp4_gemm(%codes, %w, %scales, %w_scales, %alpha, bfloat16)

    Result::

        %normed = <RMSNorm in plain operations>
        %out = fp4pass.linear(%normed, %w, <%w_scales in rows>, %alpha * %factor, None, plain)

    Emulating::

        %out = fp4pass.linear(<%normed x %factor, rounded to FP4>, %w, <%w_scales in rows>, %alpha, None, plain)
    """
    graph = FusedGraph(rewriter)
    activations = Activations(graph)
    for rule in RULES:
        rule(graph, activations)
        rewriter.check(rewriter.graph)
    _refuse_what_is_left(graph)
    list_unknown(rewriter)
    rewriter.graph.eliminate_dead_code()  # last: what is erased could not be brought back


def replace_products(graph: FusedGraph, activations: Activations) -> None:
    """FP4 products, dense and grouped, one by one."""
    graph.each(Product, lambda call: _product(graph, activations, call))


def replace_expert_blocks(graph: FusedGraph, activations: Activations) -> None:
    """Whole blocks of experts."""
    graph.each(Experts, lambda call: _experts(graph, activations, call))


def replace_plain_results(graph: FusedGraph, activations: Activations) -> None:
    """What quantizing operations give beside the codes: normed values, residual sums, untouched arguments."""

    def replace(call: Call) -> Refusal | None:
        twin = activations.twin(call)
        if isinstance(twin, Refusal):
            return twin
        for key, role in call.row.results(call.arguments).items():
            if role in (VALUE, SUM) and twin[role] is not None:
                graph.put(call, key, graph.current(twin[role]))
            elif role == UNCHANGED:
                graph.put_untouched(call, key)
        return None

    graph.each(Quantizer, replace)


def remove_round_trips(graph: FusedGraph, activations: Activations) -> None:
    """Activations rounded to FP4 and back in plain operations, before a product with packed weights."""
    whole = graph.rewriter.graph
    if graph.emulate or not any(casts_to_e4m3(node) for node in whole.nodes):
        return
    tainted = code_tainted(whole, graph.rewriter.inputs)
    for node in list(whole.nodes):
        anchor = anchor_of(node)
        if anchor is None:
            continue
        left, right = node.args[anchor.left], node.args[anchor.right]
        for x, weight in ((left, right), (right, left)):
            source = find_round_trip(x, graph.rewriter.inputs) if weight in tainted and x not in tainted else None
            if source is not None:
                dtype = value(x).dtype
                source = emit(node, lambda t, d=dtype: t.to(d), source)
                node.replace_input_with(x, shaped_like(node, source, x))


def replace_fake_quantization(graph: FusedGraph, activations: Activations) -> None:
    """One op that rounds an activation to FP4 and back. A weight that goes through it is dense: nothing to rewrite."""

    def replace(call: Call) -> Refusal | None:
        x, amax = call.arguments[call.row.x], call.arguments[call.row.amax]
        if origin(x).op == "placeholder" and graph.rewriter.inputs.is_constant(origin(x)):
            return Refusal(Reason.DENSE)
        graph.put(call, 0, emit(call.node, _fake_quantized, x, amax) if graph.emulate else x)
        return None

    graph.each(RoundTrip, replace)


RULES: tuple[Rule, ...] = (
    replace_products,
    replace_expert_blocks,
    replace_plain_results,
    replace_fake_quantization,
    remove_round_trips,
)
"""In the order in which they run; any other gives the same graph."""


def _fake_quantized(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return twins.quantized_and_back(x, twins.E2M1_MAX * twins.E4M3_MAX / amax.float())


def _product(graph: FusedGraph, activations: Activations, call: Call) -> Refusal | None:
    """Put the W4A16 product, or the one with an emulated activation, in the place of ``call``."""
    row, arguments = call.row, call.arguments
    variant = row.variant(arguments)
    activation = variant_of(call, variant) if variant else _activation(activations, call)
    if isinstance(activation, Refusal):
        return activation
    if row.output not in call.results:
        return None  # nobody reads it
    ends = None if row.ends is None else emit(call.node, lambda given: row.ends(Arguments(**given)), arguments)
    operands = {
        "x": activation.values,
        "factor": activation.factor,
        "codes": _as_stored(call.node, arguments[row.codes]),
        "scale": _as_stored(call.node, pick(arguments, row.scale)),
        "alphas": [found for name in row.alpha.split() if (found := pick(arguments, name)) is not None],
        "bias": arguments.get(row.bias),
        "ends": ends,
    }
    rank, dtype = value(arguments[row.x]).dim(), value(call.results[row.output][0]).dtype
    build = functools.partial(_built, row.kind, row.transposed, rank, dtype, graph.emulate)
    graph.put(call, row.output, emit(call.node, lambda given: build(**given), operands))
    graph.done(call, "fp4pass.grouped_linear" if row.kind == GROUPED else "fp4pass.linear")
    return None


def _as_stored(at: fx.Node, node: fx.Node) -> fx.Node:
    """A weight's tensor without the FP4 or FP8 dtype that it is viewed as, which not every GPU's compiler knows."""
    stored = node
    while stored.target in (aten.view.dtype, aten.alias.default):
        stored = stored.args[0]
    if stored.target is aten.permute.default and value(stored).dtype in _VIEWED_AS:
        inner = _as_stored(at, stored.args[0])
        return emit(at, lambda tensor, dims=stored.args[1]: tensor.permute(dims), inner)
    return stored if value(stored).dtype.itemsize == value(node).dtype.itemsize else node


def _activation(activations: Activations, call: Call) -> Activation | Refusal:
    row, arguments = call.row, call.arguments
    if row.x_scale:
        return activations.of_codes(arguments[row.x], pick(arguments, row.x_scale), call.node)
    plain = activations.plain(arguments[row.x], call.node)
    return plain if isinstance(plain, Refusal) else Activation(plain, pick(arguments, row.factor))


def _built(
    kind: str,
    transposed: bool,
    rank: int,
    dtype: torch.dtype,
    emulate: bool,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    alphas: list[torch.Tensor],
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """The product, traced. Alpha undoes both factors: times the activation's own, it is the weight's global scale."""
    total = functools.reduce(torch.mul, [alpha.float() for alpha in alphas]) if alphas else None
    k = 2 * codes.shape[-2 if transposed else -1]
    x = x.reshape(-1, k) if x.shape[-1] != k or (rank == 2 and x.dim() != 2) else x
    if emulate:
        per_row = factor
        if kind == GROUPED and factor is not None and factor.numel() > 1:
            per_row = factor[expert_of_row(ends, x.shape[0]).clamp(max=factor.numel() - 1)]
        x = twins.quantized(x, per_row)
    elif factor is not None:
        total = factor.float() if total is None else total * factor.float()
    codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    codes = codes.mT if transposed else codes
    total = total.flatten() if total is not None and total.dim() > 1 else total
    if kind == GROUPED:
        return twins.grouped(x.to(dtype), codes, scale, total, ends)
    return twins.linear(x.to(dtype), codes, scale, total, bias)


def _experts(graph: FusedGraph, activations: Activations, call: Call) -> Refusal | None:
    """Put the block as one op in the place of ``call``; with a gate, or emulated, as its steps."""
    row, arguments = call.row, call.arguments
    variant = row.variant(arguments)
    plain = variant_of(call, variant) if variant else activations.plain(arguments[row.x], call.node)
    if isinstance(plain, Refusal):
        return plain
    activation = row.activation(Arguments(**arguments))

    def build(x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        a = Arguments(**given)
        routing = getattr(a, row.ids), getattr(a, row.routing)
        return twins.experts(x, *routing, row.weights(a), activation, graph.emulate)

    graph.put(call, 0, emit(call.node, build, plain, arguments))
    by_steps = activation == "swiglu" or graph.emulate
    graph.done(call, "fp4pass.gathered_linear" if by_steps else "fp4pass.experts")
    return None


def _refuse_what_is_left(graph: FusedGraph) -> None:
    """A quantizing operation whose codes are still read has somebody unknown who reads them."""
    read = _read(graph.rewriter.graph)
    for call in graph.calls:
        if isinstance(call.row, (Quantizer, Attention)) and call.node in read:
            users = {user for nodes in call.results.values() for node in nodes for user in node.users} & read
            graph.refuse(call, Refusal(Reason.FP4_CONSUMER, ", ".join(sorted(user.name for user in users))))


def _read(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the graph's results or side effects depend on."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node.is_impure() or any(user in read for user in node.users):
            read.add(node)
    return read
