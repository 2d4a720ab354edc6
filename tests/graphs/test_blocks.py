"""Whole MoE blocks, from routed ids and weights to the summed output, become one op; what is almost one does not."""

from __future__ import annotations

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.nn import functional

from fp4pass.lowering.layout import FRAGMENTS, INTERLEAVED, PLAIN_HIGH_FIRST
from fp4pass.lowering.reference import ACTIVATIONS, relu2
from fp4pass.lowering.reference import experts as exact_experts
from fp4pass.passes.experts import rewrite_experts
from fp4pass.passes.moe import rewrite_moe
from fp4pass.passes.rewriter import Rewriter
from fp4pass.pipeline import Fp4Pass

from .routed import FORMS, INNER, E, H, K, Routed, later_by_number, read_in_between, routing, written
from .running import Known, called, compiling, listing, relative_error
from .test_mutants import mutants

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE_BY_ONE = {"grouped": "fp4pass.grouped_linear", "gathered": "fp4pass.gathered_linear"}


def compiled(module: nn.Module, *inputs: torch.Tensor, dynamic: bool | None = None) -> tuple[torch.Tensor, list[str]]:
    """The result, and what the products have become."""
    run = compiling(module, {"check": True}, dynamic)
    with torch.no_grad():
        result = run(*inputs)
    assert not run.report.refused
    ops = [entry.op for entry in run.report.rewritten]
    assert [name for name in called(run.graphs[0]) if "fp4pass" in name] == [f"{op}.default" for op in ops]
    return result, ops


def assert_no_worse(result: torch.Tensor, module: Routed, inputs: tuple, act: str = "relu2") -> None:
    """Against the block's own definition in float64.

    An id beyond the experts is what the block takes it for: nothing, or in some versions of transformers the last one.
    """
    x, ids, weights = inputs
    rest = weights.double(), *module.operands("up_proj"), *module.operands("down_proj"), act, module.layout
    with torch.no_grad():
        plain = module(*inputs)
    meant = (exact_experts(x.double(), each, *rest, torch.float64) for each in (ids, ids.clamp(max=E - 1)))
    exact = min(meant, key=lambda each: relative_error(plain, each))
    assert result.dtype == plain.dtype and result.shape == plain.shape
    assert relative_error(result, exact) <= max(relative_error(plain, exact), 1e-6)


CALLS = {f"{str(dtype)[6:]}-{tokens}": (routing(tokens, dtype), "relu2") for tokens in (1, 3) for dtype in DTYPES}
X, IDS, WEIGHTS = routing(3)
CALLS["silu"] = (X, IDS, WEIGHTS), "silu"
CALLS["int32_ids_bfloat16_weights"] = (X.bfloat16(), IDS.int(), WEIGHTS.bfloat16()), "relu2"
CALLS["float64_weights"] = (X, IDS, WEIGHTS.double()), "relu2"
CALLS["ids_of_other_devices"] = (X, torch.tensor([[E, 1], [2, E + 3], [0, 3]]), WEIGHTS), "relu2"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_experts_become_one_op(form, call):
    inputs, act = CALLS[call]
    module = Routed(FORMS[form], ACTIVATIONS[act], parallel=call == "ids_of_other_devices")
    result, ops = compiled(module, *inputs)
    assert ops == ["fp4pass.experts"]
    assert_no_worse(result, module, inputs, act)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_one_graph_for_any_number_of_tokens(form):
    module = Routed(FORMS[form])
    run = compiling(module, {"check": True}, dynamic=True)
    for tokens in (3, 7):
        assert_no_worse(run(*routing(tokens)), module, routing(tokens))
    assert [entry.op for entry in run.report.rewritten] == ["fp4pass.experts"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
@torch.no_grad()
def test_clamped_ids_count_as_the_last_expert(tokens):
    module, (x, ids, weights) = Routed(written(ids=lambda ids: ids.clamp(0, E - 1))), routing(tokens)
    inputs = x, torch.where(ids == ids[0, 0], E + 2, ids), weights
    result, ops = compiled(module, *inputs)
    assert ops == ["fp4pass.experts"]
    assert relative_error(result, module(*inputs).double()) < 1e-6


@pytest.mark.parametrize(
    ("layout", "hidden", "inner"), [(INTERLEAVED, H, INNER), (PLAIN_HIGH_FIRST, H, INNER), (FRAGMENTS, 192, 64)]
)
@torch.no_grad()
def test_two_blocks_of_another_layout(layout, hidden, inner):
    layers = nn.ModuleList(Routed(form, hidden=hidden, inner=inner) for form in FORMS.values())
    for layer in layers:
        layer.set_layout(layout)

    def both(x, ids, weights):
        return layers[1](torch.tanh(layers[0](x, ids, weights)), ids.flip(1), weights)

    inputs = routing(3, hidden=hidden)
    result, ops = compiled(both, *inputs)
    assert ops == ["fp4pass.experts"] * 2
    # Of large arguments tanh keeps no more of float32's digits.
    assert relative_error(result, both(*inputs).double()) < 1e-4


@torch.no_grad()
def test_a_block_that_feeds_another_directly():
    block = Routed(FORMS["gathered"])
    _, ops = compiled(lambda x, ids, weights: block(block(x, ids, weights), ids, weights), *routing(3))
    assert ops == ["fp4pass.experts"] * 2


SAME_VALUE = {
    "einsum": written(total=lambda y, x: torch.einsum("tko->to", y)),
    "mean_times_k": written(total=lambda y, x: y.mean(1) * K),
    "added_one_by_one": written(total=lambda y, x: y[:, 0] + y[:, 1]),
    "summed_in_float64": written(total=lambda y, x: y.sum(-2, dtype=torch.float64)),
    "weights_before_the_second_product": written(inner=lambda h, given: h * given, shares=torch.ones_like),
    "choices_in_another_order": lambda e, x, ids, weights: written()(e, x, ids.flip(1), weights.flip(1)),
    "top_1": lambda e, x, ids, weights: written()(e, x, ids[:, :1], weights[:, :1]),
}


@pytest.mark.parametrize("form", SAME_VALUE)
@torch.no_grad()
def test_other_spellings_compute_the_same(form):
    module = Routed(SAME_VALUE[form])
    result, ops = compiled(module, *routing(3))
    assert ops in (["fp4pass.experts"], ["fp4pass.gathered_linear"] * 2)
    assert relative_error(result, module(*routing(3)).double()) < 1e-6


def test_a_block_in_the_graph():
    run = compiling(Routed(FORMS["grouped"]), {"check": True})
    with torch.no_grad():
        run(*routing(3, torch.bfloat16))
    assert_expected_inline(
        listing(run.graphs[0]),
        """\
t9 = aten.view.dtype(in1, torch.uint8)  # uint8[4x48x2]
t10 = aten.view.dtype(in4, torch.uint8)  # uint8[4x32x3]
t11 = fp4pass.experts.default(in0, in7, in8, in2, t9, in3, in5, t10, in6, relu2, plain)  # bfloat16[3x32]
return [t11]""",
    )


# --- Near misses: the two products are rewritten, the block around them stays.


@torch.no_grad()
def assert_one_by_one(module: Routed, inputs: tuple, op: str = "fp4pass.gathered_linear") -> None:
    result, ops = compiled(module, *inputs)
    assert ops == [op] * 2
    assert relative_error(result, module(*inputs).double()) < {torch.float16: 2e-3}.get(inputs[0].dtype, 1e-6)


OTHER_ACTIVATIONS = [
    ("relu", torch.relu, ()),
    ("cube", lambda h: torch.relu(h) ** 3, ()),
    ("gelu", functional.gelu, ()),
    ("mish", functional.mish, ()),
    ("hardswish", functional.hardswish, ()),
    ("none", lambda h: h * 1.0, ()),
    ("twice", lambda h: 2 * relu2(h), ()),
    ("factor_1.01", lambda h: 1.01 * relu2(h), ()),
    ("leaky", lambda h: functional.leaky_relu(h, 0.1).square(), ()),
    ("silu_with_a_slope", lambda h: h * torch.sigmoid(1.02 * h), ()),
    ("clamped_above", lambda h: relu2(h).clamp(max=1000), ()),
    ("input_clamped", lambda h: relu2(h.clamp(-1000, 1000)), ()),
    ("clamped_below", lambda h: relu2(h).clamp(min=1e-6), ()),
    ("silu_clamped_below", lambda h: functional.silu(h).clamp(min=-0.2), ()),
    ("bias", lambda h: relu2(h + 0.5), ()),
    ("bias_of_each_column", lambda h: relu2(h + torch.arange(INNER) / INNER), ()),
    ("through_float8", lambda h: relu2(h).to(torch.float8_e4m3fn).to(h.dtype), ()),
    ("rounded", lambda h: (relu2(h) * 16).round() / 16, ()),
]


@pytest.mark.parametrize("act", [pytest.param(act, id=name, marks=m) for name, act, m in OTHER_ACTIVATIONS])
@pytest.mark.parametrize("form", FORMS)
def test_another_activation(form, act):
    assert_one_by_one(Routed(FORMS[form], act), routing(3), ONE_BY_ONE[form])


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda h: relu2(h).clamp(max=1000), id="after"),
        pytest.param(lambda h: relu2(h.clamp(-200, 200)), id="before"),
        pytest.param(lambda h: functional.silu(h).clamp(max=1000), id="silu"),
    ],
)
def test_a_clamp_in_half_precision(act):
    assert_one_by_one(Routed(written(), act), routing(3, torch.float16))


LAST_TOKEN = torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0], [2.0]])
SECOND_CHOICE = torch.arange(6).unsqueeze(1) % K == 1
NEAR_MISSES = [
    ("weights_squared", {"shares": lambda s: s * s}, ()),
    ("weights_left_out", {"shares": torch.ones_like}, ()),
    ("weights_left_out_for_one_choice", {"shares": lambda s: torch.where(SECOND_CHOICE, s, 1)}, ()),
    ("weights_before_the_activation", {"up": lambda h, s: h * s, "shares": torch.ones_like}, ()),
    ("weights_twice", {"inner": lambda h, s: h * s}, ()),
    ("weights_of_the_other_choices", {"shares": lambda s: s.flip(0)}, ()),
    ("weights_clamped_below", {"shares": lambda s: s.clamp(min=0.2)}, ()),
    ("small_weights_dropped", {"shares": lambda s: torch.where(s > 0.1, s, 0)}, ()),
    ("weights_without_sign", {"shares": lambda s: s.abs()}, ()),
    ("large_weights_clamped", {"shares": lambda s: s.clamp(max=5)}, ()),
    ("residual_inside_the_sum", {"total": lambda y, x: (y + x.unsqueeze(1)).sum(1)}, ()),
    ("largest_choice", {"total": lambda y, x: y.amax(1)}, ()),
    ("mean_of_choices", {"total": lambda y, x: (y / K).sum(1)}, ()),
    ("sum_without_one_choice", {"total": lambda y, x: y[:, 1:].sum(1)}, ()),
    ("ids_rolled_for_the_second_product", {"ids_down": lambda ids: ids.roll(1)}, ()),
    ("ids_of_the_next_expert", {"ids_down": lambda ids: (ids + 1) % E}, ()),
    ("rows_of_another_token", {"rows": lambda x: x.roll(1, 0)}, ()),
    ("one_late_token", {"rows": lambda x: x * LAST_TOKEN}, ()),
    ("hidden_clamped", {"rows": lambda x: x.clamp(-500, 500)}, ()),
    ("ids_wrapped", {"ids": lambda ids: ids % E}, ()),
]


@pytest.mark.parametrize("steps", [pytest.param(steps, id=name, marks=m) for name, steps, m in NEAR_MISSES])
def test_another_step(steps):
    assert_one_by_one(Routed(written(**steps)), routing(3))


@pytest.mark.parametrize("steps", [{"ids_down": lambda ids: ids.flip(0)}, {"shares": lambda s: s.flip(0)}])
def test_choices_exchanged_for_a_single_token(steps):
    assert_one_by_one(Routed(written(**steps)), routing(1))


def test_a_single_choice():
    for form in FORMS:
        assert_one_by_one(Routed(FORMS[form]), routing(3, choices=1), ONE_BY_ONE[form])


def test_products_with_different_numbers_of_experts():
    module, larger = Routed(FORMS["gathered"]), Routed(FORMS["gathered"], experts=E + 1)
    for part in module._matrices["down_proj"]:
        module._parameters[part] = larger._parameters[part]
    assert_one_by_one(module, routing(3))


def test_an_expert_that_is_left_out():
    x, _, weights = routing(1)
    module = Routed(written(ids=lambda ids: torch.where(ids == 37, 0, ids)), experts=64)
    assert_one_by_one(module, (x, torch.tensor([[37, 1]]), weights))


def later_in_an_order(weights):
    return torch.where(weights.flatten().sort().indices.unsqueeze(1) >= 8, 2 * weights, weights)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_block_of_any_number_of_tokens(form):
    module = Routed(FORMS[form])
    run = compiling(module, {"check": True}, dynamic=True)
    for tokens in (3, 7):
        assert relative_error(run(*routing(tokens)), module(*routing(tokens)).double()) < 1e-6
    assert [entry.op for entry in run.report.rewritten] == ["fp4pass.experts"]


def by_the_number_of_tokens(weights):
    return weights * (len(weights) // 3)


@pytest.mark.parametrize(
    "late", [{"rows": later_by_number}, {"shares": later_in_an_order}, {"shares": by_the_number_of_tokens}]
)
@torch.no_grad()
def test_tokens_later_than_those_traced(late):
    module = Routed(written(**late))
    run = compiling(module, {"check": True}, dynamic=True)
    for tokens in (3, 7):
        result = run(*routing(tokens))
        assert relative_error(result, module(*routing(tokens)).double()) < 1e-6


@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_ids_below_zero(parallel):
    """An index counts them from the end; transformers clamps them where experts are spread over devices."""
    module, (x, ids, weights) = Routed(FORMS["gathered"], parallel=parallel), routing(3)
    inputs = x, ids - E, weights
    result, ops = compiled(module, *inputs)
    assert ops == ["fp4pass.experts"]
    assert relative_error(result, module(*inputs).double()) < 1e-6


def shifted_below_zero(ids):
    return torch.where(ids < 0, (ids + E + 1) % E, ids)


def only_the_last_from_the_end(ids):
    return torch.where(ids == -1, E - 1, ids.clamp(min=0))


@pytest.mark.parametrize("mapped", [shifted_below_zero, only_the_last_from_the_end])
@torch.no_grad()
def test_ids_below_zero_that_a_block_maps_otherwise(mapped):
    module, (x, ids, weights) = Routed(written(ids=mapped)), routing(3)
    inputs = x, ids - E, weights
    result, ops = compiled(module, *inputs)
    assert ops == ["fp4pass.gathered_linear"] * 2
    assert relative_error(result, module(*inputs).double()) < 1e-6


@torch.no_grad()
def test_ids_that_a_top_k_has_chosen_are_not_looked_at():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Routed(FORMS["gathered"])

        def forward(self, x, scores):
            weights, ids = scores.topk(K, -1)
            return self.experts(x, ids.int(), weights)

    run, model, x = compiling(Model(), {"check": True}), Model(), routing(3)[0]
    scores = torch.rand(3, E)
    assert relative_error(run(x, scores), model(x, scores).double()) < 1e-6
    assert not {"aten.lt.Scalar", "aten.where.self"} & set(called(run.graphs[0]))


@torch.no_grad()
def test_a_first_product_that_is_read_elsewhere_too():
    run = compiling(Routed(read_in_between()), {"check": True})
    run(*routing(3))
    assert not any("bmm" in name for name in called(run.graphs[0]))


# --- Mutants of a block.


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_mutant_of_a_block_computes_the_same(form, monkeypatch):
    kept, original = [], Fp4Pass.__call__

    def keep(self, graph):
        kept.append(copy.deepcopy(graph))
        original(self, graph)

    monkeypatch.setattr(Fp4Pass, "__call__", keep)
    module, (x, ids, weights) = Routed(FORMS[form], parallel=True), routing(5)
    inputs = x, torch.where(ids == ids[0, 0], E, ids), weights
    module.up_proj_scale_2.data = module.down_proj_scale_2.data = torch.full((E,), 2.0**-8)
    compiled(module, *inputs)
    values = {(tuple(t.shape), t.dtype): t for t in (*inputs, *module.parameters())}
    leaves = [node.meta["val"] for node in kept[0].find_nodes(op="placeholder")]
    values = [values[tuple(leaf.shape), leaf.dtype].detach() for leaf in leaves]
    known = Known({}, frozenset(n.name for n in kept[0].find_nodes(op="placeholder") if n.meta["val"].dim() == 2))
    # What depends on the call's inputs; mutants of the decodes are tried elsewhere.
    of_the_block = set(known.of_the_call)
    for node in kept[0].nodes:
        if of_the_block & {n.name for n in node.all_input_nodes}:
            of_the_block.add(node.name)
    became = set()
    for what, mutant in mutants(kept[0]):
        if what.partition(":")[0] not in of_the_block:
            continue
        try:
            wanted = run_graph(mutant, values)
        except (RuntimeError, IndexError):
            continue  # the change has made it no program at all
        rewriter = Rewriter(mutant, known, "test")
        for rewrite in (rewrite_moe, rewrite_experts):
            rewrite(rewriter)
        became.update(entry.op for entry in rewriter.rewritten)
        if not wanted.isfinite().all():
            continue  # rows of no expert are read
        result = run_graph(mutant, values)
        assert torch.allclose(result, wanted, 1e-5, 1e-5 * float(wanted.abs().max())), what
    assert ONE_BY_ONE[form] in became


def run_graph(graph: fx.Graph, values: list[torch.Tensor]) -> torch.Tensor:
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*values)[0]
