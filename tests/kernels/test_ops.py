"""The ops on the CPU: numbers, shapes, gradients, fakes, and errors that name the operand."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fp4pass.errors import ArgumentError, GradientError
from fp4pass.lowering import layout, ops, reference, registry

from .operands import activations, every_product, relative_error, stored, weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.0018, torch.float16: 0.0003}
fp4pass = torch.ops.fp4pass


def moe_operands(tokens=7, dtype=torch.float32, order=layout.PLAIN):
    hidden, inner, out = (128, 64, 112) if order == layout.FRAGMENTS else (80, 48, 112)
    up, down = weight(6, inner, hidden, seed=2, order=order), weight(6, out, inner, seed=3, order=order)
    ids = torch.randint(0, 6, (tokens, 3), generator=torch.Generator().manual_seed(4))
    return activations(tokens, hidden, dtype=dtype), ids, torch.rand(tokens, 3), *up, *down, "relu2", order


def test_the_gpu_of_the_operands_is_made_the_current_one_once_a_thread_or_where_it_is_another(monkeypatch):
    class Cuda:
        """What torch.cuda has of it."""

        current, switched = 0, []

        def current_device(self):
            return self.current

        def set_device(self, index):
            self.current = index
            self.switched.append(index)

        @contextlib.contextmanager
        def device(self, index):
            before, self.current = self.current, index
            yield
            self.current = before

    class OnGpu:
        def __init__(self, index):
            self.get_device = lambda: index

    cuda = Cuda()
    monkeypatch.setattr(ops.torch, "cuda", cuda)
    monkeypatch.setattr(ops, "_thread", ops._Thread())

    def run(index):
        return ops.on_device_of(OnGpu(index), lambda: (cuda.current, len(cuda.switched)), ())

    assert [run(index) for index in (0, 0, 1, 0, 1)] == [(0, 1), (0, 1), (1, 2), (0, 2), (1, 3)]
    with ThreadPoolExecutor(1) as other:
        assert [other.submit(run, 0).result() for _ in range(2)] == [(0, 4), (0, 4)]
    assert cuda.current == 0


@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_come_out_of_linear(order):
    codes, scale, expected = every_product()
    operands = *stored(codes, scale, order), None
    for dtype in DTYPES:
        result = fp4pass.linear(torch.eye(256, dtype=dtype), *operands, None, order)
        assert torch.equal(result.double(), expected.mT)
        back = fp4pass.linear_backward(torch.eye(256, dtype=dtype), *operands, order)
        assert torch.equal(back.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(80,), (0, 80), (1, 80), (3, 5, 80), (2, 0, 80)])
def test_linear_of_any_rank_meets_the_oracle(shape, dtype):
    codes, scale, global_scale = weight(48, 80)
    x, bias = activations(*shape, dtype=dtype), activations(48, dtype=dtype, seed=9)
    result = fp4pass.linear(x, codes, scale, global_scale, bias, layout.PLAIN)
    exact = x.double() @ reference.dequantize(codes, scale, global_scale, torch.float64).mT + bias.double()
    assert result.dtype == dtype and result.shape == (*shape[:-1], 48)
    assert relative_error(result, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("out_dtype", (None, *DTYPES))
@pytest.mark.parametrize("activation", ("none", *reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_and_cast_come_last_in_linear(dtype, activation, out_dtype):
    operands, x = weight(48, 80), activations(100, 80, dtype=dtype)
    bias = activations(48, dtype=dtype, seed=9)
    result = fp4pass.linear(x, *operands, bias, layout.PLAIN, activation, out_dtype)
    exact = x.double() @ reference.dequantize(*operands, torch.float64).mT + bias.double()
    if activation == "relu2":
        exact = exact.clamp_min(0) ** 2
    elif activation == "silu":
        exact = exact * exact.sigmoid()
    assert result.dtype == (out_dtype or dtype)
    assert relative_error(result, exact) < TOLERANCE[result.dtype]


def test_strided_activations_give_the_same_result():
    codes, scale, global_scale = weight(32, 48)
    x = activations(48, 10).mT
    result = fp4pass.linear(x, codes, scale, global_scale, None, layout.PLAIN)
    assert torch.equal(result, fp4pass.linear(x.contiguous(), codes, scale, global_scale, None, layout.PLAIN))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_and_grouped_agree_and_zero_what_no_expert_owns(dtype):
    codes, scale, global_scale = weight(4, 48, 80)
    x = activations(7, 80, dtype=dtype)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    ids = torch.tensor([0, 0, 2, 2, 2, 3, 4])
    grouped = fp4pass.grouped_linear(x, codes, scale, global_scale, ends, layout.PLAIN)
    gathered = fp4pass.gathered_linear(x, codes, scale, global_scale, ids, layout.PLAIN)
    assert torch.equal(grouped, gathered)
    dense = reference.dequantize(codes, scale, global_scale, torch.float64)
    exact = torch.stack([dense[i] @ x[r].double() if i < 4 else torch.zeros(48) for r, i in enumerate(ids)])
    assert relative_error(grouped, exact) < TOLERANCE[dtype]
    assert torch.equal(grouped[6], torch.zeros(48, dtype=dtype))


@pytest.mark.parametrize("sentinel", [-1, 6, 100])
def test_sentinel_ids_contribute_zero_even_with_nan_weights(sentinel):
    x, ids, weights, *rest = moe_operands()
    ids[2, 1] = sentinel
    weights[2, 1] = torch.nan
    without = weights.clone()
    without[2, 1] = 0
    valid = ids.clone()
    valid[2, 1] = 0
    exact = reference.experts(x, valid, without, *rest, accumulate=torch.float64)
    assert relative_error(fp4pass.experts(x, ids, weights, *rest), exact) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", (layout.INTERLEAVED, layout.FRAGMENTS))
def test_experts_meet_the_oracle(order, dtype):
    operands = moe_operands(dtype=dtype, order=order)
    exact = reference.experts(*operands, accumulate=torch.float64)
    assert relative_error(fp4pass.experts(*operands), exact) < TOLERANCE[dtype]
    assert fp4pass.experts(*moe_operands(tokens=0, dtype=dtype)).shape == (0, 112)


def test_linear_gives_gradients_to_x_and_bias_and_saves_no_dense_weight():
    codes, scale, global_scale = weight(48, 80)
    x, bias = activations(3, 5, 80).requires_grad_(), activations(48, seed=9).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = fp4pass.linear(x, codes, scale, global_scale, bias, layout.PLAIN)
    assert {t.dtype for t in saved if t.numel() > 1} == {torch.uint8}
    grad = activations(3, 5, 48, seed=5)
    result.backward(grad)
    dense = reference.dequantize(codes, scale, global_scale, torch.float64)
    assert relative_error(x.grad, grad.double() @ dense) < 1e-6
    assert relative_error(bias.grad, grad.double().sum((0, 1))) < 1e-6


def test_gradients_pass_through_another_dtype_of_the_result_and_through_no_activation():
    operands = weight(48, 80)
    x, bias = activations(3, 80, dtype=torch.bfloat16).requires_grad_(), activations(48).requires_grad_()
    fp4pass.linear(x, *operands, bias, layout.PLAIN, out_dtype=torch.float32).backward(
        grad := activations(3, 48, seed=5)
    )
    exact = grad.double() @ reference.dequantize(*operands, torch.float64)
    assert x.grad.dtype == torch.bfloat16 and relative_error(x.grad, exact) < 2**-8
    assert bias.grad.dtype == torch.float32 and relative_error(bias.grad, grad.double().sum(0)) < 1e-6
    with pytest.raises(GradientError, match="activation inside"):
        fp4pass.linear(x, *operands, bias, layout.PLAIN, "relu2")
    with torch.no_grad():
        assert not fp4pass.linear(x, *operands, bias, layout.PLAIN, "relu2").requires_grad


def test_linear_can_be_differentiated_twice():
    codes, scale, global_scale = weight(32, 48)
    x = activations(2, 48).requires_grad_()
    (first,) = torch.autograd.grad(
        fp4pass.linear(x, codes, scale, global_scale, None, layout.PLAIN).square().sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), x)
    dense = reference.dequantize(codes, scale, global_scale, torch.float64)
    assert relative_error(second, (2 * dense.mT @ dense @ torch.ones(48, dtype=torch.float64)).expand(2, 48)) < 1e-5


def test_expert_products_refuse_gradients_and_linear_one_to_the_global_scale():
    x, ids, weights, *rest = moe_operands()
    x.requires_grad_()
    with pytest.raises(GradientError, match="no_grad"):
        fp4pass.experts(x, ids, weights, *rest)
    with pytest.raises(GradientError, match="no_grad"):
        fp4pass.gathered_linear(x, *rest[:3], ids[:, 0].contiguous(), layout.PLAIN)
    with torch.no_grad():
        assert fp4pass.experts(x, ids, weights, *rest).shape == (7, 112)
    codes, scale, global_scale = weight(32, 48)
    result = fp4pass.linear(activations(2, 48), codes, scale, global_scale.requires_grad_(), None, layout.PLAIN)
    with pytest.raises(GradientError, match="global scale"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (0, 1, 5))
def test_opcheck_of_linear_and_its_backward(rows, dtype):
    codes, scale, global_scale = weight(48, 80)
    x, bias = activations(rows, 80, dtype=dtype).requires_grad_(), activations(48, dtype=dtype).requires_grad_()
    torch.library.opcheck(fp4pass.linear.default, (x, codes, scale, global_scale, bias, layout.PLAIN))
    inference = (x.detach(), codes, scale, None, None, layout.INTERLEAVED)
    torch.library.opcheck(fp4pass.linear.default, inference)
    torch.library.opcheck(fp4pass.linear.default, (*inference, "relu2", torch.float32))
    grad = activations(rows, 48, dtype=dtype).requires_grad_()
    torch.library.opcheck(fp4pass.linear_backward.default, (grad, codes, scale, global_scale, layout.PLAIN))


def test_opcheck_of_the_expert_ops():
    x, ids, weights, *rest = moe_operands()
    torch.library.opcheck(fp4pass.experts.default, (x, ids, weights, *rest))
    torch.library.opcheck(fp4pass.gathered_linear.default, (x, *rest[:3], ids[:, 0].contiguous(), layout.PLAIN))
    ends = torch.tensor([0, 1, 1, 4, 6, 6])
    torch.library.opcheck(fp4pass.grouped_linear.default, (x, *rest[:3], ends, layout.PLAIN))


def test_rows_stay_symbolic_under_dynamic_compilation():
    codes, scale, global_scale = weight(48, 80)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def product(x):
        return fp4pass.linear(x, codes, scale, global_scale, None, layout.PLAIN)

    compiled = torch.compile(product, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 7, 20):
        assert compiled(activations(rows, 80)).shape == (rows, 48)
    assert len(graphs) == 1


@pytest.mark.parametrize("order", (layout.PLAIN, layout.INTERLEAVED, layout.FRAGMENTS))
def test_a_weight_is_dequantized_and_rounded_once(order):
    for shape in ((48, 128), (3, 48, 128)):
        codes, scale, global_scale = weight(*shape, order=order)
        exact = reference.dequantize(codes, scale, global_scale, torch.float64, order)
        wide = reference.dequantize(codes, scale, global_scale, torch.float32, order)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(fp4pass.dequantize(codes, scale, global_scale, order, dtype), wide.to(dtype))
        assert torch.equal(fp4pass.dequantize(codes, scale, global_scale, order, torch.float64), exact)


def test_dequantize_is_one_operation_to_dynamo_and_plain_ones_after_it():
    codes, scale, global_scale = weight(48, 128, order=layout.FRAGMENTS)
    captured, traced = [], []

    def backend(graph, inputs):
        captured.append(graph)
        return aot_autograd(fw_compiler=lambda inner, _: traced.append(inner) or inner.forward)(graph, inputs)

    def product(x):
        return x @ fp4pass.dequantize(codes, scale, global_scale, layout.FRAGMENTS, torch.float32).mT

    x = activations(3, 128)
    with torch.no_grad():
        result = torch.compile(product, backend=backend, fullgraph=True)(x)
    assert torch.equal(result, product(x))
    names = [{str(node.target) for node in graph.graph.nodes} for graph in (*captured, *traced)]
    assert [any("fp4pass" in name for name in each) for each in names] == [True, False]
    assert len(captured[0].graph.nodes) < 10 < len(traced[0].graph.nodes)


def test_wrong_operands_of_dequantize_are_named():
    codes, scale, global_scale = weight(48, 80)
    for changed, message in (
        ((codes.int(), scale, global_scale, layout.PLAIN, torch.float32), "codes has the wrong dtype"),
        ((codes[0], scale[0], global_scale, layout.PLAIN, torch.float32), "codes has the wrong number of dimensions"),
        ((codes, scale[1:], global_scale, layout.PLAIN, torch.float32), "scale has the wrong shape"),
        ((codes, scale, global_scale, "tiled", torch.float32), "unknown layout"),
        ((codes, scale, global_scale, layout.PLAIN, torch.int8), "dtype is no dtype of a weight"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fp4pass.dequantize(*changed)


def linear_arguments(**changes):
    codes, scale, global_scale = weight(48, 80)
    base = {"x": activations(3, 80), "codes": codes, "scale": scale, "global_scale": global_scale}
    return (base | {"bias": None, "layout": layout.PLAIN, "activation": "none", "out_dtype": None} | changes).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 64)}, "x has the wrong size"),
        ({"x": torch.zeros(3, 80, dtype=torch.float64)}, "x has the wrong dtype"),
        ({"x": torch.tensor(1.0)}, "x has no dimension"),
        ({"codes": torch.zeros(48, 40, dtype=torch.int8)}, "codes has the wrong dtype"),
        ({"codes": torch.zeros(48, 36, dtype=torch.uint8)}, "codes has a K that is not a multiple of 16"),
        ({"codes": torch.zeros(40, 48, dtype=torch.uint8).mT}, "codes is not contiguous"),
        ({"codes": torch.zeros(2, 48, 40, dtype=torch.uint8)}, "codes has the wrong number of dimensions"),
        ({"scale": torch.zeros(48, 5).to(torch.float8_e4m3fn)}, "scale has the wrong dtype"),
        ({"scale": torch.zeros(48, 10, dtype=torch.uint8)}, "scale has the wrong shape"),
        ({"scale": torch.zeros(48, 5, dtype=torch.uint8, device="meta")}, "scale is on another device"),
        ({"global_scale": torch.ones(48)}, "global_scale has the wrong shape"),
        ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale has the wrong dtype"),
        ({"bias": torch.zeros(80)}, "bias has the wrong size"),
        ({"layout": "tiled"}, "unknown layout"),
        ({"activation": "gelu"}, "unknown activation"),
        ({"out_dtype": torch.float64}, "out_dtype is no dtype of a result"),
        ({"layout": "fragments"}, "units of 16 rows by 64 columns"),
    ],
)
def test_wrong_operands_of_linear_are_named(changes, message):
    arguments = list(linear_arguments(**changes))
    with pytest.raises(ArgumentError, match=message) as caught:
        fp4pass.linear(*arguments)
    assert "fp4pass::linear" in str(caught.value)
    if "another device" not in message:  # The fake function checks alike.
        on_meta = [operand.to("meta") if isinstance(operand, torch.Tensor) else operand for operand in arguments]
        with pytest.raises(ArgumentError, match=message):
            fp4pass.linear(*on_meta)


def test_wrong_operands_of_the_expert_ops_are_named():
    x, ids, weights, *rest = moe_operands()
    codes, scale, global_scale = rest[:3]
    with pytest.raises(ArgumentError, match="ids has the wrong dtype"):
        fp4pass.experts(x, ids.float(), weights, *rest)
    with pytest.raises(ArgumentError, match="weights has the wrong size"):
        fp4pass.experts(x, ids, weights[:, :2], *rest)
    with pytest.raises(ArgumentError, match="unknown activation"):
        fp4pass.experts(x, ids, weights, *rest[:-2], "tanh", layout.PLAIN)
    with pytest.raises(ArgumentError, match="down_codes has the wrong size"):
        fp4pass.experts(x, ids, weights, *rest[:3], *weight(6, 112, 64), *rest[6:])
    with pytest.raises(ArgumentError, match="ids has the wrong size"):
        fp4pass.gathered_linear(x, codes, scale, global_scale, ids[:3, 0].contiguous(), layout.PLAIN)
    with pytest.raises(ArgumentError, match="offsets has the wrong size"):
        fp4pass.grouped_linear(x, codes, scale, global_scale, torch.tensor([1, 2]), layout.PLAIN)


def test_operands_may_be_passed_by_name():
    codes, scale, global_scale = weight(32, 48)
    x = activations(2, 48)
    by_name = {"x": x, "codes": codes, "scale": scale, "global_scale": global_scale, "bias": None, "layout": "plain"}
    by_place = fp4pass.linear(x, codes, scale, global_scale, None, layout.PLAIN)
    assert torch.equal(fp4pass.linear(**by_name), by_place)


def test_traced_forms_are_all_ops_of_one_kernel_with_the_same_schema():
    """Of a composite op a graph has the parts."""
    forms = registry.traced_forms()
    registered = {op for op in (*ops.OPS, "fp8_linear") if op != "dequantize"}
    assert {called.name() for called in forms} == {f"fp4pass::{op}" for op in registered}
    for called, traced in forms.items():
        assert traced.name() == called.name().replace("fp4pass::", "fp4pass_traced::")
        assert str(traced._schema).partition("(")[2] == str(called._schema).partition("(")[2]


def test_traced_forms_compute_the_same_and_check_nothing():
    codes, scale, global_scale = weight(32, 48)
    operands = codes, scale, global_scale, None, layout.PLAIN
    x = activations(2, 48)
    traced = torch.ops.fp4pass_traced.linear
    assert torch.equal(traced(x, *operands), fp4pass.linear(x, *operands))
    with pytest.raises(ArgumentError, match="x has the wrong dtype"):
        fp4pass.linear(x.double(), *operands)
    assert traced(x.double(), *operands).dtype == torch.float64


def test_reloading_the_module_keeps_the_ops():
    codes, scale, global_scale = weight(32, 48)
    before = fp4pass.linear(activations(2, 48), codes, scale, global_scale, None, layout.PLAIN)
    importlib.reload(ops)
    assert torch.equal(fp4pass.linear(activations(2, 48), codes, scale, global_scale, None, layout.PLAIN), before)


def test_the_ops_work_on_the_cpu_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fp4pass.lowering import ops\n"
        "from fp4pass.errors import VersionError\n"
        "codes, scale = torch.zeros(16, 8, dtype=torch.uint8), torch.zeros(16, 1, dtype=torch.uint8)\n"
        "assert torch.ops.fp4pass.linear(torch.ones(1, 16), codes, scale, None, None, 'plain').shape == (1, 16)\n"
        "try:\n    ops.kernels('linear')\n"
        "except VersionError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "Triton is missing" in done.stdout, done.stderr
