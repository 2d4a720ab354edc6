"""What is almost an NVFP4 product is left alone, with the reason that fits, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fp4pass.lowering.reference import dequantize
from fp4pass.match.reasons import Reason

from .decodes import E2M1, blocks, nibbles, per_expert, scaled, table_of_16, values_of
from .running import activations, called, compiling, relative_error
from .spellings import PRODUCTS_OF_EXPERTS, K, N, Packed, Spelling, linear

NF4 = torch.cat(
    (
        torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]),
        torch.tensor([0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1]),
    )
)
PLAIN = Spelling(table_of_16, linear)
GROUPED, GATHERED = PRODUCTS_OF_EXPERTS["grouped_by_transformers"], PRODUCTS_OF_EXPERTS["gathered_after_decode"]
ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)
IDS = torch.tensor([0, 2, 2, 1, 0, 0, 1])


@torch.no_grad()
def assert_refused(module: Callable, inputs: tuple, reason: Reason | None = None, detail: str = "") -> None:
    run = compiling(module, {"check": True})
    result, wanted = run(*inputs), module(*inputs)
    (entry,) = run.report.refused
    assert not run.report.rewritten
    if reason is not None:
        assert entry.reason.startswith(reason.sentence) and entry.remedy == reason.remedy
    assert detail in entry.reason
    assert not any("fp4pass" in name for name in called(run.graphs[0]))
    assert relative_error(result, wanted.double()) < 1e-5


def changed(table: torch.Tensor, at: int, to: float) -> torch.Tensor:
    table = table.clone()
    table[at] = to
    return table


@pytest.mark.parametrize(
    "table, detail",
    [
        pytest.param(changed(E2M1, 7, 5), "code 7 gives 5, in E2M1 it is 6", id="one-wrong-entry"),
        pytest.param(changed(E2M1, 7, 6.0000005), "code 7 gives 6", id="one-entry-off-by-an-ulp"),
        pytest.param(NF4, "code 0 gives -1", id="nf4"),
        pytest.param(E2M1.roll(1), "code 0 gives -6", id="shifted-by-one"),
        pytest.param(E2M1.abs(), "code 9 gives 0.5", id="signs-lost"),
    ],
)
def test_another_table(table, detail):
    assert_refused(Packed(replace(PLAIN, table=table)), (activations(3, K),), Reason.NOT_E2M1, detail)


def group_boundary_off_by_eight(m, dtype):
    return (values_of(m) * m.scale.float().repeat_interleave(16, 1).roll(8, 1) * m.factor).to(dtype)


def first_block_of_eight(m, dtype):
    wide = m.scale.float().repeat_interleave(16, 1)
    return (values_of(m) * torch.cat((wide[:, 8:], wide[:, -8:]), 1) * m.factor).to(dtype)


def neighbours_swapped(m, dtype):
    return scaled(m, values_of(m).unflatten(-1, (-1, 4)).flip(-1).flatten(-2), dtype)


def one_late_row(m, dtype):
    weight = table_of_16(m, dtype)
    return torch.cat((weight[:-1], 2 * weight[-1:]))


def one_row_by_mask(m, dtype):
    weight = table_of_16(m, dtype)
    return torch.where(torch.arange(N).unsqueeze(1) == 40, 2 * weight, weight)


def last_column_lost(m, dtype):
    weight = table_of_16(m, dtype)
    return torch.cat((weight[:, :-1], torch.zeros(N, 1, dtype=dtype)), 1)


def next_first(tensor):
    """The first dimension's entries, each in the place of the one before it."""
    return torch.cat((tensor[1:], tensor[:1]))


def scales_of_the_next_row(m, dtype):
    return (blocks(values_of(m)) * (next_first(m.scale.float()) * m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def scales_rolled(m, dtype):
    return (blocks(values_of(m)) * (m.scale.float().roll(1, 0) * m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def scales_clamped(m, dtype):
    return (blocks(values_of(m)) * (m.scale.float().clamp(min=2**-6) * m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def scales_without_sign(m, dtype):
    return (blocks(values_of(m)) * (m.scale.float().abs() * m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


def weight_clamped(m, dtype):
    return table_of_16(m, dtype).clamp(-20000, 20000)


def twice_the_weight(m, dtype):
    return table_of_16(m, dtype) * 2


def weight_with_offset(m, dtype):
    return table_of_16(m, dtype) + 0.125


def global_squared(m, dtype):
    return table_of_16(m, dtype) * m.factor


def decoded_in_float8(m, dtype):
    return table_of_16(m, torch.float32).to(torch.float8_e4m3fn).to(dtype)


def scales_left_out(m, dtype):
    return values_of(m).to(dtype)


def along_rows(m, dtype):
    values = E2M1[torch.stack((m.codes & 15, m.codes >> 4), 1).flatten(0, 1).long()]
    return (blocks(values) * m.scale.float().reshape(-1, 3, 1) * m.factor).flatten(-2).to(dtype)


DECODES = [
    (group_boundary_off_by_eight, Reason.GROUPS),
    (first_block_of_eight, Reason.GROUPS),
    (one_late_row, Reason.NOT_UNIFORM),
    (one_row_by_mask, Reason.NOT_UNIFORM),
    (neighbours_swapped, Reason.NOT_E2M1),
    (last_column_lost, Reason.NOT_E2M1),
    (scales_of_the_next_row, Reason.SCALES_MISPLACED),
    (scales_rolled, None),
    (scales_clamped, Reason.WRONG_VALUES),
    (scales_without_sign, Reason.WRONG_VALUES),
    (weight_clamped, Reason.WRONG_VALUES),
    (twice_the_weight, Reason.WRONG_VALUES),
    (weight_with_offset, Reason.NOT_E2M1),
    (global_squared, Reason.WRONG_VALUES),
    (decoded_in_float8, Reason.WRONG_VALUES),
    (scales_left_out, Reason.NO_SCALES),
]


@pytest.mark.parametrize("decode, reason", [pytest.param(*case, id=case[0].__name__) for case in DECODES])
def test_another_decode(decode, reason):
    assert_refused(Packed(replace(PLAIN, decode=decode)), (activations(3, K),), reason)


ELSEWHERE = {
    "convolution": lambda m, x, _: functional.conv1d(x.T[None], m.weight(x.dtype).unsqueeze(-1))[0].T,
    "product_and_sum": lambda m, x, _: (x.unsqueeze(1) * m.weight(x.dtype)).sum(-1),
    "added_to": lambda m, x, _: x[:1] + m.weight(x.dtype),
}


@pytest.mark.parametrize("multiply", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_weight_in_another_operation(multiply):
    assert_refused(Packed(replace(PLAIN, multiply=multiply)), (activations(3, K),), Reason.NO_PRODUCT)


@torch.no_grad()
def test_a_product_of_what_another_operation_made_of_the_same_weight():
    def both(m, x, _):
        weight = m.weight(x.dtype)
        return (x.unsqueeze(1) * weight).sum(-1) @ weight

    run = compiling(Packed(replace(PLAIN, multiply=both)), {"check": True})
    run(activations(3, K))
    (rewritten,), (refused,) = run.report.rewritten, run.report.refused
    assert rewritten.op == "fp4pass.linear_backward" and refused.reason.startswith(Reason.NO_PRODUCT.sentence)


def globally(change, through=torch.float32):
    """A decode with something done to the global scale."""

    def decode(m, dtype):
        scale = m.scale.to(through) * change(m.factor.to(through))
        return (blocks(values_of(m).to(through)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    return decode


GLOBALS = {
    "clamped_at_a_ten_thousandth": globally(lambda g: g.clamp(min=1e-4)),
    "clamped_at_five_thousand": globally(lambda g: g.clamp(max=5000)),
    "clamped_below_in_half": globally(lambda g: g.clamp(min=0.001), torch.float16),
    "clamped_above_in_half": globally(lambda g: torch.where(g > 10, 10, g), torch.float16),
    "without_its_sign": globally(torch.abs),
    "a_power_of_two": globally(lambda g: torch.exp2(g.log2().round())),
    "in_three_bits": globally(lambda g: g.to(torch.float8_e4m3fn).float()),
    "with_an_epsilon": globally(lambda g: g + 1e-8),
}


@pytest.mark.parametrize("decode", GLOBALS.values(), ids=GLOBALS)
def test_another_global_scale(decode):
    assert_refused(Packed(replace(PLAIN, decode=decode)), (activations(3, K),), Reason.WRONG_VALUES)


def test_an_activation_in_the_weight():
    x = activations(3, K)
    by_a_number = replace(PLAIN, multiply=lambda m, x, _: functional.linear(x, m.weight(x.dtype) * x.mean()))
    assert_refused(Packed(by_a_number), (x,), Reason.ACTIVATION)
    by_a_row = replace(PLAIN, multiply=lambda m, x, _: functional.linear(x, m.weight(x.dtype) * x[0]))
    assert_refused(Packed(by_a_row), (x,), Reason.ACTIVATION)


def test_a_correction_of_low_rank_added_to_the_weight():
    class Corrected(Packed):
        def __init__(self):
            super().__init__(PLAIN)
            self.down, self.up = nn.Parameter(torch.randn(2, K)), nn.Parameter(torch.randn(N, 2))

        def weight(self, dtype):
            return super().weight(dtype) + self.up @ self.down

    assert_refused(Corrected(), (activations(3, K),), Reason.ACTIVATION)


@torch.no_grad()
def test_a_weight_with_numbers_drawn_at_random():
    """So seldom that no trial would show it."""

    def multiply(m, x, _):
        weight = m.weight(x.dtype)
        return functional.linear(x, torch.where(torch.rand_like(weight) < 1e-9, 0.0, weight))

    assert_refused(Packed(replace(PLAIN, multiply=multiply)), (activations(3, K),), Reason.UNKNOWN_OP, "every call")


def test_weights_of_eight_bits():
    class EightBits(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(0, 256, (N, K), dtype=torch.uint8), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(N, K // 16).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x):
            return functional.linear(x, (blocks(self.codes.float()) * self.scale.float().unsqueeze(-1)).flatten(-2))

    assert_refused(EightBits(), (activations(3, K),), Reason.EIGHT_BIT)


def test_codes_packed_along_the_rows():
    module = Packed(replace(PLAIN, decode=along_rows, shape=(48, 96)))
    assert_refused(module, (activations(3, 48),), Reason.WRONG_AXIS)


def test_a_table_that_the_caller_passes():
    module = Packed(PLAIN)

    def forward(x, table):
        return functional.linear(x, scaled(module, table[nibbles(module.codes).long()], x.dtype))

    assert_refused(forward, (activations(3, K), E2M1.clone()), Reason.TABLE_CHANGES)


@torch.no_grad()
def test_a_late_row_of_a_weight_too_large_to_run_in_full():
    with torch.device("meta"):
        codes = torch.empty(8192, 2048, dtype=torch.uint8)
        scale = torch.empty(8192, 256, dtype=torch.float8_e4m3fn)
        x = torch.empty(3, 4096)

    def forward(x):
        weight = dequantize(codes, scale.view(torch.uint8))
        return functional.linear(x, torch.cat((weight[:-1], 2 * weight[-1:])))

    run = compiling(forward)
    assert run(x).shape == (3, 8192)
    assert run.report.refused[0].reason.startswith(Reason.TOO_LARGE.sentence)


def test_activations_without_a_kernel():
    assert_refused(Packed(PLAIN), (activations(3, K, dtype=torch.float64),), Reason.DTYPE, "float64")


def test_parameters_that_are_not_contiguous():
    for part in ("codes", "scale"):
        module = Packed(PLAIN)
        turned = getattr(module, part).t().contiguous().t()
        setattr(module, part, nn.Parameter(turned, requires_grad=False))
        assert_refused(module, (activations(3, K),), reason=Reason.STRIDED)


class RowsPicked(Packed):
    def __init__(self, rows):
        super().__init__(PLAIN)
        self.register_buffer("rows", torch.randperm(N)[:rows])

    def forward(self, x):
        return functional.linear(x, self.weight(x.dtype)[self.rows])


def test_rows_in_another_order():
    assert_refused(RowsPicked(N), (activations(3, K),))


def test_some_of_the_rows():
    assert_refused(RowsPicked(24), (activations(3, K),))


# --- Experts.


def one_late_expert(m, dtype):
    weight = table_of_16(m, dtype)
    return torch.cat((weight[:-1], 2 * weight[-1:]))


def scales_of_the_next_expert(m, dtype):
    return (blocks(values_of(m)) * (next_first(m.scale.float()) * per_expert(m)).unsqueeze(-1)).flatten(-2).to(dtype)


def globals_of_the_next_expert(m, dtype):
    factor = next_first(m.factor).view(-1, 1, 1)
    return (blocks(values_of(m)) * (m.scale.float() * factor).unsqueeze(-1)).flatten(-2).to(dtype)


EXPERT_DECODES = [
    (GROUPED, one_late_expert, Reason.NOT_UNIFORM),
    (GROUPED, scales_of_the_next_expert, Reason.SCALES_MISPLACED),
    (GROUPED, globals_of_the_next_expert, Reason.WRONG_VALUES),
    (GROUPED, weight_clamped, Reason.WRONG_VALUES),
    (GATHERED, one_late_expert, Reason.NOT_UNIFORM),
    # Gathered rows repeat some experts and leave out others: the scales that occur are not the ones that should.
    (GATHERED, scales_of_the_next_expert, Reason.WRONG_VALUES),
    (GATHERED, globals_of_the_next_expert, Reason.WRONG_VALUES),
]


@pytest.mark.parametrize(
    "spelling, decode, reason", [pytest.param(*c, id=f"{c[0].op}-{c[1].__name__}") for c in EXPERT_DECODES]
)
def test_another_decode_of_experts(spelling, decode, reason):
    which = ENDS if spelling is GROUPED else IDS
    assert_refused(Packed(replace(spelling, decode=decode)), (activations(7, K), which), reason)


@pytest.mark.parametrize("other", ["scale", "factor"])
def test_parts_gathered_by_different_ids(other):
    def multiply(m, x, ids):
        of = {"scale": ids, "factor": ids} | {other: ids.flip(0)}
        factor = m.factor[of["factor"]].view(-1, 1, 1)
        weight = blocks(E2M1[nibbles(m.codes[ids]).long()]) * (m.scale[of["scale"]].float() * factor).unsqueeze(-1)
        return torch.bmm(weight.flatten(-2), x.unsqueeze(-1)).squeeze(-1)

    assert_refused(Packed(replace(GATHERED, multiply=multiply)), (activations(7, K), IDS), Reason.IDS)


def test_a_batch_of_rows_for_every_expert():
    batched = replace(GATHERED, multiply=lambda m, x, _: torch.bmm(x, m.weight(x.dtype).mT))
    assert_refused(Packed(batched), (activations(3, 5, K),), Reason.BATCHED)


def test_several_rows_for_every_expert_id():
    batched = replace(GATHERED, multiply=lambda m, x, ids: torch.bmm(x, m.weight(x.dtype)[ids].mT))
    assert_refused(Packed(batched), (activations(7, 2, K), IDS), Reason.BATCHED, "2 rows")


def test_a_sum_over_the_rows_of_experts():
    backward = replace(GATHERED, multiply=lambda m, x, ids: torch.bmm(x.unsqueeze(1), m.weight(x.dtype)[ids]))
    assert_refused(Packed(backward), (activations(7, N), IDS), Reason.BACKWARD)


@torch.no_grad()
def test_negative_ids_count_from_the_end():
    module, inputs = Packed(GATHERED), (activations(7, K), IDS - 3)
    assert relative_error(compiling(module)(*inputs), module(*inputs).double()) < 1e-6
