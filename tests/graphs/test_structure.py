"""What keys of verdicts are made of: calls without names, in which everything that can matter is told apart."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fp4pass.match.shapes import concrete
from fp4pass.match.structure import structure

aten = torch.ops.aten


@dataclass(frozen=True)
class At:
    """The node of this number in a graph of `called`."""

    number: int


def called(*calls, prefix="", shape=(4, 8), dtype=torch.uint8):
    """A graph's leaf and the nodes of ``calls``: (target, *arguments) or with a dict of named ones at the end; an
    argument ``At(i)`` is the i-th node, the leaf the first."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"{prefix}x")]
    nodes[0].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    for target, *given in calls:
        named = given.pop() if isinstance(given[-1], dict) else {}
        put = fx.node.map_aggregate(tuple(given), lambda each: nodes[each.number] if isinstance(each, At) else each)
        nodes.append(graph.create_node("call_function", target, put, named, name=f"{prefix}{len(nodes)}"))
    return nodes


def key(*calls, **leaf):
    x, *nodes = called(*calls, **leaf)
    return structure([x], nodes)


SHIFTED = ((aten.mul.Tensor, At(0), 1), (aten.sub.Tensor, At(1), At(0)))


def test_names_are_no_part_of_a_key():
    assert key(*SHIFTED) == key(*SHIFTED, prefix="other_")


@pytest.mark.parametrize(
    "other",
    [
        ((aten.mul.Tensor, At(0), 1.0), (aten.sub.Tensor, At(1), At(0))),
        ((aten.mul.Tensor, At(0), True), (aten.sub.Tensor, At(1), At(0))),
        ((aten.mul.Tensor, At(0), "1"), (aten.sub.Tensor, At(1), At(0))),
        ((aten.mul.Tensor, At(0), [1]), (aten.sub.Tensor, At(1), At(0))),
        ((aten.mul.Tensor, At(0), 1), (aten.sub.Tensor, At(0), At(1))),
        ((aten.mul.Tensor, At(0), 1), (aten.sub.Tensor, At(1), At(1))),
        ((aten.mul.Tensor, At(0), 1), (aten.sub.Tensor, At(1), "@0")),
        ((aten.mul.Tensor, At(0), 1), (aten.sub.Tensor, At(1), At(0), {"alpha": 2})),
        ((aten.mul.Tensor, At(0), 1), (aten.add.Tensor, At(1), At(0))),
        ((aten.mul.Scalar, At(0), 1), (aten.sub.Tensor, At(1), At(0))),
        SHIFTED[:1],
    ],
)
def test_a_key_tells_arguments_and_operations_apart(other):
    assert key(*SHIFTED) != key(*other)


def test_a_key_tells_zeros_of_either_sign_apart():
    assert key((aten.add.Tensor, At(0), 0.0)) != key((aten.add.Tensor, At(0), -0.0))


@pytest.mark.parametrize("leaf", [{"shape": (8, 4)}, {"shape": (4, 8, 1)}, {"dtype": torch.int8}])
def test_a_key_tells_leaves_apart(leaf):
    assert key(*SHIFTED) != key(*SHIFTED, **leaf)


def test_of_a_stand_in_its_description_reads_and_metadata_count():
    x, product, *rest = called((aten.mm.default, At(0), At(0)), (aten.neg.default, At(1)))
    product.meta["val"] = x.meta["val"]

    def with_stand_in(description, reads):
        return structure([x], [product, *rest], {product: (description, reads)})

    first = with_stand_in((True, False), [x])
    assert first == with_stand_in((True, False), [x])
    assert first != with_stand_in((False, False), [x]) and first != with_stand_in((True, False), [x, x])
    product.meta["val"] = x.meta["val"].float()
    assert first != with_stand_in((True, False), [x])


def symbolic(hint):
    """A size that may be another in the next call."""
    graph = make_fx(torch.neg, tracing_mode="symbolic")(torch.empty(hint)).graph
    return next(iter(graph.nodes)).meta["val"].shape[0]


@pytest.mark.filterwarnings("ignore:Raw SymInt value")
@pytest.mark.parametrize("kind", ["itself", "by_a_node"])
def test_a_key_has_the_traced_numbers_of_sizes(kind):
    def viewed(hint):
        x, size = called((operator.mul, At(0), 1))
        size.meta["val"] = symbolic(hint)
        view = x.graph.call_function(aten.view.default, (x, [symbolic(hint) if kind == "itself" else size, 2]))
        return structure([x], [view])

    assert viewed(16) == viewed(16) != viewed(32)


def test_arguments_are_made_concrete_in_any_nesting():
    x, size, other = called((operator.mul, At(0), 1), (operator.mul, At(0), 2))
    size.meta["val"] = symbolic(7)
    found = concrete((x, [size, (2.0, slice(size, None))], {"at": [other, True]}), {x: "x", other: None})
    assert found == ("x", [7, (2.0, slice(7, None))], {"at": [None, True]})
    assert concrete(torch.Size([3, 4])) == (3, 4) and concrete(size) == 7 and concrete(x) is x
