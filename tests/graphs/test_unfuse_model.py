"""A whole Nemotron-H-like graph that was prepared for Blackwell, and what holds for the pass as such."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from fp4pass import pipeline
from fp4pass.options import Options
from fp4pass.passes.unfuse import rewrite
from fp4pass.pipeline import Fp4Pass

from . import fused
from .fused import EPS, GROUP_COLUMNS, Layer, ops
from .running import activations, compiling, listing, relative_error
from .standins import fake_codes, gated, norm, relu_squared
from .test_unfuse import ROUNDED, foreign
from .test_unfuse_activations import attention
from .test_unfuse_experts import CHOICES, Block

HIDDEN, WIDE = fused.K, 128


pytestmark = pytest.mark.usefixtures("libraries")


class Model(nn.Module):
    """Mamba-like, attention, MoE and MLP layers, each norm fused with the quantization after it, as engines fuse them:
    the residual returned first, last or written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_in, self.mix_out = (Layer(None, n=2 * HIDDEN, seed=1), Layer(None, n=HIDDEN, seed=2))
        self.query, self.out = Layer(None, n=3 * HIDDEN, seed=3), Layer(None, n=HIDDEN, seed=4)
        self.up, self.down = Layer(None, n=WIDE, seed=5), Layer(None, n=HIDDEN, k=WIDE, seed=6)
        self.experts = Block(listed=False, with_gate=False)
        self.router = nn.Linear(HIDDEN, 3, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.mix_in
        _, codes, scale = ops.auto_deploy.trtllm_rms_norm_quant_nvfp4(x, m.gamma, EPS, m.factor)
        y, gate = m.gemm(codes, scale).chunk(2, -1)
        codes, scale = ops.trtllm.fused_gated_rmsnorm_quant(
            y.contiguous(), gate, self.mix_out.gamma, GROUP_COLUMNS, EPS, self.mix_out.factor
        )
        mixed = self.mix_out.gemm(codes.view(torch.uint8), scale)
        m = self.query
        codes, total, scale, _ = ops.trtllm.fused_add_rms_norm_quant(mixed, x, m.gamma, m.factor, True, EPS)
        query, key, value = m.gemm(codes.view(torch.uint8), scale).chunk(3, -1)
        codes, scale = fake_codes(x)
        ops.vllm.unified_attention_with_output(
            query.contiguous(), key.contiguous(), value.contiguous(), codes, "layer.1", self.out.factor, scale
        )
        attended = self.out.gemm(codes, scale)
        m = self.up
        codes, scale, total = ops.trtllm.fused_add_rmsnorm_fp4_quantize(attended, total, m.gamma, m.factor, EPS, False)
        codes, scale = ops.trtllm.fused_relu2_quantize(m.gemm(codes, scale), self.down.factor)
        reduced, (codes, scale), total = self.down.gemm(codes, scale), fake_codes(x), total.clone()
        ops.vllm.flashinfer_fused_add_rms_norm_nvfp4_quant(
            codes, scale, total, reduced, self.mix_in.gamma, self.mix_in.factor, None, True, EPS
        )
        weights, ids = functional.softmax(self.router(total).float(), -1).topk(CHOICES)
        return total + self.experts(total, ids, weights) + self.mix_in.gemm(codes, scale)[:, :HIDDEN]

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The model without any quantized activation: products in float64, what is stored between them in bfloat16."""

        def product(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
            return (stored(rows).double() @ layer.exact_weight().T).bfloat16()

        y, gate = product(self.mix_in, norm(x, self.mix_in.gamma, EPS)).chunk(2, -1)
        total = x + product(self.mix_out, gated(y, gate, self.mix_out.gamma, GROUP_COLUMNS, EPS))
        query, key, value = product(self.query, norm(total, self.query.gamma, EPS)).double().chunk(3, -1)
        total = total + product(self.out, functional.softmax(query @ key.T, -1) @ value)
        hidden = product(self.up, norm(total, self.up.gamma, EPS))
        total = total + product(self.down, relu_squared(hidden))
        weights, ids = functional.softmax(self.router(total).float(), -1).topk(CHOICES)
        experts = self.experts.exact(total, ids, weights)
        return total + experts.bfloat16() + product(self.mix_in, norm(total, self.mix_in.gamma, EPS))[:, :HIDDEN]


def stored(rows: torch.Tensor) -> torch.Tensor:
    return rows.bfloat16()


def given(rows: int = 5) -> torch.Tensor:
    return activations(rows, HIDDEN, dtype=torch.bfloat16)


@torch.no_grad()
def test_a_model_of_fused_ops_becomes_the_plain_model():
    model, x = Model(), given()
    run = compiling(model, {"target_sm": 90, "check": True})
    got = run(x)
    assert set(foreign(run)) == {"vllm.unified_attention_with_output.default"}
    counts = {op: sum(e.op == op for e in run.report.rewritten) for op in ("fp4pass.linear", "fp4pass.experts")}
    assert counts == {"fp4pass.linear": 7, "fp4pass.experts": 1} and not run.report.refused
    assert relative_error(got, model.exact(x).double()) < 3 * ROUNDED
    assert relative_error(model(x), model.exact(x).double()) > 10 * ROUNDED  # which is what Blackwell would give


@torch.no_grad()
def test_sizes_that_vary_stay_free():
    model = Model()
    run = compiling(model, {"check": True}, dynamic=True)
    for rows in (5, 9):
        assert relative_error(run(given(rows)), model.exact(given(rows)).double()) < 3 * ROUNDED
    assert len(run.graphs) == 1


@pytest.fixture
def passes(monkeypatch):
    """The graphs that the passes are given and leave; each is run over a second time."""
    listings, original = [], Fp4Pass.__call__

    def twice(self, graph):
        listings.append(listing(graph))
        original(self, graph)
        first = self.report
        listings.append(listing(graph))
        original(self, graph)
        listings.append(listing(graph))
        listings.append(str(self.report))
        self.report = first

    monkeypatch.setattr(Fp4Pass, "__call__", twice)
    return listings


@pytest.mark.parametrize("activation", ["bf16", "emulate"])
@torch.no_grad()
def test_a_second_run_changes_nothing(passes, activation):
    compiling(Model(), {"check": True, "activations": activation})(given())
    before, once, again, second_report = passes
    assert before != once == again and second_report == "fp4pass: no quantized product in this graph"


@torch.no_grad()
def test_the_order_of_the_rules_and_of_the_passes_does_not_matter(monkeypatch):
    model, x = Model(), given()

    def result():
        run = compiling(model, {"check": True})
        run(x)
        return listing(run.graphs[0])

    wanted, rules = result(), rewrite.RULES
    for order in itertools.islice(itertools.permutations(rules), 1, None, 29):
        monkeypatch.setattr(rewrite, "RULES", order)
        assert result() == wanted
    # Only what is added to finished products has to come after.
    by_name = {each.name: each for each in pipeline.PASSES}
    unfuse, epilogue = by_name.pop("unfuse"), by_name.pop("epilogue")
    monkeypatch.setattr(pipeline, "PASSES", (*by_name.values(), unfuse, epilogue))
    assert result() == wanted


@pytest.mark.parametrize("options", [{"target_sm": 100}, {"target_sm": 75}, {"disable": ["unfuse"]}])
@torch.no_grad()
def test_where_the_pass_does_not_run_nothing_is_touched(options):
    model, x = Model(), given()
    run = compiling(model, options)
    assert torch.equal(run(x), model(x))
    assert len(foreign(run)) == 15 and not run.report.rewritten


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    def broken(graph, activations):
        raise KeyError("a mistake of ours")

    model, x = Model(), given()
    before = compiling(model, {"disable": ["unfuse"]})
    before(x)
    rules = (*rewrite.RULES, broken)
    monkeypatch.setattr(rewrite, "RULES", rules)
    run = compiling(model, {"check": True})
    assert torch.equal(run(x), model(x)) and listing(run.graphs[0]) == listing(before.graphs[0])
    assert not run.report.rewritten
    assert {e.op for e in run.report.refused} == {e.op for e in before.report.refused}
    assert all("a mistake of ours" in e.reason and e.lost == ("moe" not in e.op) for e in run.report.refused)


@torch.no_grad()
def test_metadata_is_checked_after_each_rule(monkeypatch):
    def careless(graph, activations):
        (node,) = (n for n in graph.rewriter.graph.nodes if n.target is torch.ops.aten.topk.default)
        values = next(user for user in node.users if user.args[1] == 0)
        values.meta["val"] = values.meta["val"].half()
        for user in values.users:
            user.meta["val"] = user.meta["val"].half()

    model, x = Model(), given()
    monkeypatch.setattr(rewrite, "RULES", (careless, *rewrite.RULES))
    with pytest.raises(Exception, match="recorded"):
        compiling(model, {"check": True})(x)
    compiling(model)(x)


def test_emulation_is_in_the_cache_key():
    assert repr(Options.parse(options={"activations": "emulate"})) != repr(Options.parse())


@torch.no_grad()
def test_generated_code_emulates_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, options = Layer(attention), {"activations": "emulate"}
    inputs = [given() * scale for scale in (1, 0.3, 2)]
    wanted = compiling(layer, options)(*inputs)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, backend="fp4pass", options=options)(*inputs), wanted)
