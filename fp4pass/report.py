"""What became of every quantized product: rewritten, or left as it was and why."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# A parameter of this name says no more than its module does.
_OWN_NAMES = ("weight", "weight_packed", "qdata", "codes")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One product, or one block of experts.

    module: its name in the model, "" where it is not known. op: what it is now, or the product that was left.
    n, k: rows and columns of the weight (of the first product for a block of experts); experts: their number, 0 for a
    single matrix. source: the convention in which the weight is written. lowering: what computes it now. reason,
    remedy: why it was left, and what to do; of a product of experts that was rewritten by itself, why it is no part of
    a whole block. inputs: positions of its codes among the compiled call's inputs. lost: it
    was left with an activation in FP4 or FP8 that nothing else on this GPU can read.
    epilogue: what follows the product and is done inside of it, such as ``bias, relu2``.
    """

    module: str
    op: str
    n: int = 0
    k: int = 0
    experts: int = 0
    source: str = ""
    lowering: str = ""
    reason: str = ""
    remedy: str = ""
    inputs: tuple[int, ...] = ()
    epilogue: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Report:
    """The outcome of one compile (or of all graphs of one `explain`)."""

    rewritten: tuple[Entry, ...] = ()
    refused: tuple[Entry, ...] = ()
    target: str = ""

    def __add__(self, other: Report) -> Report:
        target = self.target or other.target
        return Report(self.rewritten + other.rewritten, self.refused + other.refused, target)

    def __bool__(self) -> bool:
        return bool(self.rewritten or self.refused)

    def to_json(self) -> str:
        """The report as JSON: ``{"target": ..., "rewritten": [...], "refused": [...]}``."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        found = json.loads(text)

        def entries(rows: Iterable[Mapping[str, Any]]) -> tuple[Entry, ...]:
            return tuple(Entry(**{**row, "inputs": tuple(row["inputs"])}) for row in rows)

        return cls(entries(found["rewritten"]), entries(found["refused"]), found["target"])

    def named(self, names: Sequence[str]) -> Report:
        """With module names from the inputs of the present call: ``names[i]`` is where input i comes from."""

        def name(entry: Entry) -> Entry:
            return replace(entry, module=common_module([names[i] for i in entry.inputs if i < len(names)]))

        return replace(self, rewritten=tuple(map(name, self.rewritten)), refused=tuple(map(name, self.refused)))

    def __str__(self) -> str:
        total = len(self.rewritten) + len(self.refused)
        if not total:
            return "fp4pass: no quantized product in this graph"
        lines = [f"fp4pass: {len(self.rewritten)} of {total} quantized products rewritten ({self.target})"]
        rewritten = _fold(self.rewritten)
        done = [
            {
                "module": name,
                "layers": str(count),
                "now": f"{e.op} + {e.epilogue}" if e.epilogue else e.op,
                "weight": _shape(e),
                "lowering": e.lowering,
                "source": e.source,
            }
            for name, count, e in rewritten
        ]
        lines += _table(done, said_once=("lowering", "source"))
        lines += _because("product by product", [each for each in rewritten if each[2].reason])
        lines += _because("left", _fold(self.refused))
        return "\n".join(lines)


def common_module(names: Sequence[str]) -> str:
    """The module that owns all of these tensors: ``[a.b.up, a.b.down]`` -> ``a.b``; a lone ``x.weight`` -> ``x``."""
    parts = [name.split(".") for name in names if name]
    if not parts:
        return ""
    if len(parts) == 1:
        *owner, last = parts[0]
        return ".".join(owner if owner and last in _OWN_NAMES else parts[0])
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)


def _shape(entry: Entry) -> str:
    return f"{f'{entry.experts} x ' if entry.experts else ''}{entry.n} x {entry.k}"


def _fold(entries: Iterable[Entry]) -> list[tuple[str, int, Entry]]:
    """Entries alike but for a layer number as one: (name with the numbers as a set, how many, the first)."""
    groups: dict[Any, list[tuple[str, Entry]]] = {}
    for entry in entries:
        match = _LAYER.search(entry.module)
        number = match[1] if match else ""
        name = _LAYER.sub(".#.", entry.module, count=1)
        groups.setdefault((name, replace(entry, module="", inputs=())), []).append((number, entry))
    folded = []
    for (name, _), members in groups.items():
        numbers = [number for number, _ in members]
        shown = numbers[0] if len(numbers) == 1 else "{" + ",".join(_abridged(numbers)) + "}"
        folded.append((name.replace("#", shown) or "?", len(members), members[0][1]))
    return folded


def _because(what: str, folded: Iterable[tuple[str, int, Entry]]) -> Iterator[str]:
    """Each reason once, with what to do, and where."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, count, e in folded:
        described = f"{name} ({f'{count} x ' if count > 1 else ''}{e.op}, {_shape(e)})"
        reasons.setdefault((e.reason, e.remedy), []).append(described)
    for (reason, remedy), names in reasons.items():
        yield from (f"{what}: {reason}", f"  do: {remedy}", *(f"  in: {name}" for name in names))


def _abridged(numbers: list[str]) -> list[str]:
    return numbers if len(numbers) <= 4 else [*numbers[:2], "...", numbers[-1]]


def _table(rows: Sequence[dict[str, str]], said_once: Sequence[str]) -> list[str]:
    """Aligned columns under their names; of ``said_once`` those that are equal in every row stand above, on a line."""
    if not rows:
        return []
    equal = [name for name in said_once if len({row[name] for row in rows}) == 1]
    above = [f"{name}: {rows[0][name]}" for name in equal]
    names = [name for name in rows[0] if name not in equal]
    cells = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return [*above, *("  ".join(row).rstrip() for row in padded)]


class Store:
    """Reports on disk, so that a graph that comes from the compile cache still has one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, key: str, report: Report) -> None:
        """Keep ``report`` under ``key``. A reader sees the old one or the new one, never half of one."""
        self._directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._directory)
        with os.fdopen(handle, "w") as file:
            file.write(report.to_json())
        os.replace(temporary, self._directory / f"{key}.json")

    def load(self, key: str) -> Report | None:
        """The report kept under ``key``, or None if there is none that can be read."""
        try:
            return Report.from_json((self._directory / f"{key}.json").read_text())
        except (OSError, ValueError, KeyError, TypeError):
            return None


_last = Report()
_lock = threading.Lock()


def last_report() -> Report:
    """The report of the latest compile with ``backend="fp4pass"`` in this process that met quantized weights."""
    with _lock:
        return _last


def remember(report: Report) -> None:
    """Make ``report`` the one that `last_report` gives, if it says anything."""
    global _last
    if report:
        with _lock:
            _last = report
