"""What the un-fusing leaves: each call with a reason and a remedy, and never an FP4 activation without an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fp4pass
from fp4pass.errors import ActivationError
from fp4pass.match.reasons import Reason
from fp4pass.passes.unfuse import rewrite

from . import fused
from .fused import EPS, RANKS, Layer, ops, rows
from .running import compiling, relative_error
from .standins import fake_codes
from .test_unfuse import ROUNDED, foreign
from .test_unfuse_activations import E4M3, fake_quantized, linear
from .test_unfuse_experts import Block

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture(scope="module", autouse=True)
def operations_without_a_row(libraries):
    libraries.define("trtllm::nobody_knows(Tensor x) -> Tensor", lambda x: x.float())
    libraries.define("trtllm::new_nvfp4_linear(Tensor x, Tensor w) -> Tensor", lambda x, w: x.clone())
    libraries.define(
        "trtllm::mnnvl_fusion_allreduce(Tensor input) -> (Tensor, Tensor)",
        lambda x: ops.trtllm.fp4_quantize(x, torch.tensor(1.0), 16),
        lambda x: fake_codes(x),
    )


def fp4_argument(m: Layer, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return m.gemm(codes, scale)


def scales_of_another(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, _ = ops.trtllm.fp4_quantize(x, m.factor, 16)
    return m.gemm(codes, ops.trtllm.fp4_quantize(2 * x, m.factor, 16)[1])


def doubled_scales(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = ops.trtllm.fp4_quantize(x, m.factor, 16)
    return m.gemm(codes, scale + 8)


def permuted(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = ops.trtllm.fp4_quantize(x, m.factor, 16)
    return m.gemm(codes.flip(-1), scale)


def of_an_unknown_op(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.trtllm.mnnvl_fusion_allreduce(x))


@pytest.mark.parametrize(
    "run_layer, shown",
    [
        (fp4_argument, "an input of the graph"),
        (scales_of_another, "differ in origin"),
        (doubled_scales, "differ in origin"),
        (permuted, "made by prims::rev"),
        (of_an_unknown_op, "made by trtllm::mnnvl_fusion_allreduce"),
    ],
)
@torch.no_grad()
def test_an_activation_in_fp4_that_comes_from_nowhere_is_never_consumed(run_layer, shown):
    given = fake_codes(rows()) if run_layer is fp4_argument else (rows(),)
    run = compiling(Layer(run_layer))
    run(*given)
    entry = run.report.refused[0]
    assert Reason.FP4_ACTIVATION.sentence in entry.reason and shown in entry.reason and entry.remedy
    assert entry.module == "codes" and entry.lost and not run.report.rewritten
    assert "trtllm.nvfp4_gemm.default" in foreign(run)


@torch.no_grad()
def test_codes_that_somebody_unknown_reads_are_refused_and_the_rest_is_rewritten():
    def run_layer(m, x):
        codes, scale = ops.trtllm.fp4_quantize(x, m.factor, 16)
        return m.gemm(codes, scale), ops.trtllm.nobody_knows(codes)

    layer = Layer(run_layer)
    run = compiling(layer)
    got, want = run(rows()), layer(rows())
    assert [e.op for e in run.report.rewritten] == ["fp4pass.linear"]
    (entry,) = run.report.refused
    assert Reason.FP4_CONSUMER.sentence in entry.reason and "nobody_knows" in entry.reason and entry.lost
    assert torch.equal(got[1], want[1])


@torch.no_grad()
def test_an_op_that_is_not_known_but_named_after_fp4_is_listed():
    run = compiling(Layer(lambda m, x: ops.trtllm.new_nvfp4_linear(x, m.codes) + x))
    run(rows())
    (entry,) = run.report.refused
    assert entry.op == "trtllm::new_nvfp4_linear" and entry.module == "codes" and not entry.lost
    assert entry.reason == Reason.UNKNOWN_FP4.sentence and entry.remedy == Reason.UNKNOWN_FP4.remedy


@torch.no_grad()
def test_attention_in_fp4_that_somebody_unknown_reads_is_refused():
    def run_layer(m, query, key, value):
        codes, scale = fake_codes(query)
        ops.vllm.unified_attention_with_output(query, key, value, codes, "layer.0", m.factor, scale)
        return ops.trtllm.nobody_knows(codes)

    run = compiling(Layer(run_layer))
    run(*(rows(seed=seed) for seed in (1, 2, 3)))
    (entry,) = run.report.refused
    assert Reason.FP4_CONSUMER.sentence in entry.reason and entry.lost


def other_block(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.trtllm.fp4_quantize(x, m.factor, 32))


def powers_of_two(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.trtllm.fp4_quantize(x, m.factor, 16, True))


def layer_norm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, _, scale, _ = ops.trtllm.fused_add_rms_norm_quant(x, x, m.gamma, m.factor, False, EPS, True)
    return m.gemm(codes.view(torch.uint8), scale)


@pytest.mark.parametrize(
    "run_layer, shown",
    [(other_block, "sfVecSize=32"), (powers_of_two, "sfUseUE8M0=True"), (layer_norm, "use_rms_norm=False")],
)
@torch.no_grad()
def test_a_variant_is_refused_and_other_layers_are_not(run_layer, shown):
    def both(m, x):
        return run_layer(m, x), linear(m, x)

    run = compiling(Layer(both))
    run(rows())
    assert [e.op for e in run.report.rewritten] == ["fp4pass.linear"]
    assert all(Reason.VARIANT.sentence in e.reason and shown in e.reason and e.lost for e in run.report.refused)
    assert len({e.op for e in run.report.refused}) == 2  # what quantizes, and the product behind it


def into_shared_buffers(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = ops.trtllm.fp4_quantize(x, m.factor, 16)
    reduced = ops.trtllm.nvfp4_gemm(codes, m.codes, scale, m.scale, m.alpha, torch.bfloat16, True)
    return ops.trtllm.allreduce(reduced, None, None, None, None, None, RANKS, 2, 0, EPS, False)[0]


@torch.no_grad()
def test_a_product_that_a_later_all_reduce_looks_for_in_shared_buffers_is_refused():
    run = compiling(Layer(into_shared_buffers))
    run(rows())
    assert {e.op for e in run.report.refused} == {"trtllm::nvfp4_gemm", "trtllm::fp4_quantize"}
    assert "to_userbuffers=True" in run.report.refused[0].reason and run.report.refused[0].lost


def attention_of_its_layer(m: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    codes, scale = fake_codes(query)
    ops.trtllm.attn_custom_op_inplace(query, key, value, "causal", None, None, None, None, None, "0", codes, scale)
    return m.gemm(codes, scale)


@torch.no_grad()
def test_an_attention_whose_factor_is_out_of_reach_is_refused_with_the_way_round_it():
    run = compiling(Layer(attention_of_its_layer))
    run(*(rows(seed=seed) for seed in (1, 2, 3)))
    product, attention = run.report.refused
    assert product.op == "trtllm::nvfp4_gemm" and product.lost and attention.lost
    assert Reason.NO_TWIN.sentence in product.reason and "TRTLLM_ENABLE_ATTENTION_NVFP4_OUTPUT=0" in product.reason


@torch.no_grad()
def test_the_same_attention_with_a_plain_output_is_nothing_to_us():
    def run_layer(m, query, key, value):
        out = torch.empty_like(query)
        ops.trtllm.attn_custom_op_inplace(query, key, value, "causal", None, None, None, None, None, "0", out, None)
        return linear(m, out)

    layer, given = Layer(run_layer), [rows(seed=seed) for seed in (1, 2, 3)]
    run = compiling(layer, {"check": True})
    query, key, value = (each.double() for each in given)
    exact = functional.softmax(query @ key.T, -1) @ value @ layer.exact_weight().T
    assert relative_error(run(*given), exact) < ROUNDED and not run.report.refused


class Shuffled(Block):
    """The block that TensorRT-LLM runs with weights shuffled for SM100."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        up, down = self.up, self.down
        return ops.auto_deploy.trtllm_nvfp4_trtllm_gen_moe_fused(
            x, ids, routing, up.codes, down.codes, up.scale, down.scale, up.factor, up.factor, up.alpha, down.alpha,
            3, 2, 64, 96, False, 8
        )  # fmt: skip


@torch.no_grad()
def test_experts_whose_weights_are_shuffled_for_sm100_are_refused_but_no_activation_is_lost():
    run = compiling(Shuffled(listed=False, with_gate=False))
    run(rows(), torch.tensor([[0, 2]] * 5), torch.ones(5, 2))
    (entry,) = run.report.refused
    assert "shuffled" in entry.reason and entry.remedy and entry.module == "up" and not entry.lost
    assert (entry.n, entry.k, entry.experts) == (64, 96, 3)


# --- Errors.


def caught_while_compiling(layer: nn.Module, *given: torch.Tensor, **options: object) -> Exception:
    with pytest.raises(Exception) as caught:
        torch.compile(layer, backend="fp4pass", options=options)(*given)
    return getattr(caught.value, "inner_exception", caught.value)


def failing(graph, activations):
    raise KeyError("a mistake of ours")


@pytest.mark.parametrize("why", ["a variant", "a rule that fails", "a replacement that fails"])
@torch.no_grad()
def test_an_fp4_activation_that_is_left_is_an_error_whatever_the_reason(why, monkeypatch):
    torch.compiler.reset()
    if why == "a rule that fails":
        monkeypatch.setattr(rewrite, "RULES", (rewrite.replace_plain_results, failing, rewrite.replace_products))
    elif why == "a replacement that fails":
        monkeypatch.setattr(rewrite, "_built", failing)
    error = caught_while_compiling(Layer(other_block if why == "a variant" else linear), rows())
    assert isinstance(error, ActivationError) and "codes (trtllm::nvfp4_gemm)" in str(error)
    wanted = Reason.VARIANT if why == "a variant" else Reason.FAILED
    assert wanted.sentence in str(error) and wanted.remedy in str(error)


@pytest.mark.parametrize("options, reason", [({"disable": ["unfuse"]}, Reason.DISABLED), ({"target_sm": 100}, None)])
@torch.no_grad()
def test_where_the_un_fusing_does_not_run_its_products_are_listed_without_an_error(options, reason):
    run = compiling(Layer(linear), options)
    run(rows())
    (entry,) = run.report.refused
    wanted = reason or Reason.NATIVE_FP4
    assert wanted.sentence in entry.reason and entry.remedy and entry.op == "trtllm::nvfp4_gemm" and not entry.lost


@torch.no_grad()
def test_explain_names_each_refusal_with_a_reason_and_a_remedy():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            for name, run in (
                ("variant", other_block),
                ("nowhere", permuted),
                ("twinless", attention_of_its_layer),
                ("eight", linear),
                ("dense", fake_quantized),
                ("good", fused.trtllm_relu2),
            ):
                setattr(self, name, Layer(run))
            self.shuffled = Shuffled(listed=False, with_gate=False)
            self.dense.register_buffer("amax", torch.tensor(6.0))
            self.dense.register_buffer("weight", torch.randn(fused.N, fused.K, dtype=torch.bfloat16))

        def forward(self, x, eight, ids, routing):
            plain = self.variant(x) + self.nowhere(x) + self.twinless(x, x, x) + self.dense(x) + self.good(x, x)
            return plain + self.eight(eight), self.shuffled(x, ids, routing)

    given = rows(), rows().to(E4M3), torch.tensor([[0, 2]] * 5), torch.ones(5, 2)
    report = fp4pass.explain(Many(), *given, options={"target_sm": 90})
    assert [entry.module for entry in report.rewritten] == ["good"]
    found = {entry.module.partition(".")[0]: entry for entry in report.refused if entry.n or "dense" in entry.module}
    for name, reason in (
        ("variant", Reason.VARIANT),
        ("nowhere", Reason.FP4_ACTIVATION),
        ("twinless", Reason.NO_TWIN),
        ("eight", Reason.FP8_ACTIVATION),
        ("dense", Reason.DENSE),
        ("shuffled", Reason.NO_TWIN),
    ):
        assert found[name].reason.startswith(reason.sentence) and found[name].remedy == reason.remedy
        assert reason.sentence in str(report) and reason.remedy in str(report)
