"""A kernel that only reads a weight: what the others are measured against. No op calls it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .start import start

WORDS_A_PROGRAM = (1024, 2048, 4096)
"""Sizes of a program's share worth trying; which is best depends on the size of the weight."""


@triton.jit
def stream_kernel(words, scales, matrices, out, WORDS, SCALE_WORDS, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """Read BLOCK words of codes and the scales beside them of one matrix, and leave one number of it all.

    words, scales: int32 ``[E, WORDS]`` and ``[E, SCALE_WORDS]``, matrices: which of the E to read. Without the number,
    nothing would be read.
    """
    share, matrix = tl.program_id(0), tl.load(matrices + tl.program_id(1)).to(tl.int64)
    at = share * BLOCK + tl.arange(0, BLOCK)
    beside = share * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    codes = tl.load(words + matrix * WORDS + at, mask=at < WORDS, other=0, eviction_policy="evict_first")
    scale = tl.load(
        scales + matrix * SCALE_WORDS + beside, mask=beside < SCALE_WORDS, other=0, eviction_policy="evict_first"
    )
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + share, tl.sum(codes) + tl.sum(scale))


def stream(codes: torch.Tensor, scale: torch.Tensor, matrices: torch.Tensor, words_a_program: int) -> torch.Tensor:
    """Read codes and scales of the chosen matrices once: the least that any kernel with these operands has to do.

    codes uint8 ``[E, N, K/2]``, scale uint8 ``[E, N, K/16]``, both contiguous, N and K multiples of 16; matrices
    integer ``[A]``, ids below E. Returns sums of 32-bit words, int32 ``[A, programs]``, wrapped around.
    """
    words, scales = (tensor.flatten(1).view(torch.int32) for tensor in (codes, scale))
    shares = -(-words.shape[1] // words_a_program)
    out = torch.empty((matrices.shape[0], shares), dtype=torch.int32, device=codes.device)
    with torch.cuda.device_of(codes):
        sizes = words.shape[1], scales.shape[1]
        grid = shares, matrices.shape[0]
        start(stream_kernel, grid, words, scales, matrices, out, *sizes, BLOCK=words_a_program, num_warps=4)
    return out
