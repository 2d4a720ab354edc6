"""The operations that multiply by NVFP4 weights: linear, grouped, and whole blocks of experts.

Alpha is 1 / (the activation's factor x the weight's factor) everywhere: what undoes both on the sums.
"""

from __future__ import annotations

from types import SimpleNamespace as Arguments

import torch

from fp4pass.passes.unfuse import twins
from fp4pass.passes.unfuse.rows import GROUPED, Experts, Product
from fp4pass.passes.unfuse.twins import Weight

_TRT = "NVIDIA/TensorRT-LLM: "
_TRT_OPS = _TRT + "tensorrt_llm/_torch/custom_ops/torch_custom_ops.py"
_AUTO = _TRT + "tensorrt_llm/_torch/auto_deploy/custom_ops/"
_VLLM = "vllm-project/vllm: "
_TORCH = "pytorch/pytorch: aten/src/ATen/native/native_functions.yaml; torch.nn.functional.scaled_mm"
_IN_TILES, _BLOCKS_OF_16, _WHOLE = 1, 2, 0  # torch.nn.functional: SwizzleType.SWIZZLE_32_4_4, ScalingType

_GEMM = (
    "(Tensor act_fp4, Tensor weight, Tensor act_sf, Tensor weight_scale, Tensor alpha, ScalarType output_dtype, "
    "bool to_userbuffers=False) -> Tensor"
)
_PREQUANTIZED = (
    "(Tensor input_fp4, Tensor weight_fp4, Tensor input_sf, Tensor weight_scale, Tensor alpha, Tensor? bias=None, "
    "str out_dtype='bfloat16') -> Tensor"
)
_NO_ALL_TO_ALL = {"apply_routing_on_input": False, "enable_alltoall": False, "mapping_config": ""}


def _gemm(op: str, read: str = _TRT_OPS) -> Product:
    return Product(
        op + _GEMM,
        read,
        x="act_fp4",
        x_scale="act_sf",
        codes="weight",
        scale="weight_scale",
        alpha="alpha",
        # A later all-reduce would look for the result in the buffers that GPUs share.
        wanted={"sf_use_ue8m0": False, "to_userbuffers": False},
    )


def _prequantized(op: str) -> Product:
    return Product(
        op + _PREQUANTIZED,
        _AUTO + "quantization/, as transform/library/fuse_rmsnorm_quant_nvfp4.py calls it",
        x="input_fp4",
        x_scale="input_sf",
        codes="weight_fp4",
        scale="weight_scale",
        alpha="alpha",
        bias="bias",
    )


def _ends_of_vllm(a: Arguments) -> torch.Tensor:
    """Where each expert's rows end, from where they start and how many there are."""
    return a.expert_offsets[: a.problem_sizes.shape[0]] + a.problem_sizes[:, 0]


PRODUCTS = (
    _gemm("trtllm::nvfp4_gemm"),
    _gemm("trtllm::nvfp4_gemm_cutlass"),
    _gemm("trtllm::nvfp4_gemm_cublaslt"),
    _gemm("trtllm::cuda_core_nvfp4_gemm"),
    Product(
        "trtllm::fp4_gemm(Tensor mat1, Tensor mat2, Tensor mat1_scale, Tensor mat2_scale, Tensor global_scale, "
        "bool sf_use_ue8m0, ScalarType? out_dtype=None) -> Tensor",
        _TRT + "tensorrt_llm/_torch/custom_ops/cpp_custom_ops.py",
        x="mat1",
        x_scale="mat1_scale",
        codes="mat2",
        scale="mat2_scale",
        alpha="global_scale",
        wanted={"sf_use_ue8m0": False},
    ),
    _prequantized("auto_deploy::trtllm_nvfp4_gemm"),
    _prequantized("auto_deploy::trtllm_nvfp4_prequant_linear"),
    Product(
        "auto_deploy::torch_quant_nvfp4_linear(Tensor input, Tensor weight_fp4, Tensor? bias=None, "
        "Tensor? input_scale=None, Tensor? weight_scale=None, Tensor? alpha=None) -> Tensor",
        _AUTO + "quantization/quant.py",
        x="input",
        factor="input_scale",
        codes="weight_fp4",
        scale="weight_scale",
        alpha="alpha",
        bias="bias",
    ),
    Product(
        "auto_deploy::torch_fake_quant_nvfp4_linear(Tensor input, Tensor weight_quantized, Tensor? bias, "
        "Tensor[] input_scale, Tensor[] weight_scale, Tensor[] input_zp, Tensor[] weight_zp) -> Tensor",
        _AUTO + "quantization/torch_quant.py",
        x="input",
        factor="input_scale.0",
        codes="weight_quantized",
        scale="weight_scale.0",
        alpha="weight_scale.1",
        bias="bias",
    ),
    Product(
        "_C::cutlass_scaled_fp4_mm(Tensor(a!) out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, "
        "Tensor alpha) -> ()",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        x="a",
        x_scale="block_scale_a",
        codes="b",
        scale="block_scale_b",
        alpha="alpha",
        output="out",
    ),
    Product(
        "_C::cutlass_fp4_group_mm(Tensor(a!) out, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscales, "
        "Tensor alphas, Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
        _VLLM + "csrc/libtorch_stable/torch_bindings.cpp",
        kind=GROUPED,
        x="a",
        x_scale="a_blockscale",
        codes="b",
        scale="b_blockscales",
        alpha="alphas",
        output="out",
        ends=_ends_of_vllm,
    ),
    Product(
        "vllm::flashinfer_mm_fp4(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, Tensor g_scale, ScalarType dtype, "
        "bool use_8x4_sf_layout, str backend) -> Tensor",
        _VLLM + "vllm/utils/flashinfer.py",
        x="A",
        x_scale="A_scale",
        codes="B",
        scale="B_scale",
        alpha="g_scale",
        transposed=True,
        wanted={"use_8x4_sf_layout": False, "block_size": 16, "use_nvfp4": True},
    ),
    Product(
        "aten::_scaled_mm(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, "
        "Tensor? scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor",
        _TORCH,
        x="self",
        x_scale="scale_a",
        codes="mat2",
        scale="scale_b",
        alpha="",
        bias="bias",
        transposed=True,
        wanted={"scale_result": None},
    ),
    Product(
        "aten::_scaled_mm_v2(Tensor self, Tensor mat2, Tensor[] scale_a, int[] recipe_a, int[] swizzle_a, "
        "Tensor[] scale_b, int[] recipe_b, int[] swizzle_b, Tensor? bias, ScalarType? out_dtype, "
        "int[] contraction_dim=[], bool use_fast_accum=False) -> Tensor",
        _TORCH,
        x="self",
        x_scale="scale_a.0",
        codes="mat2",
        scale="scale_b.0",
        alpha="scale_a.1 scale_b.1",
        bias="bias",
        transposed=True,
        wanted={"recipe_a.0": _BLOCKS_OF_16, "recipe_b.0": _BLOCKS_OF_16, "swizzle_a.0": _IN_TILES}
        | {"swizzle_b.0": _IN_TILES, "recipe_a.1": _WHOLE, "recipe_b.1": _WHOLE},
    ),
    # torch 2.11 to 2.13 have no fake for it: it is in a graph only where somebody has registered one.
    Product(
        "aten::_scaled_grouped_mm_v2(Tensor self, Tensor mat2, Tensor[] scale_a, int[] recipe_a, int[] swizzle_a, "
        "Tensor[] scale_b, int[] recipe_b, int[] swizzle_b, Tensor? offs=None, Tensor? bias=None, "
        "ScalarType? out_dtype=None, int[] contraction_dim=[], bool use_fast_accum=False) -> Tensor",
        _TORCH,
        kind=GROUPED,
        x="self",
        x_scale="scale_a.0",
        codes="mat2",
        scale="scale_b.0",
        alpha="scale_a.1 scale_b.1",
        transposed=True,
        ends=lambda a: a.offs,
        wanted={"recipe_a.0": _BLOCKS_OF_16, "recipe_b.0": _BLOCKS_OF_16, "swizzle_a.0": _IN_TILES, "bias": None}
        | {"swizzle_b.0": _IN_TILES, "recipe_a.1": _WHOLE, "recipe_b.1": _WHOLE},
    ),
)


_ACTIVATIONS = {4: "silu", 5: "silu", 8: "relu2", "silu": "silu", "relu2": "relu2"}
"""TensorRT-LLM's ActivationType: Silu and Swiglu (the same to it), Relu2; older versions pass names."""


def _activation(a: Arguments) -> str | None:
    gated = a.is_gated_mlp if hasattr(a, "is_gated_mlp") else a.mlp_style == "gated_mlp"
    plain = _ACTIVATIONS.get(a.act_fn)
    return plain if not gated else "swiglu" if plain == "silu" else None


def _fused_weights(a: Arguments) -> list[Weight]:
    """Up (with a gate: w3's rows, then w1's) and down; block scales in tiles."""
    up = _in_rows(a.fc1_expert_weights_fp4, a.fc1_weight_blockscale_fp8)
    down = _in_rows(a.fc2_expert_weights_fp4, a.fc2_weight_blockscale_fp8)
    return [Weight(*up, a.fc1_alpha, a.fc1_act_global_scale), Weight(*down, a.fc2_alpha, a.fc2_act_global_scale)]


def _listed_weights(a: Arguments) -> list[Weight]:
    """One tensor an expert, stacked at every call: up (w1), with a gate w3 after it, and down (w2)."""
    names = ["w1", "w3", "w2"] if a.w3_weight else ["w1", "w2"]
    return [
        _stacked(*(getattr(a, f"{w}_{part}") for part in ("weight", "weight_scale", "alpha", "input_scale")))
        for w in names
    ]


def _stacked(codes: list, scales: list, alphas: list, factors: list) -> Weight:
    scalars = (torch.stack([each.reshape(()) for each in part]) for part in (alphas, factors))
    return Weight(*_in_rows(torch.stack(codes), torch.stack(scales)), *scalars)


def _in_rows(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, twins.row_major(scale, (*codes.shape[:2], codes.shape[2] // 8))


EXPERT_BLOCKS = (
    Experts(
        "auto_deploy::trtllm_quant_nvfp4_moe_fused(Tensor x, Tensor selected_experts, Tensor routing_weights, "
        "Tensor fc1_expert_weights_fp4, Tensor fc2_expert_weights_fp4, Tensor fc1_weight_blockscale_fp8, "
        "Tensor fc2_weight_blockscale_fp8, Tensor fc1_act_global_scale, Tensor fc2_act_global_scale, Tensor fc1_alpha, "
        "Tensor fc2_alpha, bool is_gated_mlp=True, int act_fn=4) -> Tensor",
        _AUTO + "fused_moe/trtllm_moe.py",
        _fused_weights,
        _activation,
        codes="fc1_expert_weights_fp4",
        wanted=_NO_ALL_TO_ALL,
    ),
    Experts(
        "auto_deploy::trtllm_nvfp4_trtllm_gen_moe_fused(Tensor x, Tensor selected_experts, Tensor routing_weights, "
        "Tensor fc1_expert_weights_fp4, Tensor fc2_expert_weights_fp4, Tensor fc1_weight_blockscale_fp8, "
        "Tensor fc2_weight_blockscale_fp8, Tensor fc1_act_global_scale, Tensor fc1_scale_c, Tensor fc1_alpha, "
        "Tensor fc2_alpha, int num_experts, int top_k, int intermediate_size, int hidden_size, bool is_gated_mlp=True, "
        "int act_fn=4) -> Tensor",
        _AUTO + "fused_moe/trtllm_moe.py",
        None,
        None,
        codes="fc1_expert_weights_fp4",
        no_twin="its weights are shuffled for a kernel of SM100; trtllm_quant_nvfp4_moe_fused takes them plain",
    ),
    Experts(
        "auto_deploy::torch_quant_nvfp4_moe(Tensor x, Tensor selected_experts, Tensor routing_weights, "
        "Tensor[] w1_weight, Tensor[] w2_weight, Tensor[] w3_weight, Tensor[] w1_input_scale, Tensor[] w2_input_scale, "
        "Tensor[] w3_input_scale, Tensor[] w1_weight_scale, Tensor[] w2_weight_scale, Tensor[] w3_weight_scale, "
        "Tensor[] w1_alpha, Tensor[] w2_alpha, Tensor[] w3_alpha, bool is_gated_mlp=True, int act_fn=4) -> Tensor",
        _AUTO + "quantization/quant.py, fused_moe/torch_moe.py",
        _listed_weights,
        _activation,
        codes="w1_weight.0",
        wanted=_NO_ALL_TO_ALL,
    ),
)
