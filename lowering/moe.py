# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Products of experts: kernels and their launch.

A *slot* is one row of a product and the expert it goes to: row ``s`` of ``gathered_linear``, or the pair (token ``t``,
choice ``j``) with number ``t * k + j`` in ``experts``. Few slots run directly, a program for each slot and tile of N.
Many are first sorted by expert, on the device and without a host sync, so that a tile holds slots of one expert.
Sizes depend on shapes alone, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import few_rows, many_rows, mma_rows
from .arch import Arch, Tile, rows_of_expert, target
from .decode import natural_position, to_dot_order
from .launches import FewRows, ManyRows, MmaRows
from .operands import Schedule, Weight, has_dot_order, launch_for, rows_of, tensors_of
from .reference import NO_ACTIVATION, expert_of_row
from .schedule import schedule
from .start import start
from .tile import activate, product_tile, times_global

# The second products of all slots before their sum. More tokens run in parts, each of which reads the weights again.
# With what the products before it hold this stays below 1 GB at Nano's widths.
_WORKSPACE_BYTES = 768 << 20

# Launches of kernels that take a schedule's blocks as they are. (A tuple: a union would be made anew at each call.)
_BY_BLOCKS = (FewRows, MmaRows)


@triton.jit(do_not_specialize=["slots_of_x"])
def expert_product_kernel(
    x,
    words,
    scale,
    global_scale,
    weights,
    out,
    experts,
    order,
    ends,
    block_ends,
    N,
    columns,
    EXPERTS,
    slots_of_x,
    stride_xm,
    global_stride,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    ASM: tl.constexpr,
    X_IN_DOT_ORDER: tl.constexpr,
    OUT_IN_DOT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Block ``b``, all of expert ``experts[b]``: rows of ``out [slots, columns]``. Ends at once without a valid expert.

    With ``order`` None block b is slot b alone. Otherwise ``order`` lists the slots sorted by expert, ``ends [E]`` the
    cumulative number of slots and ``block_ends [E]`` of blocks. Slot s reads row ``s // slots_of_x`` of x.
    ``columns`` is N; with OUT_IN_DOT_ORDER, N rounded up to 64, and the columns that this adds are zero.
    """
    block = tl.program_id(0)
    expert = tl.load(experts + block).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    lane = tl.arange(0, BLOCK_M)
    if order is None:
        live = lane == 0
        slot = tl.where(live, block, 0).to(tl.int64)
    else:
        block_begin = tl.load(block_ends + expert - 1, mask=expert > 0, other=0)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        position = begin + (block - block_begin) * BLOCK_M + lane
        live = position < tl.load(ends + expert)
        slot = tl.load(order + position, mask=live, other=0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # To write columns in the dot order is to take the weight's rows in it: loads of rows do not mind, and the stores
    # stay wide.
    n = natural_position(column) if OUT_IN_DOT_ORDER else column
    x_rows = x + (slot // slots_of_x) * stride_xm
    words += expert * N * (K // 8)
    scale += expert * N * (K // 16)
    acc = product_tile(x_rows, live, words, scale, n, N, 0, 1, K, BLOCK_K, LAYOUT, ASM, X_IN_DOT_ORDER)
    if global_scale is not None:
        global_scale += expert * global_stride
    acc = activate(times_global(acc, global_scale, ASM), ACTIVATION)
    if weights is not None:
        acc = acc * tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[None, :]
    if OUT_IN_DOT_ORDER:
        # An infinite x or global scale would leave NaN there.
        acc = tl.where((n < N)[:, None], acc, 0.0)
    tl.store(
        out + slot[None, :] * columns + column[:, None],
        acc.to(out.dtype.element_ty),
        mask=(column < columns)[:, None] & live[None, :],
    )


@triton.jit
def sum_slots_kernel(slots, ids, out, N, EXPERTS, CHOICES: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """``out [T, N]``: the sum of a token's CHOICES rows of ``slots`` float32; a row of no valid expert is not read."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        slot = token * CHOICES + choice
        expert = tl.load(ids + slot)
        columns = tl.where((expert >= 0) & (expert < EXPERTS), N, 0)
        acc += tl.load(slots + slot * N + n, mask=n < columns, other=0.0)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@dataclass(frozen=True)
class Rows:
    """Activations ``[R, columns]``, in or out of a product, and the order of their columns.

    In the dot order there are columns up to a multiple of 64. Each row that goes in serves ``slots`` slots.
    """

    tensor: torch.Tensor
    in_dot_order: bool = False
    slots: int = 1


def gathered_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    ids: torch.Tensor,
    layout: str,
    *,
    arch: Arch | None = None,
    asm: bool = True,
) -> torch.Tensor:
    """Launch of ``fp4pass::gathered_linear``; see ops.py. ``arch`` and ``asm=False`` are for the interpreter's sake."""
    arch = arch or target(x.device)
    out = x.new_zeros((x.shape[0], codes.shape[1]))
    if not out.numel():
        return out
    weight, rows, ids = Weight(codes, scale, global_scale, layout), rows_of(x), ids.contiguous()
    launch = launch_for(arch, rows_of_expert(len(ids), weight.count), x, weight, asm=asm, experts=True)
    plan = schedule(ids, weight.count, launch.block_m)
    if isinstance(launch, _BY_BLOCKS):
        kernel = few_rows if isinstance(launch, FewRows) else mma_rows
        kernel.expert_product(plan, rows, 1, weight, None, out, NO_ACTIVATION, launch)
    elif isinstance(launch, ManyRows):
        many_rows.gathered(plan, rows, weight, out, launch)
    else:
        _product(
            plan,
            launch,
            _rows_for(plan, rows, 1, has_dot_order(rows, weight, asm=asm)),
            weight,
            None,
            Rows(out),
            NO_ACTIVATION,
            asm,
        )
    return out


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    layout: str,
    *,
    arch: Arch | None = None,
    asm: bool = True,
) -> torch.Tensor:
    """Launch of ``fp4pass::grouped_linear``; see ops.py."""
    ids = expert_of_row(offsets, x.shape[0])
    return gathered_linear(x, codes, scale, global_scale, ids, layout, arch=arch, asm=asm)


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
    *,
    arch: Arch | None = None,
    asm: bool = True,
) -> torch.Tensor:
    """Launch of ``fp4pass::experts``; see ops.py."""
    arch = arch or target(x.device)
    up = Weight(up_codes, up_scale, up_global, layout)
    down = Weight(down_codes, down_scale, down_global, layout)
    tokens, choices = ids.shape
    out = x.new_empty((tokens, down_codes.shape[1]))
    if choices == 0:
        return out.zero_()
    rows = rows_of(x)
    step = max(1, _WORKSPACE_BYTES // (choices * max(1, out.shape[1]) * torch.float32.itemsize))
    if tokens <= step:
        _experts_of(arch, rows, ids, weights, up, down, out, activation, asm)
        return out
    for part in (slice(first, first + step) for first in range(0, tokens, step)):
        _experts_of(arch, rows[part], ids[part], weights[part], up, down, out[part], activation, asm)
    return out


def _experts_of(
    arch: Arch,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: Weight,
    down: Weight,
    out: torch.Tensor,
    activation: str,
    asm: bool,
) -> None:
    """Write the block's result for the tokens of ``x`` into ``out``, a part of the whole result."""
    # Of one choice each, or of one token, a reshape alone is a view with the strides that were there.
    flat, routing = (each.reshape(-1).contiguous() for each in (ids, weights))
    inner, columns, choices = up.codes.shape[1], out.shape[1], ids.shape[1]
    of_expert = rows_of_expert(len(flat), up.count)
    # Both products run by one schedule, so what one of them cannot run with is not for the other either.
    launch, other = (launch_for(arch, of_expert, x, each, asm=asm, experts=True) for each in (up, down))
    if type(launch) is not type(other):
        launch = arch.tile(of_expert, x.dtype, experts=True)
    plan = schedule(flat, up.count, launch.block_m)
    slots = x.new_empty((flat.shape[0], columns), dtype=torch.float32)
    # On Hopper these begin while the kernel before them ends.
    dependent = arch.wgmma and not isinstance(launch, Tile)
    if isinstance(launch, _BY_BLOCKS):
        kernel = few_rows if isinstance(launch, FewRows) else mma_rows
        hidden = x.new_empty((flat.shape[0], inner))
        chained = ((1,), (2,)) if dependent else ((), ())
        kernel.expert_product(plan, x, choices, up, None, hidden, activation, launch, *chained[0])
        kernel.expert_product(plan, hidden, 1, down, routing, slots, NO_ACTIVATION, launch, *chained[1])
    elif isinstance(launch, ManyRows):
        many_rows.experts(plan, x, choices, up, down, routing, slots, activation, launch)
    else:
        # The first product leaves its columns in the dot order, where the second one reads them side by side.
        ordered = has_dot_order(x, up, asm=asm)
        rows = Rows(x.new_empty((flat.shape[0], inner + (-inner % 64 if ordered else 0))), ordered)
        _product(plan, launch, _rows_for(plan, x, choices, ordered), up, None, rows, activation, asm)
        _product(plan, launch, rows, down, routing, Rows(slots), NO_ACTIVATION, asm)
    block = 512
    start(
        sum_slots_kernel,
        (x.shape[0], -(-columns // block)),
        slots,
        flat,
        out,
        columns,
        up.count,
        CHOICES=choices,
        BLOCK=block,
        DEPENDENT=dependent,
        launch_pdl=dependent,
        num_warps=4,
    )


def _rows_for(plan: Schedule, x: torch.Tensor, slots: int, ordered: bool) -> Rows:
    """x as a product's input; put into the dot order unless its rows are few or the product has no use for it."""
    if plan.order is None or not ordered:
        return Rows(x, slots=slots)
    return Rows(to_dot_order(x), in_dot_order=True, slots=slots)


def _product(
    plan: Schedule,
    tile: Tile,
    x: Rows,
    weight: Weight,
    routing: torch.Tensor | None,
    out: Rows,
    activation: str,
    asm: bool,
) -> None:
    n, k = weight.codes.shape[1], weight.codes.shape[2] * 2
    columns = out.tensor.shape[1]
    start(
        expert_product_kernel,
        (plan.blocks, -(-columns // tile.block_n)),
        x.tensor,
        weight.words,
        weight.scale,
        weight.global_scale,
        routing,
        out.tensor,
        *tensors_of(plan),
        n,
        columns,
        weight.count,
        x.slots,
        x.tensor.stride(0),
        weight.global_stride,
        K=k,
        ACTIVATION=activation,
        LAYOUT=weight.layout,
        ASM=asm and x.tensor.dtype != torch.float32,
        X_IN_DOT_ORDER=x.in_dot_order,
        OUT_IN_DOT_ORDER=out.in_dot_order,
        **tile.constants,
    )
