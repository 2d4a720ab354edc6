"""Every product of a graph that a quantized weight feeds, proven or refused."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fp4pass import _torch
from fp4pass.match.anchors import Anchor, anchor_of
from fp4pass.match.cone import Cone, code_tainted, extract, holds_codes, value
from fp4pass.match.convention import Convention
from fp4pass.match.proof import Weight, prove
from fp4pass.match.reasons import Refusal
from fp4pass.match.roles import Inputs, assign
from fp4pass.match.shapes import concrete


@dataclass(frozen=True)
class Product:
    """One matrix product with a quantized operand.

    ``weight_left`` says on which side of ``@`` the weight stands, ``x`` is the other operand.
    """

    node: fx.Node
    anchor: Anchor
    codes: fx.Node
    x: fx.Node
    weight_left: bool
    weight: Weight | Refusal

    @property
    def sums_rows(self) -> bool:
        """Whether the sum runs over the weight's rows N, as in a backward, not over K. Only for a proven weight."""
        return self.weight.rows_last == self.weight_left


class Prover:
    """Proofs, kept by the structure of what was proven: equal layers are proven once."""

    def __init__(self, keep: int = 4096) -> None:
        self._keep = keep
        self._verdicts: OrderedDict[Hashable, tuple[Convention, bool] | Refusal] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, cone: Cone, inputs: Inputs) -> Weight | Refusal:
        """`prove`, or what it said of a cone of the same structure and tables."""
        with _torch.real_tensors(), torch.no_grad():
            return self._verdict(cone, inputs)

    def _verdict(self, cone: Cone, inputs: Inputs) -> Weight | Refusal:
        key = _structure(cone, inputs)
        with self._lock:
            known = self._verdicts.get(key)
        if known is not None:
            return known if isinstance(known, Refusal) else Weight(assign(cone, inputs), *known)
        verdict = prove(cone, inputs)
        with self._lock:
            refused = isinstance(verdict, Refusal)
            self._verdicts[key] = verdict if refused else (verdict.convention, verdict.rows_last)
            while len(self._verdicts) > self._keep:
                self._verdicts.popitem(last=False)
        return verdict


PROVER = Prover()


def find_products(graph: fx.Graph, inputs: Inputs, prover: Prover = PROVER) -> list[Product]:
    """All products that have an operand computed from packed codes, in graph order."""
    tainted = code_tainted(graph)
    found = []
    for node in graph.nodes:
        anchor = anchor_of(node)
        if anchor is None:
            continue
        for position in (anchor.left, anchor.right):
            if node.args[position] in tainted:
                found.append(_product(node, anchor, position == anchor.left, tainted, inputs, prover))
                break
    return found


def _product(
    node: fx.Node, anchor: Anchor, weight_left: bool, tainted: set[fx.Node], inputs: Inputs, prover: Prover
) -> Product:
    weight_at, x_at = (anchor.left, anchor.right) if weight_left else (anchor.right, anchor.left)
    cone = extract(node.args[weight_at], tainted)
    codes = max((leaf for leaf in cone.leaves if holds_codes(leaf)), key=lambda leaf: value(leaf).numel())
    return Product(node, anchor, codes, node.args[x_at], weight_left, prover(cone, inputs))


def _structure(cone: Cone, inputs: Inputs) -> Hashable:
    """What a verdict depends on: operations, their arguments, the leaves' kinds and the tables' values."""
    index = {node: i for i, node in enumerate((*cone.leaves, *cone.ids, *cone.nodes))}

    def neutral(leaf: Any) -> Hashable:
        return ("node", index[leaf]) if isinstance(leaf, fx.Node) and leaf in index else repr(concrete(leaf))

    def leaf_kind(node: fx.Node) -> Hashable:
        tensor, table = value(node), inputs.table(node)
        values = None if table is None else table_bytes(table)
        meta = tensor is not None and (str(tensor.dtype), repr(concrete([*tensor.shape, *tensor.stride()])))
        return (meta, node.op == "call_function", inputs.is_constant(node), values)

    operations = []
    for node in cone.nodes:
        flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda leaf: isinstance(leaf, fx.Node))
        operations.append((str(node.target), tuple(map(neutral, flat)), str(spec)))
    leaves = tuple(leaf_kind(node) for node in (*cone.leaves, *cone.ids))
    return (leaves, len(cone.ids), tuple(operations))


def table_bytes(table: torch.Tensor) -> bytes:
    """A table's values, for keys."""
    return table.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
