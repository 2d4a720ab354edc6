# ruff: noqa: ANN001, ANN201, RUF005, RUF059  (kernels: Triton types the parameters, and compiles no starred tuple)

"""How programs of many_rows.py that share a tile add up: who begins it collects the sums that the others leave.

Small sums travel in *packets* of 16 bytes, two sums and a mark each, which are there or not as a whole: one way through
the L2 cache. Larger ones would make too many of them: they are left as they are, and a flag is raised behind them.

What says that something is there is 64 bits long. Nothing else writes it, and who reads it clears it: so memory need
not be prepared, in which any other bits may stand.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bands import begin_of
from .epilogue import GROUP_ROWS, halves, in_registers, joined, side_by_side, sums_layout
from .launches import ManyRows

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its names in Triton 3.6 and 3.9

PRESENT = gl.constexpr(0x5EF0A7C3D1926B48)
GROUP_THREADS, PACKET_BYTES, PIECE = gl.constexpr(128), gl.constexpr(16), gl.constexpr(128)


@gluon.constexpr_function
def in_packets(bm, split):
    """Whether sums travel in packets. While they wait, all threads look for theirs.

    That pays on an H200 up to 16 rows of x where two groups share K: 0.4 us less of 5. Where one group has to collect
    from all others, the waiting disturbs those that still work (0.8 us more of 16); from 32 rows on so many packets
    take longer than the flag (64 rows: 1.6 us more of 7).
    """
    return bm <= 16 and split == 2


@gluon.constexpr_function
def packets_of_thread(bm):
    """How many pairs of its sums a thread has."""
    return GROUP_ROWS.value * bm // (2 * GROUP_THREADS.value)


@gluon.constexpr_function
def send_assembly(packets):
    """Pairs of sums into so many packets, whose operand for the address is that of the first."""
    lines = [f"{{ .reg .b128 v; .reg .b64 d, f; mov.b64 f, {PRESENT.value:#x};"]
    for i in range(packets):
        place = f"[${packets} + {i * GROUP_THREADS.value * PACKET_BYTES.value}]"
        lines.append(f"mov.b64 d, {{${2 * packets + i}, ${3 * packets + i}}}; mov.b128 v, {{d, f}};")
        lines.append(f"st.relaxed.gpu.global.b128 {place}, v; mov.u32 ${i}, 0;")
    return "".join(lines) + "}"


@gluon.constexpr_function
def receive_assembly(packets):
    """What ``send_assembly`` sent, as soon as all of it is there. The packets are cleared."""
    each = range(packets)
    places = [f"${2 * packets} + {i * GROUP_THREADS.value * PACKET_BYTES.value}" for i in each]
    lines = [f"{{ .reg .b128 v<{packets}>; .reg .b64 d<{packets}>, t<{packets}>, f; .reg .pred p;"]
    lines.append(f"mov.b64 f, {PRESENT.value:#x}; again:")
    lines += [f"ld.relaxed.gpu.global.b128 v{i}, [{places[i]}];" for i in each]
    lines += [f"mov.b128 {{d{i}, t{i}}}, v{i};" for i in each]
    lines += [f"setp.ne.b64 p, t{i}, f; @p bra again;" for i in each]
    lines += [f"mov.b64 {{${i}, ${packets + i}}}, d{i};" for i in each]
    lines += [f"st.relaxed.gpu.global.b64 [{places[i]} + 8], 0;" for i in each]
    return "".join(lines) + "}"


@gluon.constexpr_function
def constraints(results, operands, packets):
    """Of assembly for so many packets at once, from the letters for one."""
    letters = [f"={letter}" for letter in results] + list(operands)
    return ",".join(letter for letter in letters for _ in range(packets))


@gluon.jit
def pairs(acc):
    """Sums ``[64, BM]`` as two vectors, neighbours of a lane. Of a vector each thread has every 128th number."""
    lower, upper = gl.split(acc.reshape([4, 2, 8, acc.shape[1] // 8, 4, 2]))
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1] // 2
    return lower.permute([3, 1, 0, 2, 4]).reshape([SIZE]), upper.permute([3, 1, 0, 2, 4]).reshape([SIZE])


@gluon.jit
def of_pairs(lower, upper, BM: gl.constexpr):
    """The inverse."""
    lower = lower.reshape([BM // 8, 2, 4, 8, 4]).permute([2, 1, 3, 0, 4])
    upper = upper.reshape([BM // 8, 2, 4, 8, 4]).permute([2, 1, 3, 0, 4])
    acc = gl.join(lower, upper).reshape([GROUP_ROWS, BM])
    return gl.convert_layout(acc, sums_layout(BM), assert_trivial=True)


@gluon.jit
def first_packet(sums, slot, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """For each of a slot's SIZE packets the address of the first that its thread has."""
    thread = gl.arange(0, SIZE, layout=LAYOUT) % GROUP_THREADS
    return (sums + slot.to(gl.int64) * (4 * SIZE) + 4 * thread).to(gl.int64)


@gluon.jit
def send(acc, sums, slot):
    """Leave sums as packets in a slot."""
    lower, upper = pairs(acc)
    LAYOUT: gl.constexpr = lower.type.layout
    PACKETS: gl.constexpr = packets_of_thread(acc.shape[1])
    SEND: gl.constexpr = send_assembly(PACKETS)
    CONSTRAINTS: gl.constexpr = constraints("r", "lff", PACKETS)
    where = first_packet(sums, slot, lower.shape[0], LAYOUT)
    gl.inline_asm_elementwise(SEND, CONSTRAINTS, [where, lower, upper], dtype=gl.int32, is_pure=False, pack=PACKETS)


@gluon.jit
def receive(acc, sums, slot, others, STRIDE: gl.constexpr):
    """``acc`` plus the packets in so many slots, STRIDE apart, in order."""
    lower, upper = pairs(acc)
    LAYOUT: gl.constexpr = lower.type.layout
    PACKETS: gl.constexpr = packets_of_thread(acc.shape[1])
    RECEIVE: gl.constexpr = receive_assembly(PACKETS)
    CONSTRAINTS: gl.constexpr = constraints("ff", "l", PACKETS)
    for other in range(0, others):
        where = first_packet(sums, slot + other * STRIDE, lower.shape[0], LAYOUT)
        more_lower, more_upper = gl.inline_asm_elementwise(
            RECEIVE, CONSTRAINTS, [where], dtype=(gl.float32, gl.float32), is_pure=False, pack=PACKETS
        )
        lower += more_lower
        upper += more_upper
    return of_pairs(lower, upper, acc.shape[1])


@gluon.jit
def wait_for(flags, count, STRIDE: gl.constexpr):
    """Until ``count`` flags, STRIDE apart, say that sums are there; they are cleared."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for first in range(0, count, 32):
        where = flags + gl.minimum(first + gl.arange(0, 32, layout=LANES), count - 1) * STRIDE
        missing = 1
        while missing > 0:
            # Each warp looks by itself.
            seen = gl.inline_asm_elementwise(
                "ld.acquire.gpu.global.b64 $0, [$1];", "=l,l", [where], dtype=gl.int64, is_pure=False, pack=1
            )
            missing = gl.max((seen != PRESENT).to(gl.int32), axis=0)
    barrier()
    for first in range(0, count, 32):
        where = flags + gl.minimum(first + gl.arange(0, 32, layout=LANES), count - 1) * STRIDE
        gl.store(where, gl.zeros([32], gl.int64, layout=LANES))


@gluon.jit
def leave(
    accs,
    bands,
    parts,
    share,
    GROUP: gl.constexpr,
    ACROSS: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
):
    """Leave the sums of so many bands to the program that began the tile."""
    sums, flags, each, total = parts
    begin, count, shared, me = share
    slot = me * ACROSS + GROUP
    if in_packets(BM, SPLIT):
        send(accs[0], sums, slot)
    else:
        for nth in gl.static_range(len(accs)):
            if nth < bands:
                mine = side_by_side(accs[nth])
                gl.store(in_slot(sums, slot, mine, begin_of(nth, BM, BAND), BM), mine)
        barrier()
        gl.atomic_xchg(flags + slot, gl.to_tensor(PRESENT), sem="release")


@gluon.jit
def collect(
    accs,
    bands,
    parts,
    share,
    last,
    GROUP: gl.constexpr,
    PART: gl.constexpr,
    ACROSS: gl.constexpr,
    SPLIT: gl.constexpr,
    STEPS: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """``accs`` of the steps before ``last`` plus, in order, what every SPLIT-th of the following programs has left.

    Without packets AT_ONCE of their sums are on their way at once.
    """
    sums, flags, each, total = parts
    begin, count, shared, me = share
    nearest = (me + 1 + PART) * ACROSS + GROUP
    STRIDE: gl.constexpr = SPLIT * ACROSS
    others = gl.cdiv(gl.cdiv(STEPS - last, each) - PART, SPLIT)
    if in_packets(BM, SPLIT):
        return (receive(accs[0], sums, nearest, others, STRIDE),)
    wait_for(flags + nearest, others, STRIDE)
    added = ()
    for nth in gl.static_range(len(accs)):
        slots = (sums, nearest, gl.where(nth < bands, others, 0))
        added = added + (plus(accs[nth], slots, STRIDE, begin_of(nth, BM, BAND), BM, AT_ONCE),)
    return added


@gluon.jit
def in_slot(sums, slot, like, FIRST: gl.constexpr, BM: gl.constexpr):
    """Where in a slot of ``64 * BM`` sums those of the rows of x from FIRST on are, as a vector of this size."""
    SIZE: gl.constexpr = like.shape[0]
    return (
        sums
        + (slot.to(gl.int64) * (GROUP_ROWS * BM) + GROUP_ROWS * FIRST)
        + gl.arange(0, SIZE, layout=like.type.layout)
    )


@gluon.jit
def plus(acc, slots, STRIDE: gl.constexpr, FIRST: gl.constexpr, BM: gl.constexpr, AT_ONCE: gl.constexpr):
    """``acc`` plus, of the rows of x from FIRST on, what stands in so many slots, STRIDE apart.

    Of more than PIECE rows of x a half at a time: a whole tile's sums twice are more than there are registers.
    """
    sums, nearest, others = slots
    if acc.shape[1] > PIECE:
        left, right = halves(acc)
        left = plus(left, slots, STRIDE, FIRST, BM, AT_ONCE)
        right = plus(right, slots, STRIDE, FIRST + right.shape[1], BM, AT_ONCE)
        return joined(left, right)
    else:
        mine = side_by_side(acc)
        for first in range(0, others, AT_ONCE):
            for ahead in gl.static_range(AT_ONCE):
                other = first + ahead
                where = in_slot(sums, nearest + other * STRIDE, mine, FIRST, BM)
                live = gl.full(mine.shape, other, gl.int32, layout=mine.type.layout) < others
                mine += gl.load(where, mask=live, other=0.0, cache_modifier=".cg")
        return in_registers(mine, acc)


_in_packets = cache(in_packets)  # on the host the call of a function for kernels takes 2 us


def places(like: torch.Tensor, programs: int, launch: ManyRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for ``parts`` (float32) and ``flags`` (int64) on the device of ``like``; it may hold anything."""
    sums = programs * launch.block_n * launch.block_m
    packets = 2 if _in_packets(launch.block_m, launch.split) else 1
    return (
        like.new_empty(sums * packets, dtype=torch.float32),
        like.new_empty(programs * launch.across, dtype=torch.int64),
    )
