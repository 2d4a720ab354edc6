"""The cone of a weight operand: every node that computes it, back to inputs, constants and expert ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from fp4pass.match.anchors import anchor_of, is_product

aten = torch.ops.aten

CODE_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
SMALLEST_WEIGHT = 256  # 16 rows of one block
GATHERS = {aten.index.Tensor, aten.index_select.default, aten.embedding.default}
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Inputs(Protocol):
    """What the caller of the match knows of the graph's inputs and constants."""

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the tensor belongs to the model (parameter, buffer, constant), not to the call."""

    def table(self, node: fx.Node) -> torch.Tensor | None:
        """The values of a small constant, where they are known and part of the cache key."""


@dataclass(frozen=True)
class Cone:
    """``nodes`` in execution order end in ``root``; ``leaves`` are the tensors that they start from."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    ids: tuple[fx.Node, ...]


def value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that stands for the node's result."""
    found = node.meta.get("val")
    return found if isinstance(found, torch.Tensor) else None


def may_hold_codes(tensor: torch.Tensor, of_the_model: bool) -> bool:
    """Whether a tensor can hold packed codes: bytes in two dimensions or more. Of a model's own also a row of bytes, or
    words of eight codes, which in arguments of a call are more likely ids."""
    if tensor.dtype in CODE_DTYPES:
        return tensor.dim() >= 2 or (of_the_model and tensor.dim() == 1 and tensor.numel() >= SMALLEST_WEIGHT // 2)
    return of_the_model and tensor.dtype == torch.int32 and tensor.dim() in (2, 3)


def holds_codes(node: fx.Node, inputs: Inputs | None = None) -> bool:
    """Whether an input or constant can hold packed codes. Without ``inputs`` none is known to be of the model."""
    tensor = value(node)
    return (
        node.op in ("placeholder", "get_attr")
        and tensor is not None
        and may_hold_codes(tensor, inputs is not None and inputs.is_constant(node))
    )


def code_leaf(cone: Cone, inputs: Inputs) -> fx.Node:
    """The leaf that holds the packed codes: a matrix before a row, the largest of these."""

    def rank(leaf: fx.Node) -> tuple[bool, int]:
        tensor = value(leaf)
        return tensor.dim() > 1, tensor.numel() * tensor.element_size()

    return max((leaf for leaf in cone.leaves if holds_codes(leaf, inputs)), key=rank)


def code_tainted(graph: fx.Graph, inputs: Inputs | None = None) -> set[fx.Node]:
    """Nodes computed from packed codes without a matrix product or a look-up of rows in between."""
    tainted: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            is_tainted = holds_codes(node, inputs)
        else:
            is_tainted = (
                not tainted.isdisjoint(node.all_input_nodes)
                and not is_product(node)
                and looked_up(node, tainted, inputs) is None
            )
        if is_tainted:
            tainted.add(node)
    return tainted


def looked_up(node: fx.Node, tainted: set[fx.Node], inputs: Inputs | None) -> fx.Node | None:
    """The ids if ``node`` looks up rows of a single matrix, as an embedding does: what it gives is an activation.

    Ids that are the same in every call put a weight's rows in another order: what they give is a weight still.
    """
    ids = gather_ids(node, tainted)
    is_matrix = ids is not None and node.args[0] in tainted and value(node.args[0]).dim() == 2
    return ids if is_matrix and _is_of_the_call(ids, inputs) else None


def _is_of_the_call(node: fx.Node, inputs: Inputs | None) -> bool:
    """Whether an argument of the call takes part in computing ``node``."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" and (inputs is None or not inputs.is_constant(node)):
            return True
        stack.extend(n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return False


def gather_ids(node: fx.Node, tainted: set[fx.Node]) -> fx.Node | None:
    """The tensor of expert ids if ``node`` picks whole experts by one that the codes have no part in."""
    if node.target not in GATHERS:
        return None
    if node.target is aten.index.Tensor:
        source, indices = node.args[0], node.args[1]
        if len(indices) != 1:
            return None
        ids = indices[0]
    elif node.target is aten.index_select.default:
        source, dim, ids = node.args
        if dim != 0:
            return None
    else:
        source, ids = node.args[0], node.args[1]
    if not isinstance(ids, fx.Node) or ids in tainted or ids.op == "get_attr" or _is_float8(origin(ids)):
        return None
    tensor = value(ids)
    whole = value(source) is not None and tensor is not None and tensor.dtype in (torch.int32, torch.int64)
    return ids if whole else None


def origin(node: fx.Node) -> fx.Node:
    """Back through operations on one tensor alone: views, casts, slices."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _is_float8(node: fx.Node) -> bool:
    """Whether a node holds E4M3: numbers made of it pick from a table of scales, not among experts."""
    return value(node) is not None and value(node).dtype == torch.float8_e4m3fn


def varying_sizes(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The sizes that may be others in the next call and that ``node`` reads, each with whether it reads it as a number
    to compute with; otherwise it stands among the sizes of a shape."""
    varying = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), _SIZES)]
    for argument in (*node.args, *node.kwargs.values()) if varying else ():
        is_list = isinstance(argument, (list, tuple))
        for each in argument if is_list else (argument,):
            if isinstance(each, fx.Node) and each in varying:
                yield each, not is_list


def sizes_computed_with(node: fx.Node) -> set[str]:
    """The sizes that may be others in the next call among the numbers that ``node`` computes with, written down."""
    makes_numbers = node.target in (aten.full.default, aten.scalar_tensor.default)
    makes_numbers |= torch.Tag.pointwise in getattr(node.target, "tags", ())
    return {str(size.meta["val"]) for size, computed in varying_sizes(node) if computed and makes_numbers}


def extract(root: fx.Node, tainted: set[fx.Node]) -> Cone:
    """Walk back from ``root``; products, inputs and constants are leaves, expert ids are cut off."""
    nodes: list[fx.Node] = []
    leaves: list[fx.Node] = []
    ids: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            nodes.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue  # a size: the replay takes its value from the node itself
        if node.op != "call_function" or anchor_of(node) is not None:
            leaves.append(node)
            continue
        cut = gather_ids(node, tainted)
        if cut is not None and cut not in ids:
            ids.append(cut)
        stack.append((node, True))
        stack += [(n, False) for n in reversed(node.all_input_nodes) if n is not cut and n not in seen]
    return Cone(root, tuple(nodes), tuple(leaves), tuple(ids))
