"""The rows of a run: as text, as JSON, as Markdown for the README."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp4pass.errors import OptionError

_COLUMNS = "{:17} {:28} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6} {:>8} {:>8}  {}"
HEADING = _COLUMNS.format(
    "shape",
    "weight",
    "tokens",
    "fp4pass",
    "bf16",
    "triton",
    "decoded",
    "roofline",
    "floor",
    "ratio",
    "error",
    "bf16",
    "kernel",
)
"""The names of the columns of a `Row`."""


@dataclass(frozen=True)
class Row:
    """One case at one number of tokens; times in microseconds a call, errors relative to float64.

    fp4pass: ours, compiled. bf16: the same product in BF16, by cuBLAS for a linear layer and by transformers' grouped
    products, compiled, for experts. triton: BF16 by Inductor's own autotuned Triton, where it was measured. roofline:
    what an H200's bandwidth and arithmetic allow. floor: a kernel that only reads codes and scales, in the same run.
    bf16_error: that of weights rounded to BF16. kernel: the configuration that ours ran with. decoded: the weight
    decoded to BF16 by a kernel of Inductor's at every call, then multiplied by cuBLAS, where it was measured.
    """

    kind: str
    name: str
    shape: str
    tokens: int
    fp4pass: float
    bf16: float
    triton: float | None
    roofline: float
    floor: float | None
    error: float
    bf16_error: float
    kernel: str
    decoded: float | None = None

    @property
    def right(self) -> bool:
        """Whether the error is a number no larger than that of weights rounded to BF16. A wrong time is no time."""
        return self.error <= self.bf16_error

    @property
    def ratio(self) -> float | None:
        """Time of BF16 over ours; None for a wrong result."""
        return self.bf16 / self.fp4pass if self.right else None

    def __str__(self) -> str:
        return _COLUMNS.format(
            self.name,
            self.shape,
            self.tokens,
            *map(_number, (self.fp4pass, self.bf16, self.triton, self.decoded, self.roofline, self.floor)),
            _ratio(self.ratio),
            f"{self.error:.1e}",
            f"{self.bf16_error:.1e}",
            self.kernel,
        )


@dataclass(frozen=True)
class Run:
    """All rows of one run, and the machine that they are from: names and values of its header."""

    machine: dict[str, str]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """``{"machine": {...}, "rows": [{...}, ...]}``, a row a line."""
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        return f'{{\n "machine": {json.dumps(self.machine)},\n "rows": [\n  {rows}\n ]\n}}\n'

    def markdown(self) -> str:
        """Time of BF16 over ours: a table for each kind, a row a shape, a column a number of tokens."""
        tables = []
        for kind in dict.fromkeys(row.kind for row in self.rows):
            rows = [row for row in self.rows if row.kind == kind]
            columns = sorted({row.tokens for row in rows})
            lines = [["tokens", *map(str, columns)], ["---"] * (1 + len(columns))]
            for name, shape in dict.fromkeys((row.name, row.shape) for row in rows):
                ratios = {row.tokens: _ratio(row.ratio) for row in rows if row.name == name}
                lines.append([f"`{name}` {shape}", *(ratios.get(tokens, "") for tokens in columns)])
            tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(tables)


def header(machine: dict[str, str]) -> str:
    """The machine and the versions in one line."""
    return ", ".join(f"{name} {value}".strip() for name, value in machine.items())


def load(file: Path) -> Run:
    """The run that was written to ``file`` by `Run.to_json`. Raises OptionError if it holds something else."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Run(content["machine"], tuple(Row(**row) for row in content["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            "this file holds no run of the benchmark",
            seen=f"{file}: {type(error).__name__}: {error}",
            expected='{"machine": {...}, "rows": [...]}, as bench --json writes it with this version of fp4pass',
            do="measure again: python -m fp4pass bench --json FILE",
        ) from error


def all_right(rows: Iterable[Row]) -> bool:
    """Whether every row's result is right."""
    return all(row.right for row in rows)


def _number(time: float | None) -> str:
    return "" if time is None else f"{time:.1f}" if time < 1000 else f"{time:.0f}"


def _ratio(ratio: float | None) -> str:
    return "wrong" if ratio is None else f"{ratio:.2f}"
