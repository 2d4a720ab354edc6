"""8-bit weights in the graph: spellings that are E4M3 with one scale, roundings of activations, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fp4pass.lowering import fp8, reference
from fp4pass.match.reasons import Reason

from .running import activations, called, compiling, relative_error

N, K = 48, 80
E4M3 = torch.float8_e4m3fn


def operands(seed=0):
    """Finite E4M3 bytes and their scale, as parameters of a model."""
    random = torch.Generator().manual_seed(seed)
    codes = (40 * torch.randn(N, K, generator=random)).to(E4M3).view(torch.uint8)
    return codes, torch.tensor(0.0371)


class Layer(torch.nn.Module):
    """A product of the weight that ``decode(codes, scale, dtype)`` gives and what ``before(x, scale)`` makes of x."""

    def __init__(self, decode, before=lambda x, scale: x, product=functional.linear, scale=None, input_scale=0.013):
        super().__init__()
        codes, usual = operands()
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        self.scale = torch.nn.Parameter(usual if scale is None else scale, requires_grad=False)
        self.input_scale = torch.nn.Parameter(torch.tensor([input_scale]), requires_grad=False)
        self.decode, self.before, self.product = decode, before, product

    def forward(self, x):
        return self.product(self.before(x, self.input_scale), self.decode(self.codes, self.scale, x.dtype))


def by_hand(codes, scale, dtype):
    return (reference.decode_scale(codes, torch.float32) * scale).to(dtype)


def rounded(x, scale):
    return (fp8.rounded(x, scale).float() * scale).to(x.dtype)


def run(layer, x, **settings):
    """The report, the result of the rewritten graph, and the ops in it."""
    compiled = compiling(layer, **settings)
    with torch.no_grad():
        result = compiled(x)
    return compiled.report, result, called(compiled.graphs[-1])


DECODES = {
    "by hand": by_hand,
    "torch's cast": lambda codes, scale, dtype: codes.view(E4M3).float().mul(scale).to(dtype),
    "in the model's dtype": lambda codes, scale, dtype: scale.to(dtype) * codes.view(E4M3).to(dtype),
    "padded rank": lambda codes, scale, dtype: (codes.view(E4M3).float()[None] * scale.reshape(1, 1, 1))[0].to(dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K)])
@pytest.mark.parametrize("decode", DECODES.values(), ids=DECODES)
def test_every_spelling_of_the_weight_is_found(decode, shape, dtype):
    x = activations(*shape, dtype=dtype)
    report, result, _ = run(Layer(decode), x)
    (entry,) = report.rewritten
    assert not report.refused and (entry.op, entry.n, entry.k) == ("fp4pass.fp8_linear", N, K)
    exact = fp8.reference(x.double(), *operands(), None, None, accumulate=torch.float64)
    assert result.dtype == dtype and relative_error(result, exact) < 2**-8


@pytest.mark.parametrize(
    ("product", "columns"),
    [
        (lambda x, w: x @ w, N),  # sums over the rows, as a backward does
        (lambda x, w: torch.mv(w, x[0]), K),
        (lambda x, w: torch.mv(w.t(), x[0]), N),
    ],
)
def test_either_side_of_the_weight_may_be_summed_over(product, columns):
    x = activations(3, columns)
    report, result, ops = run(Layer(by_hand, product=product), x)
    assert [entry.op for entry in report.rewritten] == ["fp4pass.fp8_linear"] and "fp4pass.fp8_linear.default" in ops
    assert relative_error(result, product(x.double(), by_hand(*operands(), torch.float64))) < 1e-5


def test_a_bias_is_added_inside():
    bias = activations(N, seed=7)
    x = activations(5, K)
    report, result, ops = run(Layer(by_hand, product=lambda x, w: functional.linear(x, w, bias)), x)
    assert len(report.rewritten) == 1 and not any("add" in op for op in ops)
    assert relative_error(result, fp8.reference(x.double(), *operands(), None, bias, torch.float64)) < 1e-5


ROUNDINGS = {
    "as the module does": rounded,
    "by the reciprocal": lambda x, s: ((x.float() * s.reciprocal()).clamp(-448, 448).to(E4M3).float() * s).to(x.dtype),
    "min and max": lambda x, s: ((x.float() / s).clamp_max(448).clamp_min(-448).to(E4M3).float() * s).to(x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, K), (2, 3, K)])
@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_rounded_activation_is_rounded_by_the_op(rounding, shape, dtype):
    x = activations(*shape, dtype=dtype)
    report, result, ops = run(Layer(by_hand, rounding), x, dynamic=False)
    assert report.rewritten[0].source == "E4M3 with one scale, activations E4M3 by a static scale"
    # Nothing rounds outside of the op.
    assert not [op for op in ops if "clamp" in op or "div" in op]
    wanted = fp8.reference(x, *operands(), torch.tensor(0.013), None)
    assert relative_error(result, wanted.double()) < (2**-7 if rounding is ROUNDINGS["by the reciprocal"] else 1e-6)


def test_with_any_number_of_rows_a_rounded_activation_is_found():
    layer = compiling(Layer(by_hand, rounded), dynamic=True)
    with torch.no_grad():
        for rows in (3, 9):
            x = activations(rows, K)
            assert relative_error(layer(x), Layer(by_hand, rounded)(x).double()) < 1e-5
    assert "static scale" in layer.report.rewritten[0].source


NOT_ROUNDED = {
    "by its own maximum": lambda x, s: rounded(x, x.abs().amax() / 448),
    "to E5M2": lambda x, s: ((x.float() / s).clamp(-448, 448).to(torch.float8_e5m2).float() * s).to(x.dtype),
    "clamped early": lambda x, s: ((x.float() / s).clamp(-240, 240).to(E4M3).float() * s).to(x.dtype),
    "scaled back by another number": lambda x, s: ((x.float() / s).clamp(-448, 448).to(E4M3).float() * 0.5).to(x.dtype),
    "with an activation before": lambda x, s: rounded(torch.relu(x), s),
}


@pytest.mark.parametrize("rounding", NOT_ROUNDED.values(), ids=NOT_ROUNDED)
def test_what_is_done_otherwise_to_an_activation_is_left_in_the_graph(rounding):
    layer, x = Layer(by_hand, rounding), activations(5, K)
    report, result, ops = run(layer, x)
    (entry,) = report.rewritten
    only_before = rounding is NOT_ROUNDED["with an activation before"]
    assert ("static scale" in entry.source) == only_before
    assert any(("relu" if only_before else "float8") in op or "convert" in op for op in ops)
    with torch.no_grad():
        assert relative_error(result, layer(x).double()) < 1e-5


NEAR_MISSES = {
    "a factor": lambda codes, scale, dtype: (2 * codes.view(E4M3).float() * scale).to(dtype),
    "an offset": lambda codes, scale, dtype: (codes.view(E4M3).float() * scale + 2**-9).to(dtype),
    "a clamp": lambda codes, scale, dtype: (codes.view(E4M3).float().clamp(-300, 300) * scale).to(dtype),
    "E5M2": lambda codes, scale, dtype: (codes.view(torch.float8_e5m2).float().nan_to_num(0, 0, 0) * scale).to(dtype),
    "integers": lambda codes, scale, dtype: (codes.view(torch.int8).float() * scale).to(dtype),
    "the scale divides": lambda codes, scale, dtype: (codes.view(E4M3).float() / scale).to(dtype),
    "the scale twice": lambda codes, scale, dtype: (codes.view(E4M3).float() * scale * scale).to(dtype),
    "one row otherwise": lambda codes, scale, dtype: (
        torch.cat((codes[:1].view(E4M3).float() * 0.5, codes[1:].view(E4M3).float())).mul(scale).to(dtype)
    ),
}


@pytest.mark.parametrize("decode", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_a_weight_of_other_values_is_left_and_listed(decode):
    layer, x = Layer(decode), activations(5, K)
    report, result, ops = run(layer, x)
    assert not report.rewritten and "fp4pass.fp8_linear.default" not in ops
    (entry,) = report.refused
    assert entry.reason.startswith(Reason.EIGHT_BIT.sentence) and (entry.n, entry.k) == (N, K)
    with torch.no_grad():
        assert torch.equal(result, layer(x))


@pytest.mark.parametrize("scale", [torch.rand(N, 1) + 0.5, torch.rand(1, K) + 0.5], ids=["rows", "columns"])
def test_more_than_one_scale_is_left_and_listed(scale):
    report, _, _ = run(Layer(by_hand, scale=scale), activations(5, K))
    assert not report.rewritten and "expected bytes and one scale" in report.refused[0].reason


def test_switched_off_and_on_gpus_that_are_not_served_fp8_products_are_listed():
    layer, x = Layer(by_hand), activations(5, K)
    for options, reason in (({"disable": ["fp8"]}, Reason.DISABLED), ({"target_sm": 100}, Reason.NATIVE_FP4)):
        report, _, _ = run(layer, x, options=options)
        assert not report.rewritten and report.refused[0].reason.startswith(reason.sentence)


def test_a_dtype_without_a_kernel_is_left_and_listed():
    report, _, _ = run(Layer(by_hand), activations(5, K, dtype=torch.float64))
    assert report.refused[0].reason.startswith(Reason.DTYPE.sentence)


def test_gradients_pass_and_the_backward_reads_the_bytes_too():
    layer, x = Layer(by_hand), activations(5, K).requires_grad_()
    compiled = compiling(layer)
    result = compiled(x)
    result.sum().backward()
    assert [entry.op for entry in compiled.report.rewritten] == ["fp4pass.fp8_linear"] * 2
    dense = by_hand(*operands(), torch.float64)
    assert relative_error(x.grad, torch.ones(5, N, dtype=torch.float64) @ dense) < 1e-5
