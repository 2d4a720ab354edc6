"""One MoE layer under every mode of torch.compile, with generated code; and what stands in the way of a rewrite."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fp4pass
from fp4pass import pipeline
from fp4pass.backend import Fp4passWarning
from fp4pass.errors import OptionError, UnmatchedError
from fp4pass.match.reasons import Reason
from fp4pass.passes import moe
from fp4pass.pipeline import Pass

from ..graphs.running import relative_error
from .models import assert_whole, tokens

LAYER = {"fp4pass.linear": 2, "fp4pass.experts": 1}
SHARED, ROUTED = ["mixer.shared_experts.down_proj", "mixer.shared_experts.up_proj"], ["mixer.experts"]


@pytest.fixture
def layer(nano_model):
    """A MoE layer of the tiny model: two linear products and a block of experts."""
    return nano_model(dtype=torch.float32).model.layers[1]


@pytest.fixture
def exact(nano_model, dense_twin):
    """The same layer with dense weights, in float64."""
    return dense_twin(nano_model(dtype=torch.float32), torch.float64).model.layers[1]


def hidden(length):
    return torch.randn(2, length, 80, generator=torch.Generator().manual_seed(length))


def modules(entries):
    return sorted(entry.module for entry in entries)


@pytest.mark.parametrize(
    "asked",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune", "dynamic": True},
        {"options": {"mode": "max-autotune-no-cudagraphs", "freezing": True}, "dynamic": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_generated_code_is_right_in_every_mode(asked, layer, exact, generated):
    compiled = torch.compile(layer, backend="fp4pass", fullgraph=True, **asked)
    for length in (4, 3):
        assert relative_error(compiled(hidden(length)), exact(hidden(length).double())) < 1e-5
        assert_whole(fp4pass.last_report(), ops=LAYER)


@torch.no_grad()
def test_one_token_is_rewritten_whole_under_max_autotune(nano_model, dense_twin, graphs):
    """With one row Inductor would rather multiply and sum, and no product would be left to find."""
    model = nano_model(dtype=torch.float32)
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True, mode="max-autotune")
    ids = tokens(1)[:1]
    assert relative_error(compiled(ids).logits, dense_twin(model, torch.float64)(ids).logits) < 1e-5
    assert_whole(fp4pass.last_report(), graphs)


@pytest.mark.filterwarnings("error::fp4pass.backend.Fp4passWarning")
@pytest.mark.parametrize("experts", [8, 16])
@torch.no_grad()
def test_new_global_scales_under_a_compiled_layer(experts, another, graphs):
    layer, other = (another(seed, torch.float32, experts=experts).model.layers[1] for seed in (0, 1))
    compiled = torch.compile(layer, backend="fp4pass", fullgraph=True)
    for _ in range(2):
        assert relative_error(compiled(hidden(3)), layer(hidden(3)).double()) < 1e-5
        layer.load_state_dict(other.state_dict())
    assert_whole(fp4pass.last_report(), graphs, LAYER)
    assert len(graphs) == 1


# --- What cannot be rewritten, or is asked for wrongly.


def clamp(linear):
    """Give a module a decode that is not NVFP4."""
    decode = linear.dense
    linear.dense = lambda name, dtype: decode(name, dtype).clamp(-0.1, 0.1)


@torch.no_grad()
def test_a_product_that_is_left_costs_one_warning_and_nothing_else(layer, graphs):
    clamp(layer.mixer.shared_experts.up_proj)
    with pytest.warns(Fp4passWarning) as caught:
        found = torch.compile(layer, backend="fp4pass", fullgraph=True)(hidden(3))
    report = fp4pass.last_report()
    assert modules(report.refused) == SHARED[1:] and modules(report.rewritten) == ROUTED + SHARED[:1]
    (entry,) = report.refused
    (message,) = [str(each.message) for each in caught if each.category is Fp4passWarning]
    assert entry.reason in message and entry.remedy in message and entry.module in message
    shared = layer.mixer.shared_experts
    weight = shared.up_proj.dense("weight", torch.float32)
    shared.up_proj.forward = lambda x: functional.linear(x, weight)
    assert relative_error(found, layer(hidden(3)).double()) < 1e-5


@torch.no_grad()
def test_a_product_that_is_left_is_an_error_where_a_match_is_required(layer, graphs):
    clamp(layer.mixer.shared_experts.up_proj)
    with pytest.raises(Exception, match="were not rewritten") as caught:
        torch.compile(layer, backend="fp4pass", options={"require_match": True})(hidden(3))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, UnmatchedError) and SHARED[1] in error.seen
    assert modules(fp4pass.last_report().refused) == SHARED[1:]


def test_an_unknown_option_is_an_error_that_names_the_nearest(layer, graphs):
    with pytest.raises(Exception, match="did you mean 'require_match'") as caught:
        torch.compile(layer, backend="fp4pass", options={"require_macth": True})(hidden(3))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, OptionError) and not graphs


def fails_at_once(rewriter):
    raise ValueError("not today")


def fails_after_half(rewriter):
    first = rewriter.products[0]
    with rewriter.graph.inserting_before(first.node):
        rewriter.graph.call_function(torch.ops.aten.erf.default, (first.x,))
    raise ValueError("not today")


@pytest.mark.parametrize("broken", [fails_at_once, fails_after_half])
@torch.no_grad()
def test_a_pass_that_fails_leaves_its_products_and_no_others(broken, layer, exact, graphs, monkeypatch):
    passes = (Pass(each.name, broken, "") if each.name == "linear" else each for each in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    with pytest.warns(Fp4passWarning, match="rewrite itself failed"):
        found = torch.compile(layer, backend="fp4pass", fullgraph=True)(hidden(3))
    assert relative_error(found, exact(hidden(3).double())) < 1e-5
    report = fp4pass.last_report()
    assert modules(report.rewritten) == ROUTED and modules(report.refused) == SHARED
    for entry in report.refused:
        assert entry.reason.startswith(Reason.FAILED.sentence) and "ValueError: not today" in entry.reason
    (graph,) = graphs
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.erf.default)


@torch.no_grad()
def test_one_rewrite_that_fails_does_not_undo_the_others(layer, exact, graphs, monkeypatch):
    monkeypatch.setattr(moe, "_build", fails_at_once)
    with pytest.warns(Fp4passWarning):
        found = torch.compile(layer, backend="fp4pass", fullgraph=True)(hidden(3))
    assert relative_error(found, exact(hidden(3).double())) < 1e-5
    report = fp4pass.last_report()
    assert modules(report.rewritten) == SHARED and len(report.refused) == 2
    assert all("TypeError" in entry.reason for entry in report.refused)
