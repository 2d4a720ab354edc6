# ruff: noqa: ANN001, ANN201, RUF005  (kernels: Triton types the parameters, and compiles no starred tuple)

"""How few_rows.py reads, and mma_rows.py: units of the weight, each warp its own, and the columns of x for them.

A *step* is SPLIT units along K of ACROSS rows of units, one for each warp. x comes through shared memory: a single row
as a whole, several rows a step at a time, each into a *slot*.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .units import UNIT_SCALES, UNIT_WORDS

# Their names in Triton 3.6 and 3.9.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_descriptor = gl.shared_memory_descriptor
reinterpret = _descriptor.reinterpret if hasattr(_descriptor, "reinterpret") else _descriptor._reinterpret


@gluon.constexpr_function
def next_power_of_two(number):
    """The least one that is not below ``number``."""
    return 1 << (number - 1).bit_length()


@gluon.constexpr_function
def steps_along(k, split):
    """Steps in which so many warps read the units of K, of which the last may not be whole."""
    return -(-k // (64 * split))


@gluon.constexpr_function
def sums_layout(split, across):
    """Of all warps' sums ``[split, 16 * rows of units, block_m]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[split, across, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def memory_layout(split, across, width):
    """Units as memory has them: ``[split, rows of units, width * 32]``, each lane ``width`` neighbours."""
    return gl.BlockedLayout([1, 1, width], [1, 1, 32], [split, across, 1], [2, 1, 0])


@gluon.constexpr_function
def tokens_layout(split, across, block_m):
    """x ``[split, block_m, 64]``: lane ``4 g + t`` has columns 2t and 2t + 1 of every eight of rows g, g + 8, ..."""
    columns = [[0, 0, 1 << bit] for bit in (0, 3, 4, 5)]
    rows = [[0, 8 << bit, 0] for bit in range((block_m // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 0, 0]] * (across.bit_length() - 1) + [[1 << bit, 0, 0] for bit in range(split.bit_length() - 1)]
    return gl.DistributedLinearLayout(columns + rows, lanes, warps, [], [split, block_m, 64])


@gluon.constexpr_function
def copy_layout(split, across):
    """Of a step of x as it is copied, 16 bytes a lane."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [split, across, 1], [2, 1, 0])


@gluon.constexpr_function
def rows_layout(split, across):
    """Of the rows of x that a tile reads, ``[block_m]``."""
    return gl.SliceLayout(0, gl.SliceLayout(2, copy_layout(split, across)))


@gluon.constexpr_function
def slot_layout():
    """Of a step of x in shared memory ``[split, block_m, 64]``: eight lanes read and write all banks."""
    return gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])


@gluon.jit
def load_unit(
    weight,
    rows,
    step,
    K: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    SIZE: gl.constexpr,
):
    """A step's units ``[SPLIT, rows of units, SIZE]``: ``step * SPLIT + part`` along K; zero past the end of K.

    ``rows``: (the first row of units, how many there are from it on, which is one at least). What is past them is read
    as the last of them.
    """
    row, live = rows
    UNITS: gl.constexpr = K // 64
    LAYOUT: gl.constexpr = memory_layout(SPLIT, ACROSS, SIZE // 32)
    part = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    extra = gl.arange(0, ACROSS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    element = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    unit = step * SPLIT + part
    if ACROSS > 1:
        extra = gl.minimum(extra, live - 1)
    where = weight + (row.to(gl.int64) * UNITS) * SIZE + (extra * UNITS + unit) * SIZE + element
    # The codes are read once: they need not stay near.
    NEAR: gl.constexpr = "" if SIZE == UNIT_SCALES else ".cg"
    if UNITS % SPLIT == 0:
        return gl.load(where, cache_modifier=NEAR)
    return gl.load(where, mask=unit < UNITS, other=0, cache_modifier=NEAR)


@gluon.jit
def fetch(weight, rows, step, K: gl.constexpr, SPLIT: gl.constexpr, ACROSS: gl.constexpr, HIGH: gl.constexpr):
    """Codes and scales of a step, HIGH times: of the rows of units from ``rows`` on, of those below them, and so on."""
    words, scale = weight
    row, live = rows
    fetched = ()
    for high in gl.static_range(HIGH):
        these = (row + high * ACROSS, live - high * ACROSS)
        fetched = fetched + (
            (
                load_unit(words, these, step, K, SPLIT, ACROSS, UNIT_WORDS),
                load_unit(scale, these, step, K, SPLIT, ACROSS, UNIT_SCALES),
            ),
        )
    return fetched


@gluon.jit
def take(KIB: gl.constexpr):
    """So much shared memory that nothing uses, until ``release``: it keeps other programs away."""
    rest = ()
    if KIB > 0:
        rest = (gl.allocate_shared_memory(gl.int32, [KIB, 256], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
    return rest


@gluon.jit
def release(rest):
    """See ``take``."""
    for at in gl.static_range(len(rest)):
        rest[at]._keep_alive()


@gluon.jit
def copy_row(row, K: gl.constexpr, SPLIT: gl.constexpr, LEAST_KIB: gl.constexpr):
    """A row of x in shared memory, ``[steps, SPLIT, 1, 64]``, zero past the end of K. LEAST_KIB are taken at least."""
    STEPS: gl.constexpr = next_power_of_two(steps_along(K, SPLIT))
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 1, 8], [gl.num_warps(), 1, 1], [2, 1, 0])
    unit = gl.arange(0, STEPS * SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    STRAIGHT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    copied = gl.allocate_shared_memory(row.dtype.element_ty, [STEPS * SPLIT, 1, 64], STRAIGHT)
    rest = take(LEAST_KIB - STEPS * SPLIT // 8)
    k = unit * 64 + column
    copy_async(copied, row + k, mask=k < K)
    async_copy.commit_group()
    async_copy.wait_group(0)
    release(rest)
    return reinterpret(copied, row.dtype.element_ty, [STEPS, SPLIT, 1, 64], STRAIGHT)


@gluon.jit
def copy_tokens(slot, x, x_rows, live, step, K: gl.constexpr, SPLIT: gl.constexpr, ACROSS: gl.constexpr):
    """A step's columns of ``live`` rows of x on their way into a slot. Past the last step there is nothing to copy.

    What is not copied becomes zero.
    """
    if step * SPLIT < K // 64:
        LAYOUT: gl.constexpr = copy_layout(SPLIT, ACROSS)
        part = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
        k = (step * SPLIT + part) * 64 + column
        # All columns, where no step ends past K: that only spreads the rows over them.
        inside = k >= 0 if K // 64 % SPLIT == 0 else k < K
        copy_async(slot, x + x_rows[None, :, None] + k, mask=live[None, :, None] & inside)
    async_copy.commit_group()


@gluon.jit
def first_tokens(
    x,
    x_rows,
    live,
    K: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SLOTS: gl.constexpr,
    LEAST_KIB: gl.constexpr,
):
    """What ``next_tokens`` reads: a row as a whole, or SLOTS slots for BLOCK_M rows, all but one with x on its way.

    Before the first read there must be a barrier.
    """
    if BLOCK_M == 1:
        return copy_row(x + x_rows, K, SPLIT, LEAST_KIB)
    else:
        gl.static_assert(SLOTS > 1, "while one step of x is read another is on its way")
        slots = ()
        for _ in gl.static_range(SLOTS):
            slots = slots + (gl.allocate_shared_memory(x.dtype.element_ty, [SPLIT, BLOCK_M, 64], slot_layout()),)
        # A slot that no step has takes no memory.
        rest = take(LEAST_KIB - min(SLOTS, steps_along(K, SPLIT)) * SPLIT * BLOCK_M // 8)
        for step in gl.static_range(SLOTS - 1):
            copy_tokens(slots[step], x, x_rows, live, step, K, SPLIT, ACROSS)
        release(rest)
        return slots


@gluon.jit
def next_tokens(
    slots,
    x,
    x_rows,
    live,
    step,
    place,
    K: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """A step's columns of x, where the product takes them: ``[SPLIT, rows, 64]``, of a single row eight copies.

    ``place``: the step's number, or one that differs by a multiple of the slots. These go round: the step whose slot
    comes last goes on its way.
    """
    if BLOCK_M == 1:
        LAYOUT: gl.constexpr = tokens_layout(SPLIT, ACROSS, 8)
        like = gl.zeros([SPLIT, 8, 64], slots.dtype, layout=LAYOUT)
        tokens, like = gl.broadcast(slots.index(step).load(LAYOUT), like)
    else:
        SLOTS: gl.constexpr = len(slots)
        # Behind the wait stands a barrier: every warp's copies are there, and every warp has read the step before.
        async_copy.wait_group(SLOTS - 2)
        tokens = slots[place % SLOTS].load(tokens_layout(SPLIT, ACROSS, BLOCK_M))
        copy_tokens(slots[(place + SLOTS - 1) % SLOTS], x, x_rows, live, step + SLOTS - 1, K, SPLIT, ACROSS)
    return tokens
