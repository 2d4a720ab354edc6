"""What bench/tune.py is asked to try, as it is written on its command line."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from fp4pass.bench.cases import DENSE, MOE, Dense, Moe
from fp4pass.errors import OptionError
from fp4pass.lowering.arch import Tile
from fp4pass.lowering.launches import FewRows, InParts, ManyRows, MmaRows

Launch = FewRows | ManyRows | MmaRows | InParts | Tile


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


def parse_shape(text: str) -> Dense | Moe:
    """A case of the benchmark by its name, or a weight of any other size as ``NxK``. Raises OptionError."""
    for case in (*DENSE, *MOE):
        if case.name == text:
            return case
    if (sizes := re.fullmatch(r"(\d+)x(\d+)", text)) and not any(int(size) % 16 for size in sizes.groups()):
        return Dense(text, int(sizes[1]), int(sizes[2]))
    raise OptionError(
        "this is no shape of a weight",
        seen=text,
        expected=f"NxK, multiples of 16, or one of {', '.join(case.name for case in (*DENSE, *MOE))}",
        do="give its rows and columns: 2688x4096",
    )


@dataclass(frozen=True)
class Trial:
    """Launches to try for a weight and a number of rows of x."""

    case: Dense | Moe
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
