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


def placed(arguments: Any, index: Mapping[fx.Node, int]) -> Any:
    """Arguments with every node in ``index`` as its place, to be written down. (As text 1, 1.0 and True differ.)"""
    return fx.node.map_arg(arguments, lambda node: _Place(index[node]) if node in index else node)


def structure(
    leaves: Sequence[fx.Node], nodes: Sequence[fx.Node], stand_ins: Mapping[fx.Node, Hashable] | None = None
) -> Hashable:
    """Operations, their arguments and the leaves' metadata, without names.

    Of a node in ``stand_ins`` only what stands there counts, a pair of a description and the nodes that it reads.
    """
    index = {node: i for i, node in enumerate((*leaves, *nodes))}

    def written(arguments: Any) -> str:
        return repr(concrete(placed(arguments, index)))

    def metadata(node: fx.Node) -> Hashable:
        tensor = value(node)
        return tensor is not None and (str(tensor.dtype), repr(concrete([*tensor.shape, *tensor.stride()])))

    operations: list[Hashable] = []
    for node in nodes:
        if stand_ins and node in stand_ins:
            description, reads = stand_ins[node]
            operations.append((description, written(tuple(reads)), metadata(node)))
            continue
        operations.append((node.target, written(node.args), node.kwargs and written(node.kwargs)))
    return (tuple(map(metadata, leaves)), tuple(operations))


def table_bytes(table: torch.Tensor) -> bytes:
    """A table's values, for keys."""
    return table.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
