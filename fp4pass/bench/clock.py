"""Time of calls without their launches, what the hardware allows, and errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], object]

BANDWIDTH = 4.3e12
"""Bytes a second: what copying reaches on an H200 (4.27 TB/s measured, 4.8 in its data sheet)."""

FLOPS = 790e12
"""Operations a second: what cuBLAS reaches on an H200 with large BF16 products (989 TFLOP/s in its data sheet)."""

# In a model every call finds other weights in the GPU's cache (50 MB) than its own.
BYTES_IN_TURN = 200 << 20

# Long enough that starting the graph does not count (a few microseconds), short enough for all the rows.
_GRAPH_MICROSECONDS, _REPLAYS = 1000, 12


def roofline(bytes_moved: int, operations: int) -> float:
    """Microseconds that no kernel on an H200 goes below."""
    return 1e6 * max(bytes_moved / BANDWIDTH, operations / FLOPS)


def copies(weight_bytes: int, in_turn: int = BYTES_IN_TURN) -> int:
    """How many weights of this size to go round."""
    return max(1, -(-in_turn // weight_bytes))


def microseconds(calls: Sequence[Call], device: torch.device, at_least: float) -> float:
    """The median time of one of ``calls``, which are made in turn.

    On a GPU they are captured in one CUDA graph. at_least: microseconds that a call will take in any case; so many
    rounds are captured that starting the graph does not count.
    """
    if device.type != "cuda":
        timer = Timer("[call() for call in calls]", globals={"calls": calls})
        return 1e6 * timer.blocked_autorange(min_run_time=0.01).median / len(calls)
    rounds = max(1, round(_GRAPH_MICROSECONDS / (at_least * len(calls))))
    graph = _captured(calls, rounds)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    graph.replay()
    # Without waiting in between: each replay is launched while the one before it runs.
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) for start, end in pairwise(events)]
    return statistics.median(times) / (rounds * len(calls))


def _captured(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, autotunes and loads what a capture may not
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of the compiler may call the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


def sample(count: int, most: int) -> slice:
    """Every so many-th of ``count``, at most ``most`` of them, spread over the whole."""
    return slice(None, None, max(1, -(-count // most)))
