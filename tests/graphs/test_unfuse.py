"""Operations that need SM100 become plain ones: every row of the tables, with stand-ins that really pack to FP4."""

from __future__ import annotations

import pytest
import torch

from fp4pass.match.anchors import OPAQUE_PRODUCTS
from fp4pass.passes.unfuse.graph import ROWS
from fp4pass.passes.unfuse.rows import Attention, Experts, Fp8Quantizer, Product, Quantizer, RoundTrip

from . import fused
from .fused import LINEARS, QUANTIZING, Layer, ops
from .running import activations, called, compiling, relative_error

ROUNDED = 0.004
"""A bfloat16 rounding of the activation and one of the result, as relative error of a whole product."""
LIBRARIES = ("trtllm", "auto_deploy", "dist", "_C", "vllm", "flashinfer", "tensorrt")
ALL_REDUCES = ("trtllm.allreduce", "trtllm.autotuned_allreduce", "trtllm.allreduce_pg_by_name", "dist.trtllm_fused")
"""What communicates stays, and does not quantize any more."""


pytestmark = pytest.mark.usefixtures("libraries")


def foreign(run):
    """The operations of other libraries that are left, also behind functionalization."""
    (graph,) = run.graphs
    named = [*called(graph), *(str(n.args[0]) for n in graph.nodes if n.op == "call_function" and n.args)]
    return [name for name in named if name.startswith(tuple(f"{library}." for library in LIBRARIES))]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def inputs(rows=5, dtype=torch.bfloat16):
    return activations(rows, fused.K, dtype=dtype), activations(rows, fused.K, dtype=dtype, seed=2)


@pytest.mark.parametrize("name", QUANTIZING)
@torch.no_grad()
def test_a_quantizing_op_becomes_its_plain_twin(name):
    run_layer, exact = QUANTIZING[name]
    layer, given = Layer(run_layer), inputs()
    run = compiling(layer, {"target_sm": 90, "check": True})
    got, want = run(*given), layer(*given)
    assert [e.op for e in run.report.rewritten] == ["fp4pass.linear"] and not run.report.refused
    assert_nothing_quantizes(run, name)
    assert relative_error(first(got), exact(layer, *given) @ layer.exact_weight().T) < ROUNDED
    for mine, theirs in zip(got[1:], want[1:], strict=True) if isinstance(got, tuple) else []:
        assert (mine is None and theirs is None) or relative_error(mine, theirs.double()) < ROUNDED


@pytest.mark.parametrize("name", QUANTIZING)
@torch.no_grad()
def test_emulation_gives_what_the_fused_ops_give(name):
    layer, given = Layer(QUANTIZING[name][0]), inputs()
    run = compiling(layer, {"target_sm": 90, "check": True, "activations": "emulate"})
    got, want = first(run(*given)), first(layer(*given))
    assert_nothing_quantizes(run, name)
    exact = QUANTIZING[name][1](layer, *given) @ layer.exact_weight().T
    assert emulates(got, want, exact, nothing_rounded=QUANTIZING[name][1] is fused.unquantized)


def assert_nothing_quantizes(run, name):
    left = foreign(run)
    if "allreduce" not in name:
        assert left == []
    else:
        assert len(left) == 1 and left[0].startswith(ALL_REDUCES) and "fp4" not in left[0]
        assert all(value.dtype == torch.bfloat16 for value in results_of(run, left[0]))


def results_of(run, name):
    """The fake results of the only call of an op."""
    (node,) = (node for node in run.graphs[0].nodes if str(node.target) == name)
    return node.meta["val"]


def emulates(got, want, exact, nothing_rounded=False):
    """Equal; or, where a value may round to the other side of a tie so that its code differs, much nearer to ``want``
    than the product with unquantized activations is."""
    error = relative_error(got, want.double())
    return error < 1e-6 if nothing_rounded else error < 0.6 * relative_error(exact, want.double())


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_an_fp4_product_becomes_one_with_16_bit_activations(name, emulate):
    layer, (x, _) = Layer(LINEARS[name]), inputs()
    run = compiling(layer, {"target_sm": 90, "check": True, "activations": "emulate" if emulate else "bf16"})
    got, want = run(x), layer(x)
    assert foreign(run) == [] and got.dtype == want.dtype
    (entry,) = run.report.rewritten
    assert (entry.op, entry.source, entry.n, entry.k) == ("fp4pass.linear", name, fused.N, fused.K)
    assert entry.module == "codes"
    if emulate:  # a bias is added after the stand-in has rounded
        assert relative_error(got, want.double()) < (ROUNDED if ROWS[name].bias else 1e-6)
    else:
        bias = layer.bias.double() if ROWS[name].bias and "gemm" not in name else 0  # auto_gemm gives it none
        assert relative_error(got, x.double() @ layer.exact_weight().T + bias) < ROUNDED


@torch.no_grad()
def test_a_product_written_into_part_of_a_buffer_leaves_the_rest():
    layer, (x, _) = Layer(fused.vllm_mm_into_columns), inputs()
    run = compiling(layer, {"check": True})
    got = run(x)
    assert foreign(run) == []
    assert relative_error(got[1:-1], x.double() @ layer.exact_weight().T) < ROUNDED
    assert not got[0].any() and not got[-1].any()


@torch.no_grad()
def test_an_overload_that_writes_into_its_arguments_is_read_by_their_names():
    layer, given = Layer(fused.vllm_quantize_into), inputs()
    run = compiling(layer, {"check": True})
    got = run(*given)
    assert foreign(run) == [] and not run.report.refused
    assert relative_error(got, given[0].double() @ layer.exact_weight().T) < ROUNDED


@pytest.mark.parametrize("fusion, plain", [(0, 1), (1, 2), (4, 2)])
@torch.no_grad()
def test_an_all_reduce_that_gives_no_fp4_is_left_alone(fusion, plain):
    def run_layer(m, x, residual):
        return ops.trtllm.allreduce(
            x, residual, m.gamma, m.factor, None, None, fused.RANKS, 3, fusion, fused.EPS, False
        )

    run = compiling(Layer(run_layer), {"check": True})
    assert len(run(*inputs())) == plain and not run.report and foreign(run) == ["trtllm.allreduce.default"]


def test_every_row_is_tried():
    tried = {*QUANTIZING, *LINEARS, *ELSEWHERE}
    assert tried == set(ROWS)


ELSEWHERE = {
    "_C::scaled_fp4_experts_quant",
    "_C::silu_and_mul_scaled_fp4_experts_quant",
    "_C::cutlass_fp4_group_mm",
    "aten::_scaled_mm",
    "aten::_scaled_mm_v2",
    "aten::_scaled_grouped_mm_v2",
    "auto_deploy::trtllm_quant_nvfp4_moe_fused",
    "auto_deploy::torch_quant_nvfp4_moe",
    "tensorrt_llm::static_quantize_e4m3_per_tensor",
    "_C::static_scaled_fp8_quant",
    "_C::dynamic_scaled_fp8_quant",
    "tensorrt::dynamic_block_quantize_op",
    "vllm::unified_attention_with_output",
    "trtllm::attn_custom_op_inplace",
    "auto_deploy::trtllm_nvfp4_trtllm_gen_moe_fused",
}


def test_the_matcher_knows_the_same_products_as_the_tables():
    products = {name for name, row in ROWS.items() if isinstance(row, (Product, Experts))}
    assert products == OPAQUE_PRODUCTS


def test_every_row_says_where_it_was_read_and_names_its_own_arguments():
    for row in ROWS.values():
        assert ": " in row.read and row.name.count("::") == 1
        names = set(row.argument_names)
        fields = {
            Quantizer: lambda r: [r.factor, *r.activations],
            Product: lambda r: [r.x, r.x_scale, r.codes, r.scale, *r.alpha.split(), r.factor, r.bias],
            Experts: lambda r: [r.x, r.ids, r.routing, r.codes],
            Fp8Quantizer: lambda r: [r.x, r.scale],
            RoundTrip: lambda r: [r.x, r.amax],
            Attention: lambda r: [r.output, r.scale, r.block_scale, r.like],
        }[type(row)](row)
        assert {name.partition(".")[0] for name in fields if name} <= names, row.name
