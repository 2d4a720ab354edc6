"""Run a cone again, on other values and, where its operations allow it, at other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fp4pass.match.cone import Cone
from fp4pass.match.dims import NotRescalableError, Shape, divisors
from fp4pass.match.roles import Roles
from fp4pass.match.shapes import Context, Sizes, Step, concrete, step


class Replay:
    """A cone that can be run on given leaves.

    ``needs`` says for each symbol what its size must be a multiple of. ``why_full`` is None if the cone can be run at
    any such sizes, otherwise the reason why it only runs at its own.
    """

    def __init__(self, cone: Cone, roles: Roles) -> None:
        self._cone = cone
        self._steps: dict[fx.Node, Step] = {}
        self.why_full: str | None = None
        shapes: dict[fx.Node, Any] = dict(roles.leaf_shapes())
        self.leaf_shapes: dict[fx.Node, Shape] = dict(shapes)
        groups = roles.k // 16
        columns = frozenset((roles.k, roles.k // 2, groups, 2, 4, 8, 16))
        context = Context(shapes, list(roles.symbols().values()), columns)
        try:
            for node in cone.nodes:
                self._steps[node] = found = step(node, context)
                shapes[node] = found.shape
        except NotRescalableError as error:
            self.why_full = f"{node.name}: {error}"
        self.needs = dict.fromkeys(roles.symbols(), 1)
        for shape in shapes.values():
            for part in shape if isinstance(shape, list) else [shape]:
                for name, divisor in divisors(part).items():
                    self.needs[name] = max(self.needs[name], divisor)

    def __call__(self, leaves: Mapping[fx.Node, torch.Tensor], sizes: Sizes | None) -> torch.Tensor:
        """The root's value; ``sizes`` None runs at the traced sizes."""
        values: dict[fx.Node, Any] = dict(leaves)
        for node in self._cone.nodes:
            arguments = self._steps[node].arguments if sizes is not None else None
            positional = concrete(node.args if arguments is None else arguments(sizes))
            positional, named = fx.node.map_arg((positional, concrete(node.kwargs)), values.__getitem__)
            values[node] = node.target(*positional, **_on_cpu(named))
        return values[self._cone.root]


def _on_cpu(named: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the traced device replaced: the replay is small and the GPU may not be there."""
    return {name: torch.device("cpu") if name == "device" else given for name, given in named.items()}
