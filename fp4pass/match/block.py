"""Whole MoE blocks: from routed ids and weights to the summed output, around two proven products.

A block is found the way a weight is: cut out of the graph between its inputs and its output, and run (`trial`).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.match.cone import sizes_computed_with, value
from fp4pass.match.products import Product
from fp4pass.match.reasons import Apart
from fp4pass.match.shapes import concrete
from fp4pass.match.structure import Memo, structure
from fp4pass.match.trial import Frame, Meaning, Region, explain, row_inputs

aten, prims = torch.ops.aten, torch.ops.prims

LARGEST_REGION = 200
_COUNTS = {prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
_SORTS = {aten.sort.default, aten.sort.stable}
_CHOOSERS = {*_SORTS, aten.topk.default}
_WIDE = (torch.int32, torch.int64)
_SHAPES = {aten.view.default, aten.reshape.default, aten.clone.default, aten.unsqueeze.default, aten.squeeze.dim}
_SHAPES |= {aten.expand.default, aten.permute.default, aten.slice.Tensor, aten.alias.default}
_PICKS = {aten.index.Tensor, aten.index_put.default}
_MOVES = {aten.view.default, aten.reshape.default, aten.clone.default, aten.unsqueeze.default, aten.expand.default}
_MOVES |= {aten.div.Tensor_mode, aten.floor_divide.default, prims.convert_element_type.default}
_VERDICTS = Memo()


@dataclass(frozen=True)
class Block:
    """A region that computes ``end = sum over k of weights * down(activation(up(hidden)))``, and how."""

    region: Region
    meaning: Meaning


def find_blocks(products: Sequence[Product]) -> tuple[list[Block], dict[fx.Node, Apart]]:
    """Every pair of expert products that a whole block can take the place of; of all others, why none can."""
    experts = [p for p in products if p.weight.roles.experts is not None and value(p.node) is not None]
    experts = [p for p in experts if not p.sums_rows]
    blocks: list[Block] = []
    apart = dict.fromkeys((p.node for p in experts), Apart.NO_SUM)
    with _torch.real_tensors(), torch.no_grad():
        for down in experts:
            others = {p.node: p for p in experts if p is not down}
            end = _end(down.node, others)
            up = None if end is None else _producer(down.x, others)
            if up is None or up.weight.roles.experts != down.weight.roles.experts:
                continue
            found = _block(up, down, end)
            if isinstance(found, Block):
                blocks.append(found)
            else:
                apart |= dict.fromkeys((up.node, down.node), found)
    whole = {p.node for block in blocks for p in (block.region.up, block.region.down)}
    return blocks, {node: why for node, why in apart.items() if node not in whole}


def _block(up: Product, down: Product, end: fx.Node) -> Block | Apart:
    total = _sum_below(end)
    tokens, choices, out = concrete(list(value(total.args[0]).shape))
    if choices < 2:
        return Apart.ONE
    if up.weight.roles.n == 2 * down.weight.roles.k:
        return Apart.GATED
    frame = Frame(tokens, choices, up.weight.roles.k, up.weight.roles.n, out)
    region = _region(end, up, down, frame)
    if isinstance(region, Apart):
        return region
    if end is not total and value(total).dtype == value(region.hidden).dtype:
        # The sum is what the op gives; the cast, of something else's choosing, stays behind it.
        region = replace(region, nodes=region.nodes[:-1], end=total)
    products = {p.node: _described(p) for p in (up, down)}
    key = (structure(region.leaves, region.nodes, products), frame, up.weight.roles.experts)
    meaning = _VERDICTS(key, lambda: explain(region))
    return Apart.OTHER if meaning is None else Block(region, meaning)


def _described(product: Product) -> tuple[Hashable, list[fx.Node]]:
    """What the stand-in for a product depends on, and the nodes that it reads."""
    return (product.weight_left, product.weight.roles.ids is None), row_inputs(product)


def _end(node: fx.Node, others: Mapping[fx.Node, Product]) -> fx.Node | None:
    """The sum over choices behind ``node``, before any other product, with the cast after it if there is one."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_function" or value(node) is None or node in others:
            return None
        if node.target is aten.sum.dim_IntList:
            break
    else:
        return None
    if value(node.args[0]).dim() != 3 or list(node.args[1]) not in ([1], [-2]) or value(node).dim() != 2:
        return None
    cast = next(iter(node.users), None)
    is_cast = len(node.users) == 1 and cast.target in (prims.convert_element_type.default, aten._to_copy.default)
    return cast if is_cast else node


def _sum_below(end: fx.Node) -> fx.Node:
    return end if end.target is aten.sum.dim_IntList else end.args[0]


def _producer(node: fx.Node, products: Mapping[fx.Node, Product]) -> Product | None:
    """The product from which the activation between the two was computed."""
    seen, stack = set(), [node]
    while stack and len(seen) < LARGEST_REGION:
        node = stack.pop()
        if node in products:
            return products[node]
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return None


def _region(end: fx.Node, up: Product, down: Product, frame: Frame) -> Region | Apart:
    """The nodes between (hidden, ids, weights) and ``end``, if nothing else flows in."""
    nodes: list[fx.Node] = []
    leaves: dict[str, fx.Node] = {}
    seen: set[fx.Node] = set()
    total = _sum_below(end)
    computed_with: set[str] = set()
    stack = [(end, False)]
    while stack:
        node, done = stack.pop()
        if done:
            nodes.append(node)
            continue
        if node in seen or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        seen.add(node)
        kind = None if node in (end, total) else _leaf_kind(node, frame)
        if kind is not None:
            if leaves.setdefault(kind, node) is not node:
                return Apart.INPUTS
            continue
        if node.op != "call_function" or len(seen) > LARGEST_REGION:
            return Apart.INPUTS
        computed_with |= sizes_computed_with(node)
        stack.append((node, True))
        product = next((p for p in (up, down) if p.node is node), None)
        inputs = node.all_input_nodes if product is None else row_inputs(product)
        stack.extend((n, False) for n in reversed(inputs))
    if leaves.keys() != {"hidden", "ids", "weights"} or not {up.node, down.node} <= seen:
        return Apart.INPUTS
    # A row's number over the number of choices is its token; no other size may take part.
    if not computed_with <= {str(value(node).shape[1]) for node in (total.args[0], leaves["ids"], leaves["weights"])}:
        return Apart.INPUTS
    if _is_read_elsewhere(nodes, up.node, end):
        return Apart.READ
    if _numbers_rows(nodes, total):
        return Apart.PLACES
    return Region(nodes, **leaves, end=end, up=up, down=down, frame=frame)


def _is_read_elsewhere(nodes: Sequence[fx.Node], up: fx.Node, end: fx.Node) -> bool:
    """Whether something outside of the region needs a result in between, so that the products would stay."""
    inside, after = set(nodes), {up}
    for node in nodes:
        if node in after or any(n in after for n in node.all_input_nodes):
            after.add(node)
    return any(user not in inside for node in after - {end} for user in node.users)


def _numbers_rows(nodes: Sequence[fx.Node], total: fx.Node) -> bool:
    """With a number of tokens that varies: whether rows are told apart by their place, other than to pick them.

    Places come from counting and from sorting; compared with a number they would show only beyond the traced tokens.
    """
    if isinstance(value(total).shape[0], int):
        return False
    places: set[fx.Node] = set()
    for node in nodes:
        is_order = node.target is operator.getitem and node.args[0].target in _SORTS and node.args[1] == 1
        if is_order or node.target in _COUNTS:
            places.add(node)
        elif node.target in _PICKS:
            source, written = node.args[0], node.args[2:3]
            places |= {node} if places & {source, *written} else set()
        elif places.intersection(node.all_input_nodes):
            if node.target not in _MOVES:
                return True
            places.add(node)
    return False


def never_negative(node: fx.Node) -> bool:
    """Whether integers are sure not to be negative: places that a sort or a top-k chose, or numbers with a bound."""
    while node.target in _SHAPES or (node.target is prims.convert_element_type.default and node.args[1] in _WIDE):
        node = node.args[0]
    if node.target in (aten.clamp_min.default, aten.clamp.default) and isinstance(node.args[1], int):
        return node.args[1] >= 0 and all(most is None or most >= 0 for most in node.args[2:])
    if node.target is aten.clamp_max.default:
        return node.args[1] >= 0 and never_negative(node.args[0])
    return node.target is operator.getitem and node.args[1] == 1 and node.args[0].target in _CHOOSERS


def _leaf_kind(node: fx.Node, frame: Frame) -> str | None:
    """hidden [T, H], ids [T, k] and weights [T, k] by their shapes and dtypes."""
    tensor = value(node)
    if tensor is None or tensor.dim() != 2 or tensor.dtype == torch.bool:
        return None
    shape = concrete(list(tensor.shape))
    if shape == [frame.tokens, frame.choices]:
        return "weights" if tensor.is_floating_point() else "ids"
    return "hidden" if shape == [frame.tokens, frame.hidden] and tensor.is_floating_point() else None
