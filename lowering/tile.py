"""The loop that every product over K shares: one tile of weight times one tile of activations."""

# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_tile, undo_factor


@triton.jit
def product_tile(
    x,
    x_rows,
    live,
    words,
    scale,
    first_n,
    N,
    first_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 ``[BLOCK_N, BLOCK_M]``: code x scale / undo_factor times x, over STEPS blocks of K from ``first_k``.

    x: pointer; x_rows int64 ``[BLOCK_M]``: where its rows begin; live bool ``[BLOCK_M]``: which of them exist.
    words, scale: pointers to the weight ``[N, K/8]``, ``[N, K/16]``. Everything outside counts as zero.

    The weight is the left operand, so that few tokens still fill the tensor core's wide side. K and STEPS are
    constants: with a loop count known only at run time ptxas makes every warpgroup product wait for its own end.
    """
    tl.static_assert(K % 16 == 0, "K is a multiple of the 16 codes that share a scale")
    tl.static_assert(BLOCK_K % 16 == 0, "a tile holds whole blocks")
    DTYPE: tl.constexpr = x.dtype.element_ty
    n = first_n + tl.arange(0, BLOCK_N)
    in_n = (n < N)[:, None]
    word_rows = words + n.to(tl.int64)[:, None] * (K // 8)
    scale_rows = scale + n.to(tl.int64)[:, None] * (K // 16)
    token_rows = x + x_rows[None, :]
    in_m = live[None, :]
    acc = tl.zeros((BLOCK_N, x_rows.shape[0]), tl.float32)
    for step in range(STEPS):
        begin = first_k + step * BLOCK_K
        k = begin + tl.arange(0, BLOCK_K)
        word = begin // 8 + tl.arange(0, BLOCK_K // 8)
        group = begin // 16 + tl.arange(0, BLOCK_K // 16)
        word_tile = tl.load(word_rows + word[None, :], mask=in_n & (word < K // 8)[None, :], other=0)
        scale_tile = tl.load(scale_rows + group[None, :], mask=in_n & (group < K // 16)[None, :], other=0)
        token_tile = tl.load(token_rows + k[:, None], mask=in_m & (k < K)[:, None], other=0.0)
        weight = decode_tile(word_tile, scale_tile, LAYOUT, DTYPE, ASM)
        acc = tl.dot(weight, token_tile, acc, input_precision="ieee")
        if ASM:
            # An empty instruction that reads the sum: it makes every warp wait for its own warpgroup products. Left
            # alone, Triton (3.6 to 3.9) lets all but the first product of a step run on into the next step, past the
            # barrier there, and then another warp's copy of tokens overwrites the tile that they still read.
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def times_global(acc, global_scale, ASM: tl.constexpr):
    """``acc`` with the decoder's factor and the global scale (pointer to one float32, or None) multiplied in, once."""
    factor = undo_factor(ASM)
    if global_scale is not None:
        factor = factor * tl.load(global_scale)
    return acc * factor
