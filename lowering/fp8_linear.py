"""The kernel for products with an 8-bit (E4M3) weight and 16-bit or float32 activations, and its launch.

Triton has no E4M3 below SM89, so the bytes are decoded by hand: an E4M3 magnitude, shifted to where float16 has its
exponent, is the value times 2^-8, subnormals included. The 2^8 goes into the sum.
"""

# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import heuristics_sm80, mma_rows
from .arch import Arch, target
from .linear import sum_parts_kernel
from .operands import in_shape_of, rows_of
from .start import start
from .tile import times_global

WIDEST = 128
"""More rows than that take the tile for so many: a wider one would spill. From SM89 on many rows come in W8A8."""


@triton.jit
def decode_e4m3(bytes_, DTYPE: tl.constexpr):
    """uint8 -> DTYPE (bfloat16, float16, float32): the E4M3 value / 256, exactly. NaN comes out as 480 / 256."""
    wide = bytes_.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def fp8_linear_kernel(
    x,
    weight,
    weight_scale,
    bias,
    out,
    M,
    N,
    stride_xm,
    stride_wn,
    stride_wk,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``out [M, N]``; with SPLITS > 1 one part of its sum, raw, into ``out`` float32 ``[SPLITS, M, N]``."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEPS: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    x_rows = x + m.to(tl.int64) * stride_xm
    weight_rows = weight + n.to(tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        k = (part * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        columns = k.to(tl.int64) * stride_wk
        byte_tile = tl.load(weight_rows[:, None] + columns[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        token_tile = tl.load(x_rows[None, :] + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(decode_e4m3(byte_tile, DTYPE), token_tile, acc, input_precision="ieee")
        if DTYPE.primitive_bitwidth == 16:
            # As in tile.py: makes every warp wait for its own products before the tokens' buffer is written again.
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    acc *= 2.0  # and `times_global` has the other 2^7
    inside = (n < N)[:, None] & (m < M)[None, :]
    target_rows = out + m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLITS > 1:
        tl.store(target_rows + part.to(tl.int64) * M * N, acc, mask=inside)
    else:
        acc = times_global(acc, weight_scale, ASM=True)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(target_rows, acc.to(out.dtype.element_ty), mask=inside)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    arch: Arch | None = None,
) -> torch.Tensor:
    """Launch of ``fp4pass::fp8_linear`` for activations as they are; see fp8.py. ``arch`` is for the interpreter."""
    arch = arch or target(x.device)
    n = weight.shape[0]
    rows = rows_of(x)
    m = rows.shape[0]
    out = x.new_empty((m, n))
    if out.numel() == 0:
        return in_shape_of(x, out)
    bias = bias if bias is None else bias.contiguous()
    launch = None
    if not arch.wgmma and rows.is_cuda and rows.dtype != torch.float32 and mma_rows.reads_bytes_of(weight):
        launch = heuristics_sm80.fp8_launch(m, n, arch.multiprocessors)
    if launch is None:
        _in_tiles(rows, weight, weight_scale, bias, out, arch)
    else:
        mma_rows.fp8_linear(rows, weight, weight_scale, bias, out, launch)
    return in_shape_of(x, out)


def _in_tiles(
    rows: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    arch: Arch,
) -> None:
    """Any weight, any dtype, on every GPU."""
    (m, n), k = out.shape, rows.shape[1]
    tile = arch.tile(min(m, WIDEST), rows.dtype)
    tiles = -(-m // tile.block_m), -(-n // tile.block_n)
    # Only with one row of tiles: the number of splits, a constant of the kernel, then follows from the weight alone.
    splits = arch.splits(tiles[1], -(-k // tile.block_k), tile) if tiles[0] == 1 else 1
    parts = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
    operands = (rows, weight, weight_scale, bias, parts, m, n, rows.stride(0), *weight.stride())
    start(fp8_linear_kernel, (*tiles, splits), *operands, K=k, SPLITS=splits, **tile.constants)
    if splits > 1:
        block = 256
        start(
            sum_parts_kernel,
            (m, -(-n // block)),
            parts,
            weight_scale,
            bias,
            out,
            m,
            n,
            SPLITS=splits,
            ACTIVATION="none",
            ASM=True,
            BLOCK=block,
            num_warps=4,
        )
