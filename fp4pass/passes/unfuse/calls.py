"""Calls of named operations, also of those that write to their arguments and were wrapped by functionalization."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp4pass.match.anchors import called_op
from fp4pass.match.cone import value

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


@dataclass(frozen=True)
class Call:
    """One call: the op's name, its arguments by name with defaults filled in, and the nodes that hold its results."""

    node: fx.Node
    name: str
    arguments: dict[str, Any]
    results: dict[Key, list[fx.Node]]
    places: dict[Key, Place]

    def bound(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments under ``names``; one that this version of the op names otherwise is taken by its position."""
        own, found = list(self.arguments), dict(self.arguments)
        for position, name in enumerate(names):
            if name not in found and position < len(own) and own[position] not in names:
                found[name] = self.arguments[own[position]]
        return found


def pick(arguments: Mapping[str, Any], name: str) -> Any:
    """The argument ``name``, or with ``name.1`` an element of one; None where there is none."""
    name, _, index = name.partition(".")
    found = arguments.get(name)
    if not index or found is None:
        return found
    return found[int(index)] if len(found) > int(index) else None


def read_call(node: fx.Node) -> Call | None:
    """The call that ``node`` makes, or None if it calls no op."""
    op = called_op(node)
    if op is None:
        return None
    schema = op._schema
    names = [argument.name for argument in schema.arguments]
    if op is node.target:
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        outputs: dict[int, list[Key]] = {}
    else:
        given, outputs = dict(node.kwargs), _written(node, op)
    places = _restore_views(given, names, node)
    arguments = {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
    return Call(node, schema.name, arguments, _results(node, outputs), places)


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


def _restore_views(given: dict[str, Any], names: list[str], node: fx.Node) -> dict[Key, Place]:
    """Give written arguments their names back, and say which of them are parts of a larger buffer."""
    bases, places = node.kwargs.get("_all_bases", ()), {}
    for name in names:
        index = node.kwargs.get(f"_{name}_base_index")
        if index is None:
            continue
        given[name] = bases[index]
        part = {p: node.kwargs[f"_{name}_{p}"] for p in _VIEW_PARTS if f"_{name}_{p}" in node.kwargs}
        if part:
            places[name] = Place(bases[index], part)
    return places


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
