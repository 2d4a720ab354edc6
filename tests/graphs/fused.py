"""Layers as a graph prepared for Blackwell has them: an op that quantizes, then an FP4 product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .running import activations, compiling
from .standins import dense, fake_codes, gated, in_tiles, norm, relu_squared, silu_times

ops = torch.ops
K, N, GROUP_COLUMNS, EPS = 96, 80, 32, 1e-5
"""Whole blocks, but no whole tiles of block scales; the gated norm's group; the norms' epsilon."""
FACTOR, GLOBAL = 300.0, 0.015
"""What activations are multiplied by, and the weight's global scale. Alpha is GLOBAL / FACTOR."""


class Layer(nn.Module):
    """Weights and scales, registered as buffers, for the functions below to use."""

    def __init__(self, run: Callable[..., Any], experts: int = 0, n: int = N, k: int = K, seed: int = 0) -> None:
        super().__init__()
        self.run = run
        random = torch.Generator().manual_seed(seed)
        lead = (experts,) if experts else ()

        def scales(rows: int, columns: int) -> torch.Tensor:
            return torch.randint(0x30, 0x40, (*lead, rows, columns // 16), generator=random, dtype=torch.uint8)

        codes = torch.randint(0, 256, (*lead, n, k // 2), generator=random, dtype=torch.uint8)
        alphas = (GLOBAL / FACTOR * (1 + torch.rand(lead, generator=random))) if lead else torch.tensor(GLOBAL / FACTOR)
        for name, tensor in {
            "codes": codes,
            "scale": in_tiles(scales(n, k)),
            "alpha": alphas,
            "factor": torch.tensor(FACTOR),
            "gamma": torch.rand(k, generator=random).bfloat16() + 0.5,
            "bias": torch.randn(n, generator=random).bfloat16(),
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)

    def exact_weight(self, expert: int | None = None) -> torch.Tensor:
        """The weight in float64."""
        which = () if expert is None else (expert,)
        return dense(self.codes[which], self.scale[which]) * (self.alpha.double()[which] * FACTOR)

    def gemm(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The plainest of the FP4 products."""
        return ops.trtllm.nvfp4_gemm(codes, self.codes, scale, self.scale, self.alpha, torch.bfloat16)


def buffers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes and block scales for an op to write to."""
    return fake_codes(x)


def _mutating(op: Callable[..., None], m: Layer, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    codes, scale = buffers(x)
    op(codes, scale, *arguments)
    return m.gemm(codes, scale)


def trtllm_add_norm(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, total, scale, normed = ops.trtllm.fused_add_rms_norm_quant(x, residual, m.gamma, m.factor, True, EPS, True)
    return m.gemm(codes.view(torch.uint8), scale), total, normed


def trtllm_add_norm_list(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, scale, total = ops.trtllm.fused_add_rmsnorm_fp4_quantize(x, residual, m.gamma, m.factor, EPS, False)
    return m.gemm(codes, scale), total


def trtllm_norm_list(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    normed, codes, scale = ops.trtllm.fused_rmsnorm_fp4_quantize(x, m.gamma, m.factor, EPS, True)
    return m.gemm(codes, scale), None, normed


def trtllm_gated_norm(m: Layer, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    codes, scale = ops.trtllm.fused_gated_rmsnorm_quant(x, gate, m.gamma, GROUP_COLUMNS, EPS, m.factor)
    return m.gemm(codes.view(torch.uint8), scale)


def trtllm_relu2(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.trtllm.fused_relu2_quantize(x, m.factor))


def trtllm_quantize(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.trtllm.fp4_quantize(x, m.factor, 16))


def auto_norm(m: Layer, x: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
    normed, codes, scale = ops.auto_deploy.trtllm_rms_norm_quant_nvfp4(x, m.gamma, EPS, m.factor)
    return m.gemm(codes, scale), None, normed


def auto_add_norm(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fused = ops.auto_deploy.trtllm_fused_add_rms_norm_quant_nvfp4
    normed, codes, scale, total = fused(x, residual, m.gamma, EPS, m.factor)
    return m.gemm(codes, scale), total, normed


def auto_gated_norm(m: Layer, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    fused = ops.auto_deploy.trtllm_fused_gated_rmsnorm_quant_nvfp4
    return m.gemm(*fused(x, gate, m.gamma, m.factor, EPS, GROUP_COLUMNS))


def auto_relu2(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.auto_deploy.trtllm_fused_relu2_quant_nvfp4(x, m.factor))


RANKS = [0, 1]
"""All-reduces of the stand-ins find the same on every rank."""
QUANTIZED, QUANTIZED_WITH_NORM = 5, 7


def all_reduce(op: str, *group: Any, fusion: int = QUANTIZED) -> Callable[..., Any]:
    def run(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fused = getattr(ops.trtllm, op)
        *normed, codes, scale, total = fused(
            x, residual, m.gamma, m.factor, None, None, RANKS, *group, 3, fusion, EPS, False
        )
        return m.gemm(codes, scale), total, *normed

    return run


def dist(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fused = ops.dist.trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4
    codes, scale, total = fused(x, residual, m.gamma, m.factor, EPS, "AUTO")
    return m.gemm(codes, scale), total


def dist_with_norm(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fused = ops.dist.trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4
    normed, codes, scale, total = fused(x, residual, m.gamma, m.factor, EPS, "AUTO")
    return m.gemm(codes, scale), total, normed


def vllm_quantize_into(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    codes, scale = buffers(x)
    ops._C.scaled_fp4_quant.out(x, m.factor, True, output=codes, output_scale=scale)
    return m.gemm(codes, scale)


def vllm_quantize(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops._C.scaled_fp4_quant(x, m.factor, True))


def vllm_silu(m: Layer, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return _mutating(ops._C.silu_and_mul_nvfp4_quant, m, x, torch.cat((x, gate), -1), m.factor)


def vllm_add_norm(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    residual = residual.clone()
    fused = ops.vllm.flashinfer_fused_add_rms_norm_nvfp4_quant
    return _mutating(fused, m, x, residual, x, m.gamma, m.factor, None, True, EPS), residual


def vllm_norm(m: Layer, x: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fused = ops.vllm.flashinfer_fused_add_rms_norm_nvfp4_quant
    x = x.clone()
    return _mutating(fused, m, x, None, x, m.gamma, m.factor, None, True, EPS), None, None, x


def flashinfer_quantize(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.gemm(*ops.flashinfer.fp4_quantize_sm100(x, m.factor))


def flashinfer_norm(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    codes, scale = buffers(x)
    ops.flashinfer.rmsnorm_fp4quant(x, m.gamma, codes, scale, m.factor, EPS)
    return m.gemm(codes, scale)


def flashinfer_add_norm(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (codes, scale), residual = buffers(x), residual.clone()
    ops.flashinfer.add_rmsnorm_fp4quant(x, residual, m.gamma, codes, scale, m.factor, EPS)
    return m.gemm(codes, scale), residual


def _normed(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return norm(x, m.gamma, EPS)


def _add_normed(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return norm(x + residual, m.gamma, EPS)


def _gated(m: Layer, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return gated(x, gate, m.gamma, GROUP_COLUMNS, EPS)


def _reduced(m: Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return norm(len(RANKS) * x + residual, m.gamma, EPS)


def unquantized(m: Layer, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The input itself."""
    return x.double()


QUANTIZING: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor]]] = {
    "trtllm::fused_add_rms_norm_quant": (trtllm_add_norm, _add_normed),
    "trtllm::fused_add_rmsnorm_fp4_quantize": (trtllm_add_norm_list, _add_normed),
    "trtllm::fused_rmsnorm_fp4_quantize": (trtllm_norm_list, _normed),
    "trtllm::fused_gated_rmsnorm_quant": (trtllm_gated_norm, _gated),
    "trtllm::fused_relu2_quantize": (trtllm_relu2, lambda m, x, _: relu_squared(x)),
    "trtllm::fp4_quantize": (trtllm_quantize, unquantized),
    "auto_deploy::trtllm_rms_norm_quant_nvfp4": (auto_norm, _normed),
    "auto_deploy::trtllm_fused_add_rms_norm_quant_nvfp4": (auto_add_norm, _add_normed),
    "auto_deploy::trtllm_fused_gated_rmsnorm_quant_nvfp4": (auto_gated_norm, _gated),
    "auto_deploy::trtllm_fused_relu2_quant_nvfp4": (auto_relu2, lambda m, x, _: relu_squared(x)),
    "trtllm::allreduce": (all_reduce("allreduce"), _reduced),
    "trtllm::autotuned_allreduce": (all_reduce("autotuned_allreduce", fusion=QUANTIZED_WITH_NORM), _reduced),
    "trtllm::allreduce_pg_by_name": (all_reduce("allreduce_pg_by_name", 0, "a group"), _reduced),
    "dist::trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4": (dist, _reduced),
    "dist::trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4": (dist_with_norm, _reduced),
    "_C::scaled_fp4_quant": (vllm_quantize, unquantized),
    "_C::silu_and_mul_nvfp4_quant": (vllm_silu, lambda m, x, gate: silu_times(torch.cat((x, gate), -1))),
    "vllm::flashinfer_fused_add_rms_norm_nvfp4_quant": (vllm_add_norm, _add_normed),
    "flashinfer::fp4_quantize_sm100": (flashinfer_quantize, unquantized),
    "flashinfer::rmsnorm_fp4quant": (flashinfer_norm, _normed),
    "flashinfer::add_rmsnorm_fp4quant": (flashinfer_add_norm, _add_normed),
}
"""By the op: a layer with it, and what its product multiplies, in float64. A layer gives its product and then perhaps
the residual sum, the normed values, and an argument that must come out as it went in."""


# --- Products.


def _quantized(m: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.trtllm.fp4_quantize(x, m.factor, 16)


def gemm(op: str) -> Callable[[Layer, torch.Tensor], torch.Tensor]:
    def run(m: Layer, x: torch.Tensor) -> torch.Tensor:
        codes, scale = _quantized(m, x)
        return getattr(ops.trtllm, op)(codes, m.codes, scale, m.scale, m.alpha, torch.bfloat16)

    return run


def fp4_gemm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = _quantized(m, x)
    return ops.trtllm.fp4_gemm(codes, m.codes, scale, m.scale.flatten(), m.alpha, False, torch.float16)


def auto_gemm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = _quantized(m, x)
    return ops.auto_deploy.trtllm_nvfp4_gemm(codes, m.codes, scale, m.scale, m.alpha)


def auto_prequantized(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = _quantized(m, x)
    return ops.auto_deploy.trtllm_nvfp4_prequant_linear(codes, m.codes, scale, m.scale.flatten(), m.alpha, m.bias)


def auto_linear(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return ops.auto_deploy.torch_quant_nvfp4_linear(x, m.codes, m.bias, m.factor, m.scale.flatten(), m.alpha)


def auto_listed_linear(m: Layer, x: torch.Tensor) -> torch.Tensor:
    fused = ops.auto_deploy.torch_fake_quant_nvfp4_linear
    return fused(x, m.codes, m.bias, [m.factor], [m.scale, m.alpha], [], [])


def vllm_mm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], N)
    codes, scale = _quantized(m, x)
    ops._C.cutlass_scaled_fp4_mm(out, codes, m.codes, scale, m.scale.view(torch.float8_e4m3fn), m.alpha)
    return out


def vllm_mm_into_columns(m: Layer, x: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0] + 2, N)
    codes, scale = _quantized(m, x)
    ops._C.cutlass_scaled_fp4_mm(out[1:-1], codes, m.codes, scale, m.scale, m.alpha)
    return out


def flashinfer_mm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = _quantized(m, x)
    return ops.vllm.flashinfer_mm_fp4(codes, m.codes.t(), scale, m.scale.t(), m.alpha, torch.bfloat16, False, "cutlass")


LINEARS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    **{f"trtllm::{op}": gemm(op) for op in ("nvfp4_gemm", "nvfp4_gemm_cutlass", "nvfp4_gemm_cublaslt")},
    "trtllm::cuda_core_nvfp4_gemm": gemm("cuda_core_nvfp4_gemm"),
    "trtllm::fp4_gemm": fp4_gemm,
    "auto_deploy::trtllm_nvfp4_gemm": auto_gemm,
    "auto_deploy::trtllm_nvfp4_prequant_linear": auto_prequantized,
    "auto_deploy::torch_quant_nvfp4_linear": auto_linear,
    "auto_deploy::torch_fake_quant_nvfp4_linear": auto_listed_linear,
    "_C::cutlass_scaled_fp4_mm": vllm_mm,
    "vllm::flashinfer_mm_fp4": flashinfer_mm,
}


def rows(count: int = 5, seed: int = 1) -> torch.Tensor:
    """Activations ``[count, K]`` in bfloat16."""
    return activations(count, K, dtype=torch.bfloat16, seed=seed)


@torch.no_grad()
def compile_for_sm90(layer: Layer, *given: torch.Tensor, **options: object) -> None:
    """Compile ``layer`` for ``given`` as for an SM90, the metadata checked after each pass."""
    compiling(layer, {"target_sm": 90, "check": True, **options})(*given)
