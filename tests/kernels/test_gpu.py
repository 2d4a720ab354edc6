"""The kernels on a GPU: `python -m pytest tests/kernels -m gpu`."""

from __future__ import annotations

import pytest
import torch

from fp4pass.errors import ArgumentError
from fp4pass.lowering import layout, ops, reference

from .operands import activations, assert_within, every_product, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

fp4pass = torch.ops.fp4pass
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DENSE = {torch.bfloat16: 0.0018, torch.float16: 0.00025, torch.float32: 2e-6}
MOE = {torch.bfloat16: 0.0025, torch.float16: 0.0004, torch.float32: 4e-6}
ROWS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
# One tile of each kind, then more rows than the widest one has.
ROWS_OF_EACH_TILE = (16, 32, 64, 128, 256)
ORDER = layout.INTERLEAVED


def exact_linear(x, codes, scale, global_scale, bias=None, order=ORDER):
    """The oracle, unrounded."""
    dense = reference.dequantize(codes, scale, global_scale, torch.float64, order)
    exact = x.double() @ dense.mT
    return exact if bias is None else exact + bias.double()


def routed(tokens, choices, experts, seed=0):
    """Distinct experts for each token, and routing weights."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device="cuda")
    weights, ids = scores.topk(choices, -1)
    return ids, weights


def block(experts, hidden, inner, order=ORDER):
    up = weight(experts, inner, hidden, seed=2, order=order, device="cuda")
    return up, weight(experts, hidden, inner, seed=3, order=order, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_come_out_of_linear_and_its_backward(order, dtype):
    codes, scale, expected = (t.cuda() for t in every_product())
    stored = layout.from_plain(codes, order)
    for rows in ROWS_OF_EACH_TILE:
        eye = torch.eye(256, dtype=dtype, device="cuda")
        for first in range(0, 256, rows):
            result = fp4pass.linear(eye[first : first + rows], stored, scale, None, None, order)
            assert torch.equal(result.double(), expected.mT[first : first + rows])
    assert torch.equal(fp4pass.linear_backward(eye, stored, scale, None, order).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_come_out_of_expert_products(order, dtype):
    codes, scale, expected = (t.cuda() for t in every_product())
    stored = torch.stack([torch.zeros_like(codes)] + 15 * [layout.from_plain(codes, order)])
    scales = scale.expand(16, -1, -1).contiguous()
    eye = torch.eye(256, dtype=dtype, device="cuda")
    for rows in (16, 256):
        ids = torch.ones(rows, dtype=torch.int32, device="cuda")
        for first in range(0, 256, rows):
            result = fp4pass.gathered_linear(eye[first : first + rows], stored, scales, None, ids, order)
            assert torch.equal(result.double(), expected.mT[first : first + rows])


@pytest.mark.parametrize("rows", ROWS_OF_EACH_TILE)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_plain_decoder_gives_the_assembly_s_bits(dtype, rows):
    kernels = ops._kernels("linear")
    operands = weight(208, 336, order=ORDER, device="cuda")
    # The two forms sum in different orders. With these x every sum of the weights' few bits is exact, in any order.
    x = activations(rows, 336, device="cuda").sign().to(dtype)
    by_assembly = kernels.linear(x, *operands, None, ORDER)
    assert torch.equal(kernels.linear(x, *operands, None, ORDER, asm=False), by_assembly)


@pytest.mark.parametrize(("n", "k"), [(48, 80), (80, 208), (208, 48), (10304, 2688)])
def test_linear_meets_the_oracle_at_every_number_of_rows(n, k):
    operands = weight(n, k, order=ORDER, device="cuda")
    bias = activations(n, dtype=torch.bfloat16, seed=9, device="cuda")
    for rows in ROWS:
        x = activations(rows, k, dtype=torch.bfloat16, seed=rows, device="cuda")
        result = fp4pass.linear(x, *operands, bias, ORDER)
        assert_within(result, exact_linear(x, *operands, bias), DENSE[torch.bfloat16], rows)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize("order", (layout.PLAIN, layout.INTERLEAVED))
def test_linear_meets_the_oracle_in_the_other_dtypes(order, dtype):
    operands = weight(1040, 1072, order=order, device="cuda")
    for rows in (1, 16, 17, 33, 64, 65, 129):
        x = activations(rows, 1072, dtype=dtype, seed=rows, device="cuda")
        result = fp4pass.linear(x, *operands, None, order)
        assert_within(result, exact_linear(x, *operands, order=order), DENSE[dtype], rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_meets_the_oracle(dtype):
    operands = weight(1040, 1072, order=ORDER, device="cuda")
    dense = reference.dequantize(*operands, torch.float64, ORDER)
    for rows in (0, 1, 65, 257):
        grad = activations(rows, 1040, dtype=dtype, device="cuda")
        result = fp4pass.linear_backward(grad, *operands, ORDER)
        assert_within(result, grad.double() @ dense, DENSE[dtype], rows)


def test_gradients_reach_x_through_autograd():
    operands = weight(208, 336, order=ORDER, device="cuda")
    x = activations(2, 5, 336, dtype=torch.bfloat16, device="cuda").requires_grad_()
    grad = activations(2, 5, 208, dtype=torch.bfloat16, seed=4, device="cuda")
    fp4pass.linear(x, *operands, None, ORDER).backward(grad)
    dense = reference.dequantize(*operands, torch.float64, ORDER)
    assert_within(x.grad, grad.double() @ dense, DENSE[torch.bfloat16])


def test_strides_and_ranks_of_x():
    operands = weight(208, 336, order=ORDER, device="cuda")
    for rows in (6, 70):
        x = activations(336, rows, dtype=torch.bfloat16, device="cuda").mT
        contiguous = fp4pass.linear(x.contiguous(), *operands, None, ORDER)
        assert_within(fp4pass.linear(x, *operands, None, ORDER), exact_linear(x, *operands), DENSE[torch.bfloat16])
        folded = fp4pass.linear(x.reshape(2, -1, 336), *operands, None, ORDER)
        assert torch.equal(folded.reshape(rows, 208), contiguous)
        padded = activations(rows, 352, dtype=torch.bfloat16, device="cuda")[:, 5:341]
        result = fp4pass.linear(padded, *operands, None, ORDER)
        assert_within(result, exact_linear(padded, *operands), DENSE[torch.bfloat16])
    vector = activations(336, dtype=torch.bfloat16, device="cuda")
    assert_within(
        fp4pass.linear(vector, *operands, None, ORDER), exact_linear(vector, *operands), DENSE[torch.bfloat16]
    )


def test_rows_beyond_two_to_the_31_words():
    n, k, last = (1 << 21) + 32, 8192, 32
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.full((n, k // 16), 0x38, dtype=torch.uint8, device="cuda")
    x = activations(2, k, dtype=torch.bfloat16, device="cuda")
    result = fp4pass.linear(x, codes, scale, None, None, ORDER)
    assert codes.numel() // 4 > 2**31
    exact = exact_linear(x, codes[-last:], scale[-last:], None)
    assert_within(result[:, -last:], exact, DENSE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_meet_the_oracle_from_one_token_to_many(dtype):
    up, down = block(128, 208, 112)
    for tokens in (0, 1, 2, 8, 10, 11, 33, 300, 3000):
        ids, weights = routed(tokens, 6, 128)
        x = activations(tokens, 208, dtype=dtype, device="cuda")
        result = fp4pass.experts(x, ids, weights.to(dtype), *up, *down, "relu2", ORDER)
        exact = reference.experts(x.double(), ids, weights.to(dtype), *up, *down, "relu2", ORDER, torch.float64)
        assert_within(result, exact, MOE[dtype], tokens)


def test_experts_of_nano_s_widths_meet_the_oracle():
    up, down = block(128, 2688, 1856)
    for tokens in (1, 5, 64, 1024, 4096):
        ids, weights = routed(tokens, 6, 128, seed=tokens)
        x = activations(tokens, 2688, dtype=torch.bfloat16, device="cuda") * 0.1
        result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER)
        exact = reference.experts(x.double(), ids, weights, *up, *down, "relu2", ORDER, torch.float64)
        assert_within(result, exact, MOE[torch.bfloat16], tokens)


@pytest.mark.parametrize("tokens", (3, 100))
def test_sentinels_and_empty_experts(tokens):
    up, down = block(16, 208, 112)
    ids, weights = routed(tokens, 4, 5)
    ids[ids == 2] = 16
    ids[ids == 3] = -1
    weights[(ids < 0) | (ids > 15)] = torch.nan
    ids[0] = 99
    x = activations(tokens, 208, dtype=torch.bfloat16, device="cuda")
    result = fp4pass.experts(x, ids.int(), weights, *up, *down, "relu2", ORDER)
    exact = reference.experts(x.double(), ids, weights, *up, *down, "relu2", ORDER, torch.float64)
    assert_within(result, exact, MOE[torch.bfloat16])
    assert not result[0].any()
    everything_elsewhere = fp4pass.experts(x, torch.full_like(ids, 16), weights, *up, *down, "relu2", ORDER)
    assert not everything_elsewhere.any()


@pytest.mark.parametrize("rows", (0, 5, 150, 2000))
def test_gathered_and_grouped_meet_the_oracle(rows):
    operands = weight(16, 208, 336, order=ORDER, device="cuda")
    x = activations(rows, 336, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(-1, 17, (rows,), device="cuda")
    exact = reference.gathered_linear(x.double(), *operands, ids, ORDER, torch.float64)
    assert_within(fp4pass.gathered_linear(x, *operands, ids, ORDER), exact, DENSE[torch.bfloat16])
    ends = torch.randint(0, max(rows, 1), (16,), device="cuda").sort().values.int()
    result = fp4pass.grouped_linear(x, *operands, ends, ORDER)
    exact = reference.grouped_linear(x.double(), *operands, ends, ORDER, torch.float64)
    assert_within(result, exact, DENSE[torch.bfloat16])
    assert not result[ends[-1] :].any()


def captured(call):
    """A CUDA graph of ``call()`` and its output, after warming up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("rows", (3, 40, 300))
def test_linear_replays_in_a_cuda_graph_with_changed_data(rows):
    operands = weight(208, 2688, order=ORDER, device="cuda")
    x = activations(rows, 2688, dtype=torch.bfloat16, device="cuda")
    graph, result = captured(lambda: fp4pass.linear(x, *operands, None, ORDER))
    for seed in (11, 12):
        x.copy_(activations(rows, 2688, dtype=torch.bfloat16, seed=seed, device="cuda"))
        graph.replay()
        assert torch.equal(result, fp4pass.linear(x, *operands, None, ORDER))


@pytest.mark.parametrize("tokens", (4, 200))
def test_experts_replay_in_a_cuda_graph_with_changed_routing(tokens):
    up, down = block(32, 208, 112)
    x = activations(tokens, 208, dtype=torch.bfloat16, device="cuda")
    ids, weights = routed(tokens, 6, 32)
    graph, result = captured(lambda: fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER))
    for seed in (11, 12):
        changed_ids, changed_weights = routed(tokens, 6, 32, seed=seed)
        ids.copy_(changed_ids)
        weights.copy_(changed_weights)
        x.copy_(activations(tokens, 208, dtype=torch.bfloat16, seed=seed, device="cuda"))
        graph.replay()
        assert torch.equal(result, fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER))


def test_results_repeat_bit_for_bit_and_no_call_waits_for_the_gpu():
    up, down = block(32, 208, 112)
    operands = weight(208, 2688, order=ORDER, device="cuda")
    x, wide = (activations(100, k, dtype=torch.bfloat16, device="cuda") for k in (208, 2688))
    ids, weights = routed(100, 6, 32)

    def run():
        return (
            fp4pass.linear(wide[:3], *operands, None, ORDER),
            fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER),
            fp4pass.gathered_linear(x, *up, ids[:, 0], ORDER),
        )

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_compiled_graph_calls_the_op_with_symbolic_rows():
    operands = weight(208, 336, order=ORDER, device="cuda")
    compiled = torch.compile(lambda x: fp4pass.linear(x, *operands, None, ORDER).relu(), fullgraph=True, dynamic=True)
    for rows in (3, 20, 129):
        x = activations(rows, 336, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), fp4pass.linear(x, *operands, None, ORDER).relu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ops_run_where_their_operands_are_whichever_device_is_current():
    up, down = block(16, 208, 336)
    dense = weight(208, 336, order=ORDER, device="cuda")

    def results(device):
        """Every op, at the numbers of rows that its launches tell apart."""
        first, second, single = ([t.to(device) for t in operands] for operands in (up, down, dense))
        for rows in (3, 40, 300):
            ids, weights = (t.to(device) for t in routed(rows, 4, 16))
            wide = activations(rows, 336, dtype=torch.bfloat16, device="cuda").to(device)
            x = activations(rows, 208, dtype=torch.bfloat16, device="cuda").to(device)
            ends = torch.arange(16, dtype=torch.int32, device=device) * rows // 15
            yield fp4pass.linear(wide, *single, None, ORDER)
            yield fp4pass.linear_backward(x, *single, ORDER)
            yield fp4pass.gathered_linear(x, *first, ids[:, 0], ORDER)
            yield fp4pass.grouped_linear(x, *first, ends, ORDER)
            yield fp4pass.experts(x, ids, weights, *first, *second, "relu2", ORDER)

    assert torch.cuda.current_device() == 0
    here, there = list(results("cuda:0")), list(results("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in there} == {1}
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(here, there, strict=True))
    with pytest.raises(ArgumentError, match="device"):
        fp4pass.linear(activations(3, 336, dtype=torch.bfloat16, device="cuda:1"), *dense, None, ORDER)
