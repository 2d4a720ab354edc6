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
