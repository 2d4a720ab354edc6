"""What the ops ask of their operands. Runs in the fake functions too, also with symbolic rows."""

from __future__ import annotations

import torch

from fp4pass.errors import ArgumentError

from .layout import check_layout
from .reference import ACTIVATIONS, GROUP, NO_ACTIVATION

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def check_linear(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: str,
    activation: str = NO_ACTIVATION,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Operands of a product over K: x ``[..., K]``, codes ``[N, K/2]``, scale ``[N, K/16]``, bias ``[N]``."""
    _check_activation(op, activation, (NO_ACTIVATION, *ACTIVATIONS), "apply it to the result of the op")
    if out_dtype is not None:
        _check_wanted(op, "out_dtype", out_dtype, _FLOATS, "result")
    _check_x(op, "x", x)
    _check_weight(op, "", 2, x, codes, scale, global_scale, layout)
    _check_size(op, "x", x, -1, codes.shape[-1] * 2, "K of the codes")
    _check_bias(op, bias, codes.shape[0], "N of the codes", x)


def check_linear_backward(
    op: str,
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
) -> None:
    """Operands of a product over N: grad ``[..., N]``, codes ``[N, K/2]``, scale ``[N, K/16]``."""
    _check_x(op, "grad", grad)
    _check_weight(op, "", 2, grad, codes, scale, global_scale, layout)
    _check_size(op, "grad", grad, -1, codes.shape[0], "N of the codes")


def check_gathered(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    ids: torch.Tensor,
    layout: str,
) -> None:
    """Operands of one expert a row: x ``[S, K]``, codes ``[E, N, K/2]``, ids ``[S]``."""
    _check_expert_rows(op, x, codes, scale, global_scale, layout)
    _check_dtype(op, "ids", ids, _INTEGERS)
    _check_rank(op, "ids", ids, 1, "[S]")
    _check_size(op, "ids", ids, 0, x.shape[0], "the rows of x")
    _check_device(op, "ids", ids, x)


def check_grouped(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    layout: str,
) -> None:
    """Operands of rows sorted by expert: x ``[S, K]``, codes ``[E, N, K/2]``, offsets ``[E]``."""
    _check_expert_rows(op, x, codes, scale, global_scale, layout)
    _check_dtype(op, "offsets", offsets, _INTEGERS)
    _check_rank(op, "offsets", offsets, 1, "[E]")
    _check_size(op, "offsets", offsets, 0, codes.shape[0], "E of the codes")
    _check_device(op, "offsets", offsets, x)


def check_experts(
    op: str,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    activation: str,
    layout: str,
) -> None:
    """Operands of a block: x ``[T, H]``, ids and weights ``[T, k]``, up ``[E, I, H/2]``, down ``[E, O, I/2]``."""
    between = "call the two products with gathered_linear or grouped_linear and the activation between them"
    _check_activation(op, activation, tuple(ACTIVATIONS), between)
    _check_x(op, "x", x)
    _check_rank(op, "x", x, 2, "[T, H]")
    _check_weight(op, "up_", 3, x, *up, layout)
    _check_weight(op, "down_", 3, x, *down, layout)
    _check_size(op, "x", x, 1, up[0].shape[-1] * 2, "K of up_codes")
    _check_size(op, "down_codes", down[0], 0, up[0].shape[0], "E of up_codes")
    _check_size(op, "down_codes", down[0], 2, up[0].shape[1] // 2, "half of N of up_codes, in bytes")
    _check_dtype(op, "ids", ids, _INTEGERS)
    _check_dtype(op, "weights", weights, (*_FLOATS, torch.float64))
    for name, operand in (("ids", ids), ("weights", weights)):
        _check_rank(op, name, operand, 2, "[T, k]")
        _check_size(op, name, operand, 0, x.shape[0], "the rows of x")
        _check_device(op, name, operand, x)
    _check_size(op, "weights", weights, 1, ids.shape[1], "k of ids")


def check_dequantize(
    op: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> None:
    """A weight or one for each expert, and what it shall become."""
    _check_wanted(op, "dtype", dtype, (*_FLOATS, torch.float64), "weight")
    _check_weight(op, "", 3 if codes.dim() == 3 else 2, codes, codes, scale, global_scale, layout)


def check_fp8_linear(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Operands of a product with an E4M3 weight: x ``[..., K]``, weight uint8 ``[N, K]``, each scale one float32."""
    _check_x(op, "x", x)
    _check_dtype(op, "weight", weight, (torch.uint8,))
    _check_rank(op, "weight", weight, 2, "[N, K]")
    _check_device(op, "weight", weight, x)
    _check_size(op, "x", x, -1, weight.shape[1], "K of the weight")
    for name, scale in (("weight_scale", weight_scale), ("input_scale", input_scale)):
        if scale is None:
            continue
        _check_dtype(op, name, scale, (torch.float32,))
        _check_device(op, name, scale, x)
        if scale.dim() > 1 or scale.numel() != 1:
            raise _refusal(
                op, name, "is not one number", f"shape {tuple(scale.shape)}", "shape [] or [1]", "reshape it"
            )
    _check_bias(op, bias, weight.shape[0], "N of the weight", x)


def _check_bias(op: str, bias: torch.Tensor | None, n: int | torch.SymInt, of: str, x: torch.Tensor) -> None:
    if bias is not None:
        _check_dtype(op, "bias", bias, _FLOATS)
        _check_rank(op, "bias", bias, 1, "[N]")
        _check_size(op, "bias", bias, 0, n, of)
        _check_device(op, "bias", bias, x)


def _check_expert_rows(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
) -> None:
    _check_x(op, "x", x)
    _check_rank(op, "x", x, 2, "[S, K]")
    _check_weight(op, "", 3, x, codes, scale, global_scale, layout)
    _check_size(op, "x", x, 1, codes.shape[-1] * 2, "K of the codes")


def _check_activation(op: str, activation: str, known: tuple[str, ...], do: str) -> None:
    if activation not in known:
        raise ArgumentError(
            f"fp4pass::{op}: unknown activation", seen=repr(activation), expected=f"one of {', '.join(known)}", do=do
        )


def _check_x(op: str, name: str, x: torch.Tensor) -> None:
    _check_dtype(op, name, x, _FLOATS)
    if x.dim() == 0:
        raise _refusal(op, name, "has no dimension", "shape []", "at least one dimension", "unsqueeze it")


def _check_weight(
    op: str,
    prefix: str,
    rank: int,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
) -> None:
    form = "[N, K/2]" if rank == 2 else "[E, N, K/2]"
    for suffix, operand in (("codes", codes), ("scale", scale)):
        name = prefix + suffix
        _check_dtype(op, name, operand, (torch.uint8,))
        _check_device(op, name, operand, x)
        if not operand.is_contiguous():
            seen = f"strides {tuple(operand.stride())} for shape {tuple(operand.shape)}"
            raise _refusal(
                op, name, "is not contiguous", seen, "a contiguous tensor", "call .contiguous() once, at load"
            )
    _check_rank(op, f"{prefix}codes", codes, rank, form)
    k = codes.shape[-1] * 2
    if k % GROUP:
        raise _refusal(
            op,
            f"{prefix}codes",
            f"has a K that is not a multiple of {GROUP}",
            f"K = {k}",
            f"K a multiple of {GROUP}, the codes that share a block scale",
            "leave this layer in its dequantized form",
        )
    check_layout(layout, f"fp4pass::{op}", (*codes.shape[:-1], k))
    expected = (*codes.shape[:-1], k // GROUP)
    if tuple(scale.shape) != expected:
        seen = f"shape {tuple(scale.shape)}"
        raise _refusal(
            op, f"{prefix}scale", "has the wrong shape", seen, f"{expected}", "pass one byte for each 16 codes"
        )
    if global_scale is not None:
        name = f"{prefix}global" if prefix else "global_scale"
        _check_global(op, name, global_scale, codes, rank)
        _check_device(op, name, global_scale, x)


def _check_global(op: str, name: str, global_scale: torch.Tensor, codes: torch.Tensor, rank: int) -> None:
    _check_dtype(op, name, global_scale, (torch.float32,))
    counts = (1,) if rank == 2 else (1, codes.shape[0])
    if global_scale.dim() > 1 or global_scale.numel() not in counts:
        expected = "one element" if rank == 2 else f"one element, or one for each of {codes.shape[0]} experts"
        seen = f"shape {tuple(global_scale.shape)}"
        raise _refusal(op, name, "has the wrong shape", seen, expected, "reshape it to [], [1] or [E]")


def _check_dtype(op: str, name: str, operand: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if operand.dtype not in allowed:
        seen, expected = _names((operand.dtype,)), _names(allowed)
        do = "view it as uint8" if allowed == (torch.uint8,) else f"convert it with .to(torch.{expected.split()[0]})"
        raise _refusal(op, name, "has the wrong dtype", seen, expected, do)


def _check_wanted(op: str, name: str, wanted: torch.dtype, allowed: tuple[torch.dtype, ...], what: str) -> None:
    if wanted not in allowed:
        seen, expected = _names((wanted,)), _names(allowed)
        raise _refusal(op, name, f"is no dtype of a {what}", seen, expected, "convert the result instead")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_rank(op: str, name: str, operand: torch.Tensor, rank: int, form: str) -> None:
    if operand.dim() != rank:
        seen = f"shape {tuple(operand.shape)}"
        raise _refusal(op, name, "has the wrong number of dimensions", seen, f"{rank} dimensions, {form}", "reshape it")


def _check_size(op: str, name: str, operand: torch.Tensor, dim: int, size: int | torch.SymInt, of: str) -> None:
    if operand.shape[dim] != size:
        seen = f"size {operand.shape[dim]} in dimension {dim} of {tuple(operand.shape)}"
        raise _refusal(
            op, name, "has the wrong size", seen, f"{size}, {of}", "pass operands of one layer and one batch"
        )


def _check_device(op: str, name: str, operand: torch.Tensor, x: torch.Tensor) -> None:
    if operand.device != x.device:
        raise _refusal(
            op, name, "is on another device", str(operand.device), f"{x.device}, as the other operands", "move it there"
        )


def _refusal(op: str, name: str, problem: str, seen: str, expected: str, do: str) -> ArgumentError:
    return ArgumentError(f"fp4pass::{op}: {name} {problem}", seen=seen, expected=expected, do=do)
