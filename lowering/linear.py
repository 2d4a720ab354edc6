"""Dense products: kernels and their launch. ``x @ weight.T`` over K, and ``grad @ weight`` over N for the backward."""

# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import few_rows, many_rows, mma_rows
from .arch import Arch, Tile, target
from .decode import decode_tile, scale_offset, to_dot_order, word_offset
from .launches import FewRows, InParts, ManyRows, MmaRows
from .operands import Weight, has_dot_order, in_shape_of, launch_for, rows_of, words_of
from .reference import NO_ACTIVATION
from .start import start
from .tile import activate, product_tile, times_global

# From so many rows on, putting x into the dot order once costs less than picking its columns in every program.
REORDER_FROM = 17


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    words,
    scale,
    global_scale,
    bias,
    out,
    M,
    N,
    stride_xm,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    ASM: tl.constexpr,
    X_IN_DOT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``out [M, N]``; with SPLITS > 1 one part of its sum, raw, into ``out`` float32 ``[SPLITS, M, N]``."""
    # Tiles of the same weight rows follow each other, so that they meet in the L2 cache.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    x_rows = x + m.to(tl.int64) * stride_xm
    acc = product_tile(x_rows, m < M, words, scale, n, N, part, SPLITS, K, BLOCK_K, LAYOUT, ASM, X_IN_DOT_ORDER)
    inside = (n < N)[:, None] & (m < M)[None, :]
    target_rows = out + m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLITS > 1:
        tl.store(target_rows + part.to(tl.int64) * M * N, acc, mask=inside)
    else:
        acc = times_global(acc, global_scale, ASM)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        tl.store(target_rows, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    parts,
    global_scale,
    bias,
    out,
    M,
    N,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out [M, N]``: the parts float32 ``[SPLITS, M, N]`` summed in order, then global scale, bias and activation."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(parts + (part * M + row) * N + n, mask=n < N, other=0.0)
    acc = times_global(acc, global_scale, ASM)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def linear_backward_kernel(
    grad,
    words,
    scale,
    global_scale,
    out,
    M,
    stride_gm,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``out [M, K]`` = grad ``[M, N]`` @ weight ``[N, K]``."""
    tl.static_assert(K % 16 == 0, "K is a multiple of the 16 codes that share a scale")
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    word = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    group = first_k // 16 + tl.arange(0, BLOCK_K // 16)
    grad_rows = grad + m.to(tl.int64)[:, None] * stride_gm
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        row = n.to(tl.int64)[:, None]
        in_n = (n < N)[:, None]
        word_tile = tl.load(
            words + word_offset(row, word[None, :], K, LAYOUT), mask=in_n & (word < K // 8)[None, :], other=0
        )
        scale_tile = tl.load(
            scale + scale_offset(row, group[None, :], K, LAYOUT), mask=in_n & (group < K // 16)[None, :], other=0
        )
        grad_tile = tl.load(grad_rows + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        weight = decode_tile(word_tile, scale_tile, LAYOUT, grad.dtype.element_ty, ASM)
        acc = tl.dot(grad_tile, weight, acc, input_precision="ieee")
    acc = times_global(acc, global_scale, ASM)
    k = first_k + tl.arange(0, BLOCK_K)
    tl.store(
        out + m.to(tl.int64)[:, None] * K + k[None, :],
        acc.to(out.dtype.element_ty),
        mask=(m < M)[:, None] & (k < K)[None, :],
    )


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: str,
    activation: str = NO_ACTIVATION,
    out_dtype: torch.dtype | None = None,
    *,
    arch: Arch | None = None,
    asm: bool = True,
) -> torch.Tensor:
    """Launch of ``fp4pass::linear``; see ops.py. ``arch`` and ``asm=False`` are for the interpreter's sake."""
    arch = arch or target(x.device)
    n = codes.shape[0]
    rows = rows_of(x)
    m = rows.shape[0]
    out = x.new_empty((m, n), dtype=out_dtype)
    if m == 0 or n == 0:
        return in_shape_of(x, out)
    asm = asm and x.dtype != torch.float32
    weight = Weight(codes, scale, global_scale, layout)
    bias = bias if bias is None else bias.contiguous()
    launch = launch_for(arch, m, x, weight, asm=asm)
    if isinstance(launch, InParts):
        for part, each in ((slice(launch.full), launch.first), (slice(launch.full, None), launch.rest)):
            _in_fragments(rows[part], weight, bias, out[part], activation, each)
    elif isinstance(launch, Tile):
        _in_tiles(rows, weight, bias, out, activation, arch, launch, asm)
    else:
        _in_fragments(rows, weight, bias, out, activation, launch)
    return in_shape_of(x, out)


_KERNELS = {FewRows: few_rows, ManyRows: many_rows, MmaRows: mma_rows}


def _in_fragments(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: FewRows | ManyRows | MmaRows,
) -> None:
    _KERNELS[type(launch)].linear(rows, weight, bias, out, activation, launch)


def _in_tiles(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    arch: Arch,
    tile: Tile,
    asm: bool,
) -> None:
    """Any layout, any dtype, on every GPU."""
    m, k = rows.shape
    n = out.shape[1]
    tiles = -(-m // tile.block_m), -(-n // tile.block_n)
    # Only with one row of tiles: the number of splits, a constant of the kernel, then follows from the weight alone.
    splits = arch.splits(tiles[1], -(-k // tile.block_k), tile) if tiles[0] == 1 else 1
    in_dot_order = m >= REORDER_FROM and has_dot_order(rows, weight, asm=asm)
    if in_dot_order:
        rows = to_dot_order(rows)
    parts = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
    start(
        linear_kernel,
        (*tiles, splits),
        rows,
        weight.words,
        weight.scale,
        weight.global_scale,
        bias,
        parts,
        m,
        n,
        rows.stride(0),
        K=k,
        SPLITS=splits,
        ACTIVATION=activation if splits == 1 else NO_ACTIVATION,
        LAYOUT=weight.layout,
        ASM=asm,
        X_IN_DOT_ORDER=in_dot_order,
        **tile.constants,
    )
    if splits > 1:
        block = 256
        start(
            sum_parts_kernel,
            (m, -(-n // block)),
            parts,
            weight.global_scale,
            bias,
            out,
            m,
            n,
            SPLITS=splits,
            ACTIVATION=activation,
            ASM=asm,
            BLOCK=block,
            num_warps=4,
        )


def linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: str,
    *,
    arch: Arch | None = None,
    asm: bool = True,
) -> torch.Tensor:
    """Launch of ``fp4pass::linear_backward``; see ops.py."""
    arch = arch or target(grad.device)
    n, k = codes.shape[0], codes.shape[1] * 2
    rows = rows_of(grad)
    m = rows.shape[0]
    out = grad.new_empty((m, k))
    if out.numel() and n:
        tile: Tile = arch.backward_tile(grad.dtype)
        start(
            linear_backward_kernel,
            (-(-m // tile.block_m), -(-k // tile.block_k)),
            rows,
            words_of(codes),
            scale,
            global_scale,
            out,
            m,
            rows.stride(0),
            N=n,
            K=k,
            LAYOUT=layout,
            ASM=asm and grad.dtype != torch.float32,
            **tile.constants,
        )
    return in_shape_of(grad, out)
