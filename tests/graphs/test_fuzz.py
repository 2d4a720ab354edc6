"""Products spelled at random: what is NVFP4 is found and computes the same, what nearly is one is left."""

from __future__ import annotations

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers transformers::grouped_mm_fallback)
from torch import fx

from fp4pass.passes.experts import rewrite_experts
from fp4pass.passes.linear import rewrite_linear
from fp4pass.passes.rewriter import Rewriter

from .recipes import Recipe, draw
from .running import Known, relative_error, traced

SAMPLE, ALL, BATCH = 60, 2000, 200


def rewritten(recipe: Recipe, inputs: dict[str, torch.Tensor]) -> tuple[Rewriter, fx.GraphModule]:
    """The recipe's graph after the passes for single products."""
    graph_module = traced(recipe.compute, inputs)
    known = Known({"table": inputs["table"]}, frozenset({"x", "which"}))
    rewriter = Rewriter(graph_module.graph, known, "test")
    for run in (rewrite_linear, rewrite_experts):
        run(rewriter)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return rewriter, graph_module


@torch.no_grad()
def assert_found(recipe: Recipe) -> None:
    inputs = recipe.inputs()
    rewriter, graph_module = rewritten(recipe, inputs)
    assert not rewriter.refused and rewriter.rewritten, (recipe, rewriter.refused)
    exact, plain = recipe.exact(**inputs), recipe.compute(**inputs)
    found = graph_module(*inputs.values())
    assert found.dtype == plain.dtype and found.shape == plain.shape, recipe
    # Where x itself is rounded, or two results are, the last roundings fall one way or the other.
    assert relative_error(found, exact) <= max(1.1 * relative_error(plain, exact), 1e-6), recipe


@torch.no_grad()
def assert_left(recipe: Recipe) -> None:
    inputs = recipe.inputs()
    rewriter, graph_module = rewritten(recipe, inputs)
    assert rewriter.refused and not rewriter.rewritten, recipe
    assert not any("fp4pass" in str(node.target) for node in graph_module.graph.nodes), recipe


@pytest.mark.parametrize("start", range(0, SAMPLE, 20))
def test_a_random_spelling_is_found_and_computes_the_same(start):
    for seed in range(start, start + 20):
        assert_found(draw(seed))


@pytest.mark.parametrize("start", range(0, SAMPLE, 20))
def test_a_random_near_miss_is_left(start):
    for seed in range(start, start + 20):
        assert_left(draw(seed, flaw=True))


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(0, ALL, BATCH))
def test_all_random_spellings_are_found_and_compute_the_same(start):
    for seed in range(start, start + BATCH):
        assert_found(draw(seed))


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(0, ALL, BATCH))
def test_all_random_near_misses_are_left(start):
    for seed in range(start, start + BATCH):
        assert_left(draw(seed, flaw=True))
