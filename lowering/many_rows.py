# ruff: noqa: ANN001, ANN201, RUF059  (kernels: Triton types the parameters; tuples are shared out by place)

"""Products with many rows of x on Hopper: a loader, decoders and multipliers work side by side in one program.

The loader's one warp keeps the copy engine busy; the decoders turn codes into a tile of 16-bit weights in shared
memory, in natural order, so that x needs none of its own; the multipliers run ``wgmma`` from shared memory. Barriers
in shared memory pass the stages around.

Programs stay: there is one for each multiprocessor. A *step* is 64 columns of K for one tile. Which tiles and steps are
a program's own is in sharing.py; where several share a tile, the one that begins it adds, in order, the sums that the
others have left in ``parts``. It waits only for programs that started before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arch import ManyRows
from .decode import undo_factor
from .few_rows import activate, decode_units, memory_layout
from .operands import Schedule, Weight
from .sharing import locate, place, rows_of_block, shares

# Names that changed between Triton 3.6 and 3.9.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

STEP = gl.constexpr(64)
# Codes and scales are fetched so many steps before the tokens that they meet.
LEAD = gl.constexpr(2)


@gluon.jit
def load_codes(codes_desc, scale_desc, raw, it, live, share, tiles, plan, N, UNITS: gl.constexpr):
    """Codes and scales of step ``it``, if there is one (``live``), into their slot."""
    codes, scales, arrived = raw
    ROWS: gl.constexpr = codes.shape[1]
    tile, k = locate(it, share, UNITS)
    m, n = place(tile, tiles, plan)
    row = n * ROWS
    if plan[0] is not None:
        row += gl.load(plan[0] + gl.where(live, m, 0)).to(gl.int32) * (N // 16)
    slot = it % codes.shape[0]
    mbarrier.expect(arrived.index(slot), ROWS * 576, pred=live)
    copy_in(codes_desc, [row, k * 128], arrived.index(slot), codes.index(slot), pred=live)
    copy_in(scale_desc, [row, k * 64], arrived.index(slot), scales.index(slot), pred=live)


@gluon.jit
def load(x_desc, codes_desc, scale_desc, x, raw, full, empty, share, total, tiles, plan, N, UNITS: gl.constexpr):
    """The loader: tokens as soon as their stage is free, codes and scales LEAD steps ahead of them."""
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    for it in gl.static_range(LEAD):
        load_codes(codes_desc, scale_desc, raw, it, it < total, share, tiles, plan, N, UNITS)
    for it in range(total):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), it // STAGES & 1 ^ 1)
        tile, k = locate(it, share, UNITS)
        m, n = place(tile, tiles, plan)
        row = m * BM
        if plan[0] is not None:
            expert, row, end = rows_of_block(m, plan, BM)
        mbarrier.expect(full.index(stage), BM * STEP * 2)
        copy_in(x_desc, [row, k * STEP], full.index(stage), x.index(stage))
        # Step it - STAGES is multiplied, so its codes, and those LEAD before the ones fetched now, are decoded.
        load_codes(codes_desc, scale_desc, raw, it + LEAD, it + LEAD < total, share, tiles, plan, N, UNITS)


@gluon.jit
def decoded(raw, it, DTYPE: gl.constexpr):
    """The tile ``[BN, 64]`` of step ``it``."""
    codes, scales, arrived = raw
    SLOTS: gl.constexpr = codes.shape[0]
    UNITS: gl.constexpr = codes.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = UNITS // WARPS
    mbarrier.wait(arrived.index(it % SLOTS), it // SLOTS & 1)
    words = codes.index(it % SLOTS).reshape([WARPS, ROWS, 128]).load(memory_layout(WARPS, ROWS, 4))
    scale = scales.index(it % SLOTS).reshape([WARPS, ROWS, 64]).load(memory_layout(WARPS, ROWS, 2))
    held = gl.zeros([WARPS, ROWS, 64], gl.int32, layout=memory_layout(WARPS, ROWS, 2))
    return decode_units(words, scale, held, DTYPE).reshape([UNITS * 16, 64])


@gluon.jit
def decode(raw, weight, full, empty, total):
    """The decoders. They announce a tile only after decoding the next: its stores have then reached shared memory."""
    STAGES: gl.constexpr = weight.shape[0]
    if total > 0:
        tile = decoded(raw, 0, weight.dtype)
        for it in range(total):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), it // STAGES & 1 ^ 1)
            weight.index(stage).store(tile)
            # The last step decodes itself again, for nothing.
            tile = decoded(raw, gl.minimum(it + 1, total - 1), weight.dtype)
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)


@gluon.constexpr_function
def sums_layout(warps, bm, bn):
    """Accumulators of a tile: warpgroups side by side along the tokens, else along the columns."""
    along = min(warps, bm // 16)
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[along, warps // along], instr_shape=[16, bn * along // warps, 16]
    )


@gluon.constexpr_function
def stored_layout(warps, bn):
    """A tile as it is written: 16 bytes a thread."""
    across = min(32, bn // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def finish(acc, tile, tiles, plan, result, ACTIVATION: gl.constexpr):
    """Global scale, bias, activation and routing weight, then the tile's rows of ``out``."""
    out, M, N, global_scale, global_stride, bias, weights, order = result
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = stored_layout(gl.num_warps(), BN)
    tile_m, tile_n = place(tile, tiles, plan)
    factor = undo_factor(True)
    expert = 0
    first = tile_m * BM
    end = M
    if plan[0] is not None:
        expert, first, end = rows_of_block(tile_m, plan, BM)
    if global_scale is not None:
        factor = factor * gl.load(global_scale + expert * global_stride)
    acc = acc * factor
    if bias is None:
        acc = activate(acc, ACTIVATION)
    n = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
    row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    live = row < end
    if weights is None and bias is None:
        value = gl.convert_layout(acc.to(out.dtype.element_ty), LAYOUT)
    else:
        value = gl.convert_layout(acc, LAYOUT)
        if bias is not None:
            value = activate(value + gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :], ACTIVATION)
        if weights is not None:
            row = gl.load(order + row, mask=live, other=0).to(gl.int32)
            value = value * gl.load(weights + row, mask=live, other=0.0).to(gl.float32)[:, None]
        value = value.to(out.dtype.element_ty)
    gl.store(out + row.to(gl.int64)[:, None] * N + n[None, :], value, mask=live[:, None] & (n < N)[None, :])


@gluon.jit
def multiply(x, weight, full, empty, share, parts, tiles, plan, result, UNITS: gl.constexpr, ACTIVATION: gl.constexpr):
    """The multipliers: one product is always on its way while the next one's operands are waited for."""
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BN: gl.constexpr = weight.shape[1]
    MMA: gl.constexpr = sums_layout(gl.num_warps(), BM, BN)
    begin, count, shared, me = share
    sums, flags, each, total = parts
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, MMA))
    within = row[:, None] * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))[None, :]
    it = 0
    while it < total:
        tile, first = locate(it, share, UNITS)
        last = gl.where(it < count, gl.minimum(UNITS, first + count - it), UNITS)
        acc = gl.zeros([BM, BN], gl.float32, layout=MMA)
        for step in range(first, last):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), it // STAGES & 1)
            acc = warpgroup_mma(x.index(stage), weight.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=step > first)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
        if first > 0:
            # The program before this one began the tile and will add this.
            gl.store(sums + me.to(gl.int64) * (BM * BN) + within, acc)
            barrier()
            gl.atomic_xchg(flags + me, 1, sem="release")
        else:
            other = me
            done = last
            while done < UNITS:
                other += 1
                while gl.atomic_cas(flags + other, 1, 0, sem="acquire") != 1:
                    pass
                barrier()
                acc += gl.load(sums + other.to(gl.int64) * (BM * BN) + within, cache_modifier=".cg")
                done += each
            finish(acc, tile, tiles, plan, result, ACTIVATION)


@gluon.jit(do_not_specialize=["M"])
def product_kernel(
    x_desc,
    codes_desc,
    scale_desc,
    global_scale,
    bias,
    weights,
    out,
    parts,
    flags,
    experts,
    order,
    ends,
    block_ends,
    M,
    N,
    EXPERTS,
    global_stride,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    DECODERS: gl.constexpr,
):
    """``out [M, N]`` of a dense product, or the rows of all blocks of experts, x then being sorted by expert.

    parts float32 ``[programs, BM * BN]``, flags int32 ``[programs]`` of zeros: where programs leave sums to each other;
    flags are zeros again at the end. With ``weights`` a row goes to ``out[order[row]]``, multiplied.
    """
    UNITS: gl.constexpr = K // STEP
    DTYPE: gl.constexpr = x_desc.dtype
    SLOTS: gl.constexpr = STAGES + LEAD
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    if experts is None:
        tiles = (gl.cdiv(M, BM), gl.cdiv(N, BN))
    else:
        tiles = (gl.load(block_ends + EXPERTS - 1).to(gl.int32), gl.cdiv(N, BN))
    share, total, each = shares(tiles[0] * tiles[1], UNITS)
    tokens = gl.allocate_shared_memory(DTYPE, [STAGES, BM, STEP], x_desc.layout)
    weight = gl.allocate_shared_memory(DTYPE, [STAGES, BN, STEP], SWIZZLED)
    codes = gl.allocate_shared_memory(gl.int32, [SLOTS, BN // 16, 128], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint8, [SLOTS, BN // 16, 64], scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)  # the tokens, and the decoded weight
        mbarrier.init(empty.index(stage), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(arrived.index(slot), count=1)
    fence_async_shared()
    plan = (experts, ends, block_ends)
    raw = (codes, scales, arrived)
    left = (parts, flags, each, total)
    result = (out, M, N, global_scale, global_stride, bias, weights, order)
    gl.warp_specialize(
        [
            (multiply, (tokens, weight, full, empty, share, left, tiles, plan, result, UNITS, ACTIVATION)),
            (decode, (raw, weight, full, empty, total)),
            (load, (x_desc, codes_desc, scale_desc, tokens, raw, full, empty, share, total, tiles, plan, N, UNITS)),
        ],
        [DECODERS, 1],
        [96, 40],
    )


def linear(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: ManyRows,
) -> None:
    """``out [M, N]`` = activation(rows ``[M, K]`` @ weight.T + bias), a weight in ``fragments`` and 16-bit rows."""
    m, k = rows.shape
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(out.shape[1], launch.block_n)
    _launch(rows, weight, bias, None, out, None, activation, launch, tiles * (k // 64) // _FEWEST_STEPS)


def expert_product(
    plan: Schedule,
    rows: torch.Tensor,
    weight: Weight,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    launch: ManyRows,
) -> None:
    """Rows of ``out``, for rows ``[slots, K]`` sorted by expert as ``plan.order`` lists them.

    Row p of ``rows`` gives row p of ``out``; with ``routing [slots]`` it is multiplied and becomes row
    ``plan.order[p]``.
    """
    _launch(rows, weight, None, routing, out, plan, activation, launch, rows.shape[0])


# A program that got fewer steps would be all beginning and end.
_FEWEST_STEPS = 4


def _launch(
    rows: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    routing: torch.Tensor | None,
    out: torch.Tensor,
    plan: Schedule | None,
    activation: str,
    launch: ManyRows,
    most_programs: int,
) -> None:
    m, k = rows.shape
    n = out.shape[1]
    if rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.contiguous() if rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)
    programs = max(1, min(_multiprocessors(rows.device.index), most_programs))
    units = launch.block_n // 16
    product_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [launch.block_m, 64], _swizzled()),
        TensorDescriptor.from_tensor(weight.words.view(-1, k * 2), [units, 128], _straight(32)),
        TensorDescriptor.from_tensor(weight.scale.view(-1, k), [units, 64], _straight(8)),
        weight.global_scale,
        bias,
        routing,
        out,
        rows.new_empty(programs * launch.block_m * launch.block_n, dtype=torch.float32),
        rows.new_zeros(programs, dtype=torch.int32),
        plan.experts if plan else None,
        plan.order if plan else None,
        plan.ends if plan else None,
        plan.block_ends if plan else None,
        m,
        n,
        weight.count,
        weight.global_stride,
        K=k,
        ACTIVATION=activation,
        **launch.constants,
    )


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _swizzled() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _straight(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
