"""Numbers of rows: one or many, fixed or dynamic, in any rank of input."""

from __future__ import annotations

import pytest
import torch

from fp4pass.report import Report

from .running import activations, compiling, relative_error
from .spellings import EXPERTS, LINEARS, PRODUCTS_OF_EXPERTS, K, Packed

LAYERS = ("table_of_16", "our_modules_interleaved", "weight_on_the_left", "high_nibble_first")


def assert_all_rewritten(reports: list[Report], op: str) -> None:
    for report in reports:
        assert not report.refused and [entry.op for entry in report.rewritten] == [op]


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_any_number_of_rows(name, dynamic):
    module = Packed(LINEARS[name], bias=name == "table_of_16")
    run = compiling(module, {"check": True}, dynamic=dynamic)
    for rows in (17, 2, 1, 5, 33):
        x = activations(rows, K)
        assert relative_error(run(x), module.exact_product(x)) < 1e-6
    assert_all_rewritten(run.reports, "fp4pass.linear")
    # Sizes 0 and 1 always get a graph of their own.
    assert len(run.reports) == {None: 3, True: 2, False: 5}[dynamic]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (1, 1, K), (2, 1, 4, K)])
@torch.no_grad()
def test_any_rank_of_input(shape, dynamic):
    module, x = Packed(LINEARS["table_of_16"], bias=True), activations(*shape)
    run = compiling(module, {"check": True}, dynamic=dynamic)
    result = run(x)
    assert result.shape == (*shape[:-1], 48) and relative_error(result, module.exact_product(x)) < 1e-6
    assert_all_rewritten(run.reports, "fp4pass.linear")


@torch.no_grad()
def test_no_rows():
    run = compiling(Packed(LINEARS["table_of_16"]))
    assert run(activations(0, K)).shape == (0, 48)
    assert_all_rewritten(run.reports, "fp4pass.linear")


@torch.no_grad()
def test_activations_that_are_not_contiguous():
    module, x = Packed(LINEARS["table_of_16"]), activations(K, 6).mT[::2]
    run = compiling(module)
    assert relative_error(run(x), module.exact_product(x)) < 1e-6
    assert_all_rewritten(run.reports, "fp4pass.linear")


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["gathered_after_decode", "gathered_on_the_right", "gathered_before_decode"])
@torch.no_grad()
def test_any_number_of_gathered_rows(name, dynamic):
    module = Packed(PRODUCTS_OF_EXPERTS[name])
    run = compiling(module, {"check": True}, dynamic=dynamic)
    for rows in (17, 2, 1, 5):
        x, ids = activations(rows, K), torch.arange(rows) % EXPERTS
        assert relative_error(run(x, ids), module.exact_product(x, ids)) < 1e-6
    assert_all_rewritten(run.reports, "fp4pass.gathered_linear")
    assert len(run.reports) <= 3


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_any_number_of_sorted_rows(dynamic):
    module = Packed(PRODUCTS_OF_EXPERTS["grouped_by_transformers"])
    run = compiling(module, {"check": True}, dynamic=dynamic)
    for rows in (17, 2, 1, 5):
        ids = (torch.arange(rows) % EXPERTS).sort().values
        ends = torch.bincount(ids, minlength=EXPERTS).cumsum(0).int()
        x = activations(rows, K)
        assert relative_error(run(x, ends), module.exact_product(x, ids)) < 1e-6
    assert_all_rewritten(run.reports, "fp4pass.grouped_linear")


def late_row(weight, ids):
    return torch.where(torch.arange(len(ids)).view(-1, 1, 1) < 1000, weight, 2 * weight)


SIZES = {
    "as_a_factor": (None, lambda weight, x: weight * (len(x) // 4)),
    "as_a_power": (None, lambda weight, x: weight ** (1 + len(x) // 1000)),
    "as_a_true_quotient": (None, lambda weight, x: weight * (len(x) / 5)),
    "in_a_tensor": (None, lambda weight, x: weight + torch.full((), len(x)) // 1000),
    "by_the_size_of_a_tensor": (None, lambda weight, x: weight * torch.full((len(x) // 4,), 1.0).sum()),
    "where_a_slice_begins": (None, lambda weight, x: weight[len(x) // 8 :]),
    "of_gathered_rows": ("gathered_after_decode", lambda weight, x: weight * (len(x) // 4)),
    "of_a_late_row": ("gathered_after_decode", late_row),
    "by_the_sum_over_gathered_rows": (
        "gathered_after_decode",
        lambda weight, x: weight + torch.ones(len(x)).sum().div(1000, rounding_mode="floor"),
    ),
}


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_a_number_of_rows_that_takes_part_in_the_weight(name):
    """With the traced five rows it changes nothing; with more it does."""
    product, change = SIZES[name]
    module = Packed(LINEARS["table_of_16"] if product is None else PRODUCTS_OF_EXPERTS[product])

    def forward(x, ids=None):
        weight = module.weight(x.dtype)
        if ids is None:
            return torch.nn.functional.linear(x, change(weight, x))
        return torch.bmm(change(weight[ids], x), x.unsqueeze(-1)).squeeze(-1)

    run = compiling(forward, {"check": True}, dynamic=True)
    for rows in (5, 2300):
        given = (activations(rows, K), torch.arange(rows) % EXPERTS)[: 1 if product is None else 2]
        assert torch.equal(run(*given), forward(*given))
    assert not any(report.rewritten for report in run.reports)
    assert all(report.refused for report in run.reports)
