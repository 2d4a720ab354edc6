"""Every product of a graph that a quantized weight feeds, proven or refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.match.anchors import Anchor, anchor_of, is_product
from fp4pass.match.cone import CODE_DTYPES, Cone, Inputs, code_leaf, code_tainted, extract, gather_ids, looked_up, value
from fp4pass.match.convention import Convention
from fp4pass.match.proof import Weight, prove
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.roles import assign, scale_leaf
from fp4pass.match.structure import Memo, structure, table_bytes

Sizes = tuple[int | None, int, int]


@dataclass(frozen=True)
class Product:
    """One matrix product with a quantized operand.

    ``weight_left`` says on which side of ``@`` the weight stands, ``x`` is the other operand. With no ``anchor`` it is
    a look-up: the rows of the weight that the ids ``x`` name.
    """

    node: fx.Node
    anchor: Anchor | None
    codes: fx.Node
    x: fx.Node
    weight_left: bool
    weight: Weight | Refusal

    @property
    def sums_rows(self) -> bool:
        """Whether the sum runs over the weight's rows N, as in a backward, not over K. Only for a proven weight."""
        return self.weight.rows_last == self.weight_left

    @property
    def sizes(self) -> Sizes:
        """(experts, N, K) of the weight; for one that is not proven as its codes' shape has them."""
        if isinstance(self.weight, Weight):
            return self.weight.roles.sizes
        codes = value(self.codes)
        experts = codes.shape[0] if codes.dim() == 3 else None
        rows = codes.shape[-2] if codes.dim() > 1 else 1
        elements_a_byte = 1 if self.weight.reason is Reason.EIGHT_BIT else 2
        return experts, rows, elements_a_byte * codes.shape[-1] * codes.element_size()


_VERDICTS = Memo()


def find_products(graph: fx.Graph, inputs: Inputs) -> list[Product]:
    """All products that have an operand computed from packed codes, in graph order. Equal layers are proven once.

    A weight that meets an activation in another operation is one that is refused.
    """
    tainted = code_tainted(graph, inputs)
    found = []
    for node in graph.nodes:
        if node in tainted:
            continue  # a product's result is not, nor are rows that were looked up
        anchor = anchor_of(node)
        found.append(_look_up(node, tainted, inputs) if anchor is None else _product(node, anchor, tainted, inputs))
    products = [product for product in found if product is not None]
    refused = {product.codes for product in products if isinstance(product.weight, Refusal)}
    return products + _elsewhere(graph, inputs, tainted, refused)


def _product(node: fx.Node, anchor: Anchor, tainted: set[fx.Node], inputs: Inputs) -> Product | None:
    """The product that ``node`` is; where both operands come from codes, with the proven one as the weight."""
    sides = [left for left, at in ((True, anchor.left), (False, anchor.right)) if node.args[at] in tainted]
    tries = [product for left in sides if (product := _with_weight(node, anchor, left, tainted, inputs)) is not None]
    proven = (product for product in tries if isinstance(product.weight, Weight))
    return next(proven, tries[0] if tries else None)


def _with_weight(
    node: fx.Node, anchor: Anchor, weight_left: bool, tainted: set[fx.Node], inputs: Inputs
) -> Product | None:
    weight_at, x_at = (anchor.left, anchor.right) if weight_left else (anchor.right, anchor.left)
    cone = extract(node.args[weight_at], tainted)
    codes = code_leaf(cone, inputs)
    if not _is_byte_matrix(codes) and scale_leaf(cone, codes) is None:
        return None  # indices of some other kind
    with _torch.real_tensors(), torch.no_grad():
        weight = _proven(cone, codes, inputs)
    return Product(node, anchor, codes, node.args[x_at], weight_left, weight)


def _elsewhere(graph: fx.Graph, inputs: Inputs, tainted: set[fx.Node], refused: set[fx.Node]) -> list[Product]:
    """The model's weights with block scales that meet an activation in some other operation, each once."""
    of_the_call: set[fx.Node] = set()
    found: dict[fx.Node, Product] = {}
    for node in graph.nodes:
        read = node.all_input_nodes
        from_the_call = of_the_call.intersection(read)
        if from_the_call or (node.op == "placeholder" and not inputs.is_constant(node)):
            of_the_call.add(node)
        weights = [n for n in read if n in tainted and n not in from_the_call] if from_the_call else ()
        activations = [n for n in read if n in from_the_call and _is_float(n)] if weights else ()
        if not activations or is_product(node) or gather_ids(node, tainted) is not None:
            continue
        for weight in weights:
            cone = extract(weight, tainted)
            codes = code_leaf(cone, inputs)
            if inputs.is_constant(codes) and codes not in refused and scale_leaf(cone, codes) is not None:
                refusal = Refusal(Reason.NO_PRODUCT, str(node.target))
                found.setdefault(codes, Product(node, None, codes, activations[0], False, refusal))
    return list(found.values())


def _is_float(node: fx.Node) -> bool:
    return value(node) is not None and value(node).is_floating_point()


def _look_up(node: fx.Node, tainted: set[fx.Node], inputs: Inputs) -> Product | None:
    """The look-up of rows that ``node`` is, if it decodes a whole quantized table for them."""
    ids = looked_up(node, tainted, inputs)
    if ids is None or node.args[0].op != "call_function" or not value(node).is_floating_point():
        return None
    cone = extract(node.args[0], tainted)
    codes = code_leaf(cone, inputs)
    if scale_leaf(cone, codes) is None:
        return None
    with _torch.real_tensors(), torch.no_grad():
        return Product(node, None, codes, ids, False, _proven(cone, codes, inputs))


def _is_byte_matrix(codes: fx.Node) -> bool:
    return value(codes).dtype in CODE_DTYPES and value(codes).dim() > 1


def _proven(cone: Cone, codes: fx.Node, inputs: Inputs) -> Weight | Refusal:
    """`prove`, or what it said of a cone of the same structure and tables. A verdict kept names no node."""
    readings = assign(cone, codes, inputs)
    if isinstance(readings, Refusal):
        return readings

    def find() -> tuple[int, Convention, bool] | Refusal:
        found = prove(cone, readings)
        if isinstance(found, Refusal):
            return found
        return readings.index(found.roles), found.convention, found.rows_last

    tables = [(leaf, inputs.table(leaf)) for leaf in cone.leaves]
    known = [
        (leaf.op, inputs.is_constant(leaf), None if table is None else table_bytes(table)) for leaf, table in tables
    ]
    key = (structure((*cone.leaves, *cone.ids), cone.nodes), len(cone.ids), tuple(known))
    verdict = _VERDICTS(key, find)
    if isinstance(verdict, Refusal):
        return verdict
    number, convention, rows_last = verdict
    return Weight(readings[number], convention, rows_last)
