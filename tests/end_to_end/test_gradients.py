"""Gradients through compiled layers of the tiny model: to the activations, or a clear error."""

from __future__ import annotations

import pytest
import torch

import fp4pass
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.errors import GradientError

from ..graphs.running import relative_error
from .models import assert_whole, tokens


def embedded(model):
    return model.get_input_embeddings()(tokens(7)).detach().requires_grad_()


def without_experts(model):
    """The model less its MoE layers, then one of their shared experts as a layer: linear products alone."""
    mamba, experts, attention, _ = model.model.layers
    experts.mixer = experts.mixer.shared_experts
    model.model.layers = torch.nn.ModuleList([mamba, experts, attention])
    return model


def gradient(call, inputs):
    logits = call(inputs_embeds=inputs, use_cache=False).logits
    (found,) = torch.autograd.grad(logits.square().sum(), inputs)
    return found


def test_without_experts_the_gradient_reaches_the_embeddings_and_no_weight_is_saved_dense(
    nano_model, dense_twin, graphs
):
    model = nano_model(dtype=torch.float32)
    exact = without_experts(dense_twin(model, torch.float64))
    model = without_experts(model)
    inputs, saved = embedded(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        found = gradient(torch.compile(model, backend="fp4pass", fullgraph=True), inputs)
    assert relative_error(found, gradient(exact, inputs.detach().double().requires_grad_())) < 1e-5
    assert_whole(fp4pass.last_report(), ops={"fp4pass.linear": 4, "fp4pass.linear_backward": 4})
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    dense = {frozenset((p.out_features, p.in_features)) for p in packed}
    assert len(packed) == 4 and any(tensor.dtype == torch.uint8 for tensor in saved)
    assert not [t.shape for t in saved if t.is_floating_point() and t.dim() == 2 and frozenset(t.shape) in dense]


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_say_that_they_have_no_backward(dtype, experts, nano_model, graphs):
    model = nano_model(dtype=dtype, experts_implementation=experts)
    layer = model.model.layers[1]
    with pytest.raises(Exception, match=r"experts have no backward|gradients flow") as caught:
        torch.compile(layer, backend="fp4pass", fullgraph=True)(embedded(model))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, GradientError) and "torch.no_grad()" in error.do
