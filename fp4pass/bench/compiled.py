"""What both kinds of cases share: how ours and its rivals are compiled, the floor, the name of the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fp4pass.bench.clock import Call, microseconds
from fp4pass.lowering import arch

_QUIET = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}

INDUCTORS_TRITON = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON", **_QUIET}
"""Options of torch.compile: products by Triton templates, tuned, cuBLAS left out."""


Reading = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a floor reads: codes ``[E, N, K/2]``, scale ``[E, N, K/16]``, and which of the E matrices."""


def compile_ours() -> Callable[..., Any]:
    """``call(module, *inputs)`` compiled by fp4pass, for any number of tokens; raises for a product left over."""
    return _compiled(backend="fp4pass", options={"require_match": True, **_QUIET})


def compile_plain(backend: str = "inductor") -> Callable[..., Any]:
    """The same without fp4pass."""
    return _compiled(backend=backend)


def _compiled(**settings: Any) -> Callable[..., Any]:
    def call(module: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return module(*inputs)

    return torch.compile(call, fullgraph=True, dynamic=True, **settings)


def at_once(calls: Sequence[Call]) -> None:
    """Make each call, all at the same time: each thread compiles the kernels that its call is the first to launch."""
    with ThreadPoolExecutor(len(calls)) as threads:
        for running in [threads.submit(call) for call in calls]:
            running.result()


def chosen(device: torch.device, rows: int, layout: str, n: int, k: int, *, experts: bool = False) -> str:
    """The kernel of a product of a weight ``[N, K]`` in ``layout`` with so many rows of x (an expert's)."""
    if device.type != "cuda":
        return "plain torch"
    return str(arch.target(device).launch(rows, torch.bfloat16, layout, columns=n, depth=k, experts=experts))


def floor(turns: Sequence[Sequence[Reading]], device: torch.device, at_least: float) -> float | None:
    """Microseconds of a turn that only reads its weights; None without a GPU. at_least: as for `microseconds`."""
    if device.type != "cuda":
        return None
    from fp4pass.lowering.stream import WORDS_A_PROGRAM, stream  # needs Triton

    def read(turn: Sequence[Reading], share: int) -> None:
        for codes, scale, matrices in turn:
            stream(codes, scale, matrices, share)

    calls = ([functools.partial(read, turn, share) for turn in turns] for share in WORDS_A_PROGRAM)
    return min(microseconds(each, device, at_least) for each in calls)
