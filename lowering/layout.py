"""Orders in which codes and block scales are held. Each keeps shape, dtype and byte count, so it is undone exactly.

A row of codes is uint8 ``[K/2]``: two 4-bit codes a byte. Seen as little-endian 32-bit words, slot ``s`` of a word is
its bits ``4s .. 4s+3``; the first three layouts say which of eight neighbouring k each slot holds, and leave block
scales as they are.

====================  =========================  ==================================================
layout                slots 0..7 hold k =        written by
====================  =========================  ==================================================
``plain``             0, 1, 2, 3, 4, 5, 6, 7     checkpoints (even k in the low nibble)
``plain_high_first``  1, 0, 3, 2, 5, 4, 7, 6     some producers (even k in the high nibble)
``interleaved``       6, 4, 2, 0, 7, 5, 3, 1     us, for the kernels, where K is no multiple of 64
``fragments``         (below)                    us, for the kernels
====================  =========================  ==================================================

In ``interleaved`` one mask and one shift give a register with two neighbouring bf16 values:
``(w & 0x80008000) | ((w & 0x70007000) >> 6)`` is the pair (k0, k1), each times 2^-126, and ``w << 4`` brings up the
next pair. No permutation of bytes is needed.

``fragments`` orders a weight as the tensor core takes it. A *unit* is 16 rows by 64 columns: 512 bytes of codes and 64
block scales, each contiguous, the units of 16 rows one after the other along K. In a unit, lane ``4 g + t`` of a warp
owns the columns 2t and 2t + 1 of every eight, in the rows ``g`` and ``g + 8``: what it multiplies, with x as it is. Its
16 bytes of codes are four words (row g, then row g + 8, two words each); the word of the left 32 columns comes first,
and its four pairs are those of the columns 2t, 2t + 8, 2t + 16, 2t + 24. Of the scales it has two: block ``t`` of each
row. The lower half of a word is for the even columns, the upper half for the odd ones, in bits of which most come out
by one shift and one mask (s sign, e exponent, m mantissa; the digit is the pair; e2 and m2 are in the *other* half, so
that a rotation brings them):

====  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===
bit   15   14   13   12   11   10   9    8    7    6    5    4    3    2    1    0
====  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===
      s0   e3   s3   e2   e2   m2   s1   e0   e0   m0   e3   m3   s2   e1   e1   m1
====  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===  ===
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fp4pass.errors import ArgumentError

PLAIN = "plain"
PLAIN_HIGH_FIRST = "plain_high_first"
INTERLEAVED = "interleaved"
FRAGMENTS = "fragments"
LAYOUTS = (PLAIN, PLAIN_HIGH_FIRST, INTERLEAVED, FRAGMENTS)

UNIT_ROWS, UNIT_COLUMNS = 16, 64

# A piece's temporaries take at most six times its bytes: under 256 MB.
_REPACK_PIECE_BYTES = 32 << 20


def layout_for(device: torch.device, shapes: Iterable[tuple[int, ...]]) -> str:
    """The layout of weights ``[..., N, K]`` of all these shapes, held on ``device`` in one module.

    The kernels' own on a GPU, the checkpoint's elsewhere.
    """
    if device.type != "cuda":
        return PLAIN
    return FRAGMENTS if all(_is_in_whole_units(shape) for shape in shapes) else INTERLEAVED


def check_layout(layout: str, what: str, *shapes: tuple[int, ...]) -> None:
    """Raise ArgumentError unless ``layout`` is one of ``LAYOUTS`` that weights ``[..., N, K]`` of ``shapes`` can have.

    ``what`` names the caller.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(
            f"{what}: unknown layout",
            seen=repr(layout),
            expected=f"one of {', '.join(LAYOUTS)}",
            do="pass the name of the order in which the codes are stored",
        )
    for shape in shapes if layout == FRAGMENTS else ():
        if not _is_in_whole_units(shape):
            raise ArgumentError(
                f"{what}: the weight does not split into units of {UNIT_ROWS} rows by {UNIT_COLUMNS} columns",
                seen=f"a weight of shape {tuple(shape)}",
                expected=f"[..., N, K] with N a multiple of {UNIT_ROWS} and K of {UNIT_COLUMNS} in layout {FRAGMENTS}",
                do=f"use layout {INTERLEAVED} for it",
            )


def _is_in_whole_units(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-2] % UNIT_ROWS == 0 and shape[-1] % UNIT_COLUMNS == 0


def to_plain(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes in ``layout`` -> codes in the plain layout.

    codes: uint8 ``[..., K/2]``, K a multiple of 8 (``[..., N, K/2]`` in whole units for ``fragments``). Returns uint8
    of the same shape; ``codes`` itself if it is plain already. Uses elementwise and shape ops only, so that it traces,
    and runs on meta tensors.
    """
    check_layout(layout, "to_plain")
    if layout == PLAIN:
        return codes
    if layout == PLAIN_HIGH_FIRST:
        return _swap_nibbles(codes)
    if layout == FRAGMENTS:
        return _codes_from_units(codes)
    byte0, byte1, byte2, byte3 = _bytes_of_words(codes, "to_plain")
    return _words_of_bytes(
        (byte1 >> 4) | (byte3 & 0xF0),
        (byte1 & 0x0F) | _low_to_high(byte3),
        (byte0 >> 4) | (byte2 & 0xF0),
        (byte0 & 0x0F) | _low_to_high(byte2),
    )


def nibbles(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """The codes one by one, in natural order: uint8 ``[..., K/2]`` in ``layout`` -> integers 0 to 15 ``[..., K]``.

    The same codes as those of `to_plain`, by as few operations as there may be: they are traced for each weight.
    """
    if layout == FRAGMENTS:
        return _nibbles_of_units(codes)
    packed = to_plain(codes, layout)
    return torch.stack((packed & 0x0F, packed >> 4), -1).flatten(-2)


def from_plain(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes in the plain layout -> codes in ``layout``; the exact inverse of :func:`to_plain`."""
    check_layout(layout, "from_plain")
    if layout == PLAIN:
        return codes
    if layout == PLAIN_HIGH_FIRST:
        return _swap_nibbles(codes)
    if layout == FRAGMENTS:
        return _units_from_codes(codes)
    k01, k23, k45, k67 = _bytes_of_words(codes, "from_plain")
    return _words_of_bytes(
        (k67 & 0x0F) | _low_to_high(k45),
        (k23 & 0x0F) | _low_to_high(k01),
        (k67 >> 4) | (k45 & 0xF0),
        (k23 >> 4) | (k01 & 0xF0),
    )


def scale_to_plain(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """Block scales ``[..., N, K/16]`` of any dtype, held in ``layout``, -> rows in the checkpoint's order."""
    check_layout(layout, "scale_to_plain")
    if layout != FRAGMENTS:
        return scale
    units = _in_units(scale, 4, "scale_to_plain")  # ..., rows / 16, K / 64, g, t, half
    return _moved(units, (0, 4, 2, 1, 3)).reshape(scale.shape)


def scale_from_plain(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The exact inverse of :func:`scale_to_plain`."""
    check_layout(layout, "scale_from_plain")
    if layout != FRAGMENTS:
        return scale
    rows = _in_rows(scale, 4, "scale_from_plain")  # ..., rows / 16, half, g, K / 64, t
    return _moved(rows, (0, 3, 2, 4, 1)).reshape(scale.shape)


def repack_codes_(codes: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """Reorder ``codes`` from layout ``source`` to ``target`` in its own storage, with at most 256 MB beside it.

    codes: contiguous uint8 ``[..., N, K/2]``. Returns ``codes``. Raises ArgumentError, with nothing moved, for a layout
    that is unknown or not for this shape and for a tensor that is not contiguous.
    """
    return _repack_(codes, 2, source, target, lambda piece: from_plain(to_plain(piece, source), target))


def repack_scale_(scale: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """The same for block scales: contiguous, of any one-byte dtype, ``[..., N, K/16]``."""
    return _repack_(scale, 16, source, target, lambda piece: scale_from_plain(scale_to_plain(piece, source), target))


@torch.no_grad()
def _repack_(
    tensor: torch.Tensor,
    columns: int,
    source: str,
    target: str,
    reordered: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``columns``: how many of the weight an element of ``tensor`` stands for."""
    for layout in (source, target):
        check_layout(layout, "repack", (*tensor.shape[:-1], tensor.shape[-1] * columns))
    if source == target:
        return tensor
    if not tensor.is_contiguous():
        raise ArgumentError(
            "repack: codes or scales are not contiguous",
            seen=f"strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}",
            expected="a contiguous tensor, since its bytes are reordered in place",
            do="call .contiguous() first and keep the result",
        )
    # No layout moves anything out of its 16 rows.
    rows = tensor.view(-1, tensor.shape[-1])
    step = max(1, _REPACK_PIECE_BYTES // max(1, UNIT_ROWS * tensor.shape[-1])) * UNIT_ROWS
    for piece in rows.split(step):
        piece.copy_(reordered(piece))
    return tensor


def _codes_from_units(codes: torch.Tensor) -> torch.Tensor:
    half, other = _halves_of_units(codes)
    pairs = (_code_of_half(pair, half, other).unbind(-1) for pair in range(4))
    packed = torch.stack([(even | (odd << 4)).to(torch.uint8) for even, odd in pairs], -1)
    return _moved(packed, (0, 4, 2, 1, 5, 6, 3)).reshape(codes.shape)


def _nibbles_of_units(codes: torch.Tensor) -> torch.Tensor:
    half, other = _halves_of_units(codes)
    pairs = torch.stack([_code_of_half(pair, half, other) for pair in range(4)], -1)
    return _moved(pairs, (0, 4, 2, 1, 5, 7, 3, 6)).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def _halves_of_units(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves of words, int16 ``[..., rows / 16, K / 64, g, t, half of the rows, word, 2]``, and for each the other."""
    units = _in_units(codes, 32, "to_plain")
    if not torch.compiler.is_compiling() and units.storage_offset() % 2:
        units = units.clone()  # such bytes are no 16-bit numbers to torch
    halves = units.view(torch.int16).unflatten(-1, (2, 2, 2))
    lower, upper = halves.unbind(-1)
    return halves, torch.stack((upper, lower), -1)


def _units_from_codes(codes: torch.Tensor) -> torch.Tensor:
    rows = _in_rows(codes, 32, "from_plain").unflatten(-1, (2, 4, 4))  # ..., rows / 16, half, g, K / 64, word, pair, t
    pairs = _moved(rows, (0, 3, 2, 6, 1, 4, 5))
    even, odd = (pairs & 0x0F).unbind(-1), (pairs >> 4).unbind(-1)
    halves = (*_half_of_codes(even, odd[2]), *_half_of_codes(odd, even[2]))
    return torch.stack(halves, -1).reshape(codes.shape)


def _code_of_half(pair: int, half: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A code of the 16 bits ``half``, of which ``other`` may have a part: see the table above."""
    if pair == 0:
        return ((half >> 12) & 8) | ((half >> 6) & 7)
    if pair == 1:
        return ((half >> 6) & 8) | (half & 7)
    if pair == 2:
        return (half & 8) | ((other >> 10) & 7)
    return ((half >> 10) & 8) | ((half >> 12) & 4) | ((half >> 4) & 3)


def _half_of_codes(codes: tuple[torch.Tensor, ...], other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse of ``_code_of_half``, as (low byte, high byte); ``other``: the other half's third code."""
    c0, c1, c2, c3 = codes
    low = ((c0 & 3) << 6) | ((c3 & 3) << 4) | (c2 & 8) | (c1 & 7)
    signs = ((c0 & 8) << 4) | ((c3 & 8) << 2) | ((c1 & 8) >> 2)
    return low, signs | ((c3 & 4) << 4) | ((other & 7) << 2) | ((c0 & 4) >> 2)


def _in_units(tensor: torch.Tensor, width: int, what: str) -> torch.Tensor:
    """``[..., N, K / 64 * width]`` in units -> ``[..., N / 16, K / 64, 8 rows, 4 blocks, the rest]``."""
    rows, units = _units_of(tensor, width, what)
    rest = UNIT_ROWS * width // 32
    return tensor.reshape(*tensor.shape[:-2], rows, units, 8, 4, rest)


def _in_rows(tensor: torch.Tensor, width: int, what: str) -> torch.Tensor:
    """``[..., N, K / 64 * width]`` in rows -> ``[..., N / 16, 2 halves, 8 rows, K / 64, width]``."""
    rows, units = _units_of(tensor, width, what)
    return tensor.reshape(*tensor.shape[:-2], rows, 2, 8, units, width)


def _units_of(tensor: torch.Tensor, width: int, what: str) -> tuple[int, int]:
    check_layout(FRAGMENTS, what, (*tensor.shape[:-1], tensor.shape[-1] * (UNIT_COLUMNS // width)))
    return tensor.shape[-2] // UNIT_ROWS, tensor.shape[-1] // width


def _moved(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``tensor`` with its last dimensions permuted."""
    lead = tensor.dim() - len(order)
    return tensor.permute(*range(lead), *(lead + each for each in order))


def _swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    return (codes >> 4) | _low_to_high(codes)


def _low_to_high(codes: torch.Tensor) -> torch.Tensor:
    # Masked before the shift: the result then fits a byte whatever width a compiler computes in.
    return (codes & 0x0F) << 4


def _bytes_of_words(codes: torch.Tensor, what: str) -> tuple[torch.Tensor, ...]:
    if codes.shape[-1] % 4:
        raise ArgumentError(
            f"{what}: rows of codes do not split into 32-bit words",
            seen=f"{codes.shape[-1]} bytes a row",
            expected="a multiple of 4 bytes (K a multiple of 8)",
            do="use the plain layout for such a weight",
        )
    return codes.unflatten(-1, (codes.shape[-1] // 4, 4)).unbind(-1)


def _words_of_bytes(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts, -1).flatten(-2)
