"""A whole Nemotron-H-like graph that was prepared for Blackwell, and what holds for the pass as such."""

from __future__ import annotations

import collections
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
from .fused import EPS, FACTOR, GROUP_COLUMNS, QUANTIZED_WITH_NORM, Layer, ops
from .running import activations, compiling, listing, relative_error
from .standins import fake_codes, gated, norm, relu_squared, silu_times
from .test_unfuse import ROUNDED, foreign
from .test_unfuse_activations import attention
from .test_unfuse_experts import CHOICES, Block, layer_of_experts

HIDDEN, WIDE = fused.K, 128


pytestmark = pytest.mark.usefixtures("libraries")


class Model(nn.Module):
    """Mamba-like, attention, MLP, MoE, gated and grouped layers, each norm and activation fused with the quantization
    after it, as engines fuse them: the residual returned first, last or written in place, or summed over GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_in, self.mix_out = (Layer(None, n=2 * HIDDEN, seed=1), Layer(None, n=HIDDEN, seed=2))
        self.query, self.out = Layer(None, n=3 * HIDDEN, seed=3), Layer(None, n=HIDDEN, seed=4)
        self.up, self.down = Layer(None, n=WIDE, seed=5), Layer(None, n=HIDDEN, k=WIDE, seed=6)
        self.gate_up, self.last = Layer(None, n=2 * WIDE, seed=7), Layer(None, n=HIDDEN, k=WIDE, seed=8)
        self.experts = Block(listed=False, with_gate=False)
        self.router = nn.Linear(HIDDEN, 3, dtype=torch.bfloat16)
        self.by_expert = layer_of_experts(None)
        self.register_buffer("one_for_others", torch.tensor([0, 1, 1], dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total, attended = self.attention(*self.mixer(x))
        reduced, total = self.mlp(attended, total)
        (codes, scale), total = fake_codes(x), total.clone()
        m = self.mix_in
        ops.vllm.flashinfer_fused_add_rms_norm_nvfp4_quant(
            codes, scale, total, reduced, m.gamma, m.factor, None, True, EPS
        )
        weights, ids = functional.softmax(self.router(total).float(), -1).topk(CHOICES)
        mixed = self.experts(total, ids, weights) + m.gemm(codes, scale)[:, :HIDDEN]
        return torch.cat(self.gated_mlp(mixed, total), -1)

    def mixer(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m, out = self.mix_in, self.mix_out
        _, codes, scale = ops.auto_deploy.trtllm_rms_norm_quant_nvfp4(x, m.gamma, EPS, m.factor)
        y, gate = m.gemm(codes, scale).chunk(2, -1)
        fused_norm = ops.trtllm.fused_gated_rmsnorm_quant
        codes, scale = fused_norm(y.contiguous(), gate, out.gamma, GROUP_COLUMNS, EPS, out.factor)
        return out.gemm(codes.view(torch.uint8), scale), x

    def attention(self, mixed: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = self.query
        codes, total, scale, _ = ops.trtllm.fused_add_rms_norm_quant(mixed, total, m.gamma, m.factor, True, EPS)
        heads = [each.contiguous() for each in m.gemm(codes.view(torch.uint8), scale).chunk(3, -1)]
        codes, scale = fake_codes(total)
        ops.vllm.unified_attention_with_output(*heads, codes, "layer.1", self.out.factor, scale)
        return total, self.out.gemm(codes, scale)

    def mlp(self, attended: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = self.up
        codes, scale, total = ops.trtllm.fused_add_rmsnorm_fp4_quantize(attended, total, m.gamma, m.factor, EPS, False)
        codes, scale = ops.trtllm.fused_relu2_quantize(m.gemm(codes, scale), self.down.factor)
        return self.down.gemm(codes, scale), total

    def gated_mlp(self, mixed: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = self.gate_up
        normed, codes, scale, total = ops.trtllm.allreduce(
            mixed, total, m.gamma, m.factor, None, None, [0], 3, QUANTIZED_WITH_NORM, EPS, False
        )
        wide = m.gemm(codes, scale)
        codes, scale = fake_codes(wide[:, :WIDE])
        ops._C.silu_and_mul_nvfp4_quant(codes, scale, wide, self.last.factor)
        rows = self.last.gemm(codes, scale) + normed + total
        return self.mix_out.gemm(*ops.trtllm.fp4_quantize(rows, self.mix_out.factor, 16)), self.grouped(rows)

    def grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows go to the first expert."""
        m, count = self.by_expert, rows.shape[0]
        codes, scale = fake_codes(rows)[0], rows.new_empty(3 * 128, 8, dtype=torch.uint8)
        starts, tiles = self.one_for_others * count, self.one_for_others * 128
        ops._C.scaled_fp4_experts_quant(codes, scale, rows, m.factors, starts, tiles)
        sizes = torch.stack([(1 - self.one_for_others) * count] * 3, -1)
        out = rows.new_empty(count, fused.N)
        ops._C.cutlass_fp4_group_mm(out, codes, m.codes, scale, m.scale, m.alpha, sizes, starts, tiles)
        return out

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The model without any quantized activation: products in float64, what is stored between them in bfloat16."""

        def product(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
            return (rows.bfloat16().double() @ layer.exact_weight().T).bfloat16()

        y, gate = product(self.mix_in, norm(x, self.mix_in.gamma, EPS)).chunk(2, -1)
        total = x + product(self.mix_out, gated(y, gate, self.mix_out.gamma, GROUP_COLUMNS, EPS))
        query, key, value = product(self.query, norm(total, self.query.gamma, EPS)).double().chunk(3, -1)
        total = total + product(self.out, functional.softmax(query @ key.T, -1) @ value)
        hidden = product(self.up, norm(total, self.up.gamma, EPS))
        total = total + product(self.down, relu_squared(hidden))
        weights, ids = functional.softmax(self.router(total).float(), -1).topk(CHOICES)
        experts = self.experts.exact(total, ids, weights)
        mixed = experts.bfloat16() + product(self.mix_in, norm(total, self.mix_in.gamma, EPS))[:, :HIDDEN]
        total = mixed + total
        normed = norm(total, self.gate_up.gamma, EPS).bfloat16()
        rows = product(self.last, silu_times(product(self.gate_up, normed))) + normed + total
        first = self.by_expert.exact_weight(0) * (self.by_expert.factors[0] / FACTOR)
        return torch.cat((product(self.mix_out, rows), (rows.double() @ first.T).bfloat16()), -1)


def given(rows: int = 5) -> torch.Tensor:
    return activations(rows, HIDDEN, dtype=torch.bfloat16)


@torch.no_grad()
def test_a_model_of_fused_ops_becomes_the_plain_model():
    model, x = Model(), given()
    run = compiling(model, {"target_sm": 90, "check": True})
    got = run(x)
    # Attention and all-reduce stay, and quantize no more: nothing in the graph has FP4 in its name or dtype.
    assert set(foreign(run)) == {"vllm.unified_attention_with_output.default", "trtllm.allreduce.default"}
    assert not [name for name in foreign(run) if "fp4" in name] and not fp4_or_fp8(run.graphs[0])
    counts = collections.Counter(entry.op for entry in run.report.rewritten)
    assert counts == {"fp4pass.linear": 10, "fp4pass.experts": 1, "fp4pass.grouped_linear": 1}
    assert not run.report.refused
    assert relative_error(got, model.exact(x).double()) < 3 * ROUNDED
    assert relative_error(model(x), model.exact(x).double()) > 10 * ROUNDED  # which is what Blackwell would give


def fp4_or_fp8(graph):
    """The nodes that compute in a dtype of FP4 or FP8."""
    small = (torch.float4_e2m1fn_x2, torch.float8_e4m3fn)
    return [n for n in graph.nodes if n.op == "call_function" and getattr(n.meta.get("val"), "dtype", None) in small]


@torch.no_grad()
def test_below_sm90_the_numbers_are_the_same():
    model, x = Model(), given()
    results, listings = [], []
    for target in (80, 90):
        run = compiling(model, {"target_sm": target, "check": True})
        results.append(run(x))
        listings.append(listing(run.graphs[0]))
        assert len(run.report.rewritten) == 12 and not run.report.refused
    assert torch.equal(*results) and listings[0] == listings[1]


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


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.fuzz)])
@torch.no_grad()
def test_the_order_of_the_rules_and_of_the_passes_does_not_matter(step, monkeypatch):
    model, x = Model(), given()

    def result():
        run = compiling(model, {"check": True})
        run(x)
        return listing(run.graphs[0])

    wanted, rules = result(), rewrite.RULES
    for order in itertools.islice(itertools.permutations(rules), 1, None, step):
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
    assert len(foreign(run)) == 23 and not run.report.rewritten


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
