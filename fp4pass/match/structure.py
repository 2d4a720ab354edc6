"""What two parts of a graph must have in common for a verdict on one to hold for the other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from fp4pass.match.cone import value
from fp4pass.match.shapes import concrete

Verdict = TypeVar("Verdict")


class Memo:
    """Verdicts by structure, the oldest forgotten beyond ``keep``. Safe to share between threads."""

    def __init__(self, keep: int = 4096) -> None:
        self._keep = keep
        self._verdicts: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, find: Callable[[], Verdict]) -> Verdict:
        """The verdict kept under ``key``, or what ``find`` finds."""
        with self._lock:
            if key in self._verdicts:
                return self._verdicts[key]
        verdict = find()
        with self._lock:
            self._verdicts[key] = verdict
            while len(self._verdicts) > self._keep:
                self._verdicts.popitem(last=False)
        return verdict


class _Place:
    """A node, by its place among the others. Written without quotes, so that no string looks like it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"@{self._number}"


def written(arguments: Any, nodes: Sequence[fx.Node]) -> str:
    """Arguments as text, in which 1, 1.0 and True differ, with every one of ``nodes`` as its place among them."""
    return repr(concrete(arguments, {node: _Place(i) for i, node in enumerate(nodes)}))


def structure(
    leaves: Sequence[fx.Node], nodes: Sequence[fx.Node], stand_ins: Mapping[fx.Node, Hashable] | None = None
) -> Hashable:
    """Operations, their arguments and the leaves' metadata, without names.

    Of a node in ``stand_ins`` only what stands there counts, a pair of a description and the nodes that it reads.
    """

    def metadata(node: fx.Node) -> Hashable:
        tensor = value(node)
        return tensor is not None and (str(tensor.dtype), repr(concrete([*tensor.shape, *tensor.stride()])))

    stand_ins = stand_ins or {}
    operations = [stand_ins[node][0] if node in stand_ins else node.target for node in nodes]
    arguments = [stand_ins[node][1] if node in stand_ins else (node.args, node.kwargs) for node in nodes]
    described = (*leaves, *(node for node in nodes if node in stand_ins))
    return tuple(operations), written(arguments, (*leaves, *nodes)), tuple(map(metadata, described))


def table_bytes(table: torch.Tensor) -> bytes:
    """A table's values, for keys."""
    return table.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
