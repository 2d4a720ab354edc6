"""The op ``fp4pass::fp8_linear``: a product with an E4M3 weight, as mixed checkpoints have beside their NVFP4 ones.

The weight is ``e4m3(weight) * weight_scale``. Without an input scale activations are multiplied as they are (W8A16);
with one they are rounded to E4M3 by that static scale first (W8A8), and GPUs from SM89 on multiply in FP8. The scales
multiply the sum once, so that the weight itself is exact in any activation dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from fp4pass.errors import GradientError

from . import checks
from .arch import target
from .ops import kernels, on_device_of
from .reference import decode_scale
from .registry import is_registered, register

E4M3_MAX = 448.0
FIRST_FP8_SM = 89
"""The first generation with FP8 tensor cores."""

_OP = "fp8_linear"
_SCHEMA = "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias) -> Tensor"
_PIECE_BYTES = 256 << 20
_TEMPORARIES = 4


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``x @ weight.T + bias`` in plain torch: x ``[..., K]``, weight uint8 ``[N, K]`` -> ``[..., N]`` in x's dtype.

    weight_scale and input_scale are one float32 number each. Sums are in ``accumulate``; float64 is the oracle.
    """
    factor = weight_scale.to(accumulate).reshape(())
    if input_scale is not None:
        x_values, factor = rounded(x, input_scale).to(accumulate), factor * input_scale.to(accumulate).reshape(())
    else:
        x_values = x.to(accumulate)
    x_values = x_values.contiguous()  # the order of a sum in a matrix library may depend on strides
    parts = [x_values @ decode_scale(weight[rows], accumulate).mT for rows in _pieces(weight, accumulate)]
    total = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * factor
    return (total if bias is None else total + bias.to(accumulate)).to(x.dtype)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` in float8_e4m3fn, to the nearest; what lies beyond its range becomes its largest value."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def in_fp8(rows: int, columns: int) -> bool:
    """Whether FP8 tensor cores take a weight ``[rows, columns]``."""
    return rows % 16 == 0 and columns % 16 == 0


def _pieces(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of N whose decoding, temporaries included, stays within 256 MB."""
    n, k = weight.shape
    step = max(1, _PIECE_BYTES // (_TEMPORARIES * dtype.itemsize * max(1, k)))
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def _fake(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _on_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if input_scale is None:
        return _launch(x, weight, weight_scale, bias)
    values = rounded(x, input_scale)
    if target(x.device).sm < FIRST_FP8_SM or not in_fp8(*weight.shape):
        return _launch(values.to(x.dtype), weight, weight_scale * input_scale.reshape(weight_scale.shape), bias)
    return _multiplied_in_fp8(x, values, weight, weight_scale, input_scale, bias)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return on_device_of(x, kernels("fp8_linear").fp8_linear, (x, weight, weight_scale, bias))


def _multiplied_in_fp8(
    x: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    out_shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0:
        return x.new_empty(out_shape)
    one = torch.nn.functional.ScalingType.TensorWise
    weight = weight.contiguous().view(torch.float8_e4m3fn).t()
    scales = input_scale.reshape(()), one, weight_scale.reshape(()), one
    rows = values.reshape(-1, x.shape[-1])
    if bias is None or x.dtype == torch.float32:  # with which torch takes no bias
        total = torch.nn.functional.scaled_mm(rows, weight, *scales, output_dtype=x.dtype).view(out_shape)
        return total if bias is None else total + bias.to(total.dtype)
    # Inside of it the bias is added before the only rounding.
    bias = bias.to(x.dtype)
    return torch.nn.functional.scaled_mm(rows, weight, *scales, bias=bias, output_dtype=x.dtype).view(out_shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, weight_scale, input_scale, _ = inputs
    if input_scale is not None and any(each is not None and each.requires_grad for each in inputs):
        raise GradientError(
            "fp4pass::fp8_linear: activations that are rounded to FP8 have no gradient",
            seen="an input_scale, and an operand with requires_grad=True",
            expected="inference, or activations as they are (w8a16)",
            do="call fp4pass.from_pretrained(..., fp8='w8a16'), or run the model under torch.no_grad()",
        )
    ctx.save_for_backward(weight, weight_scale)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.fp4pass.fp8_linear(grad, weight.t(), weight_scale, None, None)
    if ctx.needs_input_grad[4]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return to_x, None, None, None, to_bias


if not is_registered(_OP):
    register(
        _OP,
        _SCHEMA,
        functools.partial(checks.check_fp8_linear, _OP),
        {"CPU": reference, "CUDA": _on_cuda},
        _fake,
        _gradients,
        _save,
    )
