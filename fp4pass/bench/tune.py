"""Launches of linear layers or blocks of experts side by side, for whoever chooses them in lowering/heuristics_*.py.

    python -m fp4pass.bench.tune "nano.out_proj 8 16 | ManyRows(16, 6, room=2)" "256x2688 64 | ..." ...
    python -m fp4pass.bench.tune "nano.experts 2048 | ManyRows(256, 5, deep=1, band=64)"
    python -m fp4pass.bench.tune @FILE     # such lines
    python -m fp4pass.bench.tune --as-sm 80 "nano.out_proj 512 | MmaRows(64) | MmaRows(128)"     # see lowering/older.py

Speed alone chooses nothing: a launch may be wrong at some shapes and right at others, or never end. So each is first
held against float64, in a process of its own and among memory full of NaN; what fails there is not timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch.nn.functional import linear as product

from fp4pass import nvfp4
from fp4pass.bench.cases import Dense, Moe
from fp4pass.bench.clock import copies, microseconds, relative_error, roofline
from fp4pass.bench.command import gpu, machine
from fp4pass.bench.routed import Routing, Weight, in_fragments, random_block, routings
from fp4pass.bench.table import header
from fp4pass.bench.trials import Launch, Trial, parse_trials
from fp4pass.errors import Fp4passError
from fp4pass.lowering import reference
from fp4pass.lowering.arch import ARCHS, Arch, rows_of_expert, target
from fp4pass.lowering.launches import InParts
from fp4pass.lowering.layout import FRAGMENTS

WITHIN, OF_EXPERTS_WITHIN = 0.002, 0.003
"""The largest relative errors to float64 that a launch may have: rounding its result to BF16 makes 0.0017, give or take
a tenth where there are few hundred numbers, and rounding experts' intermediate as well 0.0024; weights rounded to BF16
make 0.0024, and 0.0050."""

_SECONDS = 90  # for compiling a launch and running it; what takes longer waits for something that never comes


@dataclass(frozen=True)
class _Only(Arch):
    """A generation whose products all run with one launch."""

    only: Launch

    def launch(self, rows: int, *_: object, **__: object) -> Launch:
        """The one. In parts that is the first of them, where there are no rows for another."""
        return self.only.first if isinstance(self.only, InParts) and rows <= self.only.full else self.only


def run_with(only: Launch, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x [M, K]`` times a weight in ``fragments``: codes, scale bytes and global scale; by this launch."""
    from fp4pass.lowering.linear import linear  # needs Triton

    arch = _Only(*astuple(target(x.device)), only)
    return linear(x, *weight, None, FRAGMENTS, arch=arch)


def run_block_with(only: Launch, x: torch.Tensor, routing: Routing, up: Weight, down: Weight) -> torch.Tensor:
    """A block of experts in ``fragments``, ``x [M, K]`` routed through both products, each by this launch."""
    from fp4pass.lowering.moe import experts  # needs Triton

    arch = _Only(*astuple(target(x.device)), only)
    return experts(x, *routing, *up, *down, "relu2", FRAGMENTS, arch=arch)


def faults(only: Launch, case: Dense | Moe, tokens: int, device: torch.device) -> str:
    """What is wrong with a launch for a case and up to ``tokens`` rows of x; "" if nothing is."""
    if isinstance(case, Moe):
        return _faults_of_block(only, case, tokens, device)
    return _faults_of_linear(only, case.n, case.k, tokens, device)


def _faults_of_linear(only: Launch, n: int, k: int, tokens: int, device: torch.device) -> str:
    """Also tried are some rows fewer, and a weight whose last tile is not full."""
    for rows in dict.fromkeys((n, max(16, n - 16))):
        packed = nvfp4.quantize(torch.randn(rows, k, device=device))
        weight, dense = in_fragments(*packed), nvfp4.dequantize(*packed, torch.float64)
        for count in dict.fromkeys((tokens, max(1, tokens - 3))):
            x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
            exact = x.double() @ dense.mT
            for _ in range(2):
                _leave_nan_behind(device)
                error = relative_error(run_with(only, x, weight), exact)
                if not error <= WITHIN:
                    return f"wrong: error {error:.1e} for {count} rows and a weight of {rows}"
    return ""


def _faults_of_block(only: Launch, case: Moe, tokens: int, device: torch.device) -> str:
    """Of a few experts, each with as many rows as to expect in the case, one with none, and one with all."""
    few = replace(case, experts=min(case.experts, 8), top_k=min(case.top_k, 2))
    up, down = random_block(few, device)
    rows = rows_of_expert(tokens * case.top_k, case.experts)
    slots = max(1, rows * few.experts // few.top_k)
    x = torch.randn(slots, case.width, device=device, dtype=torch.bfloat16)
    uneven = routings(replace(few, experts=few.experts - 1), slots, device)[0]
    for name, routing in (("uneven", uneven), ("one", (torch.zeros_like(uneven[0][:, :1]), uneven[1][:, :1]))):
        exact = reference.experts(x.double(), *routing, *up, *down, "relu2", FRAGMENTS, torch.float64)
        for _ in range(2):
            _leave_nan_behind(device)
            error = relative_error(run_block_with(only, x, routing, up, down), exact)
            if not error <= OF_EXPERTS_WITHIN:
                return f"wrong: error {error:.1e} for {slots} rows and {name} of {few.experts} experts"
    return ""


def _leave_nan_behind(device: torch.device) -> None:
    """In the memory that the next tensors get, small ones and large."""
    for size in (1 << 10, 1 << 16, 1 << 20):
        full = [torch.full((size,), torch.nan, device=device) for _ in range(16)]
        del full


Task = tuple[Launch, Dense | Moe, int, torch.device]
"""The arguments of `faults`."""


def _try(task: Task) -> str:
    try:
        return faults(*task)
    except Exception as error:  # the compiler's, mostly: the launch does not fit
        first, *_ = f"{type(error).__name__}: {str(error).strip()}".splitlines()
        return first[:180]


def checked(tasks: Sequence[Task], sm: int | None = None) -> Iterator[str]:
    """The `faults` of each, in order; as on a GPU of ``sm``, if one is given.

    Several processes work them out: what takes one of them down spares the rest.
    """
    count = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(count, _act_as, (sm,)) as pool:
        for running in [pool.apply_async(_try, (task,)) for task in tasks]:
            try:
                yield running.get(timeout=_SECONDS)
            except multiprocessing.TimeoutError:
                yield f"not done after {_SECONDS} s"


def _act_as(sm: int | None) -> None:
    if sm:
        from fp4pass.lowering.older import act_as  # needs Triton

        act_as(sm)


def compare(trials: Sequence[Trial], device: torch.device, sm: int | None = None) -> Iterator[str]:
    """A line for each trial, and one for each launch: the tables' first.

    Beside linear layers BF16 is timed; launches of experts stand beside that of the tables.
    """
    tasks: dict[Trial, list[Task]] = {}
    for trial in trials:
        launches = dict.fromkeys((_taken(trial, device), *trial.tried))
        tasks[trial] = [(each, trial.case, trial.tokens, device) for each in launches]
    every = list(dict.fromkeys(itertools.chain.from_iterable(tasks.values())))
    wrong = dict(zip(every, checked(every, sm), strict=True))
    for case, same in itertools.groupby(tasks, lambda trial: trial.case):
        subject = _Block(case, device) if isinstance(case, Moe) else _Linear(case, device, sm)
        for trial in same:
            time, beside, heading = subject.at(trial.tokens)
            yield f"{case.name} {case.shape}, {trial.tokens} tokens: {heading}"
            for task in tasks[trial]:
                if fault := wrong[task]:
                    yield f"  {fault}  {task[0]!r}"
                    continue
                ours = time(task[0])
                beside = beside or ours
                yield f"  {ours:8.2f} {beside / ours:5.2f}  {task[0]!r}"


def _taken(trial: Trial, device: torch.device) -> Launch:
    """What the tables have for a trial."""
    case, rows = trial.case, trial.tokens
    if isinstance(case, Dense):
        return target(device).launch(rows, torch.bfloat16, FRAGMENTS, columns=case.n, depth=case.k)
    rows = rows_of_expert(rows * case.top_k, case.experts)
    return target(device).launch(rows, torch.bfloat16, FRAGMENTS, columns=case.inner, depth=case.width, experts=True)


Subject = tuple[Callable[[Launch], float], float, str]
"""At some tokens: how to time a launch, the microseconds to hold it against (0: those of the first), and a heading."""


class _Linear:
    """A linear layer: weights in turn, packed and in BF16."""

    def __init__(self, case: Dense, device: torch.device, sm: int | None) -> None:
        made = (nvfp4.quantize(torch.randn(case.n, case.k, device=device)) for _ in range(copies(case.weight_bytes())))
        self.case, self.device, self.weights = case, device, [in_fragments(*each) for each in made]
        sizes = {"size": (case.n, case.k), "device": device, "dtype": torch.bfloat16}
        self.dense = [torch.randn(**sizes) for _ in range(copies(2 * case.n * case.k))]
        self.bf16_product = product
        if sm:
            from fp4pass.lowering.older import bf16_product

            self.bf16_product = bf16_product

    def at(self, tokens: int) -> Subject:
        x = torch.randn(tokens, self.case.k, device=self.device, dtype=torch.bfloat16)
        least = roofline(*self.case.cost(tokens))

        def time(only: Launch) -> float:
            return microseconds([functools.partial(run_with, only, x, e) for e in self.weights], self.device, least)

        bf16 = microseconds([functools.partial(self.bf16_product, x, e) for e in self.dense], self.device, least)
        return time, bf16, f"BF16 {bf16:.2f} us, roofline {least:.2f}"


class _Block:
    """A block of experts, which a call with few tokens has others of than the call before."""

    def __init__(self, case: Moe, device: torch.device) -> None:
        self.case, self.device, self.weights = case, device, random_block(case, device)

    def at(self, tokens: int) -> Subject:
        case = self.case
        x = torch.randn(tokens, case.width, device=self.device, dtype=torch.bfloat16)
        in_turn = routings(case, tokens, self.device)
        least = roofline(*case.cost(tokens, len(in_turn[0][0].unique())))

        def time(only: Launch) -> float:
            calls = [functools.partial(run_block_with, only, x, each, *self.weights) for each in in_turn]
            return microseconds(calls, self.device, least)

        return time, 0.0, f"roofline {least:.2f} us"


def main(given: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for arguments or a machine that do not allow it."""
    parser = argparse.ArgumentParser(
        "python -m fp4pass.bench.tune",
        description="launches of linear layers and of experts, held against float64 and timed",
        fromfile_prefix_chars="@",
    )
    parser.add_argument(
        "trials",
        nargs="+",
        metavar="TRIAL",
        help="'SHAPE TOKENS ... | LAUNCH | LAUNCH ...', with SHAPE a name or NxK; @FILE: a line for each",
    )
    parser.add_argument("--as-sm", type=int, choices=ARCHS, help="the kernels of an older generation, on this GPU")
    arguments = parser.parse_args(given)
    lines = filter(str.strip, arguments.trials)
    try:
        trials = list(itertools.chain.from_iterable(map(parse_trials, lines)))
        device = gpu()
        _act_as(arguments.as_sm)
    except Fp4passError as error:
        print(error, file=sys.stderr)
        return 2
    kernels = f"kernels of SM{arguments.as_sm}, " if arguments.as_sm else ""
    print(header(machine(device)))
    print(f"{kernels}microseconds, time of BF16 over it (of experts: of the first); the first is what the tables have")
    for line in compare(trials, device, arguments.as_sm):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
