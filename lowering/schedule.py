# ruff: noqa: ANN001, ANN201  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Which rows go to which expert, worked out on the device without a host sync, in sizes that shapes alone decide.

A counting sort of the slots by their expert. Many slots are counted in *parts*; ``earlier [parts, experts]`` then says
how many slots of an expert lie in the parts before. A few are one part, and one program does all of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arch import rows_of_expert
from .operands import Schedule
from .start import start

# Up to here one program sorts faster than a second kernel starts.
_MOST_SLOTS_OF_ONE_PROGRAM = 256
_PART, _SLOTS_A_PROGRAM = 1024, 32


@triton.jit
def load_expert(ids, slot, S, E):
    """The slots' experts, and whether they have a valid one."""
    chosen = tl.load(ids + slot, mask=slot < S, other=-1)
    return chosen, (chosen >= 0) & (chosen < E)


@triton.jit
def count_slots(ids, first, end, S, E, E_PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the slots from ``first`` to ``end`` each expert has."""
    counts = tl.zeros((E_PADDED,), tl.int32)
    expert = tl.arange(0, E_PADDED)
    for begin in range(first, end, CHUNK):
        chosen, valid = load_expert(ids, begin + tl.arange(0, CHUNK), S, E)
        # What has no valid expert is counted below the first and taken away again.
        counts += tl.histogram(tl.where(valid, chosen, 0).to(tl.int32), E_PADDED)
        counts -= tl.where(expert == 0, CHUNK - tl.sum(valid.to(tl.int32)), 0)
    return counts


@triton.jit(do_not_specialize=["S"])
def parts_kernel(ids, earlier, S, E, PART: tl.constexpr, E_PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """For now, how many slots each expert has in each part."""
    first = tl.program_id(0) * PART
    counts = count_slots(ids, first, first + PART, S, E, E_PADDED, CHUNK)
    expert = tl.arange(0, E_PADDED)
    tl.store(earlier + tl.program_id(0) * E + expert, counts, mask=expert < E)


@triton.jit
def sum_parts(earlier, PARTS, E, E_PADDED: tl.constexpr, FEW: tl.constexpr):
    """Each expert's slots in all parts; ``earlier`` becomes those in the parts before."""
    counts = tl.zeros((E_PADDED,), tl.int32)
    expert = tl.arange(0, E_PADDED)[None, :]
    for first in range(0, PARTS, FEW):
        part = first + tl.arange(0, FEW)[:, None]
        inside = (part < PARTS) & (expert < E)
        found = tl.load(earlier + part * E + expert, mask=inside, other=0)
        tl.store(earlier + part * E + expert, counts[None, :] + tl.cumsum(found, 0) - found, mask=inside)
        counts += tl.sum(found, 0)
    return counts


@triton.jit
def order_slots(ids, earlier, ends, order, slot, S, E, PART: tl.constexpr, CHUNK: tl.constexpr):
    """Put the slots, neighbours within one part, where they belong in ``order``."""
    chosen, valid = load_expert(ids, slot, S, E)
    begin = tl.load(ends + chosen - 1, mask=valid & (chosen > 0), other=0)
    part = tl.min(slot) // PART
    if earlier is not None:
        begin += tl.load(earlier + part * E + chosen, mask=valid, other=0)
    rank = tl.zeros_like(slot)
    for first in range(part * PART, tl.max(slot) + 1, CHUNK):
        before = first + tl.arange(0, CHUNK)
        other = tl.load(ids + before, mask=before < S, other=-1)
        same = (other[None, :] == chosen[:, None]) & (before[None, :] < slot[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    tl.store(order + begin + rank, slot, mask=valid)


@triton.jit
def name_blocks(block_ends, experts, block, BLOCKS, E, E_PADDED: tl.constexpr):
    """A block belongs to the first expert whose blocks end behind it; past them all, to none."""
    expert = tl.arange(0, E_PADDED)
    before = tl.load(block_ends + expert, mask=expert < E, other=BLOCKS + 1)
    tl.store(experts + block, tl.sum((before[None, :] <= block[:, None]).to(tl.int32), 1), mask=block < BLOCKS)


@triton.jit(do_not_specialize=["S", "BLOCKS", "PARTS"])
def ends_kernel(
    ids,
    earlier,
    ends,
    block_ends,
    experts,
    order,
    S,
    E,
    BLOCKS,
    PARTS,
    BLOCK_M,
    E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    SLOTS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Cumulative numbers of slots and of blocks by expert; with ALONE all the rest, too. One program does it."""
    if earlier is None:
        counts = count_slots(ids, 0, S, S, E, E_PADDED, CHUNK)
    else:
        counts = sum_parts(earlier, PARTS, E, E_PADDED, FEW)
    expert = tl.arange(0, E_PADDED)
    tl.store(ends + expert, tl.cumsum(counts, 0), mask=expert < E)
    tl.store(block_ends + expert, tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M, 0), mask=expert < E)
    if ALONE:
        # What is read from here on other threads may have written.
        tl.debug_barrier()
        for first in range(0, S, SLOTS):
            order_slots(ids, None, ends, order, first + tl.arange(0, SLOTS), S, E, CHUNK, CHUNK)
        for first in range(0, BLOCKS, SLOTS):
            name_blocks(block_ends, experts, first + tl.arange(0, SLOTS), BLOCKS, E, E_PADDED)


@triton.jit(do_not_specialize=["S", "BLOCKS"])
def order_kernel(
    ids,
    earlier,
    ends,
    block_ends,
    experts,
    order,
    S,
    E,
    BLOCKS,
    PART: tl.constexpr,
    E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``order``: the slots with a valid expert, sorted by expert, those of one expert as they came; and the blocks'
    experts, of which there are never more than slots."""
    first = tl.program_id(0) * SLOTS
    order_slots(ids, earlier, ends, order, first + tl.arange(0, SLOTS), S, E, PART, CHUNK)
    if first < BLOCKS:
        name_blocks(block_ends, experts, first + tl.arange(0, SLOTS), BLOCKS, E, E_PADDED)


def schedule(ids: torch.Tensor, experts: int, block_m: int) -> Schedule:
    """The schedule of slots with expert ids ``[S]``, in tiles of ``block_m``; ids outside ``[0, experts)`` drop out.

    Every tensor's size follows from S and ``experts`` alone: blocks that turn out not to be needed get the expert
    ``experts``, and what ``order`` has behind the slots with a valid expert is undefined.
    """
    count = ids.shape[0]
    if rows_of_expert(count, experts) == 0:
        return Schedule(count, ids)
    # An expert's first block needs one slot, every further one block_m more.
    nonempty = min(count, experts)
    blocks = nonempty + (count - nonempty) // block_m
    parts = -(-count // _PART)
    sizes = experts, experts, blocks, count
    plan = tuple(torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes)
    ends, block_ends, of_block, order = plan
    earlier = torch.empty(parts, experts, dtype=torch.int32, device=ids.device) if parts > 1 else None
    padded = max(16, 1 << (experts - 1).bit_length())
    both = {"E_PADDED": padded, "SLOTS": _SLOTS_A_PROGRAM}
    if earlier is not None:
        start(
            parts_kernel, (parts,), ids, earlier, count, experts, PART=_PART, E_PADDED=padded, CHUNK=1024, num_warps=8
        )
    alone = count <= _MOST_SLOTS_OF_ONE_PROGRAM
    start(
        ends_kernel,
        (1,),
        ids,
        earlier,
        *plan,
        count,
        experts,
        blocks,
        parts,
        block_m,
        CHUNK=_MOST_SLOTS_OF_ONE_PROGRAM if alone else 1024,
        FEW=max(1, 8192 // padded),
        ALONE=alone,
        num_warps=8,
        **both,
    )
    if not alone:
        start(
            order_kernel,
            (-(-count // _SLOTS_A_PROGRAM),),
            ids,
            earlier,
            *plan,
            count,
            experts,
            blocks,
            PART=_PART,
            CHUNK=256,
            num_warps=4,
            **both,
        )
    return Schedule(blocks, of_block, order, ends, block_ends)
