"""Stand-ins for the operations of other libraries, to register under their own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .standins import (
    dense,
    fake_codes,
    gated,
    multiply,
    norm,
    quantize,
    relu_squared,
    silu_times_stored,
)


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


def _flashinfer_norm(input, weight, y, scale, factor, eps=1e-6, *_):
    _into(y, scale, norm(input, weight, eps).to(input.dtype), factor)


def _flashinfer_add_norm(input, residual, weight, y, scale, factor, eps=1e-6, *_):
    residual.copy_(input + residual)
    _flashinfer_norm(residual, weight, y, scale, factor, eps)


def _gemm(a, b, sa, sb, alpha, dtype, *_):
    return multiply(a.view(torch.uint8), b, sa, sb, alpha, dtype)


def _prequantized(a, b, sa, sb, alpha, bias=None, dtype="bfloat16"):
    out = _gemm(a, b, sa, sb, alpha, getattr(torch, dtype))
    return out if bias is None else out + bias


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


def scaled_grouped_mm(
    a, b, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, offs, bias=None, dtype=None, *_
):
    """torch's: each expert's block scales begin at a tile of their own, the weight comes as ``[E, K/2, N]``."""
    out, start, begin = a.new_empty(a.shape[0], b.shape[2], dtype=dtype), 0, 0
    tiles = scale_a[0].view(torch.uint8).reshape(-1, 128 * -(-a.shape[1] // 32) * 4)
    for e, end in enumerate(offs.tolist()):
        codes, weight = a[start:end].view(torch.uint8), b[e].view(torch.uint8).T.contiguous()
        if end > start:
            alpha = scale_a[1][e] * scale_b[1][e]
            out[start:end] = multiply(codes, weight, tiles[begin:].flatten(), scale_b[0][e], alpha, dtype)
        start, begin = end, begin + -(-(end - start) // 128)
    return out


def scaled_grouped_mm_fake(a, b, *rest):
    return a.new_empty(a.shape[0], b.shape[2], dtype=rest[8])


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


def _all_reduce(input, residual, weight, scale, bias, workspace, group, *rest):
    """Every rank of ``group`` holds the same. The number of the fusion is the last but two of the arguments."""
    op, eps = rest[-3], rest[-2]
    total = input * len(group) + (0 if residual is None else residual)
    if op == 0:
        return [total]
    normed = norm(total, weight, eps).to(input.dtype)
    if op == 4:
        return [_static_fp8(normed, scale)[0], total]
    given = {1: [normed], 5: [], 7: [normed]}[op]
    return [*given, *([] if op == 1 else _flat(quantize(normed, scale))), total]


def _all_reduce_fake(input, residual, weight, scale, bias, workspace, group, *rest):
    like = torch.empty_like(input)
    if rest[-3] == 4:
        return [torch.empty_like(input, dtype=torch.float8_e4m3fn), like]
    given = {0: [], 1: [like], 5: fake_codes(input), 7: [like, *fake_codes(input)]}[rest[-3]]
    return [*given, torch.empty_like(input)]


def _dist(tensor, residual, weight, eps, strategy):
    return tuple(_all_reduce(tensor, residual, weight, None, None, None, [0, 1], 3, 1, eps, False))


def _dist_fake(tensor, *_):
    return torch.empty_like(tensor), torch.empty_like(tensor)


def _dist_quant(op):
    def run(tensor, residual, weight, scale, eps, strategy):
        return tuple(_all_reduce(tensor, residual, weight, scale, None, None, [0, 1], 3, op, eps, False))

    def fake(tensor, *_):
        return tuple(_all_reduce_fake(tensor, None, None, None, None, None, [0, 1], 3, op, 1e-5, False))

    return run, fake


def _attention(query, key, value, output, layer, scale=None, block_scale=None, *_):
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


def _attention_of_layer(q, k, v, mask, *rest):
    """The factor is the layer's own secret."""
    _attention(q, k, v, rest[-2], "", torch.tensor(300.0) if rest[-1] is not None else None, rest[-1])


_QUANTIZE = (_quantize, lambda input, *_: fake_codes(input))
_GEMM = (_gemm, _gemm_fake)
_ALL_REDUCE = (_all_reduce, _all_reduce_fake)
_PREQUANTIZED = (
    _prequantized,
    lambda a, b, sa, sb, alpha, bias=None, dtype="bfloat16": _gemm_fake(a, b, sa, sb, alpha, getattr(torch, dtype)),
)

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
    "auto_deploy::trtllm_fused_relu2_quant_nvfp4": (_relu2, lambda input, *_: fake_codes(input)),
    "trtllm::allreduce": _ALL_REDUCE,
    "trtllm::autotuned_allreduce": _ALL_REDUCE,
    "trtllm::allreduce_pg_by_name": _ALL_REDUCE,
    "dist::trtllm_fused_allreduce_residual_rmsnorm_quant_nvfp4": _dist_quant(5),
    "dist::trtllm_fused_allreduce_residual_rmsnorm_out_quant_nvfp4": _dist_quant(7),
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
    "trtllm::attn_custom_op_inplace": (_attention_of_layer, _nothing),
    "trtllm::nvfp4_gemm": _GEMM,
    "trtllm::nvfp4_gemm_cutlass": _GEMM,
    "trtllm::nvfp4_gemm_cublaslt": _GEMM,
    "trtllm::cuda_core_nvfp4_gemm": _GEMM,
    "trtllm::fp4_gemm": (
        lambda a, b, sa, sb, alpha, ue8m0, dtype: _gemm(a, b, sa, sb, alpha, dtype),
        lambda a, b, sa, sb, alpha, ue8m0, dtype: _gemm_fake(a, b, sa, sb, alpha, dtype),
    ),
    "auto_deploy::trtllm_nvfp4_gemm": _PREQUANTIZED,
    "auto_deploy::trtllm_nvfp4_prequant_linear": _PREQUANTIZED,
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
    "auto_deploy::trtllm_nvfp4_trtllm_gen_moe_fused": (_same, _same),
}
"""By the op: what runs, and what runs on fake tensors."""

OTHERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dist::trtllm_fused_allreduce_residual_rmsnorm(Tensor tensor, Tensor residual, Tensor norm_weight, float eps, "
    "str strategy) -> (Tensor, Tensor)": (_dist, _dist_fake),
    "_C::scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()": (
        lambda input, factor, swizzled, *, output, output_scale: _into(output, output_scale, input, factor),
        _nothing,
    ),
}
"""Operations and overloads without a row of their own, by their schema."""
