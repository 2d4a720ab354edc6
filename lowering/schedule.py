# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Which rows go to which expert, worked out on the device without a host sync, in sizes that shapes alone decide."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .operands import Schedule

# Up to here a program a slot is cheaper than sorting, although two slots may read the same weight.
_MOST_DIRECT_SLOTS = 16
_SLOTS_A_PROGRAM = 32


@triton.jit(do_not_specialize=["S", "BLOCKS"])
def blocks_kernel(
    ids,
    ends,
    block_ends,
    experts,
    S,
    E,
    BLOCKS,
    BLOCK_M,
    E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Cumulative numbers of slots and of blocks by expert, and each block's expert. One program does all of it."""
    expert = tl.arange(0, E_PADDED)
    counts = tl.zeros((E_PADDED,), tl.int32)
    for first in range(0, S, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        chosen = tl.load(ids + slot, mask=slot < S, other=-1)
        valid = (chosen >= 0) & (chosen < E)
        # What has no valid expert is counted below the first and taken away again.
        counts += tl.histogram(tl.where(valid, chosen, 0).to(tl.int32), E_PADDED)
        counts -= tl.where(expert == 0, CHUNK - tl.sum(valid.to(tl.int32)), 0)
    block_end = tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M, 0)
    tl.store(ends + expert, tl.cumsum(counts, 0), mask=expert < E)
    tl.store(block_ends + expert, block_end, mask=expert < E)
    before = tl.where(expert < E, block_end, BLOCKS + 1)
    for first in range(0, BLOCKS, FEW):
        block = first + tl.arange(0, FEW)
        # A block belongs to the first expert whose blocks end behind it; past them all, to none.
        tl.store(experts + block, tl.sum((before[None, :] <= block[:, None]).to(tl.int32), 1), mask=block < BLOCKS)


@triton.jit(do_not_specialize=["S"])
def order_kernel(ids, ends, order, S, E, SLOTS: tl.constexpr, CHUNK: tl.constexpr):
    """``order``: the slots with a valid expert, sorted by expert, those of one expert as they came."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    chosen = tl.load(ids + slot, mask=slot < S, other=-1)
    valid = (chosen >= 0) & (chosen < E)
    rank = tl.zeros((SLOTS,), tl.int32)
    for first in range(0, tl.program_id(0) * SLOTS + SLOTS, CHUNK):
        earlier = first + tl.arange(0, CHUNK)
        other = tl.load(ids + earlier, mask=earlier < S, other=-1)
        same = (other[None, :] == chosen[:, None]) & (earlier[None, :] < slot[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    begin = tl.load(ends + chosen - 1, mask=valid & (chosen > 0), other=0)
    tl.store(order + begin + rank, slot, mask=valid)


def runs_directly(slots: int, experts: int) -> bool:
    """Whether so many slots are better not sorted by their expert."""
    return slots <= min(_MOST_DIRECT_SLOTS, experts)


def schedule(ids: torch.Tensor, experts: int, block_m: int) -> Schedule:
    """The schedule of slots with expert ids ``[S]``, in tiles of ``block_m``; ids outside ``[0, experts)`` drop out.

    Every tensor's size follows from S and ``experts`` alone: blocks that turn out not to be needed get the expert
    ``experts``, and what ``order`` has behind the slots with a valid expert are slots, too, but any.
    """
    count = ids.shape[0]
    if runs_directly(count, experts):
        return Schedule(count, ids)
    # An expert's first block needs one slot, every further one block_m more.
    nonempty = min(count, experts)
    blocks = nonempty + (count - nonempty) // block_m
    ends, block_ends, of_block = (
        torch.empty(size, dtype=torch.int32, device=ids.device) for size in (experts, experts, blocks)
    )
    order = torch.zeros(count, dtype=torch.int32, device=ids.device)
    padded = max(16, triton.next_power_of_2(experts))
    few = max(1, 8192 // padded)
    blocks_kernel[(1,)](
        ids,
        ends,
        block_ends,
        of_block,
        count,
        experts,
        blocks,
        block_m,
        E_PADDED=padded,
        CHUNK=1024,
        FEW=few,
        num_warps=8,
    )
    order_kernel[(triton.cdiv(count, _SLOTS_A_PROGRAM),)](
        ids, ends, order, count, experts, SLOTS=_SLOTS_A_PROGRAM, CHUNK=256, num_warps=4
    )
    return Schedule(blocks, of_block, order, ends, block_ends)
