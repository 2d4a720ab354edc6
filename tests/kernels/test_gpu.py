"""The kernels on a GPU: `python -m pytest tests/kernels -m gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fp4pass.errors import ArgumentError
from fp4pass.lowering import layout, ops, reference

from .operands import activations, assert_within, every_product, stored, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

fp4pass = torch.ops.fp4pass
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DENSE = {torch.bfloat16: 0.0018, torch.float16: 0.00025, torch.float32: 2e-6}
MOE = {torch.bfloat16: 0.0025, torch.float16: 0.0004, torch.float32: 4e-6}
ROWS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
# One tile of each kind, then more rows than the widest one has.
ROWS_OF_EACH_TILE = (16, 32, 64, 128, 256)


def order_of(*shapes):
    """The layout that a module with weights of these shapes has on a GPU."""
    return layout.layout_for(torch.device("cuda"), shapes)


# Whole units have kernels of their own; other shapes have the general ones.
EACH_WIDTH = pytest.mark.parametrize("k", (320, 336), ids=("fragments", "interleaved"))
EACH_BLOCK = pytest.mark.parametrize(("hidden", "inner"), ((192, 128), (208, 112)), ids=("fragments", "interleaved"))


def exact_linear(x, codes, scale, global_scale, bias=None, *, order):
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


def dense(n, k):
    """A weight, and the layout that it is in."""
    order = order_of((n, k))
    return weight(n, k, order=order, device="cuda"), order


def block(experts, hidden, inner):
    """The weights of a block of experts, and the layout that they are in."""
    order = order_of((inner, hidden), (hidden, inner))
    up = weight(experts, inner, hidden, seed=2, order=order, device="cuda")
    return up, weight(experts, hidden, inner, seed=3, order=order, device="cuda"), order


def test_both_layouts_of_a_gpu_are_tested():
    assert [order_of((208, k)) for k in (320, 336)] == [layout.FRAGMENTS, layout.INTERLEAVED]
    assert [block(1, *sizes)[-1] for sizes in ((192, 128), (208, 112))] == [layout.FRAGMENTS, layout.INTERLEAVED]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_come_out_of_linear_and_its_backward(order, dtype):
    codes, scale, expected = (t.cuda() for t in every_product())
    operands = *stored(codes, scale, order), None
    for rows in ROWS_OF_EACH_TILE:
        eye = torch.eye(256, dtype=dtype, device="cuda")
        for first in range(0, 256, rows):
            result = fp4pass.linear(eye[first : first + rows], *operands, None, order)
            assert torch.equal(result.double(), expected.mT[first : first + rows])
    assert torch.equal(fp4pass.linear_backward(eye, *operands, order).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_come_out_of_expert_products(order, dtype):
    codes, scale, expected = (t.cuda() for t in every_product())
    codes, scale = stored(codes, scale, order)
    codes = torch.stack([torch.zeros_like(codes)] + 15 * [codes])
    operands = codes, scale.expand(16, -1, -1).contiguous(), None
    eye = torch.eye(256, dtype=dtype, device="cuda")
    for rows in (16, 256):
        ids = torch.ones(rows, dtype=torch.int32, device="cuda")
        for first in range(0, 256, rows):
            result = fp4pass.gathered_linear(eye[first : first + rows], *operands, ids, order)
            assert torch.equal(result.double(), expected.mT[first : first + rows])


@pytest.mark.parametrize("rows", ROWS_OF_EACH_TILE)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@EACH_WIDTH
def test_the_plain_decoder_gives_the_assembly_s_bits(k, dtype, rows):
    kernels = ops.kernels("linear")
    operands, order = dense(208, k)
    # The two forms sum in different orders. With these x every sum of the weights' few bits is exact, in any order.
    x = activations(rows, k, device="cuda").sign().to(dtype)
    by_assembly = kernels.linear(x, *operands, None, order)
    assert torch.equal(kernels.linear(x, *operands, None, order, asm=False), by_assembly)


@pytest.mark.parametrize(("n", "k"), [(48, 80), (80, 208), (208, 48), (16, 64), (48, 192), (208, 320), (10304, 2688)])
def test_linear_meets_the_oracle_at_every_number_of_rows(n, k):
    operands, order = dense(n, k)
    bias = activations(n, dtype=torch.bfloat16, seed=9, device="cuda")
    for rows in ROWS:
        x = activations(rows, k, dtype=torch.bfloat16, seed=rows, device="cuda")
        result = fp4pass.linear(x, *operands, bias, order)
        assert_within(result, exact_linear(x, *operands, bias, order=order), DENSE[torch.bfloat16], rows)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize(("k", "order"), [(1072, layout.PLAIN), (1072, layout.INTERLEAVED), (1088, layout.FRAGMENTS)])
def test_linear_meets_the_oracle_in_the_other_dtypes(k, order, dtype):
    operands = weight(1040, k, order=order, device="cuda")
    for rows in (1, 16, 17, 33, 64, 65, 129):
        x = activations(rows, k, dtype=dtype, seed=rows, device="cuda")
        result = fp4pass.linear(x, *operands, None, order)
        assert_within(result, exact_linear(x, *operands, order=order), DENSE[dtype], rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1088, 1072), ids=("fragments", "interleaved"))
def test_backward_meets_the_oracle(k, dtype):
    operands, order = dense(1040, k)
    exact = reference.dequantize(*operands, torch.float64, order)
    for rows in (0, 1, 65, 257):
        grad = activations(rows, 1040, dtype=dtype, device="cuda")
        result = fp4pass.linear_backward(grad, *operands, order)
        assert_within(result, grad.double() @ exact, DENSE[dtype], rows)


@EACH_WIDTH
def test_gradients_reach_x_through_autograd(k):
    operands, order = dense(208, k)
    x = activations(2, 5, k, dtype=torch.bfloat16, device="cuda").requires_grad_()
    grad = activations(2, 5, 208, dtype=torch.bfloat16, seed=4, device="cuda")
    fp4pass.linear(x, *operands, None, order).backward(grad)
    exact = reference.dequantize(*operands, torch.float64, order)
    assert_within(x.grad, grad.double() @ exact, DENSE[torch.bfloat16])


@EACH_WIDTH
def test_strides_and_ranks_of_x(k):
    operands, order = dense(208, k)
    for rows in (6, 70):
        x = activations(k, rows, dtype=torch.bfloat16, device="cuda").mT
        contiguous = fp4pass.linear(x.contiguous(), *operands, None, order)
        result = fp4pass.linear(x, *operands, None, order)
        assert_within(result, exact_linear(x, *operands, order=order), DENSE[torch.bfloat16])
        folded = fp4pass.linear(x.reshape(2, -1, k), *operands, None, order)
        assert torch.equal(folded.reshape(rows, 208), contiguous)
        padded = activations(rows, k + 16, dtype=torch.bfloat16, device="cuda")[:, 5 : k + 5]
        result = fp4pass.linear(padded, *operands, None, order)
        assert_within(result, exact_linear(padded, *operands, order=order), DENSE[torch.bfloat16])
    vector = activations(k, dtype=torch.bfloat16, device="cuda")
    result = fp4pass.linear(vector, *operands, None, order)
    assert_within(result, exact_linear(vector, *operands, order=order), DENSE[torch.bfloat16])


@pytest.mark.parametrize("order", (layout.FRAGMENTS, layout.INTERLEAVED))
@pytest.mark.parametrize("rows", (2, 130))
def test_rows_beyond_two_to_the_31_words(rows, order):
    n, k, last = (1 << 21) + 32, 8192, 32
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    # One scale for all blocks has the same bytes in every layout.
    scale = torch.full((n, k // 16), 0x38, dtype=torch.uint8, device="cuda")
    x = activations(rows, k, dtype=torch.bfloat16, device="cuda")
    result = fp4pass.linear(x, codes, scale, None, None, order)
    assert codes.numel() // 4 > 2**31
    # The last rows, whole units of them, are a weight by themselves.
    exact = exact_linear(x, codes[-last:], scale[-last:], None, order=order)
    assert_within(result[:, -last:], exact, DENSE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_BLOCK
def test_experts_meet_the_oracle_from_one_token_to_many(hidden, inner, dtype):
    up, down, order = block(128, hidden, inner)
    for tokens in (0, 1, 2, 8, 10, 11, 33, 300, 3000):
        ids, weights = routed(tokens, 6, 128)
        x = activations(tokens, hidden, dtype=dtype, device="cuda")
        result = fp4pass.experts(x, ids, weights.to(dtype), *up, *down, "relu2", order)
        exact = reference.experts(x.double(), ids, weights.to(dtype), *up, *down, "relu2", order, torch.float64)
        assert_within(result, exact, MOE[dtype], tokens)


def test_experts_of_nano_s_widths_meet_the_oracle():
    up, down, order = block(128, 2688, 1856)
    for tokens in (1, 5, 64, 1024, 4096):
        ids, weights = routed(tokens, 6, 128, seed=tokens)
        x = activations(tokens, 2688, dtype=torch.bfloat16, device="cuda") * 0.1
        result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", order)
        exact = reference.experts(x.double(), ids, weights, *up, *down, "relu2", order, torch.float64)
        assert_within(result, exact, MOE[torch.bfloat16], tokens)


@pytest.mark.parametrize("tokens", (3, 100))
@EACH_BLOCK
def test_sentinels_and_empty_experts(hidden, inner, tokens):
    up, down, order = block(16, hidden, inner)
    ids, weights = routed(tokens, 4, 5)
    ids[ids == 2] = 16
    ids[ids == 3] = -1
    weights[(ids < 0) | (ids > 15)] = torch.nan
    ids[0] = 99
    x = activations(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    result = fp4pass.experts(x, ids.int(), weights, *up, *down, "relu2", order)
    exact = reference.experts(x.double(), ids, weights, *up, *down, "relu2", order, torch.float64)
    assert_within(result, exact, MOE[torch.bfloat16])
    assert not result[0].any()
    everything_elsewhere = fp4pass.experts(x, torch.full_like(ids, 16), weights, *up, *down, "relu2", order)
    assert not everything_elsewhere.any()


@pytest.mark.parametrize("rows", (0, 5, 150, 2000))
@EACH_WIDTH
def test_gathered_and_grouped_meet_the_oracle(k, rows):
    order = order_of((208, k))
    operands = weight(16, 208, k, order=order, device="cuda")
    x = activations(rows, k, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(-1, 17, (rows,), device="cuda")
    exact = reference.gathered_linear(x.double(), *operands, ids, order, torch.float64)
    assert_within(fp4pass.gathered_linear(x, *operands, ids, order), exact, DENSE[torch.bfloat16])
    ends = torch.randint(0, max(rows, 1), (16,), device="cuda").sort().values.int()
    result = fp4pass.grouped_linear(x, *operands, ends, order)
    exact = reference.grouped_linear(x.double(), *operands, ends, order, torch.float64)
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
@pytest.mark.parametrize("k", (2688, 2704), ids=("fragments", "interleaved"))
def test_linear_replays_in_a_cuda_graph_with_changed_data(k, rows):
    operands, order = dense(208, k)
    x = activations(rows, k, dtype=torch.bfloat16, device="cuda")
    graph, result = captured(lambda: fp4pass.linear(x, *operands, None, order))
    for seed in (11, 12):
        x.copy_(activations(rows, k, dtype=torch.bfloat16, seed=seed, device="cuda"))
        graph.replay()
        assert torch.equal(result, fp4pass.linear(x, *operands, None, order))


@pytest.mark.parametrize("tokens", (4, 200))
@EACH_BLOCK
def test_experts_replay_in_a_cuda_graph_with_changed_routing(hidden, inner, tokens):
    up, down, order = block(32, hidden, inner)
    x = activations(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    ids, weights = routed(tokens, 6, 32)
    graph, result = captured(lambda: fp4pass.experts(x, ids, weights, *up, *down, "relu2", order))
    for seed in (11, 12):
        changed_ids, changed_weights = routed(tokens, 6, 32, seed=seed)
        ids.copy_(changed_ids)
        weights.copy_(changed_weights)
        x.copy_(activations(tokens, hidden, dtype=torch.bfloat16, seed=seed, device="cuda"))
        graph.replay()
        assert torch.equal(result, fp4pass.experts(x, ids, weights, *up, *down, "relu2", order))


@EACH_BLOCK
def test_results_repeat_bit_for_bit_and_no_call_waits_for_the_gpu(hidden, inner):
    up, down, order = block(32, hidden, inner)
    operands, order_of_wide = dense(208, 2688)
    x, wide = (activations(100, k, dtype=torch.bfloat16, device="cuda") for k in (hidden, 2688))
    ids, weights = routed(100, 6, 32)

    def run():
        return (
            fp4pass.linear(wide[:3], *operands, None, order_of_wide),
            fp4pass.linear(wide, *operands, None, order_of_wide),
            fp4pass.experts(x, ids, weights, *up, *down, "relu2", order),
            fp4pass.gathered_linear(x, *up, ids[:, 0], order),
        )

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EACH_WIDTH
def test_a_compiled_graph_calls_the_op_with_symbolic_rows(k):
    operands, order = dense(208, k)
    compiled = torch.compile(lambda x: fp4pass.linear(x, *operands, None, order).relu(), fullgraph=True, dynamic=True)
    for rows in (3, 20, 129):
        x = activations(rows, k, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), fp4pass.linear(x, *operands, None, order).relu())


@EACH_WIDTH
@pytest.mark.parametrize("rows", [3, 40, 300])
def test_a_thread_that_did_nothing_on_the_gpu_yet_runs_what_another_compiled(rows, k):
    operands, order = dense(208, k)
    x = activations(rows, k, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        expected = fp4pass.linear(x, *operands, None, order)
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(fp4pass.linear, x, *operands, None, order).result(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("hidden", "inner"), [(192, 320), (208, 336)], ids=("fragments", "interleaved"))
def test_ops_run_where_their_operands_are_whichever_device_is_current(hidden, inner):
    up, down, order = block(16, hidden, inner)
    operands, order_of_dense = dense(hidden, inner)
    assert order == order_of_dense

    def results(device):
        """Every op, at the numbers of rows that its launches tell apart."""
        first, second, single = ([t.to(device) for t in each] for each in (up, down, operands))
        for rows in (3, 40, 300):
            ids, weights = (t.to(device) for t in routed(rows, 4, 16))
            wide = activations(rows, inner, dtype=torch.bfloat16, device="cuda").to(device)
            x = activations(rows, hidden, dtype=torch.bfloat16, device="cuda").to(device)
            ends = torch.arange(16, dtype=torch.int32, device=device) * rows // 15
            yield fp4pass.linear(wide, *single, None, order)
            yield fp4pass.linear_backward(x, *single, order)
            yield fp4pass.gathered_linear(x, *first, ids[:, 0], order)
            yield fp4pass.grouped_linear(x, *first, ends, order)
            yield fp4pass.experts(x, ids, weights, *first, *second, "relu2", order)

    assert torch.cuda.current_device() == 0
    here, there = list(results("cuda:0")), list(results("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in there} == {1}
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(here, there, strict=True))
    with pytest.raises(ArgumentError, match="device"):
        fp4pass.linear(activations(3, inner, dtype=torch.bfloat16, device="cuda:1"), *operands, None, order)
