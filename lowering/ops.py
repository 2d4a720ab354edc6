"""The ops ``torch.ops.fp4pass.*``: schemas, fake functions, implementations by device, gradients.

========================  ======================================================================
``linear``                ``activation(x @ weight.T + bias)``; x ``[..., K]`` -> ``[..., N]``
``linear_backward``       ``grad @ weight``; grad ``[..., N]`` -> ``[..., K]``
``gathered_linear``       one expert a row by its id; x ``[S, K]`` -> ``[S, N]``
``grouped_linear``        rows sorted by expert, with cumulative ends; x ``[S, K]`` -> ``[S, N]``
``experts``               up product, activation, down product, routing weights, sum; ``[T, O]``
``dequantize``            the whole weight ``[..., N, K]`` in a dtype, for graphs
========================  ======================================================================

A weight is ``e2m1(codes) * e4m3(scale) * global_scale``: codes uint8 ``[..., N, K/2]`` in ``layout``, scale uint8
``[..., N, K/16]`` (the bytes of E4M3), global_scale float32 ``[]``, ``[1]`` or one an expert, or None. Activations are
bfloat16, float16 or float32; the result has their dtype, but that of ``linear`` has ``out_dtype`` where one is given.
Every op raises ArgumentError for operands that do not fit. (Compiled graphs call unchecked forms of them: registry.py.)

``dequantize`` is composite: for dynamo it is one operation to trace instead of up to seventy, and whoever traces on
(AOTAutograd, before any pass sees the graph) finds the plain operations that it consists of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fp4pass.errors import GradientError, VersionError

from . import checks, reference
from .registry import CALLED, is_registered, register

_SCHEMAS = {
    "linear": (
        "(Tensor x, Tensor codes, Tensor scale, Tensor? global_scale, Tensor? bias, str layout,"
        " str activation='none', ScalarType? out_dtype=None) -> Tensor"
    ),
    "linear_backward": "(Tensor grad, Tensor codes, Tensor scale, Tensor? global_scale, str layout) -> Tensor",
    "gathered_linear": (
        "(Tensor x, Tensor codes, Tensor scale, Tensor? global_scale, Tensor ids, str layout) -> Tensor"
    ),
    "grouped_linear": (
        "(Tensor x, Tensor codes, Tensor scale, Tensor? global_scale, Tensor offsets, str layout) -> Tensor"
    ),
    "experts": (
        "(Tensor x, Tensor ids, Tensor weights, Tensor up_codes, Tensor up_scale, Tensor? up_global,"
        " Tensor down_codes, Tensor down_scale, Tensor? down_global, str activation, str layout) -> Tensor"
    ),
    "dequantize": "(Tensor codes, Tensor scale, Tensor? global_scale, str layout, ScalarType dtype) -> Tensor",
}
OPS = tuple(_SCHEMAS)
"""Names of the ops in the namespace ``fp4pass``."""


_CHECKS = {
    "linear": checks.check_linear,
    "linear_backward": checks.check_linear_backward,
    "gathered_linear": checks.check_gathered,
    "grouped_linear": checks.check_grouped,
}


def _check(op: str, args: tuple[Any, ...]) -> None:
    if op == "experts":
        x, ids, weights, *rest, activation, layout = args
        checks.check_experts(op, x, ids, weights, tuple(rest[:3]), tuple(rest[3:]), activation, layout)
        return
    _CHECKS[op](op, *args)


def _fake(op: str, args: tuple[Any, ...]) -> torch.Tensor:
    x = args[0]
    columns = {
        "linear": lambda: args[1].shape[0],
        "linear_backward": lambda: args[1].shape[1] * 2,
        "gathered_linear": lambda: args[1].shape[1],
        "grouped_linear": lambda: args[1].shape[1],
        "experts": lambda: args[6].shape[1],
    }[op]()
    out_dtype = args[7] if op == "linear" and len(args) > 7 else None
    return x.new_empty((*x.shape[:-1], columns), dtype=out_dtype)


def _on_cpu(op: str, args: tuple[Any, ...]) -> torch.Tensor:
    return getattr(reference, op)(*args)


def _on_cuda(op: str, args: tuple[Any, ...]) -> torch.Tensor:
    return on_device_of(args[0], getattr(kernels(op), op), args)


class _Thread(threading.local):
    """``gpus``: those that the thread has once made the current one."""

    def __init__(self) -> None:
        self.gpus: set[int] = set()


_thread = _Thread()


def on_device_of(x: torch.Tensor, launch: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> torch.Tensor:
    """``launch(*args)`` with the GPU of ``x`` as the current one."""
    index = x.get_device()
    # Nearly always it is; to enter and leave a context would take the host as long as a kernel runs.
    if index in _thread.gpus and index == torch.cuda.current_device():
        return launch(*args)
    with torch.cuda.device(index):
        # Triton 3.6 describes tensors to the GPU through the driver, which a new thread cannot call before this.
        torch.cuda.set_device(index)
        _thread.gpus.add(index)
        return launch(*args)


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None, layout: str, dtype: torch.dtype
) -> torch.Tensor:
    """Rounded to the dtype once, from float32 (float64 for float64)."""
    checks.check_dequantize("dequantize", codes, scale, global_scale, layout, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return reference.dequantize(codes, scale, global_scale, wide, layout).to(dtype)


@cache
def kernels(op: str) -> ModuleType:
    """The module with the launch function of ``op``. Raises VersionError where Triton is missing."""
    # Imported on the first call that needs it: everything else works without Triton.
    try:
        from . import fp8_linear, linear, moe
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise VersionError(
            f"fp4pass::{op}: Triton is missing",
            seen="the operands are on a GPU and `import triton` fails",
            expected="Triton 3.6 or later, which CUDA builds of torch bring along",
            do="pip install triton, or move the model to the CPU",
        ) from error
    if op == "fp8_linear":
        return fp8_linear
    return linear if op.startswith("linear") else moe


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _save_weight(ctx, inputs, output)
    x, bias, ctx.layout, activation = inputs[0], *inputs[4:7]
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    if activation != reference.NO_ACTIVATION:
        raise GradientError(
            "fp4pass::linear: a product with an activation inside has no backward",
            seen=f"activation={activation!r}, gradients enabled and an operand with requires_grad=True",
            expected="the activation as an operation of its own, which keeps what its backward needs",
            do="call the op without activation and apply that to its result, or run under torch.no_grad()",
        )


def _save_linear_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _save_weight(ctx, inputs, output)
    ctx.layout = inputs[4]


def _linear_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _refuse_global_gradient("linear", ctx.needs_input_grad[3])
    codes, scale, global_scale = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        rows = grad.to(ctx.x_dtype)
        to_x = torch.ops.fp4pass.linear_backward(rows, codes, scale, global_scale, ctx.layout)
    if ctx.needs_input_grad[4]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, None, to_bias, None, None, None


def _linear_backward_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _refuse_global_gradient("linear_backward", ctx.needs_input_grad[3])
    codes, scale, global_scale = ctx.saved_tensors
    to_grad = torch.ops.fp4pass.linear(grad, codes, scale, global_scale, None, ctx.layout)
    return to_grad, None, None, None, None


def _refuse_global_gradient(op: str, needed: bool) -> None:
    if needed:
        raise GradientError(
            f"fp4pass::{op}: no gradient is given to the global scale",
            seen="a global_scale with requires_grad=True",
            expected="a quantized weight that is not trained: its gradient would need the dequantized weight",
            do="call global_scale.requires_grad_(False)",
        )


def _refuse_gradient(op: str) -> None:
    raise GradientError(
        f"fp4pass::{op}: products of experts have no backward",
        seen="gradients enabled and an operand with requires_grad=True",
        expected="inference",
        do="run the model under torch.no_grad() or torch.inference_mode()",
    )


_GRADIENTS = {
    "linear": (_linear_gradients, _save_linear),
    "linear_backward": (_linear_backward_gradients, _save_linear_backward),
}


def _register(op: str) -> None:
    if op == "dequantize":
        name = f"{CALLED}::{op}"
        torch.library.define(name, _SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeImplicitAutograd", _dequantize)
        return
    refused = lambda ctx, grad: _refuse_gradient(op), lambda ctx, inputs, output: _refuse_gradient(op)
    register(
        op,
        _SCHEMAS[op],
        lambda *args: _check(op, args),
        {"CPU": lambda *args: _on_cpu(op, args), "CUDA": lambda *args: _on_cuda(op, args)},
        lambda *args: _fake(op, args),
        *_GRADIENTS.get(op, refused),
    )


for _op in OPS:
    if not is_registered(_op):
        _register(_op)
