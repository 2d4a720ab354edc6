"""Experts that are rewritten product by product: the report says why they are no whole block, and what to do."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from fp4pass.lowering.reference import relu2
from fp4pass.match.reasons import Apart

from .routed import FORMS, Routed, later_by_number, read_in_between, routing, written
from .running import compiling, relative_error


@torch.no_grad()
def report_of(module: nn.Module, *inputs: torch.Tensor, dynamic: bool | None = None, **options: object):
    run = compiling(module, options, dynamic)
    run(*inputs)
    return run.report


LATE = torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0], [2.0]])
WHY = {
    Apart.INPUTS: written(rows=lambda x: x * LATE),
    Apart.NO_SUM: written(total=lambda y, x: y.amax(1)),
    Apart.OTHER: written(shares=lambda s: s * s),
    Apart.READ: read_in_between(),
}


@pytest.mark.parametrize("why", WHY, ids=lambda why: why.name)
def test_why_a_block_is_not_whole(why):
    report = report_of(Routed(WHY[why]), *routing(3))
    assert [(e.reason, e.remedy) for e in report.rewritten] == [(why.sentence, why.remedy)] * 2


@pytest.mark.parametrize("form", FORMS)
def test_a_single_choice_is_no_block(form):
    report = report_of(Routed(FORMS[form]), *routing(3, choices=1))
    assert {entry.reason for entry in report.rewritten} == {Apart.ONE.sentence}


@pytest.mark.parametrize("form", FORMS)
def test_another_activation_is_no_block(form):
    report = report_of(Routed(FORMS[form], torch.tanh), *routing(3))
    assert {entry.reason for entry in report.rewritten} == {Apart.OTHER.sentence}


def test_places_count_only_where_the_number_of_tokens_varies():
    module = Routed(written(rows=later_by_number))
    report = report_of(module, *routing(3), dynamic=True)
    assert {entry.reason for entry in report.rewritten} == {Apart.PLACES.sentence}
    report = report_of(module, *routing(3), dynamic=False)
    assert [(entry.op, entry.reason) for entry in report.rewritten] == [("fp4pass.experts", "")]


def test_a_sum_that_stays_in_float32_is_no_block():
    def form(e, x, ids, weights):
        flat = ids.reshape(-1)
        inner = relu2(torch.bmm(e.up_proj[flat], x.repeat_interleave(2, 0).unsqueeze(-1)))
        out = torch.bmm(e.down_proj[flat], inner).squeeze(-1) * weights.reshape(-1, 1)
        return out.view(3, 2, -1).sum(1)

    report = report_of(Routed(form), *routing(3, torch.bfloat16))
    assert {entry.reason for entry in report.rewritten} == {Apart.DTYPE.sentence}


def test_a_cast_of_the_result_is_left_behind_the_block():
    def form(*given):
        return written()(*given).float()

    module, inputs = Routed(form), routing(3, torch.bfloat16)
    run = compiling(module)
    with torch.no_grad():
        result = run(*inputs)
        assert relative_error(result, module(*inputs).double()) < 2**-7
    assert [(entry.op, entry.reason) for entry in run.report.rewritten] == [("fp4pass.experts", "")]


def test_a_cast_back_to_the_tokens_dtype_is_part_of_the_block():
    def form(e, x, ids, weights):
        e.up_proj, e.down_proj = e.up_proj.float(), e.down_proj.float()
        return written(rows=lambda rows: rows.float())(e, x, ids, weights)

    report = report_of(Routed(form), *routing(3, torch.bfloat16))
    assert [(entry.op, entry.reason) for entry in report.rewritten] == [("fp4pass.experts", "")]


def test_without_the_pass_nothing_is_said():
    report = report_of(Routed(FORMS["gathered"]), *routing(3), disable=["moe"])
    assert [(entry.op, entry.reason) for entry in report.rewritten] == [("fp4pass.gathered_linear", "")] * 2


def test_the_report_says_it_once_for_all_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Routed(FORMS["grouped"], torch.tanh) for _ in range(2))

        def forward(self, x, ids, weights):
            for layer in self.layers:
                x = layer(x, ids, weights)
            return x

    assert_expected_inline(
        str(report_of(Model(), *routing(3))),
        """\
fp4pass: 4 of 4 quantized products rewritten (cpu)
lowering: plain torch on the CPU
source: plain codes, linear scales, global scale multiplies
module                  layers  now                     weight
layers.{0,1}.up_proj    2       fp4pass.grouped_linear  4 x 48 x 32
layers.{0,1}.down_proj  2       fp4pass.grouped_linear  4 x 32 x 48
product by product: tried with numbers, the block is not the sum of routing weight x down(activation(up(token)))
  do: use relu2 or silu as the activation, and weight what the second product gives
  in: layers.{0,1}.up_proj (2 x fp4pass.grouped_linear, 4 x 48 x 32)
  in: layers.{0,1}.down_proj (2 x fp4pass.grouped_linear, 4 x 32 x 48)""",
    )
