"""Launches of one linear layer beside each other, for whoever chooses them in lowering/heuristics_*.py.

    python -m fp4pass.bench.tune "nano.out_proj 8 16 | ManyRows(16, 6, room=2)" "256x2688 64 | ..." ...
    python -m fp4pass.bench.tune @FILE     # such lines
    python -m fp4pass.bench.tune --as-sm 80 "nano.out_proj 512 | MmaRows(64) | MmaRows(128)"     # see lowering/older.py

Speed alone chooses nothing: a launch may be wrong at some shapes and right at others, or never end. So each is first
held against float64, in a process of its own and among memory full of NaN; what fails there is not timed.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch.nn.functional import linear as product

from fp4pass import nvfp4
from fp4pass.bench.cases import DENSE, Dense
from fp4pass.bench.clock import copies, microseconds, relative_error, roofline
from fp4pass.bench.command import gpu, machine
from fp4pass.bench.table import header
from fp4pass.errors import Fp4passError, OptionError
from fp4pass.lowering.arch import ARCHS, Arch, Tile, target
from fp4pass.lowering.launches import FewRows, InParts, ManyRows, MmaRows
from fp4pass.lowering.layout import FRAGMENTS, from_plain, scale_from_plain

Launch = FewRows | ManyRows | MmaRows | InParts | Tile
Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

WITHIN = 0.002
"""The largest relative error to float64 that a launch may have: rounding its result to BF16 makes 0.0017, give or take
a tenth where there are few hundred numbers; weights rounded to BF16 make 0.0024."""

_SECONDS = 90  # for compiling a launch and running it; what takes longer waits for something that never comes


@dataclass(frozen=True)
class _Only(Arch):
    """A generation whose products all run with one launch."""

    only: Launch

    def launch(self, rows: int, *_: object, **__: object) -> Launch:
        """The one. In parts that is the first of them, where there are no rows for another."""
        return self.only.first if isinstance(self.only, InParts) and rows <= self.only.full else self.only


def parse_launch(text: str) -> Launch:
    """``FewRows(8, 8, 16, slots=4)`` and the like, as the tables have them. Raises OptionError for anything else."""
    try:
        return _built(ast.parse(text, mode="eval").body)
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptionError(
            "this is no launch",
            seen=f"{text} ({type(error).__name__}: {error})",
            expected="FewRows(...), ManyRows(...), MmaRows(...), Tile(...) or InParts(...), as their classes have it",
            do='write it as there, in quotes: "ManyRows(16, 6, room=2, across=1, split=2)"',
        ) from error


def _built(call: ast.expr) -> Launch:
    kind = {each.__name__: each for each in (FewRows, ManyRows, MmaRows, InParts, Tile)}[call.func.id]
    return kind(*map(_value, call.args), **{each.arg: _value(each.value) for each in call.keywords})


def _value(given: ast.expr) -> object:
    return _built(given) if isinstance(given, ast.Call) else ast.literal_eval(given)


def parse_shape(text: str) -> Dense:
    """A case of the benchmark by its name, or a weight of any other size as ``NxK``. Raises OptionError."""
    for case in DENSE:
        if case.name == text:
            return case
    if (sizes := re.fullmatch(r"(\d+)x(\d+)", text)) and not any(int(size) % 16 for size in sizes.groups()):
        return Dense(text, int(sizes[1]), int(sizes[2]))
    raise OptionError(
        "this is no shape of a weight",
        seen=text,
        expected=f"NxK, multiples of 16, or one of {', '.join(case.name for case in DENSE)}",
        do="give its rows and columns: 2688x4096",
    )


def run_with(only: Launch, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x [M, K]`` times a weight in ``fragments``: codes, scale bytes and global scale; by this launch."""
    from fp4pass.lowering.linear import linear  # needs Triton

    arch = _Only(*astuple(target(x.device)), only)
    return linear(x, *weight, None, FRAGMENTS, arch=arch)


def faults(only: Launch, n: int, k: int, tokens: int, device: torch.device) -> str:
    """What is wrong with a launch for a weight ``[n, k]`` and up to ``tokens`` rows of x; "" if nothing is.

    Also tried are some rows fewer, and a weight whose last tile is not full.
    """
    for rows in dict.fromkeys((n, max(16, n - 16))):
        packed = nvfp4.quantize(torch.randn(rows, k, device=device))
        weight, dense = _in_fragments(*packed), nvfp4.dequantize(*packed, torch.float64)
        for count in dict.fromkeys((tokens, max(1, tokens - 3))):
            x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
            exact = x.double() @ dense.mT
            for _ in range(2):
                _leave_nan_behind(device)
                error = relative_error(run_with(only, x, weight), exact)
                if not error <= WITHIN:
                    return f"wrong: error {error:.1e} for {count} rows and a weight of {rows}"
    return ""


def _in_fragments(codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> Weight:
    return from_plain(codes, FRAGMENTS), scale_from_plain(scale.view(torch.uint8), FRAGMENTS), factor


def _leave_nan_behind(device: torch.device) -> None:
    """In the memory that the next tensors get, small ones and large."""
    for size in (1 << 10, 1 << 16, 1 << 20):
        full = [torch.full((size,), torch.nan, device=device) for _ in range(16)]
        del full


Task = tuple[Launch, int, int, int, torch.device]
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


@dataclass(frozen=True)
class Trial:
    """Launches to try for a weight and a number of rows of x."""

    case: Dense
    tokens: int
    tried: tuple[Launch, ...]


def parse_trials(line: str) -> list[Trial]:
    """``SHAPE TOKENS ... | LAUNCH | LAUNCH ...``: a trial for each number of tokens. Raises OptionError for no such."""
    what, *tried = (part.strip() for part in line.split("|"))
    shape, *tokens = what.split() or [""]
    if not tokens or not all(map(str.isdecimal, tokens)):
        raise OptionError(
            "this is nothing to try",
            seen=line,
            expected="SHAPE TOKENS ... | LAUNCH | LAUNCH ...",
            do='write "nano.out_proj 8 16 | FewRows(8, 8, 16, slots=4, early=True)"',
        )
    case, launches = parse_shape(shape), tuple(map(parse_launch, tried))
    return [Trial(case, int(count), launches) for count in tokens]


def compare(trials: Sequence[Trial], device: torch.device, sm: int | None = None) -> Iterator[str]:
    """A line for each trial with BF16's time, and one for each launch: the tables' first."""
    bf16_product = product
    if sm:
        from fp4pass.lowering.older import bf16_product
    tasks: dict[Trial, list[Task]] = {}
    for trial in trials:
        case = trial.case
        taken = target(device).launch(trial.tokens, torch.bfloat16, FRAGMENTS, columns=case.n, depth=case.k)
        launches = dict.fromkeys((taken, *trial.tried))
        tasks[trial] = [(each, case.n, case.k, trial.tokens, device) for each in launches]
    every = list(dict.fromkeys(itertools.chain.from_iterable(tasks.values())))
    wrong = dict(zip(every, checked(every, sm), strict=True))
    for case, same in itertools.groupby(tasks, lambda trial: trial.case):
        made = (nvfp4.quantize(torch.randn(case.n, case.k, device=device)) for _ in range(copies(case.weight_bytes())))
        weights = [_in_fragments(*each) for each in made]
        sizes = {"size": (case.n, case.k), "device": device, "dtype": torch.bfloat16}
        dense = [torch.randn(**sizes) for _ in range(copies(2 * case.n * case.k))]
        for trial in same:
            count = trial.tokens
            x, least = torch.randn(count, case.k, device=device, dtype=torch.bfloat16), roofline(*case.cost(count))
            bf16 = microseconds([functools.partial(bf16_product, x, each) for each in dense], device, least)
            yield f"{case.name} {case.shape}, {count} tokens: BF16 {bf16:.2f} us, roofline {least:.2f}"
            for task in tasks[trial]:
                if fault := wrong[task]:
                    yield f"  {fault}  {task[0]!r}"
                else:
                    ours = microseconds([functools.partial(run_with, task[0], x, e) for e in weights], device, least)
                    yield f"  {ours:8.2f} {bf16 / ours:5.2f}  {task[0]!r}"


def main(given: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for arguments or a machine that do not allow it."""
    parser = argparse.ArgumentParser(
        "python -m fp4pass.bench.tune",
        description="launches of linear layers, held against float64 and timed",
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
    print(f"{kernels}microseconds, time of BF16 over it; the first launch is what the tables have")
    for line in compare(trials, device, arguments.as_sm):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
