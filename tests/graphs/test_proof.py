"""Every spelling of an NVFP4 product is proven and rewritten to the right op, and its result gets no worse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fp4pass.match.convention import Arrangement, Convention
from fp4pass.match.products import find_products
from fp4pass.match.proof import Weight

from . import decodes
from .running import Known, activations, called, compiling, relative_error, traced
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, K, N, Packed, Spelling

FLOAT32_ERROR = 1e-6
"""What the order of a float32 sum changes; below it nothing is compared."""


def every_dtype(spellings):
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, spelling in spellings.items()
        for dtype in spelling.dtypes
    ]


def assert_rewritten(run, spelling: Spelling):
    (entry,) = run.report.rewritten
    assert not run.report.refused
    convention = Convention(spelling.layout, Arrangement(scales=spelling.scales), spelling.global_scale)
    assert (entry.op, entry.source) == (spelling.op, str(convention))
    assert (entry.n, entry.k, entry.experts) == (*spelling.shape, spelling.experts)
    assert called(run.graphs[0]).count(f"{spelling.op}.default") == 1


def assert_no_worse(result, plain, exact):
    assert result.dtype == plain.dtype and result.shape == plain.shape
    assert relative_error(result, exact) <= max(relative_error(plain, exact), FLOAT32_ERROR)


# Everything that is called in the graph of a spelling once it is rewritten: nothing of the decode is left.
VIEWED = "view.dtype -> linear.default"
LEFT = {
    "global_divides": "view.dtype -> reciprocal.default -> linear.default",
    "scales_in_tiles": "view.dtype -> reshape.default -> permute.default -> reshape.default -> linear.default",
    "scaled_output": "view.dtype -> linear.default -> mul.Tensor",
    "scaled_output in 16 bits": "view.dtype -> linear.default -> convert_element_type.default -> mul.Tensor",
}


@pytest.mark.parametrize("name, dtype", every_dtype(LINEARS))
@torch.no_grad()
def test_linear(name, dtype):
    module = Packed(LINEARS[name])
    run, x = compiling(module, {"check": True}), activations(64, module.exact.shape[1], dtype=dtype)
    result = run(x)
    assert_rewritten(run, LINEARS[name])
    left = " -> ".join(op.partition(".")[2] for op in called(run.graphs[0]))
    assert left == LEFT.get(name if dtype == torch.float32 else f"{name} in 16 bits", LEFT.get(name, VIEWED))
    assert_no_worse(result, module(x), module.exact_product(x))


@pytest.mark.parametrize("name, dtype", every_dtype(PRODUCTS_OF_EXPERTS))
@torch.no_grad()
def test_product_of_experts(name, dtype):
    spelling = PRODUCTS_OF_EXPERTS[name]
    module = Packed(spelling)
    # The middle expert has no rows.
    ids, ends = torch.tensor([0] * 20 + [2] * 13), torch.tensor([20, 20, 33], dtype=torch.int32)
    which = ends if spelling.op == "fp4pass.grouped_linear" else ids
    x = activations(33, spelling.shape[1], dtype=dtype)
    run = compiling(module, {"check": True})
    result = run(x, which)
    assert_rewritten(run, spelling)
    assert_no_worse(result, module(x, which), module.exact_product(x, ids))


PLAIN = LINEARS["table_of_16"]
GATHERED = PRODUCTS_OF_EXPERTS["gathered_after_decode"]


def rewritten(module, *inputs):
    """Compile, compare with the module itself, and return the run."""
    run = compiling(module, {"check": True})
    with torch.no_grad():
        result, plain = run(*inputs), module(*inputs)
    assert not run.report.refused
    assert relative_error(result, plain.double()) < FLOAT32_ERROR
    return run


def test_a_bias_goes_into_the_op():
    run = rewritten(Packed(PLAIN, bias=True), activations(3, K))
    assert called(run.graphs[0]) == ["aten.view.dtype", "fp4pass.linear.default"]


@pytest.mark.parametrize(
    "shape, factors", [((3, N), {"alpha": 2, "beta": 3}), ((3, N), {}), ((1,), {}), ((3, 1), {"beta": 2})]
)
def test_what_the_op_cannot_add_is_added_after_it(shape, factors):
    def multiply(m, x, _):
        return torch.addmm(m.other, x, m.weight(x.dtype).t(), **factors)

    module = Packed(replace(PLAIN, multiply=multiply))
    module.other = torch.nn.Parameter(activations(*shape))
    assert "aten.add.Tensor" in called(rewritten(module, activations(3, K)).graphs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decode", [decodes.table_of_16, decodes.without_global])
@torch.no_grad()
def test_a_scaled_bias_and_a_scaled_product_are_rounded_once(decode, dtype):
    def multiply(m, x, _):
        return torch.addmm(m.bias.to(x.dtype), x, m.weight(x.dtype).t(), alpha=3, beta=0.7)

    module, x = Packed(replace(PLAIN, decode=decode, multiply=multiply), bias=True), activations(3, K, dtype=dtype)
    exact = 3 * (x.double() @ module.weight(torch.float64).T) + 0.7 * module.bias.to(dtype).double()
    run = compiling(module, {"check": True})
    assert_no_worse(run(x), module(x), exact)
    assert "aten.add.Tensor" not in called(run.graphs[0])


def test_two_products_share_one_weight():
    def multiply(m, x, _):
        weight = m.weight(x.dtype)
        return torch.nn.functional.linear(x, weight) + torch.nn.functional.linear(x.relu(), weight)

    run = rewritten(Packed(replace(PLAIN, multiply=multiply)), activations(3, K))
    assert [entry.op for entry in run.report.rewritten] == ["fp4pass.linear"] * 2
    assert "aten.index.Tensor" not in called(run.graphs[0])


@pytest.mark.parametrize("k", [32, K])
def test_a_product_over_the_rows_is_a_backward(k):
    module = Packed(replace(PLAIN, shape=(32, k), multiply=lambda m, x, _: x @ m.weight(x.dtype)))
    (entry,) = rewritten(module, activations(3, 32)).report.rewritten
    assert (entry.op, entry.n, entry.k) == ("fp4pass.linear_backward", 32, k)


@pytest.mark.parametrize("equation, shape", [("bik,nk->bin", (2, 3, K)), ("k,nk->n", (K,)), ("nk,ki->ni", (K, 3))])
def test_a_single_matrix_in_any_product_that_einsum_makes(equation, shape):
    def multiply(m, x, _):
        return torch.einsum(equation, *((m.weight(x.dtype), x) if equation[0] == "n" else (x, m.weight(x.dtype))))

    rewritten(Packed(replace(PLAIN, multiply=multiply)), activations(*shape))


@pytest.mark.parametrize("rows", [N, 5])
@pytest.mark.parametrize("on_the_left", [False, True])
def test_a_single_matrix_for_every_entry_of_a_batch(on_the_left, rows):
    def multiply(m, x, _):
        weight = m.weight(x.dtype)
        if on_the_left:
            return (weight @ x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(x.unsqueeze(1), weight.t().expand(x.shape[0], -1, -1)).squeeze(1)

    (entry,) = rewritten(Packed(replace(PLAIN, multiply=multiply)), activations(rows, K)).report.rewritten
    assert entry.op == "fp4pass.linear" and entry.experts == 0


@pytest.mark.parametrize("name", ["scales_by_column_number", "scales_gathered", "shifts_by_column_number"])
@torch.no_grad()
def test_columns_by_their_numbers_in_a_square_too_large_to_run_in_full(name):
    """N equals K: what counts columns is told from what counts rows."""
    size = 4096
    inputs = {
        "x": torch.empty(3, size),
        "codes": torch.empty(size, size // 2, dtype=torch.uint8),
        "scale": torch.empty(size, size // 16, dtype=torch.float8_e4m3fn),
        "factor": torch.empty(()),
        "table": decodes.E2M1,
    }

    def product(x, **parts):
        return x @ getattr(decodes, name)(SimpleNamespace(**parts), torch.float32).T

    (found,) = find_products(traced(product, inputs).graph, Known({"table": decodes.E2M1}, frozenset({"x"})))
    assert isinstance(found.weight, Weight)


def test_a_product_with_a_vector():
    rewritten(Packed(replace(PLAIN, multiply=lambda m, x, _: m.weight(x.dtype) @ x)), activations(K))
    over_rows = replace(PLAIN, multiply=lambda m, x, _: m.weight(x.dtype).t() @ x)
    (entry,) = rewritten(Packed(over_rows), activations(N)).report.rewritten
    assert entry.op == "fp4pass.linear_backward"


def test_the_weight_multiplies_another_quantized_weight():
    module = Packed(replace(PLAIN, multiply=lambda m, x, _: x @ (m.weight(x.dtype) @ m.weight(x.dtype).t())))
    (entry,) = rewritten(module, activations(3, N)).report.rewritten
    assert entry.op == "fp4pass.linear"


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_global_scale_of_one_element(shape):
    module = Packed(LINEARS["global_on_the_weight"])
    module.factor.data = module.factor.data.view(shape)
    rewritten(module, activations(3, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_global_scale_of_another_dtype(dtype):
    module = Packed(PLAIN)
    module.factor.data = module.factor.data.to(dtype)
    rewritten(module, activations(3, K))


@pytest.mark.parametrize("part, dtype", [("codes", torch.int8), ("codes", torch.float4_e2m1fn_x2)])
def test_codes_stored_as_another_dtype_of_a_byte(part, dtype):
    def decode(m, to):
        return decodes.scaled(m, m.table[decodes.nibbles(m.codes.view(torch.uint8)).long()], to)

    module = Packed(replace(PLAIN, decode=decode))
    module.codes = torch.nn.Parameter(module.codes.view(dtype), requires_grad=False)
    rewritten(module, activations(3, K))


def test_scales_stored_as_bytes():
    def decode(m, to):
        scale = m.scale.view(torch.float8_e4m3fn).float() * m.factor
        return (decodes.blocks(decodes.values_of(m)) * scale.unsqueeze(-1)).flatten(-2).to(to)

    module = Packed(replace(PLAIN, decode=decode))
    module.scale = torch.nn.Parameter(module.scale.view(torch.uint8), requires_grad=False)
    assert "aten.view.dtype" not in called(rewritten(module, activations(3, K)).graphs[0])


def test_scales_stored_flat():
    def decode(m, to):
        scale = m.scale.view(N, -1).float() * m.factor
        return (decodes.blocks(decodes.values_of(m)) * scale.unsqueeze(-1)).flatten(-2).to(to)

    module = Packed(replace(PLAIN, decode=decode))
    module.scale = torch.nn.Parameter(module.scale.flatten(), requires_grad=False)
    rewritten(module, activations(3, K))


def test_weights_that_the_caller_passes():
    module = Packed(PLAIN)

    def forward(x, codes, scale, factor):
        values = torch.tensor(decodes.VALUES)[decodes.nibbles(codes).long()]
        weight = decodes.blocks(values) * (scale.float() * factor).unsqueeze(-1)
        return x @ weight.flatten(-2).t()

    rewritten(forward, activations(3, K), module.codes.data, module.scale.data, module.factor.data)


@pytest.mark.parametrize("experts, rows", [(1, 1), (1, 4), (16, 16)])
def test_sizes_that_coincide(experts, rows):
    """N, K, the number of experts and that of rows do not tell dimensions apart."""
    size = 16 if experts == 16 else K
    # A table of 16 has as many entries as one column of 16 x 16 / 16 scales: the decode here has none.
    spelling = replace(
        GATHERED, decode=decodes.arithmetic_on_powers, experts=experts, shape=(size, size), table=decodes.E2M1[:0]
    )
    rewritten(Packed(spelling), activations(rows, size), torch.arange(rows).flip(0) % experts)


def test_the_smallest_weight():
    rewritten(Packed(replace(PLAIN, decode=decodes.arithmetic_on_powers, shape=(16, 16))), activations(3, 16))


def test_the_smallest_weight_with_a_table():
    rewritten(Packed(replace(PLAIN, shape=(16, 16))), activations(3, 16))


def test_constants_of_no_dimension():
    def decode(m, to):
        numbers = decodes.nibbles(m.codes)
        sign = torch.where(numbers >= 8, torch.tensor(-1.0), torch.tensor(1.0))
        return decodes.scaled(m, m.table[(numbers & 7).long()] * sign, to)

    rewritten(Packed(replace(PLAIN, decode=decode, table=decodes.E2M1[:8])), activations(3, K))


def test_a_table_that_is_not_contiguous():
    def decode(m, to):
        return decodes.scaled(m, m.pair[:, 0][decodes.nibbles(m.codes).long()], to)

    module = Packed(replace(PLAIN, decode=decode))
    module.register_buffer("pair", torch.stack((decodes.E2M1, decodes.E2M1)).t())
    rewritten(module, activations(3, K))
