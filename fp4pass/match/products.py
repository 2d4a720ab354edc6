"""Every product of a graph that a quantized weight feeds, proven or refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.match.anchors import Anchor, anchor_of
from fp4pass.match.cone import Cone, code_tainted, extract, holds_codes, value
from fp4pass.match.convention import Convention
from fp4pass.match.proof import Weight, prove
from fp4pass.match.reasons import Refusal
from fp4pass.match.roles import Inputs, assign
from fp4pass.match.structure import Memo, structure, table_bytes


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


_VERDICTS = Memo()


def find_products(graph: fx.Graph, inputs: Inputs) -> list[Product]:
    """All products that have an operand computed from packed codes, in graph order. Equal layers are proven once."""
    tainted = code_tainted(graph)
    found = []
    for node in graph.nodes:
        anchor = anchor_of(node)
        if anchor is None:
            continue
        for position in (anchor.left, anchor.right):
            if node.args[position] in tainted:
                found.append(_product(node, anchor, position == anchor.left, tainted, inputs))
                break
    return found


def _product(node: fx.Node, anchor: Anchor, weight_left: bool, tainted: set[fx.Node], inputs: Inputs) -> Product:
    weight_at, x_at = (anchor.left, anchor.right) if weight_left else (anchor.right, anchor.left)
    cone = extract(node.args[weight_at], tainted)
    codes = max((leaf for leaf in cone.leaves if holds_codes(leaf)), key=lambda leaf: value(leaf).numel())
    with _torch.real_tensors(), torch.no_grad():
        weight = _proven(cone, inputs)
    return Product(node, anchor, codes, node.args[x_at], weight_left, weight)


def _proven(cone: Cone, inputs: Inputs) -> Weight | Refusal:
    """`prove`, or what it said of a cone of the same structure and tables. A verdict kept names no node."""

    def find() -> tuple[Convention, bool] | Refusal:
        found = prove(cone, inputs)
        return found if isinstance(found, Refusal) else (found.convention, found.rows_last)

    tables = [(leaf, inputs.table(leaf)) for leaf in cone.leaves]
    known = [
        (leaf.op, inputs.is_constant(leaf), None if table is None else table_bytes(table)) for leaf, table in tables
    ]
    key = (structure((*cone.leaves, *cone.ids), cone.nodes), len(cone.ids), tuple(known))
    verdict = _VERDICTS(key, find)
    return verdict if isinstance(verdict, Refusal) else Weight(assign(cone, inputs), *verdict)
