"""Every small change to a decode is either refused or rewritten to something that computes the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx

from fp4pass.passes.experts import rewrite_experts
from fp4pass.passes.linear import rewrite_linear
from fp4pass.passes.rewriter import Rewriter
from fp4pass.pipeline import Fp4Pass

from .running import Known, activations, compiling, relative_error
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, Packed

aten = torch.ops.aten

SWAPPED = {
    aten.mul.Tensor: aten.add.Tensor,
    aten.div.Tensor: aten.mul.Tensor,
    aten.ge.Scalar: aten.gt.Scalar,
    aten.bitwise_and.Scalar: aten.bitwise_or.Scalar,
    aten.maximum.default: aten.minimum.default,
    aten.add.Tensor: aten.sub.Tensor,
    aten.neg.default: aten.abs.default,
}


@pytest.fixture
def traced(monkeypatch):
    """``traced(name)``: the graph of a spelling before the passes, values for its inputs, and what is known of them."""

    def trace(name):
        kept, original = [], Fp4Pass.__call__

        def keep(self, graph):
            kept.append(copy.deepcopy(graph))
            original(self, graph)

        monkeypatch.setattr(Fp4Pass, "__call__", keep)
        spelling = {**LINEARS, **PRODUCTS_OF_EXPERTS}[name]
        module = Packed(spelling)
        x = activations(5, spelling.shape[1], seed=3)
        inputs = (x, torch.tensor([0, 2, 1, 1, 0])) if spelling.experts else (x,)
        with torch.no_grad():
            compiling(module)(*inputs)
        (graph,) = kept
        return graph, *_bind(graph, module, inputs)

    return trace


def _bind(graph, module, inputs):
    """Values by placeholder, told by shape and dtype: no two inputs of a spelling have both in common."""
    values = [*inputs, module.codes, module.scale, module.factor, module.table]
    by_kind = {(tuple(value.shape), value.dtype): value.detach() for value in values}
    bound = {}
    for node in graph.find_nodes(op="placeholder"):
        held = node.meta["val"]
        bound[node.name] = by_kind[tuple(held.shape), held.dtype]
    calls = frozenset(name for name, value in bound.items() if any(value.data_ptr() == i.data_ptr() for i in inputs))
    tables = {name: value for name, value in bound.items() if value.data_ptr() == module.table.data_ptr()}
    return list(bound.values()), Known(tables, calls)


@dataclass(frozen=True)
class Change:
    """What is done to the node at ``index``: arguments by position (a node by its name), or another operation."""

    index: int
    what: str
    args: Mapping[int, Any] = field(default_factory=dict)
    target: Any = None

    def made(self, graph):
        """A changed copy of the graph."""
        changed = copy.deepcopy(graph)
        node = list(changed.nodes)[self.index]
        by_name = {n.name: n for n in changed.nodes}
        for position, new in self.args.items():
            new = new(list(node.args[position])) if callable(new) else by_name.get(new, new)
            node.update_arg(position, new)
        node.target = self.target or node.target
        return changed


def changes(graph):
    """One for each number, operand order and operation of the decode. Without copies: there are thousands."""
    for index, node in enumerate(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for position, given in enumerate(node.args):
            if type(given) in (int, float) and torch.Tag.pointwise in node.target.tags:
                for other in (given + 1, given - 1, given * 2, -given):
                    yield Change(index, f"{node.name}: {given} -> {other}", args={position: other})
        if node.target in (aten.stack.default, aten.cat.default):
            yield Change(index, f"{node.name}: reversed", args={0: lambda parts: parts[::-1]})
        if node.target is aten.where.self:
            swapped = {1: node.args[2].name, 2: node.args[1].name}
            yield Change(index, f"{node.name}: swapped", args=swapped)
        if (other := SWAPPED.get(node.target)) is not None:
            yield Change(index, f"{node.name}: {other}", target=other)


def mutants(graph):
    """(what was changed, the changed graph) for every change."""
    return ((change.what, change.made(graph)) for change in changes(graph))


def mutants_of_mutants(graph, random_, count):
    """The same for pairs of changes drawn at random."""
    first = list(changes(graph))
    for _ in range(count):
        one = random_.choice(first)
        once = one.made(graph)
        two = random_.choice(list(changes(once)))
        yield f"{one.what}, {two.what}", two.made(once)


def _run(graph, values):
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*values)[0]


def _rewrite(graph, known):
    rewriter = Rewriter(graph, known, "test")
    for run in (rewrite_linear, rewrite_experts):
        run(rewriter)
    graph.eliminate_dead_code()
    return rewriter


@pytest.mark.parametrize(
    "name",
    [
        "table_of_16",
        "table_of_8_sign_by_where",
        "arithmetic_on_integers",
        "arithmetic_on_powers",
        "bits_of_bfloat16",
        "concatenated_nibbles",
        "written_by_slices",
        "scales_by_column_number",
        "global_divides",
        "our_modules_interleaved",
        "our_modules_fragments",
        "gathered_after_decode",
        "gathered_before_decode",
    ],
)
@torch.no_grad()
def test_a_mutant_is_refused_or_computes_the_same(name, traced):
    graph, values, known = traced(name)
    assert _rewrite(copy.deepcopy(graph), known).rewritten
    assert _refused_among(mutants(graph), values, known) >= 5


# Those whose inputs the fixture does not make: offsets of sorted rows, and a weight of 128 rows.
OTHERWISE_CALLED = {"scales_in_tiles", *(name for name in PRODUCTS_OF_EXPERTS if name.startswith("grouped"))}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", sorted({**LINEARS, **PRODUCTS_OF_EXPERTS}.keys() - OTHERWISE_CALLED))
@torch.no_grad()
def test_a_mutant_of_a_mutant_is_refused_or_computes_the_same(name, traced):
    graph, values, known = traced(name)
    _refused_among(mutants(graph), values, known)
    _refused_among(mutants_of_mutants(graph, random.Random(name), 200), values, known)


def _refused_among(changed, values, known):
    """How many changed graphs are refused; those that are rewritten must compute what they did."""
    refused = 0
    for what, mutant in changed:
        try:
            wanted = _run(mutant, values)
        except (RuntimeError, IndexError):
            continue  # the change has made it no program at all
        rewriter = _rewrite(mutant, known)
        refused += len(rewriter.refused)
        if rewriter.rewritten:
            assert relative_error(_run(mutant, values), wanted.double()) < 1e-5, what
    return refused
