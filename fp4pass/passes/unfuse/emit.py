"""Putting a function of tensors into a graph, as the nodes that it traces to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fp4pass import _torch
from fp4pass.match.cone import value

_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack")


def emit(at: fx.Node, function: Callable[..., Any], *arguments: Any) -> Any:
    """Put ``function(*arguments)`` before ``at``.

    arguments: any structure of nodes and constants; ``function`` is traced on the nodes' fake tensors, with Inductor's
    decompositions, and gets everything else as it is. Returns what the function returns, nodes in the place of tensors.
    Nothing is emitted if tracing fails.
    """
    flat, spec = pytree.tree_flatten(arguments, is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, fx.Node)]
    nodes = [flat[i] for i in places]

    def on_tensors(*tensors: torch.Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        return function(*pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(flat)], spec))

    fakes = [value(node) for node in nodes]
    with torch.no_grad(), fakes[0].fake_mode:
        traced = make_fx(on_tensors, decomposition_table=_torch.decompositions_keeping_products())(*fakes)
    traced.graph.eliminate_dead_code()
    return _inlined(at, traced.graph, nodes)


def origin_of(node: fx.Node) -> dict[str, Any]:
    """The metadata that says where in the model a node comes from; what else there is describes its own arguments."""
    return {name: node.meta[name] for name in _KEPT if name in node.meta}


def _inlined(at: fx.Node, traced: fx.Graph, nodes: list[fx.Node]) -> Any:
    """Copies of the traced nodes before ``at``, its placeholders standing for ``nodes``."""
    into: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    kept = origin_of(at)
    with at.graph.inserting_before(at):
        for node in traced.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], into.__getitem__)
            if node.op == "call_function":
                into[node] = at.graph.node_copy(node, into.__getitem__)
                into[node].meta |= kept
    raise AssertionError("a traced function has an output")
