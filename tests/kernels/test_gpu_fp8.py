"""``fp8_linear`` on a GPU: ``python -m pytest tests/kernels -m gpu``."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import fp8

from .operands import NAN_BYTES, activations, assert_within, e4m3, relative_error
from .test_fp8 import TOLERANCE, fp8_weight, product

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Ragged in every direction, Nano's projections, and a weight too narrow for FP8 products.
SHAPES = [(40, 72), (48, 80), (10304, 2688), (2688, 4096)]
ROWS = [0, 1, 2, 7, 16, 17, 31, 33, 64, 65, 129, 257]


def on_gpu(n, k):
    codes, scale = fp8_weight(n, k)
    return codes.cuda(), scale.cuda()


def exact(x, codes, scale, input_scale=None, bias=None):
    return fp8.reference(x.double(), codes, scale, input_scale, bias, accumulate=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_finite_byte_comes_out_of_the_product(dtype):
    codes = torch.tensor([0 if byte in NAN_BYTES else byte for byte in range(256)], dtype=torch.uint8, device="cuda")
    values = torch.tensor([e4m3(int(byte)) for byte in codes], dtype=torch.float64)
    weight = torch.diag(codes)
    result = product(torch.eye(256, dtype=dtype, device="cuda"), weight, torch.ones((), device="cuda"), None, None)
    assert torch.equal(result.diagonal().double().cpu(), values) and int(result.count_nonzero()) <= 256


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_activations_as_they_are_meet_the_oracle(n, k, dtype):
    codes, scale = on_gpu(n, k)
    bias = activations(n, dtype=dtype, device="cuda", seed=5)
    for rows in ROWS:
        x = activations(rows, k, dtype=dtype, device="cuda", seed=rows)
        assert_within(product(x, codes, scale, None, bias), exact(x, codes, scale, bias=bias), TOLERANCE[dtype], rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_columns_may_follow_each_other_in_memory(dtype):
    codes, scale = on_gpu(1856, 2688)
    for rows in (1, 33, 200):
        x = activations(rows, 1856, dtype=dtype, device="cuda")
        assert_within(product(x, codes.t(), scale, None, None), exact(x, codes.t(), scale), TOLERANCE[dtype], rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rounded_activations_meet_the_oracle(n, k, dtype):
    codes, scale = on_gpu(n, k)
    input_scale = torch.tensor([0.013], device="cuda")
    bias = activations(n, dtype=dtype, device="cuda", seed=5)
    # FP8 tensor cores of Hopper sum in fewer than 23 bits.
    tolerance = max(TOLERANCE[dtype], 1e-3)
    for rows in ROWS:
        x = activations(rows, k, dtype=dtype, device="cuda", seed=rows)
        wanted = exact(x.float(), codes, scale, input_scale, bias)
        assert_within(product(x, codes, scale, input_scale, bias), wanted, tolerance, rows)


@pytest.mark.parametrize("rounded", [False, True], ids=["w8a16", "w8a8"])
def test_a_cuda_graph_replays_the_product(rounded):
    codes, scale = on_gpu(2688, 4096)
    input_scale = torch.tensor(0.013, device="cuda") if rounded else None
    x = activations(3, 4096, dtype=torch.bfloat16, device="cuda")
    product(x, codes, scale, input_scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = product(x, codes, scale, input_scale, None)
    for seed in (11, 12):
        x.copy_(activations(3, 4096, dtype=torch.bfloat16, device="cuda", seed=seed))
        graph.replay()
        assert relative_error(result, exact(x.float(), codes, scale, input_scale)) < 0.003


def test_the_gradient_meets_the_oracle():
    codes, scale = on_gpu(1856, 2688)
    x = activations(5, 2688, dtype=torch.bfloat16, device="cuda").requires_grad_()
    grad = activations(5, 1856, dtype=torch.bfloat16, device="cuda", seed=3)
    product(x, codes, scale, None, None).backward(grad)
    assert_within(x.grad, exact(grad, codes.t(), scale), TOLERANCE[torch.bfloat16])
