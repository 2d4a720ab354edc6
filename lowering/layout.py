"""Orders of the codes' bits. Every layout keeps shape, dtype and byte count, so each is undone exactly.

A row of codes is uint8 ``[K/2]``: two 4-bit codes a byte. Seen as little-endian 32-bit words, slot ``s`` of a word is
its bits ``4s .. 4s+3``; a layout says which of eight neighbouring k each slot holds.

====================  =========================  ==================================================
layout                slots 0..7 hold k =        written by
====================  =========================  ==================================================
``plain``             0, 1, 2, 3, 4, 5, 6, 7     checkpoints (even k in the low nibble)
``plain_high_first``  1, 0, 3, 2, 5, 4, 7, 6     some producers (even k in the high nibble)
``interleaved``       6, 4, 2, 0, 7, 5, 3, 1     us, for the kernels
====================  =========================  ==================================================

In ``interleaved`` one mask and one shift give a register with two neighbouring bf16 values:
``(w & 0x80008000) | ((w & 0x70007000) >> 6)`` is the pair (k0, k1), each times 2^-126, and ``w << 4`` brings up the
next pair. No permutation of bytes is needed.
"""

from __future__ import annotations

import torch

from fp4pass.errors import ArgumentError

PLAIN = "plain"
PLAIN_HIGH_FIRST = "plain_high_first"
INTERLEAVED = "interleaved"
LAYOUTS = (PLAIN, PLAIN_HIGH_FIRST, INTERLEAVED)

# A piece's temporaries take at most six times its bytes: under 256 MB.
_REPACK_PIECE_BYTES = 32 << 20


def layout_for(device: torch.device) -> str:
    """The layout for codes held on ``device``: the kernels' own on a GPU, the checkpoint's elsewhere."""
    return INTERLEAVED if device.type == "cuda" else PLAIN


def check_layout(layout: str, what: str) -> None:
    """Raise ArgumentError unless ``layout`` is one of ``LAYOUTS``; ``what`` names the caller."""
    if layout not in LAYOUTS:
        raise ArgumentError(
            f"{what}: unknown layout",
            seen=repr(layout),
            expected=f"one of {', '.join(LAYOUTS)}",
            do="pass the name of the order in which the codes are stored",
        )


def to_plain(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes in ``layout`` -> codes in the plain layout.

    codes: uint8 ``[..., K/2]``, K a multiple of 8. Returns uint8 of the same shape; ``codes`` itself if it is plain
    already. Uses elementwise ops only, so that it traces, and runs on meta tensors.
    """
    check_layout(layout, "to_plain")
    if layout == PLAIN:
        return codes
    if layout == PLAIN_HIGH_FIRST:
        return _swap_nibbles(codes)
    byte0, byte1, byte2, byte3 = _bytes_of_words(codes, "to_plain")
    return _words_of_bytes(
        (byte1 >> 4) | (byte3 & 0xF0),
        (byte1 & 0x0F) | _low_to_high(byte3),
        (byte0 >> 4) | (byte2 & 0xF0),
        (byte0 & 0x0F) | _low_to_high(byte2),
    )


def from_plain(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes in the plain layout -> codes in ``layout``; the exact inverse of :func:`to_plain`."""
    check_layout(layout, "from_plain")
    if layout == PLAIN:
        return codes
    if layout == PLAIN_HIGH_FIRST:
        return _swap_nibbles(codes)
    k01, k23, k45, k67 = _bytes_of_words(codes, "from_plain")
    return _words_of_bytes(
        (k67 & 0x0F) | _low_to_high(k45),
        (k23 & 0x0F) | _low_to_high(k01),
        (k67 >> 4) | (k45 & 0xF0),
        (k23 >> 4) | (k01 & 0xF0),
    )


@torch.no_grad()
def repack_(codes: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """Reorder ``codes`` from layout ``source`` to ``target`` in its own storage, with at most 256 MB beside it.

    codes: contiguous uint8 ``[..., K/2]``. Returns ``codes``. Raises ArgumentError for an unknown layout or a tensor
    that is not contiguous.
    """
    check_layout(source, "repack_")
    check_layout(target, "repack_")
    if source == target:
        return codes
    if not codes.is_contiguous():
        raise ArgumentError(
            "repack_: codes are not contiguous",
            seen=f"strides {tuple(codes.stride())} for shape {tuple(codes.shape)}",
            expected="a contiguous tensor, since words of four bytes are reordered in place",
            do="call .contiguous() first and keep the result",
        )
    # Every layout permutes within four bytes, so rows need not be kept apart.
    for piece in codes.view(-1).split(_REPACK_PIECE_BYTES):
        piece.copy_(from_plain(to_plain(piece, source), target))
    return codes


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
