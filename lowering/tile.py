"""The loop that every product over K shares: one tile of weight times one tile of activations."""

# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_tile, natural_position, scale_offset, undo_factor, word_offset


@triton.jit
def product_tile(
    x_rows,
    live,
    words,
    scale,
    n,
    N,
    part,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    ASM: tl.constexpr,
    X_IN_DOT_ORDER: tl.constexpr,
):
    """float32 ``[BLOCK_N, BLOCK_M]``: code x scale / undo_factor times x, over part ``part`` of SPLITS of K.

    x_rows: pointers ``[BLOCK_M]`` to the rows of x; live bool ``[BLOCK_M]``: which of them exist. words, scale:
    pointers to the weight ``[N, K/8]``, ``[N, K/16]``; n int32 ``[BLOCK_N]``: its rows, in any order. Everything
    outside counts as zero. With X_IN_DOT_ORDER x has its columns in the dot order already (see decode.py) and zeros up
    to a multiple of 64 of them; else the assembly form picks them in it.

    The weight is the left operand, so that few tokens still fill the tensor core's wide side. K and SPLITS are
    constants: with a loop count known only at run time ptxas makes every warpgroup product wait for its own end.
    """
    tl.static_assert(K % 16 == 0, "K is a multiple of the 16 codes that share a scale")
    tl.static_assert(BLOCK_K % 16 == 0, "a tile holds whole blocks")
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    K_PADDED: tl.constexpr = (K + 63) // 64 * 64
    STEPS: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS
    in_n = (n < N)[:, None]
    row = n.to(tl.int64)[:, None]
    in_m = live[None, :]
    acc = tl.zeros((n.shape[0], x_rows.shape[0]), tl.float32)
    for step in range(STEPS):
        begin = (part * STEPS + step) * BLOCK_K
        position = begin + tl.arange(0, BLOCK_K)
        k = natural_position(position) if ASM and LAYOUT != "fragments" else position
        word = begin // 8 + tl.arange(0, BLOCK_K // 8)
        if LAYOUT == "fragments" and BLOCK_K == 32:
            # Half a unit, which is every other of its words.
            word = begin // 64 * 8 + begin // 32 % 2 + 2 * tl.arange(0, 4)
        group = begin // 16 + tl.arange(0, BLOCK_K // 16)
        word_tile = tl.load(
            words + word_offset(row, word[None, :], K, LAYOUT), mask=in_n & (word < K // 8)[None, :], other=0
        )
        scale_tile = tl.load(
            scale + scale_offset(row, group[None, :], K, LAYOUT), mask=in_n & (group < K // 16)[None, :], other=0
        )
        column = position if X_IN_DOT_ORDER else k
        # The same condition, where it is, in a form that keeps neighbours together and so the loads wide.
        in_k = position < K_PADDED if X_IN_DOT_ORDER or K == K_PADDED else k < K
        token_tile = tl.load(x_rows[None, :] + column[:, None], mask=in_m & in_k[:, None], other=0.0)
        weight = decode_tile(word_tile, scale_tile, LAYOUT, DTYPE, ASM, DOT_ORDER=ASM)
        acc = tl.dot(weight, token_tile, acc, input_precision="ieee")
        if DTYPE.primitive_bitwidth == 16:
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


@triton.jit
def activate(acc, ACTIVATION: tl.constexpr):
    """The activation that ``ACTIVATION`` names, of a sum in float32; not homogeneous, it comes after the global scale.

    NaN stays NaN.
    """
    if ACTIVATION == "relu2":
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc = acc * acc
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return acc
