"""Run part of a graph again, on other values and, where its operations allow it, at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fp4pass.match.dims import NotRescalableError, Shape, Symbol, divisors
from fp4pass.match.shapes import Context, Sizes, Step, concrete, step

aten, prims = torch.ops.aten, torch.ops.prims

CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError)
"""What an operation raises that does not take the values or sizes of a replay."""


@dataclass(frozen=True)
class StandIn:
    """What a node is taken for instead of being run: its shape, and its value from the values so far."""

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
        self._calls = {node: (concrete(node.args), _on_cpu(concrete(node.kwargs))) for node in part.nodes}
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
            self.why_full = f"{node.name}: {error}"
        self.needs = {symbol.name: 1 for symbol in part.symbols}
        for shape in shapes.values():
            for each in shape if isinstance(shape, list) else [shape]:
                for name, divisor in divisors(each).items():
                    self.needs[name] = math.lcm(self.needs[name], divisor)

    def __call__(self, leaves: Mapping[fx.Node, torch.Tensor], sizes: Sizes | None) -> torch.Tensor:
        """The root's value; ``sizes`` None runs at the traced sizes."""
        values: dict[fx.Node, Any] = dict(leaves)
        for node in self._part.nodes:
            if node in self._part.stand_ins:
                values[node] = self._part.stand_ins[node].value(values)
                continue
            positional, named = self._calls[node]
            arguments = self._steps[node].arguments if sizes is not None else None
            if arguments is not None:
                positional = concrete(arguments(sizes))
            positional, named = fx.node.map_arg((positional, named), values.__getitem__)
            values[node] = _CPU_FORMS.get(node.target, node.target)(*positional, **named)
        return values[self._part.root]


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


def _on_cpu(named: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the traced device replaced: the replay is small and the GPU may not be there."""
    return {name: torch.device("cpu") if name == "device" else given for name, given in named.items()}
