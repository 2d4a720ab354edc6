"""``explain`` without weights says what a compile will do, for GPUs that are here and for those that are not."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import fp4pass
from fp4pass.checkpoint.load import skeleton
from fp4pass.checkpoint.modules import NVFP4Linear
from fp4pass.match.reasons import Reason

from ..checkpoints.files import same_bytes
from ..graphs.running import activations, relative_error
from .models import assert_whole, tokens


@pytest.fixture
def bare(nano_dir):
    """The tiny model on the meta device."""
    return skeleton(nano_dir)


def on_meta(*shape, dtype=torch.long):
    return torch.zeros(shape, dtype=dtype, device="meta")


def explained(model, ids, sm=None, **settings):
    return fp4pass.explain(model, ids, options=sm and {"target_sm": sm}, **settings)


@pytest.mark.parametrize("sm, experts", [(90, "grouped_mm"), (80, "batched_mm")])
def test_a_skeleton_is_told_what_the_model_gets(sm, experts, bare, nano_model, graphs):
    bare.config._experts_implementation = experts
    told = explained(bare, on_meta(2, 7), sm, use_cache=False)
    model = nano_model(dtype=torch.bfloat16, experts_implementation=experts)
    with torch.no_grad():
        torch.compile(model, backend="fp4pass", options={"target_sm": sm})(tokens(7), use_cache=False)
    assert_whole(told, graphs)
    assert told == fp4pass.last_report()
    assert {entry.lowering for entry in told.rewritten} == {f"Triton, sm_{sm}"}


def test_a_step_with_a_static_cache_is_told_too(bare):
    cache = StaticCache(config=bare.config, max_cache_len=16)
    assert_whole(explained(bare, on_meta(1, 2), past_key_values=cache))
    assert_whole(explained(bare, on_meta(1, 1), past_key_values=cache))


def test_one_token_of_each_of_two_texts_is_told_too(nano_model):
    assert_whole(explained(nano_model(dtype=torch.float32), tokens(1)))


def test_explaining_changes_nothing(nano_model):
    model = nano_model(dtype=torch.float32)
    ids = tokens(7)
    with torch.no_grad():
        before = model(ids).logits
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        last = fp4pass.last_report()
        assert_whole(explained(model, ids))
        assert fp4pass.last_report() is last
        assert torch.equal(model(ids).logits, before)
    for name, tensor in model.state_dict().items():
        assert same_bytes(tensor, state[name])


@pytest.mark.parametrize("sm, reason", [(75, Reason.TOO_OLD), (100, Reason.NATIVE_FP4), (120, Reason.NATIVE_FP4)])
@pytest.mark.filterwarnings("ignore::fp4pass.backend.Fp4passWarning")
def test_a_gpu_that_is_not_served_is_told_why_and_keeps_the_graph(sm, reason, nano_dir, nano_model, graphs):
    bare = skeleton(nano_dir, dtype=torch.float32).model.layers[1]
    told = explained(bare, on_meta(2, 7, 80, dtype=torch.float32), sm)
    layer, x = nano_model(dtype=torch.float32).model.layers[1], activations(2, 7, 80)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="fp4pass", options={"target_sm": sm})(x)
        assert relative_error(compiled, layer(x).double()) < 1e-5
    assert told == fp4pass.last_report()
    assert not told.rewritten and len(told.refused) == 4
    assert {entry.reason for entry in told.refused} == {f"{reason.sentence} (sm_{sm})"}
    assert {entry.remedy for entry in told.refused} == {reason.remedy}
    (graph,) = graphs
    assert not any("fp4pass" in str(node.target) for node in graph.nodes)


@torch.no_grad()
def test_explaining_does_not_use_up_the_compiles_of_a_function():
    def product(x, layer):
        return layer(x)

    layers = [NVFP4Linear(32, 16, device="cpu") for _ in range(12)]
    x = torch.randn(2, 32)
    assert all(len(fp4pass.explain(product, x, layer).rewritten) == 1 for layer in layers)
    torch.compile(product, backend="eager", fullgraph=True)(x, layers[0])  # raises beyond dynamo's limit of compiles


def test_with_any_number_of_tokens_blocks_are_found_whole(bare):
    assert_whole(explained(bare, on_meta(1, 20), 90, use_cache=False, dynamic=True))
