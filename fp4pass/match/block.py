"""Whole MoE blocks: from routed ids and weights to the summed output, around two proven products.

The block is found the way a weight is: cut out of the graph between its inputs and its output, and run. The two
products are proven already, so matrices of small whole numbers stand in for them, narrow ones: only the columns are
scaled down, the tokens and their routing stay as they are. Whole numbers keep every step exact in any dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.lowering.reference import ACTIVATIONS
from fp4pass.match.cone import value
from fp4pass.match.dims import Symbol, plain
from fp4pass.match.products import Product
from fp4pass.match.replay import Part, Replay, StandIn
from fp4pass.match.shapes import concrete
from fp4pass.match.structure import Memo, structure

aten, prims = torch.ops.aten, torch.ops.prims

LARGEST_REGION = 200
FILLS, MOST_IDS = 3, 4096
_BOUNDS = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.minimum.default}
_BOUNDS |= {aten.maximum.default, aten.hardtanh.default}
_COUNTS = {prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
_SORTS = {aten.sort.default, aten.sort.stable}
_PICKS = {aten.index.Tensor, aten.index_put.default}
_MOVES = {aten.view.default, aten.reshape.default, aten.clone.default, aten.unsqueeze.default, aten.expand.default}
_MOVES |= {aten.div.Tensor_mode, aten.floor_divide.default, prims.convert_element_type.default}
_VERDICTS = Memo()
NARROW = {"H": 4, "I": 6, "O": 5}


@dataclass(frozen=True)
class Block:
    """``end = sum over k of weights * down(activation(up(hidden)))`` for the experts that ``ids`` name.

    clamps_ids: an id beyond the last expert stands for that one, where otherwise it stands for nothing.
    """

    up: Product
    down: Product
    hidden: fx.Node
    ids: fx.Node
    weights: fx.Node
    end: fx.Node
    activation: str
    clamps_ids: bool


@dataclass(frozen=True)
class _Frame:
    """A block's sizes: tokens, choices a token, and the three widths."""

    tokens: int
    choices: int
    hidden: int
    inner: int
    out: int


def find_blocks(products: Sequence[Product]) -> list[Block]:
    """Every pair of expert products that a whole block can take the place of."""
    experts = [p for p in products if p.weight.roles.experts is not None and value(p.node) is not None]
    experts = [p for p in experts if not p.sums_rows]
    with _torch.real_tensors(), torch.no_grad():
        tries = [_block(down, {p.node: p for p in experts if p is not down}) for down in experts]
    return [block for block in tries if block is not None]


def _block(down: Product, others: Mapping[fx.Node, Product]) -> Block | None:
    end = _end(down.node)
    if end is None:
        return None
    total = _sum_below(end)
    tokens, choices, out = concrete(list(value(total.args[0]).shape))
    up = _producer(down.x, others)
    if up is None or choices < 2 or up.weight.roles.experts != down.weight.roles.experts:
        return None
    frame = _Frame(tokens, choices, up.weight.roles.k, up.weight.roles.n, out)
    region = _region(end, up, down, frame)
    if region is None:
        return None
    nodes, leaves = region
    key = (structure(leaves, nodes, {p.node: _described(p) for p in (up, down)}), frame, up.weight.roles.experts)
    verdict = _VERDICTS(key, lambda: _prove(nodes, leaves, end, up, down, frame))
    return None if verdict is None else Block(up, down, *leaves, end, *verdict)


def _described(product: Product) -> tuple[Hashable, list[fx.Node]]:
    """What the stand-in for a product depends on, and the nodes that it reads."""
    return (product.weight_left, product.weight.roles.ids is None), _row_inputs(product)


def _end(node: fx.Node) -> fx.Node | None:
    """The sum over choices that follows ``node``, with the cast after it if there is one."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_function" or value(node) is None:
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


def _region(
    end: fx.Node, up: Product, down: Product, frame: _Frame
) -> tuple[list[fx.Node], tuple[fx.Node, fx.Node, fx.Node]] | None:
    """The nodes between (hidden, ids, weights) and ``end``, or None if anything else flows in."""
    nodes: list[fx.Node] = []
    leaves: dict[str, fx.Node] = {}
    seen: set[fx.Node] = set()
    total = _sum_below(end)
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
                return None
            continue
        if node.op != "call_function" or len(seen) > LARGEST_REGION:
            return None
        stack.append((node, True))
        product = next((p for p in (up, down) if p.node is node), None)
        inputs = node.all_input_nodes if product is None else _row_inputs(product)
        stack.extend((n, False) for n in reversed(inputs))
    if leaves.keys() != {"hidden", "ids", "weights"} or not {up.node, down.node} <= seen:
        return None
    if _is_read_elsewhere(nodes, up.node, end) or _numbers_rows(nodes, total):
        return None
    return nodes, (leaves["hidden"], leaves["ids"], leaves["weights"])


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


def _leaf_kind(node: fx.Node, frame: _Frame) -> str | None:
    """hidden [T, H], ids [T, k] and weights [T, k] by their shapes and dtypes."""
    tensor = value(node)
    if tensor is None or tensor.dim() != 2 or tensor.dtype == torch.bool:
        return None
    shape = concrete(list(tensor.shape))
    if shape == [frame.tokens, frame.choices]:
        return "weights" if tensor.is_floating_point() else "ids"
    return "hidden" if shape == [frame.tokens, frame.hidden] and tensor.is_floating_point() else None


def _row_inputs(product: Product) -> list[fx.Node]:
    """What a product needs beside its weight: its rows, and which expert each belongs to."""
    ids = product.weight.roles.ids
    return [product.x, ids if ids is not None else product.node.args[product.anchor.offsets]]


def _prove(
    nodes: Sequence[fx.Node],
    leaves: tuple[fx.Node, fx.Node, fx.Node],
    end: fx.Node,
    up: Product,
    down: Product,
    frame: _Frame,
) -> tuple[str, bool] | None:
    """(activation, whether ids are clamped) with which the region computes what the block stands for, or None."""
    hidden, ids, weights = leaves
    symbols = {name: Symbol(name, size) for name, size in (("H", frame.hidden), ("I", frame.inner), ("O", frame.out))}
    tokens, choices, experts = frame.tokens, frame.choices, up.weight.roles.experts
    generator = torch.Generator().manual_seed(0x4D6F45)

    def whole(*size: int, low: int = -1, high: int = 2) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator).double()

    first_ids = torch.randint(0, experts, (tokens, choices), generator=generator)

    def fill(number: int) -> dict[fx.Node, torch.Tensor]:
        """Every id comes by in every place where there are few; routing weights of every kind.

        Weights stay within 2^-4 and 2^4: the sums then have fewer bits than a float32, and are exact in any order.
        """
        scales = torch.exp2(whole(tokens, choices, low=-2, high=3) * (1 if number % 2 else 2))
        signs = whole(tokens, choices) if number % 2 else 1
        return {
            hidden: whole(tokens, NARROW["H"]).to(value(hidden).dtype),
            ids: ((first_ids + number) % experts).to(value(ids).dtype),
            weights: (scales * signs).to(value(weights).dtype),
        }

    w_up = whole(experts, NARROW["I"], NARROW["H"])
    w_down = whole(experts, NARROW["O"], NARROW["I"])
    stand_ins = {up.node: _stand_in(up, w_up, symbols["I"]), down.node: _stand_in(down, w_down, symbols["O"])}
    routing = (plain(tokens), plain(choices))
    shapes = {hidden: (plain(tokens), (symbols["H"],)), ids: routing, weights: routing}
    trial = _Trial(Replay(Part(nodes, end, shapes, list(symbols.values()), stand_ins=stand_ins)), leaves, w_up, w_down)
    half = torch.float16 in trial.dtypes(nodes)
    if trial.replay.why_full is not None or (half and any(_bounds(node) for node in nodes)):
        return None
    # A bound on the values in between would show where they are large or small; for half precision see `_bounds`.
    reach = 2.0**4 if half else 2.0**20
    fills = [fill(number) for number in range(experts if tokens * experts <= MOST_IDS else FILLS)]
    first = fills[0]
    fills += [{**first, hidden: first[hidden] * factor} for factor in (reach, 1 / reach)]
    strangers = experts + torch.arange(tokens * choices).reshape(tokens, choices) // 2 % (experts + 2)
    is_strange = torch.arange(tokens * choices).reshape(tokens, choices) % 2 == 0
    beyond = {**first, ids: torch.where(is_strange, strangers, first[ids]).to(value(ids).dtype)}
    for name, activation in ACTIVATIONS.items():
        tolerance = 0.0 if name == "relu2" else max(torch.finfo(dtype).eps for dtype in trial.dtypes(nodes))
        if all(trial.explains(each, activation, tolerance) for each in fills):
            for clamps in (False, True):
                if trial.explains(beyond, activation, tolerance, beyond=True, clamps=clamps):
                    return name, clamps
    return None


def _bounds(node: fx.Node) -> bool:
    """Whether the node bounds floats: too near to the end of half precision to be told by trying."""
    return node.target in _BOUNDS and value(node).is_floating_point()


@dataclass(frozen=True)
class _Trial:
    """A region that can be run, and the whole-number matrices that stand for its weights."""

    replay: Replay
    leaves: tuple[fx.Node, fx.Node, fx.Node]
    w_up: torch.Tensor
    w_down: torch.Tensor

    def explains(
        self,
        fill: Mapping[fx.Node, torch.Tensor],
        activation: Callable[[torch.Tensor], torch.Tensor],
        tolerance: float,
        beyond: bool = False,
        clamps: bool = False,
    ) -> bool:
        """Whether the region gives the block's result on ``fill``, to ``tolerance`` of the largest number.

        ``beyond``: some ids name no expert of ours. A region that fails or has undefined numbers there was not made
        for such ids; one that was may count them as nothing or, if it ``clamps`` ids, as the last expert.
        """
        hidden, ids, weights = (fill[leaf].double() for leaf in self.leaves)
        try:
            found = self.replay(fill, NARROW)
        except (IndexError, RuntimeError):
            return beyond
        if beyond and not found.isfinite().all():
            return True
        counted = weights if clamps else torch.where(ids < len(self.w_up), weights, 0)
        chosen = ids.long().clamp(max=len(self.w_up) - 1)
        inner = activation(torch.einsum("th,tkih->tki", hidden, self.w_up[chosen]))
        want = (torch.einsum("tki,tkoi->tko", inner, self.w_down[chosen]) * counted.unsqueeze(-1)).sum(1)
        # Whole numbers and powers of two: exact up to the one rounding of the result.
        bound = tolerance * float(want.abs().max())
        return torch.allclose(found.double(), want.to(found.dtype).double(), rtol=2 * tolerance, atol=2 * bound)

    def dtypes(self, nodes: Sequence[fx.Node]) -> set[torch.dtype]:
        """The float dtypes that the region computes in."""
        return {value(n).dtype for n in nodes if value(n) is not None and value(n).is_floating_point()}


def _stand_in(product: Product, matrices: torch.Tensor, columns: Symbol) -> StandIn:
    """The product with whole-number ``matrices [E, N, K]`` in its weight's place, in the shape that it gives."""
    experts, ids = product.weight.roles.experts, product.weight.roles.ids
    rows_node = _row_inputs(product)[1]
    dtype = value(product.node).dtype

    def compute(values: Mapping[fx.Node, Any]) -> torch.Tensor:
        x = values[product.x].double()
        rows = x.reshape(-1, x.shape[-2] if product.weight_left else x.shape[-1])
        owner = values[rows_node]
        if ids is None:  # where each expert's rows end; those behind the last end belong to none
            owner = torch.searchsorted(owner.long(), torch.arange(len(rows)), right=True)
        known = owner.long().clamp(0, experts - 1)
        out = torch.einsum("sk,snk->sn", rows, matrices[known])
        out[owner >= experts] = torch.nan
        out = out.to(dtype)
        if ids is None:
            return out
        return out.unsqueeze(-1 if product.weight_left else -2)

    sizes = concrete(list(value(product.node).shape))
    shape: list[Any] = [plain(size) for size in sizes]
    shape[-2 if ids is not None and product.weight_left else -1] = (columns,)
    return StandIn(tuple(_row_inputs(product)), tuple(shape), compute)
