"""For every row of the tables the operations of a small graph before and after un-fusing, in a line."""

from __future__ import annotations

import textwrap

import pytest
import torch
from expecttest import assert_expected_inline

from fp4pass.passes.unfuse.graph import ROWS

from . import fused
from .fused import LINEARS, QUANTIZING, Layer, compile_for_sm90, rows
from .running import activations
from .test_unfuse_activations import (
    attention,
    dynamic_by_vllm,
    fake_quantized,
    layer_with_fp8,
    scaled_mm,
    scaled_mm_v2,
    static_by_trtllm,
    static_by_vllm,
    static_unit,
    torch_layer,
)
from .test_unfuse_experts import Block, grouped, grouped_by_torch, layer_of_experts
from .test_unfuse_refusals import Shuffled, attention_of_its_layer

pytestmark = pytest.mark.usefixtures("libraries")

FOLDED = {
    "convert pow mean add rsqrt mul convert mul convert": "RMSNorm",
    "convert convert neg exp add div mul view pow mean add rsqrt mul view convert mul": "GatedRMSNorm",
    "relu pow": "relu2",
    "convert split neg exp add div mul convert": "silu_and_mul",
    "view permute clone view slice slice clone": "rows",
    "view permute clone view slice clone": "rows",
}
"""Runs of operations that stand for one thing, in the order in which they are looked for."""


def operations(listing: str) -> str:
    """The operations of a listing, without their namespaces, and without what only unpacks results or allocates."""
    names = []
    for line in listing.splitlines():
        call = line.partition(" = ")[2]
        name = call.partition("(")[0]
        if name == "auto_functionalized_v2":
            name = call.partition("(")[2].partition(")")[0]
        parts = name.removesuffix(".default").split(".")
        short = parts[1].replace("convert_element_type", "convert") if len(parts) > 1 else parts[0]
        if short and short not in ("<built-in function getitem>", "empty", "alias"):
            names.append(short)
    text = " ".join(names)
    for run, name in FOLDED.items():
        text = text.replace(run, name)
    return text


def with_amax_and_weight() -> Layer:
    layer = Layer(fake_quantized)
    layer.register_buffer("amax", torch.tensor(6.0))
    layer.register_buffer("weight", torch.randn(fused.N, fused.K, dtype=torch.bfloat16))
    return layer


def cases():
    """By the row: a layer and its inputs."""
    two, three = [rows(), rows(seed=2)], [rows(seed=seed) for seed in (1, 2, 3)]
    wide = [activations(5, 128, dtype=torch.bfloat16)]
    by_expert, routed = activations(11, fused.K, dtype=torch.bfloat16), [torch.tensor([[0, 2]] * 5), torch.ones(5, 2)]
    found = {name: (Layer(run), two) for name, (run, _) in QUANTIZING.items()}
    found |= {name: (Layer(run), two[:1]) for name, run in LINEARS.items()}
    return found | {
        "_C::scaled_fp4_experts_quant": (layer_of_experts(grouped), [by_expert, None]),
        "_C::silu_and_mul_scaled_fp4_experts_quant": (layer_of_experts(grouped), [by_expert, by_expert]),
        "_C::cutlass_fp4_group_mm": (layer_of_experts(grouped), [by_expert, None]),
        "aten::_scaled_mm": (torch_layer(scaled_mm, static_unit), wide),
        "aten::_scaled_mm_v2": (torch_layer(scaled_mm_v2, static_unit), wide),
        "aten::_scaled_grouped_mm_v2": (layer_of_experts(grouped_by_torch), [by_expert, None]),
        "auto_deploy::trtllm_quant_nvfp4_moe_fused": (Block(listed=False, with_gate=True), [rows(), *routed]),
        "auto_deploy::torch_quant_nvfp4_moe": (Block(listed=True, with_gate=False), [rows(), *routed]),
        "auto_deploy::trtllm_nvfp4_trtllm_gen_moe_fused": (Shuffled(listed=False, with_gate=False), [rows(), *routed]),
        "tensorrt_llm::static_quantize_e4m3_per_tensor": (layer_with_fp8(static_by_trtllm), two[:1]),
        "_C::static_scaled_fp8_quant": (layer_with_fp8(static_by_vllm), two[:1]),
        "_C::dynamic_scaled_fp8_quant": (layer_with_fp8(dynamic_by_vllm), two[:1]),
        "tensorrt::dynamic_block_quantize_op": (with_amax_and_weight(), two[:1]),
        "vllm::unified_attention_with_output": (Layer(attention), three),
        "trtllm::attn_custom_op_inplace": (Layer(attention_of_its_layer), three),
    }


def table(passes: list[str], namespace: str) -> str:
    """The rows of a namespace: the op, and the operations before and after."""
    lines = []
    for name, (layer, given) in cases().items():
        if name.startswith(namespace):
            passes.clear()
            compile_for_sm90(layer, *given)
            lines.append(name.partition("::")[2])
            wrapped = {"width": 110, "initial_indent": "  ", "subsequent_indent": "      "}
            lines += [textwrap.fill(operations(each), **wrapped) for each in passes]
    return "\n".join(lines)


def test_every_row_has_its_lines():
    assert set(cases()) == set(ROWS)
    assert {name.partition("::")[0] for name in ROWS} == {
        "trtllm", "auto_deploy", "dist", "_C", "vllm", "flashinfer", "aten", "tensorrt_llm", "tensorrt"
    }  # fmt: skip


def test_rows_of_trtllm(passes):
    assert_expected_inline(
        table(passes, "trtllm::"),
        """\
fused_add_rms_norm_quant
  fused_add_rms_norm_quant view nvfp4_gemm
  add RMSNorm mul rows linear
fused_add_rmsnorm_fp4_quantize
  fused_add_rmsnorm_fp4_quantize nvfp4_gemm
  add RMSNorm mul rows linear
fused_rmsnorm_fp4_quantize
  fused_rmsnorm_fp4_quantize nvfp4_gemm
  RMSNorm mul rows linear
fused_gated_rmsnorm_quant
  fused_gated_rmsnorm_quant view nvfp4_gemm
  GatedRMSNorm mul rows linear
fused_relu2_quantize
  fused_relu2_quantize nvfp4_gemm
  relu2 mul rows linear
fp4_quantize
  fp4_quantize nvfp4_gemm
  mul rows linear
allreduce
  allreduce nvfp4_gemm
  allreduce mul rows linear
autotuned_allreduce
  autotuned_allreduce nvfp4_gemm
  autotuned_allreduce mul rows linear
allreduce_pg_by_name
  allreduce_pg_by_name nvfp4_gemm
  allreduce_pg_by_name mul rows linear
nvfp4_gemm
  fp4_quantize nvfp4_gemm
  mul rows linear
nvfp4_gemm_cutlass
  fp4_quantize nvfp4_gemm_cutlass
  mul rows linear
nvfp4_gemm_cublaslt
  fp4_quantize nvfp4_gemm_cublaslt
  mul rows linear
cuda_core_nvfp4_gemm
  fp4_quantize cuda_core_nvfp4_gemm
  mul rows linear
fp4_gemm
  fp4_quantize view fp4_gemm
  view mul convert rows linear
attn_custom_op_inplace
  attn_custom_op_inplace nvfp4_gemm
  attn_custom_op_inplace nvfp4_gemm""",
    )


def test_rows_of_auto_deploy(passes):
    assert_expected_inline(
        table(passes, "auto_deploy::"),
        """\
trtllm_rms_norm_quant_nvfp4
  trtllm_rms_norm_quant_nvfp4 nvfp4_gemm
  RMSNorm mul rows linear
trtllm_fused_add_rms_norm_quant_nvfp4
  trtllm_fused_add_rms_norm_quant_nvfp4 nvfp4_gemm
  add RMSNorm mul rows linear
trtllm_fused_gated_rmsnorm_quant_nvfp4
  trtllm_fused_gated_rmsnorm_quant_nvfp4 nvfp4_gemm
  GatedRMSNorm mul rows linear
trtllm_fused_relu2_quant_nvfp4
  trtllm_fused_relu2_quant_nvfp4 nvfp4_gemm
  relu2 mul rows linear
trtllm_nvfp4_gemm
  fp4_quantize trtllm_nvfp4_gemm
  mul rows linear
trtllm_nvfp4_prequant_linear
  fp4_quantize view trtllm_nvfp4_prequant_linear
  view mul rows linear
torch_quant_nvfp4_linear
  view torch_quant_nvfp4_linear
  view mul rows linear
torch_fake_quant_nvfp4_linear
  torch_fake_quant_nvfp4_linear
  mul rows linear
trtllm_quant_nvfp4_moe_fused
  trtllm_quant_nvfp4_moe_fused
  rows rows view view unsqueeze expand clone view view view mul gathered_linear silu_and_mul view view mul
      gathered_linear view convert unsqueeze mul sum convert view
torch_quant_nvfp4_moe
  unbind unbind unbind view view view unbind view view view unbind unbind torch_quant_nvfp4_moe
  unbind unbind unbind view view view unbind view view view unbind unbind cat view cat view rows view view
      view unsqueeze unsqueeze unsqueeze cat view view view unsqueeze unsqueeze unsqueeze cat cat view cat
      view rows view view view unsqueeze unsqueeze unsqueeze cat view view view unsqueeze unsqueeze unsqueeze
      cat view view view mul view view mul experts view
trtllm_nvfp4_trtllm_gen_moe_fused
  trtllm_nvfp4_trtllm_gen_moe_fused
  trtllm_nvfp4_trtllm_gen_moe_fused""",
    )


def test_rows_of_dist(passes):
    assert_expected_inline(
        table(passes, "dist::"),
        """\
trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4
  trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4 nvfp4_gemm
  trtllm_fused_allreduce_residual_rmsnorm mul rows linear
trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4
  trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4 nvfp4_gemm
  trtllm_fused_allreduce_residual_rmsnorm mul rows linear""",
    )


def test_rows_of_vllm(passes):
    assert_expected_inline(
        table(passes, "_C::") + "\n" + table(passes, "vllm::"),
        """\
scaled_fp4_quant
  scaled_fp4_quant nvfp4_gemm
  mul rows linear
silu_and_mul_nvfp4_quant
  cat silu_and_mul_nvfp4_quant nvfp4_gemm
  cat silu_and_mul mul rows linear
cutlass_scaled_fp4_mm
  fp4_quantize view cutlass_scaled_fp4_mm
  mul rows linear
scaled_fp4_experts_quant
  scaled_fp4_experts_quant cutlass_fp4_group_mm
  slice select add mul rows grouped_linear
silu_and_mul_scaled_fp4_experts_quant
  unsqueeze expand clone view clone silu_and_mul_scaled_fp4_experts_quant cutlass_fp4_group_mm
  unsqueeze expand clone view clone silu_and_mul slice select add mul rows grouped_linear
cutlass_fp4_group_mm
  scaled_fp4_experts_quant cutlass_fp4_group_mm
  slice select add mul rows grouped_linear
static_scaled_fp8_quant
  static_scaled_fp8_quant fp4_quantize nvfp4_gemm
  mul rows linear
dynamic_scaled_fp8_quant
  dynamic_scaled_fp8_quant fp4_quantize nvfp4_gemm
  mul rows linear
flashinfer_fused_add_rms_norm_nvfp4_quant
  clone flashinfer_fused_add_rms_norm_nvfp4_quant nvfp4_gemm copy_
  clone add RMSNorm mul rows linear copy_
flashinfer_mm_fp4
  fp4_quantize permute permute flashinfer_mm_fp4
  permute permute mul permute permute rows linear
unified_attention_with_output
  unified_attention_with_output nvfp4_gemm
  unified_attention_with_output mul rows linear""",
    )


def test_rows_of_flashinfer(passes):
    assert_expected_inline(
        table(passes, "flashinfer::"),
        """\
fp4_quantize_sm100
  fp4_quantize_sm100 nvfp4_gemm
  mul rows linear
rmsnorm_fp4quant
  rmsnorm_fp4quant nvfp4_gemm
  RMSNorm mul rows linear
add_rmsnorm_fp4quant
  clone add_rmsnorm_fp4quant nvfp4_gemm
  clone add RMSNorm mul rows linear""",
    )


def test_rows_of_torch_and_modelopt(passes):
    assert_expected_inline(
        table(passes, "aten::") + "\n" + table(passes, "tensorrt"),
        """\
_scaled_mm
  reciprocal mul convert view abs amax div div clamp_min clamp_max convert convert mul unsqueeze div clamp_min
      clamp_max _tensor_constant0 lift_fresh_copy abs bucketize convert lt convert __lshift__ bitwise_or view
      slice slice __lshift__ bitwise_or view constant_pad_nd view view permute clone view view permute view
      view _scaled_mm mul mul convert mul
  reciprocal mul convert view permute view permute convert view permute clone view linear mul mul convert mul
_scaled_mm_v2
  reciprocal mul convert view abs amax div div clamp_min clamp_max convert convert mul unsqueeze div clamp_min
      clamp_max _tensor_constant0 lift_fresh_copy abs bucketize convert lt convert __lshift__ bitwise_or view
      slice slice __lshift__ bitwise_or view constant_pad_nd view view permute clone view view mul view
      permute view _scaled_mm_v2
  reciprocal mul convert view mul permute mul view mul permute convert view permute clone view linear
_scaled_grouped_mm_v2
  scaled_fp4_experts_quant reciprocal mul view mul permute view view view _scaled_grouped_mm_v2
  reciprocal mul mul permute mul mul permute rows grouped_linear
static_quantize_e4m3_per_tensor
  static_quantize_e4m3_per_tensor fp4_quantize nvfp4_gemm
  mul rows linear
dynamic_block_quantize_op
  dynamic_block_quantize_op dynamic_block_quantize_op permute mm
  dynamic_block_quantize_op permute mm""",
    )
