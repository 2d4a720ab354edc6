"""What is done to a linear product's result is done inside of the product, in whatever way it is spelled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

from fp4pass.match import epilogue
from fp4pass.passes import epilogue as rewrite
from fp4pass.passes.epilogue import rewrite_epilogue
from fp4pass.passes.rewriter import Rewriter

from .running import Known, activations, called, compiling, relative_error, traced
from .spellings import LINEARS, K, N, Packed

LINEAR = LINEARS["our_modules_interleaved"]
HALF = torch.bfloat16


class Followed(nn.Module):
    """A quantized linear layer without bias and what ``after(module, result)`` does to its result."""

    def __init__(self, after, device="cpu"):
        super().__init__()
        self.linear, self.after = Packed(LINEAR, device=device), after
        self.added = nn.Parameter(activations(N, seed=7).to(device, HALF), requires_grad=False)

    def forward(self, x):
        return self.after(self, self.linear(x))


@dataclass
class Traced:
    """Of ``after(self, product)`` the rewritten graph, its result and the exact one, for a few rows."""

    after: Callable[..., torch.Tensor]
    dtype: torch.dtype = HALF
    bias: bool = False
    rows: int = 5

    def __post_init__(self):
        self.added, self.other = activations(N, seed=7).to(self.dtype), activations(N, seed=8).to(self.dtype)
        self.residual = activations(self.rows, N, seed=9).to(self.dtype)
        layer = Packed(LINEAR, bias=self.bias).requires_grad_(False)
        x = activations(self.rows, K, dtype=self.dtype)
        self.exact = self.after(self, layer.exact_product(x))

        def product(x, codes, scale, factor, bias, added, other, residual):
            self.added, self.other, self.residual = added, other, residual
            return self.after(self, torch.ops.fp4pass.linear(x, codes, scale, factor, bias, LINEAR.layout))

        inputs = {"x": x, "codes": layer.codes, "scale": layer.scale.view(torch.uint8), "factor": layer.factor}
        inputs |= {"bias": layer.bias} if self.bias else {}
        inputs |= {"added": self.added, "other": self.other, "residual": self.residual}
        module = traced(lambda **named: product(**({"bias": None} | named)), inputs)
        self.graph = module.graph
        self.as_written = module(*inputs.values())
        rewrite_epilogue(Rewriter(self.graph, Known({}, frozenset({"x", "residual"})), ""))
        self.graph.eliminate_dead_code()
        module.recompile()
        self.found = module(*inputs.values())

    @property
    def inside(self):
        """What the product has taken in."""
        (product,) = self.graph.find_nodes(op="call_function", target=torch.ops.fp4pass.linear.default)
        bias = "bias" if product.args[4] is not None and not self.bias else ""
        return ", ".join(filter(None, [bias, *(str(each).removeprefix("torch.") for each in product.args[6:])]))

    @property
    def rest(self):
        """What the graph still calls beside the product, changes of shape left out."""
        free = ("fp4pass.linear", "aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze")
        return [name for name in called(self.graph) if not name.startswith(free)]

    @property
    def error(self):
        return relative_error(self.found, self.exact)


def epilogue_of(run):
    """What the report says that the only product has taken in."""
    (entry,) = run.report.rewritten
    assert entry.op == "fp4pass.linear" and not run.report.refused
    return entry.epilogue


RELU2 = {
    "square": lambda _, y: functional.relu(y).square(),
    "power": lambda _, y: functional.relu(y) ** 2,
    "times_itself": lambda _, y: (r := torch.relu(y)) * r,
    "clamped": lambda _, y: y.clamp(min=0).pow(2.0),
    "in_float32": lambda _, y: y.float().relu().square().to(HALF),
    "in_other_shapes": lambda _, y: (y.view(1, -1, 6, 8).relu() ** 2).reshape(5, N),
    "scaled_and_back": lambda _, y: (2 * y).relu().square() / 4,
}
SILU = {
    "function": lambda _, y: functional.silu(y),
    "times_sigmoid": lambda _, y: y * torch.sigmoid(y),
    "quotient": lambda _, y: y / (1 + torch.exp(-y)),
    "in_float32": lambda _, y: functional.silu(y.float()).to(HALF),
}


@pytest.mark.parametrize("name", RELU2)
def test_squared_relu_is_found_in_every_spelling(name):
    case = Traced(RELU2[name])
    assert case.inside == "relu2" and not case.rest
    assert case.found.shape == case.exact.shape and case.error < 0.0025


@pytest.mark.parametrize("name", SILU)
def test_silu_is_found_in_every_spelling(name):
    case = Traced(SILU[name])
    assert case.inside == "silu" and not case.rest and case.error < 0.0025


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "after"), [("relu2", RELU2["square"]), ("silu", SILU["quotient"])])
def test_activations_of_other_dtypes(name, after, dtype):
    case = Traced(after, dtype)
    assert case.inside == name and not case.rest and case.found.dtype == dtype and case.error < 0.0003


@pytest.mark.parametrize(
    ("after", "inside"),
    [
        (lambda m, y: y + m.added, "bias, none"),
        (lambda m, y: m.added.view(1, N) + y, "bias, none"),
        (lambda m, y: (y.float() + m.added.float()).to(HALF), "bias, none"),
        (lambda m, y: torch.relu(y + m.added).square(), "bias, relu2"),
        (lambda m, y: functional.silu((y + m.added).float()), "bias, silu, float32"),
        (lambda m, y: y.float(), "none, float32"),
        (lambda m, y: y.view(1, 5, N).float(), "none, float32"),
    ],
)
def test_a_bias_and_the_cast_of_a_result(after, inside):
    case = Traced(after)
    assert case.inside == inside and case.found.shape == case.exact.shape
    assert not case.rest or case.rest == ["prims.convert_element_type.default"]  # of the bias
    assert case.error < (1e-6 if case.found.dtype == torch.float32 else 0.0025)


def test_a_product_with_a_bias_of_its_own_takes_the_activation_and_no_second_one():
    case = Traced(RELU2["square"], bias=True)
    assert case.inside == "relu2" and not case.rest and case.error < 0.0025
    assert Traced(lambda m, y: y + m.added, bias=True).inside == ""


def test_the_roundings_before_the_last_are_left_out():
    case = Traced(lambda m, y: (y + m.added).relu().square(), rows=50)
    assert case.inside == "bias, relu2" and case.error < 0.6 * relative_error(case.as_written, case.exact)


# --- What is not done inside.

NEAR_MISSES = {
    "cube": lambda _, y: y.relu() ** 3,
    "square_without_relu": lambda _, y: y.square(),
    "relu": lambda _, y: y.relu(),
    "leaky": lambda _, y: functional.leaky_relu(y).square(),
    "relu6": lambda _, y: functional.relu6(y).square(),
    "gelu": lambda _, y: functional.gelu(y),
    "relu_before_a_scale": lambda _, y: (0.5 * y).relu().square(),
    "silu_of_twice": lambda _, y: y * torch.sigmoid(1.702 * y),
    "through_half_precision": lambda _, y: y.half().relu().square().to(HALF),
    "through_integers": lambda _, y: y.int().to(HALF).relu().square(),
    "with_other_rows": lambda _, y: y.relu() * y.relu().flip(0),
    "all_with_all": lambda _, y: y.relu().view(5, 1, N) * y.relu().view(1, 5, N),
    "normed": lambda _, y: (y.float() - y.float().mean(-1, keepdim=True)).relu().square().to(HALF),
    "two_biases": lambda m, y: (y + m.added) * torch.sigmoid(y),
    "zero_for_nan": lambda _, y: torch.where(y > 0, y * y, 0),
    "nan_for_infinity": lambda _, y: y * y.relu(),
    "a_row_of_the_call": lambda _, y: y + y[0] * 2,
    "product_read_twice": lambda _, y: (y.relu().square(), y),
    "relu_read_twice": lambda _, y: ((r := y.relu()).square(), r),
    "cast_that_is_not_the_result": lambda _, y: y.float().sum(-1),
    "to_half_precision": lambda _, y: y.half(),
    "random": lambda _, y: functional.dropout(y, 1e-9).relu().square(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left(name):
    case = Traced(NEAR_MISSES[name])
    assert case.inside == "" and case.rest


@pytest.mark.parametrize(
    ("after", "inside"),
    [
        (lambda _, y: y.relu().square() * 1.0001, "relu2"),
        (lambda _, y: y.relu().square().clamp(max=1e30), "relu2"),
        (lambda _, y: y.relu().square().nan_to_num(), "relu2"),
        (lambda m, y: functional.silu(y) * m.added, "silu"),
        (lambda m, y: y + m.added + m.other, "bias, none"),
        (lambda _, y: ((r := y.relu().square()) + 1, r), "relu2"),
    ],
)
def test_what_follows_the_activation_stays(after, inside):
    case = Traced(after)
    assert case.inside == inside and case.rest


@pytest.mark.parametrize("rows", [1, 5])
def test_a_residual_is_no_bias_even_of_a_single_token(rows):
    case = Traced(lambda m, y: y + m.residual, rows=rows)
    assert case.inside == "" and case.rest


def test_a_search_ends_after_a_few_operations(monkeypatch):
    def slow(_, y):
        for _ in range(8):
            y = y * 2 / 2
        return y.relu().square()

    assert Traced(slow).inside == ""
    monkeypatch.setattr(epilogue, "LARGEST", 100)
    assert Traced(slow).inside == "relu2"


def test_in_training_the_activation_keeps_what_its_backward_needs():
    module = Followed(RELU2["square"])
    x = activations(5, K).requires_grad_()
    run = compiling(module, {"check": True})
    run(x).sum().backward()
    exact = 2 * module.linear.exact_product(x.detach()).relu() @ module.linear.exact
    assert relative_error(x.grad, exact) < 1e-5
    assert all(entry.epilogue == "" for entry in run.report.rewritten)


def test_if_it_fails_the_product_stays_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(rewrite, "_build", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        case = Traced(RELU2["square"])
    assert case.inside == "" and "ZeroDivisionError" in caplog.text and torch.equal(case.found, case.as_written)


# --- Whole graphs and reports.


def test_one_graph_for_any_number_of_tokens():
    module = Followed(lambda _, y: y.relu().square().sum(0))
    run = compiling(module, {"check": True}, dynamic=True)
    with torch.no_grad():
        for rows in (5, 2, 48):
            x = activations(1, rows, K, dtype=HALF)
            exact = module.linear.exact_product(x).relu().square().sum(0)
            assert relative_error(run(x), exact) < 0.003
    assert len(run.graphs) == 1 and epilogue_of(run) == "relu2"


def test_a_graph_with_bias_activation_and_cast(passes):
    run = compiling(Followed(lambda m, y: (y + m.added).relu().square().float(), device="meta"), {"target_sm": 90})
    with torch.no_grad():
        run(torch.empty(2, 3, K, dtype=HALF, device="meta"))
    assert_expected_inline(
        passes[1],
        """\
t5 = aten.view.default(in0, [6, 80])  # bfloat16[6x80]
t6 = aten.view.dtype(in1, torch.uint8)  # uint8[48x5]
t7 = fp4pass.linear.default(t5, in2, t6, in3, in4, interleaved, relu2, torch.float32)  # float32[6x48]
t8 = aten.view.default(t7, [2, 3, 48])  # float32[2x3x48]
return [t8]""",
    )


def test_the_report_names_what_is_inside():
    run = compiling(Followed(lambda m, y: torch.relu(y + m.added).square()), {"check": True})
    with torch.no_grad():
        run(activations(5, K, dtype=HALF))
    assert "fp4pass.linear + bias, relu2" in str(run.report)
    assert '"epilogue": "bias, relu2"' in run.report.to_json()
