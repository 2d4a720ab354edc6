"""A tiny nano-like checkpoint from disk through ``torch.compile(model, backend="fp4pass")`` to logits and text."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import fp4pass
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.lowering.layout import FRAGMENTS, LAYOUTS, PLAIN

from ..graphs.running import relative_error
from .models import assert_whole, tokens

pytestmark = pytest.mark.filterwarnings("error::fp4pass.backend.Fp4passWarning")

LONGEST = 20
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def new_cache(kind, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=LONGEST)


@torch.no_grad()
def prefill_and_step(models, kind="dynamic"):
    """For a prompt, then for one token more: the logits of each model."""
    caches = [new_cache(kind, model) for model in models]
    for ids in (tokens(7), tokens(1, seed=1)):
        yield [model(ids, past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)]


# --- Logits.


@pytest.mark.parametrize(
    "dtype, experts, kind",
    [
        (torch.float32, "grouped_mm", "dynamic"),
        (torch.float32, "batched_mm", "static"),
        (torch.float16, "batched_mm", "dynamic"),
        (torch.bfloat16, "grouped_mm", "static"),
    ],
    ids=str,
)
def test_prefill_and_decode_are_rewritten_whole(dtype, experts, kind, nano_model, dense_twin, follow, graphs):
    model = nano_model(dtype=dtype, experts_implementation=experts)
    exact, dense = dense_twin(model, torch.float64), dense_twin(model, dtype)
    follow(exact, model, dense)
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True, options={"check": True})
    for truth, theirs, ours in prefill_and_step((exact, dense, compiled), kind):
        assert_whole(fp4pass.last_report(), graphs)
        bound = 1e-5 if dtype == torch.float32 else 1.5 * relative_error(theirs, truth)
        assert relative_error(ours, truth) < bound
    assert len(graphs) == 2


@pytest.mark.parametrize("experts, op", [("grouped_mm", "grouped_linear"), ("batched_mm", "gathered_linear")])
def test_experts_are_rewritten_product_by_product_where_no_block_is_sought(experts, op, nano_model, dense_twin, graphs):
    model = nano_model(dtype=torch.float32, experts_implementation=experts)
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True, options={"disable": ["moe"]})
    for truth, ours in prefill_and_step((dense_twin(model, torch.float64), compiled)):
        assert_whole(fp4pass.last_report(), graphs, {"fp4pass.linear": 6, f"fp4pass.{op}": 4})
        assert relative_error(ours, truth) < 1e-5


def test_in_bfloat16_the_error_is_not_larger_than_that_of_the_dequantized_model(another, dense_twin, follow, graphs):
    model = another(0, torch.bfloat16, experts=12)
    exact, dense = dense_twin(model, torch.float64), dense_twin(model, torch.bfloat16)
    follow(exact, model, dense)
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True)
    ours, theirs = [], []
    for seed in range(1, 10):
        fresh = another(seed, torch.bfloat16, experts=12)
        for each, source in ((exact, dense_twin(fresh, torch.float64)), (dense, dense_twin(fresh)), (model, fresh)):
            missing, unexpected = each.load_state_dict(source.state_dict(), strict=False)
            assert not missing and all(".gate." in name for name in unexpected)
        with torch.no_grad():
            truth, *found = (each(tokens(24, seed)).logits.double() for each in (exact, compiled, dense))
        for errors, logits in zip((ours, theirs), found, strict=True):
            errors.append(relative_error(logits, truth))
        first, second = truth.topk(2).values.unbind(-1)
        clear = first - second > 2 * (found[1] - truth).abs().max()
        assert clear.any() and torch.equal(found[0].argmax(-1)[clear], truth.argmax(-1)[clear])
    assert len(graphs) == 1
    assert median(ours) <= median(theirs)


@torch.no_grad()
def test_equal_layers_that_are_compiled_by_themselves_share_a_graph(another, dense_twin, graphs):
    model = another(0, torch.float32, layers=9)
    truth = dense_twin(model, torch.float64)(tokens(7)).logits
    for layer in model.model.layers:
        layer.compile(backend="fp4pass", fullgraph=True, options={"require_match": True})
    assert relative_error(model(tokens(7), use_cache=False).logits, truth) < 1e-5
    kinds = {(type(layer.mixer), *map(type, layer.mixer.children())) for layer in model.model.layers}
    assert len(graphs) == len(kinds) < 5


# --- Text.


def compile_config(**settings):
    config = CompileConfig(backend="fp4pass", fullgraph=True, **settings)
    config._compile_all_devices = True  # without it generate compiles on GPUs alone
    return config


def assert_same_text(model, dense, ids, **settings):
    assert torch.equal(model.generate(ids, **GREEDY, **settings), dense.generate(ids, **GREEDY))


def test_generate_with_a_static_cache_gives_the_dense_models_tokens(nano_model, dense_twin, generated):
    model = nano_model(dtype=torch.float32)
    assert_same_text(
        model, dense_twin(model), tokens(7), cache_implementation="static", compile_config=compile_config()
    )
    assert_whole(fp4pass.last_report())


def test_generate_in_chunks_compiles_prefill_too_and_takes_options(nano_model, dense_twin, graphs):
    model = nano_model(dtype=torch.float32)
    config = compile_config(mode=None, options={"require_match": True, "mode": "max-autotune"})
    settings = {"cache_implementation": "static", "compile_config": config, "prefill_chunk_size": 4}
    assert_same_text(model, dense_twin(model), tokens(8), **settings)
    assert_whole(fp4pass.last_report(), graphs)
    assert {rows(graph) for graph in graphs} == {2 * 4, 2 * 1}


def rows(graph):
    """How many tokens the first linear layer of ours has."""
    linear = graph.find_nodes(op="call_function", target=torch.ops.fp4pass.linear.default)[0]
    return linear.args[0].meta["val"].shape[0]


def test_a_compiled_model_generates_with_a_growing_cache(nano_model, dense_twin, graphs):
    model = nano_model(dtype=torch.float32)
    dense = dense_twin(model)
    model.compile(backend="fp4pass", fullgraph=True)
    assert_same_text(model, dense, tokens(7))
    assert_whole(fp4pass.last_report(), graphs)
    assert len(graphs) == 3  # the prompt, a step, and a step at any position


def test_with_dynamic_sizes_one_graph_takes_prompts_of_every_length(nano_model, dense_twin, graphs):
    model = nano_model(dtype=torch.float32)
    exact = dense_twin(model, torch.float64)
    for each in (model, exact):
        each.model.layers = each.model.layers[1:]  # a mamba layer of unknown length takes torch half a minute
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (7, 5, 12):
            assert relative_error(compiled(tokens(length)).logits, exact(tokens(length)).logits) < 1e-5
    assert_whole(fp4pass.last_report(), graphs, {"fp4pass.linear": 4, "fp4pass.experts": 2})
    assert len(graphs) == 1


# --- Weights that change.


@torch.no_grad()
def test_new_values_and_other_layouts_under_a_compiled_model(another, dense_twin, graphs):
    in_units = {"hidden": 128, "intermediate": 64, "shared": 192, "head_dim": 32, "mamba_head_dim": 8}
    model, other = (another(seed, torch.float32, experts=12, **in_units) for seed in (0, 1))
    compiled = torch.compile(model, backend="fp4pass", fullgraph=True)
    ids = tokens(7)
    first = compiled(ids).logits
    set_layout(model, FRAGMENTS)
    assert torch.equal(compiled(ids).logits, first)
    model.load_state_dict(other.state_dict())
    second = compiled(ids).logits
    assert relative_error(second, dense_twin(other, torch.float64)(ids).logits) < 1e-5
    set_layout(model, PLAIN)
    assert torch.equal(compiled(ids).logits, second)
    assert_whole(fp4pass.last_report(), graphs)
    arguments = [{a for n in graph.nodes if "fp4pass" in str(n.target) for a in n.args} for graph in graphs]
    assert [found & set(LAYOUTS) for found in arguments] == [{PLAIN}, {FRAGMENTS}]


def set_layout(model, layout):
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.set_layout(layout)
