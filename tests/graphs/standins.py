"""Operations of other libraries as stand-ins: their schemas, from the tables of un-fusing, and what they compute.

They really pack to FP4 and multiply in float64, by arithmetic of their own: nothing here comes from the twins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fp4pass.lowering.reference import decode_codes, decode_scale
from fp4pass.passes.unfuse.graph import ROWS

TILE = (128, 4)
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


class StandIns:
    """Registers ops under their own names until `close`. ``calls`` counts what ran."""

    def __init__(self) -> None:
        self._libraries: dict[str, torch.library.Library] = {}

    def define(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
        """An op that runs on the CPU and, unless ``fake`` says more, on fake tensors by the same function."""
        namespace, _, rest = schema.partition("::")
        if namespace not in self._libraries:
            self._libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        library = self._libraries[namespace]
        library.define(rest)
        name = rest.partition("(")[0]
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"{namespace}::{name}", fake or run, lib=library)

    def row(self, name: str) -> None:
        """The op of a row of the tables, as ``IMPLEMENTATIONS`` has it."""
        self.define(ROWS[name].schema, *IMPLEMENTATIONS[name])

    def close(self) -> None:
        """Forget all ops."""
        for library in self._libraries.values():
            library._destroy()


# --- FP4.


def to_codes(values: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes of float64 ``[..., K]``, nearest, ties to the even code."""
    size = values.abs().double()
    below, above = torch.bucketize(size, BOUNDS.double()), torch.bucketize(size, BOUNDS.double(), right=True)
    codes = torch.where(below % 2 == 0, below, above).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def in_tiles(scale: torch.Tensor) -> torch.Tensor:
    """Row-major bytes ``[(E,) N, G]`` -> tiles of 128 rows by 4 blocks, padded with zeros, ``[(E,) N', G']``."""
    rows, groups = scale.shape[-2:]
    scale = functional.pad(scale, (0, -groups % 4, 0, -rows % 128))
    *lead, rows, groups = scale.shape
    tiles = scale.reshape(*lead, rows // 128, 4, 32, groups // 4, 4)
    n = len(lead)
    return tiles.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, rows, groups).contiguous()


def in_rows(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `in_tiles`, from any shape of the tiles."""
    found = torch.empty(rows, groups, dtype=torch.uint8)
    flat, wide = scale.contiguous().view(torch.uint8).flatten(), -(-groups // 4)
    for r in range(rows):
        for c in range(groups):
            place = (r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            found[r, c] = flat[place]
    return found


def quantize(x: torch.Tensor, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [..., K]`` times factor, as codes ``[M, K/2]`` and swizzled E4M3 bytes."""
    rows = x.reshape(-1, x.shape[-1]).double()
    if factor is not None:
        rows = rows * (factor.double().reshape(-1, 1) if factor.numel() > 1 else factor.double().reshape(()))
    blocks = rows.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    return to_codes((blocks / scale.double().unsqueeze(-1)).nan_to_num(0).flatten(-2)), in_tiles(
        scale.view(torch.uint8)
    )


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes ``[N, K/2]`` with swizzled scales, in float64."""
    rows, half = codes.shape
    blocks = decode_codes(codes.contiguous(), dtype=torch.float64).unflatten(-1, (-1, 16))
    return (blocks * decode_scale(in_rows(scale, rows, half // 8), torch.float64).unsqueeze(-1)).flatten(-2)


def multiply(codes, weight, scale, weight_scale, alpha, dtype=torch.bfloat16):
    """``alpha * a @ b.T`` in float64, rounded once."""
    return (dense(codes, scale) @ dense(weight, weight_scale).T * alpha.double()).to(dtype)


def fake_codes(x: torch.Tensor, word: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes (in words of ``word`` bytes) and block scales for ``x``."""
    rows, groups = x.numel() // x.shape[-1], x.shape[-1] // 16
    codes = x.new_empty(rows, x.shape[-1] // (2 * word), dtype=torch.uint8 if word == 1 else torch.int32)
    return codes, x.new_empty((rows + 127) // 128 * 128 * ((groups + 3) // 4 * 4), dtype=torch.uint8)


# --- What the norms compute, in float64.


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without any rounding."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group: int, eps: float) -> torch.Tensor:
    """The Mamba mixer's norm without any rounding."""
    wide = (x.double() * functional.silu(gate.double())).unflatten(-1, (-1, group))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight.double()


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU without any rounding."""
    return x.double().relu().square()


def silu_times(x: torch.Tensor) -> torch.Tensor:
    """silu(left half) x right half without any rounding."""
    gate, up = x.double().chunk(2, -1)
    return functional.silu(gate) * up


def silu_times_stored(x: torch.Tensor) -> torch.Tensor:
    """The same in ``x``'s dtype, as a kernel computes it: in float32, so that ties fall as they do anywhere."""
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)


def _int32(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.int32)


def _flat(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0], pair[1].flatten()


def _write(target: torch.Tensor, found: torch.Tensor) -> None:
    target.view(torch.uint8).copy_(found.reshape(target.view(torch.uint8).shape))


def _into(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, factor: torch.Tensor | None) -> None:
    found = quantize(values, factor)
    _write(codes, found[0])
    _write(scale, found[1])


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _relu2(input, sf_scale, sf_vec_size=16):
    return _flat(quantize(relu_squared(input).to(input.dtype), sf_scale))


def _quantize(input, scale=None, *_):
    return _flat(quantize(input, scale))


def _add_norm_quant(input, residual, gamma, sf_scale=None, use_rms_norm=True, eps=1e-6, output_hp_norm=False):
    total = input + residual
    normed = norm(total, gamma, eps).to(input.dtype)
    codes, scale = _flat(quantize(normed, sf_scale))
    return _int32(codes), total, scale, normed


def _add_norm_quant_fake(input, residual, gamma, sf_scale=None, use_rms_norm=True, eps=1e-6, output_hp_norm=False):
    codes, scale = fake_codes(input, 4)
    return codes, torch.empty_like(input), scale, torch.empty_like(input)


def _norm_list(x, weight, factor, eps, return_norm_out):
    normed = norm(x, weight, eps).to(x.dtype)
    return [*([normed] if return_norm_out else []), *_flat(quantize(normed, factor))]


def _norm_list_fake(x, weight, factor, eps, return_norm_out):
    return [*([torch.empty_like(x)] if return_norm_out else []), *fake_codes(x)]


def _add_norm_list(x, residual, weight, factor, eps, return_norm_out):
    return [*_norm_list(x + residual, weight, factor, eps, return_norm_out), x + residual]


def _add_norm_list_fake(x, residual, weight, factor, eps, return_norm_out):
    return [*_norm_list_fake(x, weight, factor, eps, return_norm_out), torch.empty_like(x)]


def _gated_quant(x, z, weight, group_size, eps=1e-5, sf_scale=None):
    codes, scale = _flat(quantize(gated(x, z, weight, group_size, eps).to(x.dtype), sf_scale))
    return _int32(codes), scale


def _auto_norm(input, weight, eps, sf_scale):
    normed = norm(input, weight, eps).to(input.dtype)
    return (normed, *_flat(quantize(normed, sf_scale)))


def _auto_add_norm(x, residual, weight, eps, sf_scale):
    return (*_auto_norm(x + residual, weight, eps, sf_scale), x + residual)


def _auto_gated(x, gate, weight, scale, eps, group):
    return _flat(quantize(gated(x, gate, weight, group, eps).to(x.dtype), scale))


def _experts_quant(output, output_scale, input, factor, starts, scale_starts):
    for e, (start, end) in enumerate(zip(starts.tolist(), [*starts.tolist()[1:], input.shape[0]], strict=True)):
        codes, scale = quantize(input[start:end], factor[e])
        output[start:end] = codes
        begin = int(scale_starts[e])
        output_scale[begin : begin + scale.shape[0]] = scale


def _silu_experts_quant(output, output_scale, input, factor, starts, scale_starts):
    _experts_quant(output, output_scale, silu_times_stored(input), factor, starts, scale_starts)


def _vllm_norm(result, scale, residual, input, weight, factor, unswizzled, swizzled, epsilon):
    if residual is not None:
        residual.copy_(input + residual)
    _into(result, scale, norm(input if residual is None else residual, weight, epsilon).to(input.dtype), factor)


def _flashinfer_norm(input, weight, y, scale, factor, eps=1e-6, block=16, swizzled=False):
    _into(y, scale, norm(input, weight, eps).to(input.dtype), None if factor is None else 1 / factor)


def _flashinfer_add_norm(input, residual, weight, y, scale, factor, eps=1e-6, block=16, swizzled=False):
    residual.copy_(input + residual)
    _flashinfer_norm(residual, weight, y, scale, factor, eps)


def _gemm(a, b, sa, sb, alpha, dtype, *_):
    return multiply(a.view(torch.uint8), b, sa, sb, alpha, dtype)


def _gemm_fake(a, b, sa, sb, alpha, dtype, *_):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _linear(input, weight, bias, factor, scale, alpha, *_):
    out = multiply(*_swap(quantize(input, factor), weight, scale), alpha, input.dtype)
    return (out if bias is None else out + bias).reshape(*input.shape[:-1], -1)


def _swap(pair, weight, scale):
    return pair[0], weight, pair[1], scale


def _linear_fake(input, weight, *_):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _listed_linear(input, weight, bias, factors, scales, *_):
    return _linear(input, weight, bias, factors[0], scales[0], scales[1])


def _vllm_mm(out, a, b, sa, sb, alpha):
    out.copy_(multiply(a.view(torch.uint8), b, sa, sb, alpha, out.dtype))


def _group_mm(out, a, b, sa, sb, alphas, sizes, starts, scale_starts):
    for e, (start, size) in enumerate(zip(starts.tolist(), sizes[:, 0].tolist(), strict=False)):
        # Each expert's block scales begin at a tile of their own.
        begin = int(scale_starts[e]) * (sa.numel() // sa.shape[0])
        if size:
            own = sa.view(torch.uint8).flatten()[begin:]
            out[start : start + size] = multiply(a[start : start + size], b[e], own, sb[e], alphas[e], out.dtype)


def _moe(x, ids, routing, up, down, activation, gate=None):
    """``up`` and ``down``: (codes, scale, alpha, factor) by expert."""
    rows = x.reshape(-1, x.shape[-1])
    total = torch.zeros_like(rows, dtype=torch.float64)
    for t in range(rows.shape[0]):
        for e, weight in zip(ids[t].tolist(), routing[t].tolist(), strict=True):
            hidden = activation(*(_row(rows[t : t + 1], side, e) for side in ([up] if gate is None else [gate, up])))
            total[t] += _row(hidden.to(x.dtype), down, e)[0].double() * weight
    return total.to(x.dtype).reshape(x.shape)


def _row(x, side, e):
    codes, scale, alpha, factor = (part[e] if part is not None and len(part) > 1 else part[0] for part in side)
    return multiply(*_swap(quantize(x, factor), codes, scale), alpha, x.dtype)


def _plain_act(hidden):
    return relu_squared(hidden)


def _fused_moe(x, ids, routing, c1, c2, s1, s2, f1, f2, a1, a2, is_gated_mlp=True, act_fn=4):
    def gated_act(hidden):
        return silu_times_stored(torch.cat(hidden.chunk(2, -1)[::-1], -1))

    scalars = [part.reshape(-1) for part in (a1, f1, a2, f2)]
    return _moe(
        x, ids, routing, (c1, s1, *scalars[:2]), (c2, s2, *scalars[2:]), gated_act if is_gated_mlp else _plain_act
    )


def _listed_moe(x, ids, routing, w1, w2, w3, f1, f2, f3, s1, s2, s3, a1, a2, a3, is_gated_mlp=True, act_fn=4):
    def gated_act(gate, up):
        return silu_times_stored(torch.cat((gate, up), -1))

    if not is_gated_mlp:
        return _moe(x, ids, routing, (w1, s1, a1, f1), (w2, s2, a2, f2), _plain_act)
    return _moe(x, ids, routing, (w3, s3, a3, f3), (w2, s2, a2, f2), gated_act, gate=(w1, s1, a1, f1))


def _same(x, *_):
    return torch.empty_like(x)


def _attention(query, key, value, output, layer, scale=None, block_scale=None):
    result = functional.softmax(query.double() @ key.double().T, -1) @ value.double()
    if block_scale is not None:
        _into(output, block_scale, result.to(query.dtype), scale)
    elif scale is not None:
        output.copy_((result / scale).to(output.dtype))
    else:
        output.copy_(result)


def _static_fp8(input, scale):
    return (input.double() / scale.double()).clamp(-448, 448).to(torch.float8_e4m3fn), scale.clone()


def _static_fp8_into(result, input, scale):
    result.copy_(_static_fp8(input, scale)[0])


def _dynamic_fp8_into(result, input, scale):
    scale.copy_(input.float().abs().max() / 448)
    _static_fp8_into(result, input, scale)


def _fake_quantize(x, block, amax, *_):
    factor = 6 * 448 / amax.double()
    codes, scale = quantize(x, factor)
    return (dense(codes, scale) / factor).to(x.dtype).reshape(x.shape)


_QUANTIZE = (_quantize, lambda input, *_: fake_codes(input))
_GEMM = (_gemm, _gemm_fake)

IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "trtllm::fused_add_rms_norm_quant": (_add_norm_quant, _add_norm_quant_fake),
    "trtllm::fused_add_rmsnorm_fp4_quantize": (_add_norm_list, _add_norm_list_fake),
    "trtllm::fused_rmsnorm_fp4_quantize": (_norm_list, _norm_list_fake),
    "trtllm::fused_gated_rmsnorm_quant": (_gated_quant, lambda x, *_: fake_codes(x, 4)),
    "trtllm::fused_relu2_quantize": (_relu2, lambda input, *_: fake_codes(input)),
    "trtllm::fp4_quantize": _QUANTIZE,
    "auto_deploy::trtllm_rms_norm_quant_nvfp4": (_auto_norm, lambda x, *_: (torch.empty_like(x), *fake_codes(x))),
    "auto_deploy::trtllm_fused_add_rms_norm_quant_nvfp4": (
        _auto_add_norm,
        lambda x, *_: (torch.empty_like(x), *fake_codes(x), torch.empty_like(x)),
    ),
    "auto_deploy::trtllm_fused_gated_rmsnorm_quant_nvfp4": (
        lambda x, gate, weight, scale, eps, group: _flat(
            quantize(gated(x, gate, weight, group, eps).to(x.dtype), scale)
        ),
        lambda x, *_: fake_codes(x),
    ),
    "_C::scaled_fp4_quant": (lambda input, scale, swizzled: _flat(quantize(input, scale)), _QUANTIZE[1]),
    "_C::scaled_fp4_experts_quant": (_experts_quant, _nothing),
    "_C::silu_and_mul_scaled_fp4_experts_quant": (_silu_experts_quant, _nothing),
    "_C::silu_and_mul_nvfp4_quant": (
        lambda result, scale, input, factor: _into(result, scale, silu_times_stored(input), factor),
        _nothing,
    ),
    "vllm::flashinfer_fused_add_rms_norm_nvfp4_quant": (_vllm_norm, _nothing),
    "flashinfer::fp4_quantize_sm100": _QUANTIZE,
    "flashinfer::rmsnorm_fp4quant": (_flashinfer_norm, _nothing),
    "flashinfer::add_rmsnorm_fp4quant": (_flashinfer_add_norm, _nothing),
    "tensorrt_llm::static_quantize_e4m3_per_tensor": (
        _static_fp8,
        lambda x, scale: (torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(scale)),
    ),
    "_C::static_scaled_fp8_quant": (_static_fp8_into, _nothing),
    "_C::dynamic_scaled_fp8_quant": (_dynamic_fp8_into, _nothing),
    "tensorrt::dynamic_block_quantize_op": (_fake_quantize, _same),
    "vllm::unified_attention_with_output": (_attention, _nothing),
    "trtllm::nvfp4_gemm": _GEMM,
    "trtllm::nvfp4_gemm_cutlass": _GEMM,
    "trtllm::nvfp4_gemm_cublaslt": _GEMM,
    "trtllm::cuda_core_nvfp4_gemm": _GEMM,
    "trtllm::fp4_gemm": (
        lambda a, b, sa, sb, alpha, ue8m0, dtype: _gemm(a, b, sa, sb, alpha, dtype),
        lambda a, b, sa, sb, alpha, ue8m0, dtype: _gemm_fake(a, b, sa, sb, alpha, dtype),
    ),
    "auto_deploy::trtllm_nvfp4_gemm": (
        lambda a, b, sa, sb, alpha, bias=None, dtype="bfloat16": _gemm(a, b, sa, sb, alpha, getattr(torch, dtype)),
        lambda a, b, sa, sb, alpha, bias=None, dtype="bfloat16": _gemm_fake(a, b, sa, sb, alpha, getattr(torch, dtype)),
    ),
    "auto_deploy::torch_quant_nvfp4_linear": (_linear, _linear_fake),
    "auto_deploy::torch_fake_quant_nvfp4_linear": (_listed_linear, _linear_fake),
    "_C::cutlass_scaled_fp4_mm": (_vllm_mm, _nothing),
    "_C::cutlass_fp4_group_mm": (_group_mm, _nothing),
    "vllm::flashinfer_mm_fp4": (
        lambda a, b, sa, sb, alpha, dtype, small, backend: _gemm(a, b.T.contiguous(), sa, sb.T, alpha, dtype),
        lambda a, b, sa, sb, alpha, dtype, small, backend: a.new_empty(a.shape[0], b.shape[1], dtype=dtype),
    ),
    "auto_deploy::trtllm_quant_nvfp4_moe_fused": (_fused_moe, _same),
    "auto_deploy::torch_quant_nvfp4_moe": (_listed_moe, _same),
}
