"""Run part of a graph again, on other values and, where its operations allow it, at other sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fp4pass.match.dims import NotRescalableError, Shape, Symbol, divisors, scaled
from fp4pass.match.shapes import Context, Sizes, Step, concrete, step
from fp4pass.match.structure import written

aten, prims = torch.ops.aten, torch.ops.prims

CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError)
"""What an operation raises that does not take the values or sizes of a replay."""


@dataclass(frozen=True)
class StandIn:
    """What a node is taken for instead of being run: its shape, and its value from those of the nodes it ``reads``."""

    reads: tuple[fx.Node, ...]
    shape: Shape
    value: Callable[[Mapping[fx.Node, Any]], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Nodes of a graph in execution order, ending in ``root``, and the symbolic shapes of what they start from.

    symbols: the sizes that may change. columns: literals that in a last dimension are numbers, whatever symbol has the
    same size.
    """

    nodes: Sequence[fx.Node]
    root: fx.Node
    leaf_shapes: Mapping[fx.Node, Shape]
    symbols: Sequence[Symbol]
    columns: frozenset[int] = frozenset()
    stand_ins: Mapping[fx.Node, StandIn] = field(default_factory=dict)


class Replay:
    """A part of a graph that can be run on given leaves.

    ``needs`` says for each symbol what its size must be a multiple of. ``why_full`` is None if the part can be run at
    any such sizes, otherwise the reason why it only runs at its own.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._steps: dict[fx.Node, Step] = {}
        self.leaf_shapes = part.leaf_shapes
        self.why_full: str | None = None
        shapes: dict[fx.Node, Any] = dict(part.leaf_shapes)
        context = Context(shapes, part.symbols, part.columns)
        try:
            for node in part.nodes:
                stand_in = part.stand_ins.get(node)
                self._steps[node] = found = step(node, context) if stand_in is None else Step(stand_in.shape)
                shapes[node] = found.shape
        except NotRescalableError as error:
            self.why_full = f"{node.target}: {error}"
        every = [each for shape in shapes.values() for each in (shape if isinstance(shape, list) else [shape])]
        unsplit = {symbol.name: 1 for symbol in part.symbols}
        self.needs = unsplit | divisors(dim for shape in every for dim in shape)

    def calls(self, runs: Sequence[Sizes]) -> Hashable:
        """What is called at each of these sizes, without names. Parts that call the same compute the same from equal
        leaves, given in the same order."""
        nodes = self._part.nodes
        leaves = [[scaled(dim, sizes) for dim in shape] for shape in self.leaf_shapes.values() for sizes in runs]
        calls = [[self._call(n, sizes) for sizes in (runs if self._steps[n].arguments else runs[:1])] for n in nodes]
        return repr(leaves), tuple(node.target for node in nodes), written(calls, (*self.leaf_shapes, *nodes))

    def _call(self, node: fx.Node, sizes: Sizes | None) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call, by position and by name."""
        arguments = self._steps[node].arguments if sizes is not None else None
        named = node.kwargs
        if "device" in named:  # the replay is small and the GPU may not be there
            named = {**named, "device": torch.device("cpu")}
        return node.args if arguments is None else arguments(sizes), named

    def __call__(self, leaves: Mapping[fx.Node, torch.Tensor], sizes: Sizes | None) -> torch.Tensor:
        """The root's value; ``sizes`` None runs at the traced sizes."""
        values: dict[fx.Node, Any] = dict(leaves)
        for node in self._part.nodes:
            values[node] = self._value(node, values, sizes)
            for done in self._last_reads[node]:
                values.pop(done, None)  # a size is not among them: its value comes from the trace
        return values[self._part.root]

    @functools.cached_property
    def _last_reads(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node those that no later one reads, so that their values need not be kept."""
        read, found = {self._part.root}, {}
        for node in reversed(self._part.nodes):
            stand_in = self._part.stand_ins.get(node)
            inputs = node.all_input_nodes if stand_in is None else stand_in.reads
            found[node] = [n for n in dict.fromkeys(inputs) if n not in read]
            read.update(inputs)
        return found

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any], sizes: Sizes | None) -> Any:
        if node in self._part.stand_ins:
            return self._part.stand_ins[node].value(values)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"{node.target} gives other numbers at every call")
        positional, named = concrete(self._call(node, sizes), values)
        return _CPU_FORMS.get(node.target, node.target)(*positional, **named)


def _histc(numbers: torch.Tensor, *bins: Any) -> torch.Tensor:
    """GPUs count integers, the CPU floats."""
    return aten.histc.default(numbers.float(), *bins).to(numbers.dtype)


def _view_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return aten.view.dtype(tensor.contiguous(), dtype)


# Strides may come out otherwise than they were traced, which is nothing to a reshape.
_CPU_FORMS: dict[Any, Callable[..., Any]] = {
    aten.histc.default: _histc,
    aten.view.default: aten.reshape.default,
    prims.convert_element_type.default: torch.Tensor.to,  # the same, without a detour through Python
    aten.view.dtype: _view_dtype,
}
