"""The operations that give an activation in FP4: norms, activations and plain quantization.

Norms are those of the model, whatever the fused kernel rounds: RMSNorm multiplies its weight in float32 before the only
cast, the gated norm of the Mamba mixer after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace as Arguments
from typing import Any

import torch

from fp4pass.lowering.reference import relu2
from fp4pass.passes.unfuse import twins
from fp4pass.passes.unfuse.rows import (
    CODES,
    SCALES,
    SUM,
    UNCHANGED,
    VALUE,
    Attention,
    Fp8Quantizer,
    Quantizer,
    RoundTrip,
)


def _norm(x: str, weight: str = "weight", eps: str = "eps") -> Callable:
    return lambda a: (twins.rms_norm(getattr(a, x), getattr(a, weight), getattr(a, eps)), None)


def _add_norm(x: str, weight: str = "weight", eps: str = "eps", residual: str = "residual") -> Callable:
    """The sum is rounded to the activation's dtype before the norm, as the residual stream of the model is."""

    def twin(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        total = getattr(a, x) + getattr(a, residual)
        return twins.rms_norm(total, getattr(a, weight), getattr(a, eps)), total

    return twin


def _gated_norm(gate: str) -> Callable:
    return lambda a: (twins.gated_rms_norm(a.x, getattr(a, gate), a.weight, a.group_size, a.eps), None)


def _as_is(a: Arguments) -> tuple[torch.Tensor, None]:
    return a.input, None


def _vllm_norm(a: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    total = a.input if a.residual is None else a.input + a.residual
    return twins.rms_norm(total, a.weight, a.epsilon), None if a.residual is None else total


def _with_norm_first(*rest: str) -> Callable[[Arguments], Mapping[int, str]]:
    """The normed values come first where they are asked for; then ``rest``."""
    return lambda a: dict(enumerate([VALUE, *rest] if a.return_norm_out else rest))


def _all_reduce_norm(name: str, changed: Mapping[str, Any]) -> Callable:
    """The fusion of an all-reduce with residual and norm that does not quantize: the op ``name`` with the arguments of
    the other but for ``changed``. GPUs talk in it, so plain operations cannot take its place."""

    def twin(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        namespace, _, op = name.partition("::")
        plain = getattr(getattr(torch.ops, namespace), op).default
        given = vars(a) | changed
        normed, total = plain(**{argument.name: given[argument.name] for argument in plain._schema.arguments})
        return normed, total

    return twin


_RESIDUAL_RMS_NORM, _QUANTIZED, _QUANTIZED_WITH_NORM = 1, 5, 7
"""TensorRT-LLM's AllReduceFusionOp: RESIDUAL_RMS_NORM, its .._QUANT_NVFP4 and .._OUT_QUANT_NVFP4."""


def _fused_with_all_reduce(a: Arguments) -> Mapping[int, str]:
    """By the number of the fusion; FP8 fusions run below SM100 too."""
    rest = {_QUANTIZED: (), _QUANTIZED_WITH_NORM: (VALUE,)}.get(a.op)
    return {} if rest is None else dict(enumerate([*rest, CODES, SCALES, SUM]))


def _all_reduce(op: str, group: str) -> Quantizer:
    return Quantizer(
        f"{op}(Tensor input, Tensor? residual, Tensor? norm_weight, Tensor? scale, Tensor? bias, Tensor? workspace, "
        f"int[] group, {group}int strategy, int op, float eps, bool trigger_completion_at_end) -> Tensor[]",
        _TRT + "cpp/tensorrt_llm/thop/allreduceOp.cpp: its fallback calls fp4_quantize(normed, scale)",
        _all_reduce_norm(op, {"op": _RESIDUAL_RMS_NORM, "scale": None}),
        _fused_with_all_reduce,
        "scale",
        activations=("input", "residual"),
    )


_TRT = "NVIDIA/TensorRT-LLM: "
_AUTO = _TRT + "tensorrt_llm/_torch/auto_deploy/custom_ops/"
_VLLM = "vllm-project/vllm: "
_FLASHINFER = "flashinfer-ai/flashinfer: "
_DIST = _AUTO + "distributed/trtllm_dist.py"
_PLAIN_NVFP4 = {
    "sfVecSize": 16,
    "sfUseUE8M0": False,
    "sf_vec_size": 16,
    "sf_use_ue8m0": False,
    "is_sf_8x4_layout": False,
}

QUANTIZERS = (
    Quantizer(
        "trtllm::fused_add_rms_norm_quant(Tensor input, Tensor residual, Tensor gamma, Tensor? sf_scale, "
        "bool use_rms_norm=True, float eps=1e-6, bool output_hp_norm=False) -> (Tensor, Tensor, Tensor, Tensor?)",
        _TRT + "cpp/tensorrt_llm/thop/fusedAddRMSNormQuant.cpp",
        _add_norm("input", "gamma"),
        {0: CODES, 1: SUM, 2: SCALES, 3: VALUE},
        "sf_scale",
        activations=("input", "residual"),
        wanted={"use_rms_norm": True},
    ),
    Quantizer(
        "trtllm::fused_add_rmsnorm_fp4_quantize(Tensor hidden_states, Tensor residual, Tensor norm_weight, "
        "Tensor scale_factor, float eps, bool return_norm_out) -> Tensor[]",
        _TRT + "cpp/tensorrt_llm/thop/fusedRMSNormFp4Quantize.cpp",
        _add_norm("hidden_states", "norm_weight"),
        _with_norm_first(CODES, SCALES, SUM),
        "scale_factor",
        activations=("hidden_states", "residual"),
    ),
    Quantizer(
        "trtllm::fused_rmsnorm_fp4_quantize(Tensor hidden_states, Tensor norm_weight, Tensor scale_factor, float eps, "
        "bool return_norm_out) -> Tensor[]",
        _TRT + "cpp/tensorrt_llm/thop/fusedRMSNormFp4Quantize.cpp",
        _norm("hidden_states", "norm_weight"),
        _with_norm_first(CODES, SCALES),
        "scale_factor",
        activations=("hidden_states",),
    ),
    Quantizer(
        "trtllm::fused_gated_rmsnorm_quant(Tensor x, Tensor z, Tensor weight, int group_size, float eps=1e-5, "
        "Tensor? sf_scale=None) -> (Tensor, Tensor)",
        _TRT + "cpp/tensorrt_llm/thop/fusedGatedRMSNormQuant.cpp",
        _gated_norm("z"),
        {0: CODES, 1: SCALES},
        "sf_scale",
        activations=("x", "z"),
    ),
    Quantizer(
        "trtllm::fused_relu2_quantize(Tensor input, Tensor sf_scale, int sf_vec_size=16) -> (Tensor, Tensor)",
        _TRT + "cpp/tensorrt_llm/thop/fusedActivationQuant.cpp",
        lambda a: (relu2(a.input), None),
        {0: CODES, 1: SCALES},
        "sf_scale",
        wanted=_PLAIN_NVFP4,
    ),
    Quantizer(
        "trtllm::fp4_quantize(Tensor input, Tensor? globalScale, int sfVecSize, bool sfUseUE8M0=False, "
        "bool isSfSwizzledLayout=True) -> (Tensor, Tensor)",
        _TRT + "cpp/tensorrt_llm/thop/fp4Quantize.cpp",
        _as_is,
        {0: CODES, 1: SCALES},
        "globalScale",
        wanted=_PLAIN_NVFP4,
    ),
    Quantizer(
        "auto_deploy::trtllm_rms_norm_quant_nvfp4(Tensor input, Tensor weight, float eps, Tensor sf_scale) "
        "-> (Tensor, Tensor, Tensor)",
        _AUTO + "normalization/trtllm_fused_add_rms_norm_quant_nvfp4.py",
        _norm("input"),
        {0: VALUE, 1: CODES, 2: SCALES},
        "sf_scale",
    ),
    Quantizer(
        "auto_deploy::trtllm_fused_add_rms_norm_quant_nvfp4(Tensor x, Tensor residual, Tensor weight, float eps, "
        "Tensor sf_scale) -> (Tensor, Tensor, Tensor, Tensor)",
        _AUTO + "normalization/trtllm_fused_add_rms_norm_quant_nvfp4.py",
        _add_norm("x"),
        {0: VALUE, 1: CODES, 2: SCALES, 3: SUM},
        "sf_scale",
        activations=("x", "residual"),
    ),
    Quantizer(
        "auto_deploy::trtllm_fused_gated_rmsnorm_quant_nvfp4(Tensor x, Tensor gate, Tensor weight, Tensor scale, "
        "float eps, int group_size) -> (Tensor, Tensor)",
        _AUTO + "mamba/ (its wrapper of trtllm::fused_gated_rmsnorm_quant)",
        _gated_norm("gate"),
        {0: CODES, 1: SCALES},
        "scale",
        activations=("x", "gate"),
    ),
    Quantizer(
        "auto_deploy::trtllm_fused_relu2_quant_nvfp4(Tensor input, Tensor scale) -> (Tensor, Tensor)",
        _AUTO + "its wrapper of trtllm::fused_relu2_quantize, as transform/library/fuse_relu2_quant_nvfp4.py calls it",
        lambda a: (relu2(a.input), None),
        {0: CODES, 1: SCALES},
        "scale",
    ),
    *(
        _all_reduce(f"trtllm::{op}", group)
        for op, group in (
            ("allreduce", ""),
            ("autotuned_allreduce", ""),
            ("allreduce_pg_by_name", "int rank, str group_name, "),
        )
    ),
    Quantizer(
        "dist::trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4(Tensor tensor, Tensor residual, "
        "Tensor norm_weight, Tensor scale, float eps, str strategy) -> (Tensor, Tensor, Tensor)",
        _DIST,
        _all_reduce_norm("dist::trtllm_fused_allreduce_residual_rmsnorm", {}),
        {0: CODES, 1: SCALES, 2: SUM},
        "scale",
        activations=("tensor", "residual"),
    ),
    Quantizer(
        "dist::trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4(Tensor tensor, Tensor residual, "
        "Tensor norm_weight, Tensor scale, float eps, str strategy) -> (Tensor, Tensor, Tensor, Tensor)",
        _DIST,
        _all_reduce_norm("dist::trtllm_fused_allreduce_residual_rmsnorm", {}),
        {0: VALUE, 1: CODES, 2: SCALES, 3: SUM},
        "scale",
        activations=("tensor", "residual"),
    ),
    Quantizer(
        "_C::scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        _as_is,
        {0: CODES, 1: SCALES, "output": CODES, "output_scale": SCALES},
        "input_scale",
    ),
    Quantizer(
        "_C::scaled_fp4_experts_quant(Tensor(a!) output, Tensor(b!) output_scale, Tensor input, "
        "Tensor input_global_scale, Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        _as_is,
        {"output": CODES, "output_scale": SCALES},
        "input_global_scale",
    ),
    Quantizer(
        "_C::silu_and_mul_scaled_fp4_experts_quant(Tensor(a!) output, Tensor(b!) output_scale, Tensor input, "
        "Tensor input_global_scale, Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        lambda a: (twins.silu_and_mul(a.input), None),
        {"output": CODES, "output_scale": SCALES},
        "input_global_scale",
    ),
    Quantizer(
        "_C::silu_and_mul_nvfp4_quant(Tensor(a!) result, Tensor(b!) result_block_scale, Tensor input, "
        "Tensor input_global_scale) -> ()",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        lambda a: (twins.silu_and_mul(a.input), None),
        {"result": CODES, "result_block_scale": SCALES},
        "input_global_scale",
    ),
    Quantizer(
        "vllm::flashinfer_fused_add_rms_norm_nvfp4_quant(Tensor(a!) result, Tensor(b!) result_block_scale, "
        "Tensor(c!)? residual, Tensor(d!) input, Tensor weight, Tensor input_global_scale, "
        "Tensor? block_scale_unswizzled, bool is_sf_swizzled_layout, float epsilon) -> ()",
        _VLLM + "vllm/model_executor/layers/fusion/fused_norm_quant.py; gives it 448 * 6 / amax",
        _vllm_norm,
        {"result": CODES, "result_block_scale": SCALES, "residual": SUM, "input": UNCHANGED},
        "input_global_scale",
        activations=("input", "residual"),
    ),
    Quantizer(
        "flashinfer::fp4_quantize_sm100(Tensor input, Tensor? global_scale=None, int sf_vec_size=16, "
        "bool sf_use_ue8m0=False, bool is_sf_swizzled_layout=True, bool is_sf_8x4_layout=False, bool? enable_pdl=None) "
        "-> (Tensor, Tensor)",
        _FLASHINFER + "flashinfer/fp4_quantization.py",
        _as_is,
        {0: CODES, 1: SCALES},
        "global_scale",
        wanted=_PLAIN_NVFP4,
    ),
    # Their documentation says that the normed values are divided by the global scale. The kernels multiply: a block's
    # scale is global_scale * amax / 6, and FlashInfer's tests (tests/norm/test_*rmsnorm_fp4_quant_cute_dsl.py) want
    # what fp4_quantize gives with the same 448 * 6 / amax; so do the callers, vLLM and SGLang.
    Quantizer(
        "flashinfer::rmsnorm_fp4quant(Tensor input, Tensor weight, Tensor(a!) y_fp4, Tensor(b!) block_scale, "
        "Tensor? global_scale, float eps=1e-6, int block_size=16, str? scale_format=None, "
        "bool is_sf_swizzled_layout=False) -> ()",
        _FLASHINFER + "flashinfer/cute_dsl/rmsnorm_fp4quant.py, the kernel",
        _norm("input"),
        {"y_fp4": CODES, "block_scale": SCALES},
        "global_scale",
        wanted={"block_size": 16, "scale_format": "e4m3"},
    ),
    Quantizer(
        "flashinfer::add_rmsnorm_fp4quant(Tensor input, Tensor(c!) residual, Tensor weight, Tensor(a!) y_fp4, "
        "Tensor(b!) block_scale, Tensor? global_scale, float eps=1e-6, int block_size=16, str? scale_format=None, "
        "bool is_sf_swizzled_layout=False) -> ()",
        _FLASHINFER + "flashinfer/cute_dsl/add_rmsnorm_fp4quant.py, the kernel",
        _add_norm("input"),
        {"y_fp4": CODES, "block_scale": SCALES, "residual": SUM},
        "global_scale",
        activations=("input", "residual"),
        wanted={"block_size": 16, "scale_format": "e4m3"},
    ),
)

FP8_QUANTIZERS = (
    Fp8Quantizer(
        "tensorrt_llm::static_quantize_e4m3_per_tensor(Tensor input, Tensor scale) -> (Tensor, Tensor)",
        _TRT + "cpp/tensorrt_llm/thop/fp8Op.cpp",
    ),
    Fp8Quantizer(
        "_C::static_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor scale) -> ()",
        _VLLM + "csrc/torch_bindings.cpp",
    ),
    Fp8Quantizer(
        "_C::dynamic_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale) -> ()",
        _VLLM + "csrc/torch_bindings.cpp",
        scale="",
    ),
)

ATTENTIONS = (
    Attention(
        "vllm::unified_attention_with_output(Tensor query, Tensor key, Tensor value, Tensor(a!) output, "
        "str layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, "
        "Tensor? kv_cache_dummy_dep=None) -> ()",
        _VLLM + "vllm/model_executor/layers/attention/attention.py",
    ),
    Attention(
        "trtllm::attn_custom_op_inplace(Tensor q, Tensor? k, Tensor? v, str attention_mask, "
        "Tensor? mrope_rotary_cos_sin, Tensor? mrope_position_deltas, int? attention_window_size, "
        "Tensor? attention_mask_data, Tensor? attention_sinks, str layer_idx, Tensor(a!) output, "
        "Tensor(b!)? output_sf) -> ()",
        _TRT + "tensorrt_llm/_torch/modules/attention.py",
        scale="",
        block_scale="output_sf",
        like="q",
        no_twin="the factor of its output is kept in its layer, not in the graph; "
        "TRTLLM_ENABLE_ATTENTION_NVFP4_OUTPUT=0 gives bfloat16",
    ),
)

ROUND_TRIPS = (
    RoundTrip(
        "tensorrt::dynamic_block_quantize_op(Tensor input, int block_size, Tensor amax, int num_bits, "
        "int exponent_bits, int scale_num_bits, int scale_exponent_bits) -> Tensor",
        "NVIDIA/Model-Optimizer: modelopt/torch/quantization/tensor_quant.py",
        wanted={"block_size": 16, "num_bits": 4, "exponent_bits": 2, "scale_num_bits": 8, "scale_exponent_bits": 4},
    ),
)
