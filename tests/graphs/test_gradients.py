"""With gradients enabled: a backward to the activations, no dequantized weight saved, or a clear error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fp4pass._torch import DataDependentError
from fp4pass.errors import GradientError

from . import decodes
from .running import activations, called, compiling, relative_error
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, K, N, Packed

PLAIN = LINEARS["table_of_16"]
ENDS = torch.tensor([1, 1, 3], dtype=torch.int32)


def gradients(call, x, grad, *parameters):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(call(x), (x, *parameters), grad)


@pytest.mark.parametrize("name", ["table_of_16", "our_modules_interleaved", "weight_on_the_left", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_activation(name, dtype):
    module = Packed(LINEARS[name])
    n, k = module.exact.shape
    x, grad = activations(5, k, dtype=dtype), activations(5, n, dtype=dtype, seed=2)
    run = compiling(module, {"check": True})
    (found,) = gradients(run, x, grad)
    (plain,) = gradients(module, x, grad)
    exact = grad.double() @ module.exact
    assert found.dtype == dtype
    assert relative_error(found, exact) <= max(relative_error(plain, exact), 1e-6)
    assert sorted(entry.op for entry in run.report.rewritten) == ["fp4pass.linear", "fp4pass.linear_backward"]


def test_a_bias_and_the_layers_around_it_are_trained():
    module = nn.Sequential(nn.Linear(16, K), Packed(PLAIN, bias=True), nn.ReLU(), nn.Linear(N, 4))
    trained = [p for p in module.parameters() if p.requires_grad]
    x, grad = activations(3, 2, 16), activations(3, 2, 4, seed=2)
    run = compiling(module, {"check": True})
    found, plain = gradients(run, x, grad, *trained), gradients(module, x, grad, *trained)
    assert len(found) == 6
    for ours, theirs in zip(found, plain, strict=True):
        assert relative_error(ours, theirs.double()) < 1e-5


def test_what_is_saved_for_the_backward_is_packed():
    module, x = Packed(PLAIN), activations(3, K).requires_grad_()
    run = compiling(module)
    result = run(x)
    saved = result.grad_fn.saved_tensors
    assert saved and not any(t.is_floating_point() and t.numel() >= N * K for t in saved)
    backward_ops = called(run.graphs[0])
    result.sum().backward()
    assert "fp4pass.linear.default" in backward_ops and "aten.index.Tensor" not in backward_ops
    assert "fp4pass.linear_backward.default" in called(run.graphs[1])


def test_without_gradients_to_the_activation_there_is_no_backward():
    run = compiling(Packed(PLAIN))
    result = run(activations(3, K))
    assert not result.requires_grad and [entry.op for entry in run.report.rewritten] == ["fp4pass.linear"]


def assert_no_gradients(spelling, *inputs, dtype=torch.float32):
    with pytest.raises(Exception, match="gradient") as caught:
        compiling(Packed(spelling))(activations(3, K, dtype=dtype).requires_grad_(), *inputs)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, GradientError) and "no_grad" in error.do


def test_a_weight_that_is_no_nvfp4_is_left_to_its_owner():
    module = Packed(replace(PLAIN, decode=lambda m, dtype: 2 * decodes.table_of_16(m, dtype)))
    run, x = compiling(module), activations(3, K).requires_grad_()
    run(x).sum().backward()
    assert run.report.refused and not run.report.rewritten
    (wanted,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("name", ["gathered_after_decode", "gathered_on_the_right", "gathered_before_decode"])
def test_gathered_experts_have_no_backward(name):
    assert_no_gradients(PRODUCTS_OF_EXPERTS[name], torch.tensor([0, 2, 2]))


def test_grouped_experts_have_no_backward():
    assert_no_gradients(PRODUCTS_OF_EXPERTS["grouped"], ENDS, dtype=torch.bfloat16)


def test_grouped_experts_of_transformers_have_no_backward():
    assert_no_gradients(PRODUCTS_OF_EXPERTS["grouped_by_transformers"], ENDS)


@torch.library.custom_op("fp4pass_tests::first_rows", mutates_args=())
def first_rows(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """x, its rows from ``count`` on set to zero."""
    return torch.where(torch.arange(x.shape[0])[:, None] < count, x, 0)


def first_rows_backward(ctx, grad):
    return (grad if ctx.count.item() == 1 else 2 * grad), None


first_rows.register_fake(lambda x, count: torch.empty_like(x))
first_rows.register_autograd(
    first_rows_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "count", inputs[1])
)


def test_another_backward_that_cannot_be_traced_keeps_its_own_error():
    linear, count = Packed(PLAIN), torch.tensor(1)
    run = compiling(lambda x: first_rows(linear(x), count))
    with pytest.raises(Exception, match="data-dependent") as caught:
        run(activations(3, K).requires_grad_())
    assert isinstance(caught.value.inner_exception, DataDependentError)
