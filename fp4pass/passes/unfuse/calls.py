"""Calls of named operations, also of those that write to their arguments and were wrapped by functionalization."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp4pass.match.anchors import called_op
from fp4pass.match.cone import value
from fp4pass.passes.unfuse.rows import Row

Key = int | str
"""A result of a call: the position among what the op returns, or the name of an argument that it writes to."""

_VIEW_PARTS = ("size", "stride", "storage_offset", "slice_dim", "slice_start", "slice_end")


@dataclass(frozen=True)
class Place:
    """Where in a larger buffer an op wrote: the buffer as it was, and the part of it."""

    base: fx.Node
    part: dict[str, Any]

    def embed(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """``base`` with ``value`` in the part."""
        part = self.part
        if "slice_dim" in part:
            bounds = part["slice_dim"], part["slice_start"], part["slice_end"]
            return torch.ops.aten.slice_scatter.default(base, value, *bounds)
        return torch.as_strided_scatter(base, value, part["size"], part["stride"], part["storage_offset"])


class Call:
    """One call of the op that ``row`` describes. Its arguments are read when asked for, since others may be replaced in
    the meantime.

    results: the nodes that hold each result, by `Key`.
    """

    def __init__(self, node: fx.Node, row: Row) -> None:
        self.node, self.row, self._op = node, row, called_op(node)
        self._wrapped = self._op is not node.target
        self.results = _results(node, _written(node, self._op) if self._wrapped else {})

    @property
    def arguments(self) -> dict[str, Any]:
        """By name, defaults filled in; an argument that is written to is the buffer in which it lies. What this version
        of the op names otherwise than the row stands under both names, by its position."""
        own = [argument.name for argument in self._op._schema.arguments]
        given = dict(zip(own, () if self._wrapped else self.node.args, strict=False)) | dict(self.node.kwargs)
        for name in own:
            index = given.get(f"_{name}_base_index")
            if index is not None:
                given[name] = given["_all_bases"][index]
        found = {a.name: given.get(a.name, a.default_value) for a in self._op._schema.arguments}
        names = self.row.argument_names
        renamed = ((new, old) for new, old in zip(names, own, strict=False) if new not in found and old not in names)
        return found | {new: found[old] for new, old in renamed}

    def place(self, key: Key) -> Place | None:
        """Where the call wrote a result, if that is only a part of a buffer."""
        kwargs = self.node.kwargs
        part = {p: kwargs[f"_{key}_{p}"] for p in _VIEW_PARTS if f"_{key}_{p}" in kwargs}
        return Place(self.arguments[key], part) if part else None


def _written(node: fx.Node, op: torch._ops.OpOverload) -> dict[int, list[Key]]:
    """By position in the wrapper's result, which arguments' new values stand there: after what the op returns (one
    None if that is nothing) the arguments that it writes to, or the buffers in which these lie."""
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    first = max(1, len(op._schema.returns))
    outputs: dict[int, list[Key]] = {i: [i] for i in range(len(op._schema.returns))}
    for i, name in enumerate(written):
        base = node.kwargs.get(f"_{name}_base_index", None if "_all_bases" in node.kwargs else i)
        if base is not None:
            outputs.setdefault(first + base, []).append(name)
    return outputs


def _results(node: fx.Node, outputs: dict[int, list[Key]]) -> dict[Key, list[fx.Node]]:
    """The nodes that hold each result. Of two arguments in one buffer neither can be told."""
    if value(node) is not None:
        return {0: [node]}
    results: dict[Key, list[fx.Node]] = {}
    for user in node.users:
        if user.target is operator.getitem and user.args[0] is node:
            keys = outputs.get(user.args[1], [user.args[1]])
            results.setdefault(keys[0] if len(keys) == 1 else f"one of {keys}", []).append(user)
    return results
