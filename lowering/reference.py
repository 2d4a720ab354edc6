"""Plain-torch twins of every kernel: the CPU implementation (float32) and the oracle of the tests (float64).

They compute what the kernels compute: code x block scale is exact, products are summed in ``accumulate``, the global
scale multiplies the sum once, then come the bias and one cast. Dequantize-then-multiply rounds every weight instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from .layout import PLAIN, UNIT_ROWS, nibbles, scale_to_plain

GROUP = 16
"""Codes along K that share one block scale."""

# Decoding holds about three tensors of the result's size at once.
_PIECE_BYTES = 256 << 20
_TEMPORARIES = 4


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU, the activation of Nemotron-H's experts. Any shape and float dtype."""
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu2": relu2, "silu": functional.silu}
"""Activations that ``experts`` fuses between its two products and ``linear`` into its one, by name."""

NO_ACTIVATION = "none"
"""The name that stands for none of them."""


def decode_codes(codes: torch.Tensor, layout: str = PLAIN, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E2M1 values of ``codes``: uint8 ``[..., K/2]`` -> ``dtype [..., K]`` in natural order, exact in any dtype."""
    code = nibbles(codes, layout)
    # Shifted into place, an E2M1 magnitude read as fp16 is the value times 2^-14, as with E4M3 below.
    magnitude = ((code & 7).to(torch.int16) << 9).view(torch.float16).to(dtype) * 2.0**14
    return torch.where(code >= 8, -magnitude, magnitude)


def decode_scale(scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E4M3 values of the bytes ``scale``: uint8 of any shape -> ``dtype``. The bytes 0x7F and 0xFF give NaN."""
    # Shifted into place, an E4M3 magnitude read as fp16 is the value times 2^-8: the exponent fields line up, and so
    # do the subnormals.
    low = scale & 0x7F
    magnitude = (low.to(torch.int16) << 7).view(torch.float16).to(dtype) * 256
    magnitude = torch.where(low == 0x7F, torch.nan, magnitude)
    return torch.where(scale >= 0x80, -magnitude, magnitude)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = PLAIN,
) -> torch.Tensor:
    """The whole weight ``[..., N, K]`` in ``dtype``; in float64 it is the oracle.

    codes uint8 ``[..., N, K/2]``, scale uint8 ``[..., N, K/16]``, global_scale float32 ``[]``, ``[1]``, ``[E]`` (codes
    then are ``[E, N, K/2]``) or None. Code x scale is exact; the global scale is multiplied last, in ``dtype``.
    """
    blocks = decode_codes(codes, layout, dtype).unflatten(-1, (scale.shape[-1], GROUP))
    factors = decode_scale(scale_to_plain(scale, layout), dtype)
    weight = (blocks * factors.unsqueeze(-1)).flatten(-2)
    if global_scale is None:
        return weight
    factor = global_scale.to(dtype)
    return weight * (factor.reshape(()) if factor.numel() == 1 else factor.reshape(-1, 1, 1))


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: str,
    activation: str = NO_ACTIVATION,
    out_dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``: x ``[..., K]``, codes uint8 ``[N, K/2]``, bias ``[N]`` -> ``[..., N]``.

    Global scale, bias and activation apply to the sum as ``accumulate`` has it; one cast to ``out_dtype`` (None: x's
    dtype) follows.
    """
    # Contiguous, because the order of a sum in a matrix library may depend on strides.
    total = _product(x.to(accumulate).contiguous(), codes, scale, layout)
    total = _times_global(total, global_scale)
    if bias is not None:
        total = total + bias.to(accumulate)
    if activation != NO_ACTIVATION:
        total = ACTIVATIONS[activation](total)
    return total.to(out_dtype or x.dtype)


def linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``grad @ weight``: grad ``[..., N]``, codes uint8 ``[N, K/2]`` -> ``[..., K]`` in grad's dtype."""
    total = grad.new_zeros((*grad.shape[:-1], codes.shape[-1] * 2), dtype=accumulate)
    for rows in _pieces(codes, accumulate):
        total += grad[..., rows].to(accumulate) @ dequantize(codes[rows], scale[rows], None, accumulate, layout)
    return _times_global(total, global_scale).to(grad.dtype)


def gathered_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    ids: torch.Tensor,
    layout: str,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Row ``s`` times the weight of expert ``ids[s]``: x ``[S, K]``, codes uint8 ``[E, N, K/2]`` -> ``[S, N]``.

    ids are integers ``[S]``; a row whose id lies outside ``[0, E)`` is zero.
    """
    out = x.new_zeros((x.shape[0], codes.shape[1]))
    for expert, rows in _rows_by_expert(ids, codes.shape[0]):
        out[rows] = linear(
            x[rows], codes[expert], scale[expert], _of_expert(global_scale, expert), None, layout, accumulate=accumulate
        )
    return out


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    layout: str,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows sorted by expert: expert ``e`` owns rows ``offsets[e-1] .. offsets[e]``; x ``[S, K]`` -> ``[S, N]``.

    offsets are cumulative ends ``[E]``; rows past the last of them are zero.
    """
    ids = expert_of_row(offsets, x.shape[0])
    return gathered_linear(x, codes, scale, global_scale, ids, layout, accumulate)


def expert_of_row(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The expert that owns each of ``rows`` sorted rows, int64 ``[rows]``; E for the rows past ``offsets[-1]``."""
    positions = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets.contiguous(), positions, right=True)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up_codes: torch.Tensor,
    up_scale: torch.Tensor,
    up_global: torch.Tensor | None,
    down_codes: torch.Tensor,
    down_scale: torch.Tensor,
    down_global: torch.Tensor | None,
    activation: str,
    layout: str,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A whole block of experts without gate: x ``[T, H]``, ids and weights ``[T, k]`` -> ``[T, O]`` in x's dtype.

    up_codes uint8 ``[E, I, H/2]``, down_codes uint8 ``[E, O, I/2]``. The hidden row is rounded to x's dtype, as a
    kernel stores it; the routing weight multiplies the second product in ``accumulate``; the sum over k is cast once.
    An id outside ``[0, E)`` contributes nothing, whatever its weight.
    """
    tokens, k = ids.shape
    slots = x.new_zeros((tokens * k, down_codes.shape[1]), dtype=accumulate)
    routing = weights.reshape(-1, 1).to(accumulate)
    for expert, rows in _rows_by_expert(ids.reshape(-1), up_codes.shape[0]):
        hidden = _product(x[rows // k].to(accumulate), up_codes[expert], up_scale[expert], layout)
        hidden = ACTIVATIONS[activation](_times_global(hidden, _of_expert(up_global, expert)))
        hidden = hidden.to(x.dtype).to(accumulate)
        result = _product(hidden, down_codes[expert], down_scale[expert], layout)
        slots[rows] = _times_global(result, _of_expert(down_global, expert)) * routing[rows]
    return slots.unflatten(0, (tokens, k)).sum(1).to(x.dtype)


def _product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, layout: str) -> torch.Tensor:
    """``x @ (code x scale).T`` in x's dtype, without the global scale; decodes a piece of N at a time."""
    parts = [x @ dequantize(codes[rows], scale[rows], None, x.dtype, layout).mT for rows in _pieces(codes, x.dtype)]
    return torch.cat(parts, -1) if len(parts) != 1 else parts[0]


def _pieces(codes: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of N, in whole units, whose decoding, temporaries included, stays within 256 MB."""
    n, row_weights = codes.shape[0], codes.shape[-1] * 2
    unit = UNIT_ROWS * _TEMPORARIES * dtype.itemsize * max(1, row_weights)
    step = max(1, _PIECE_BYTES // unit) * UNIT_ROWS
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def _times_global(total: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    return total if global_scale is None else total * global_scale.to(total.dtype).reshape(())


def _of_expert(global_scale: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    if global_scale is None or global_scale.numel() == 1:
        return global_scale
    return global_scale[expert]


def _rows_by_expert(ids: torch.Tensor, experts_count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that occurs in ``ids [S]``, with the row numbers that chose it."""
    for expert in ids.unique().tolist():
        if 0 <= expert < experts_count:
            yield expert, (ids == expert).nonzero().squeeze(1)
