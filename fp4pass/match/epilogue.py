"""What a graph does to each number of a product's result on its own: adds a bias, applies an activation, casts.

An activation is found by meaning: the operations after the product are run on all 65,536 numbers of a 16-bit dtype, in
float64 and without the casts between floats, and compared with what the name stands for. So they may be spelled in any
way, and only their roundings are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.lowering.reference import ACTIVATIONS, NO_ACTIVATION
from fp4pass.match.cone import value

aten, prims = torch.ops.aten, torch.ops.prims

LARGEST = 16
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
VIEWS = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}
_SAME = {*VIEWS, aten.alias.default, aten.clone.default}
_CASTS = {prims.convert_element_type.default, aten._to_copy.default}


@dataclass(frozen=True)
class Epilogue:
    """``end = activation(product + bias)``, in end's dtype; ``views`` give the product's result end's shape."""

    end: fx.Node
    activation: str
    bias: fx.Node | None
    views: tuple[fx.Node, ...]


def find_epilogue(product: fx.Node, may_add: Callable[[fx.Node], bool]) -> Epilogue | None:
    """The longest that follows ``product [..., N]`` and can be done inside of it, None if there is nothing to do.

    ``may_add(node)`` says whether a tensor of one value a feature may be added before everything else.
    """
    with _torch.real_tensors(), torch.no_grad():
        return _Search(product, may_add).longest()


class _Search:
    """Follows the uses of a product's result as long as all of them are functions of its numbers, one by one."""

    def __init__(self, product: fx.Node, may_add: Callable[[fx.Node], bool]) -> None:
        self.product, self.may_add = product, may_add
        self.dtype = value(product).dtype
        self.start = _every_number(self.dtype)
        self.found = {product: self.start}
        self.bias: fx.Node | None = None

    def longest(self) -> Epilogue | None:
        best, end = None, self._advance()
        while end is not None and len(self.found) <= LARGEST:
            if self._is_only_way_out(end):
                best = self._judged(end) or best
            end = self._advance()
        return best

    def _advance(self) -> fx.Node | None:
        """Take in one more node that is computed from those taken in; None if there is none."""
        for node in list(self.found):
            for user in node.users:
                if user not in self.found and (result := self._result(user)) is not None:
                    self.found[user] = result
                    return user
        return None

    def _result(self, node: fx.Node) -> torch.Tensor | None:
        """What ``node`` gives for every number, None if that is not all that it depends on."""
        if node.op != "call_function" or value(node) is None:
            return None
        if node.target in _SAME:
            return self.found.get(node.args[0])
        if node.target in _CASTS:
            return self.found.get(node.args[0]) if self._keeps_range(node) else None
        if node.target is aten.add.Tensor and not node.kwargs and self.bias is None:
            for inside, other in (node.args, node.args[::-1]):
                if self._is_bias(node, inside, other):
                    self.bias = other
                    return self.start
        return self._applied(node) if _is_pointwise(node) else None

    def _keeps_range(self, cast: fx.Node) -> bool:
        """Whether a cast does nothing but round: between floats, and not to float16, which ends at 65504."""
        before, after = value(cast.args[0]).dtype, value(cast).dtype
        return before in FLOATS and after in FLOATS and (after != torch.float16 or self.dtype == after)

    def _is_bias(self, add: fx.Node, inside: Any, other: Any) -> bool:
        """Whether ``other`` has one value a feature, and is added to the product wherever that is used."""
        if self.found.get(inside) is not self.start or not isinstance(other, fx.Node) or other in self.found:
            return False
        if any(user is not add and user not in self.found for node in self.found for user in node.users):
            return False
        n, added = value(self.product).shape[-1], value(other)
        fits = added.dtype in FLOATS and added.numel() == n and added.shape[-1:] == value(inside).shape[-1:] == (n,)
        return fits and self.may_add(other)

    def _applied(self, node: fx.Node) -> torch.Tensor | None:
        """The result of an operation on each number, if it has no other operands than constants."""
        for operand in node.all_input_nodes:
            if value(operand) is not None and value(operand).dim() and _sizes(operand) != _sizes(node):
                return None  # numbers meet others than their own
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._operand)
            return node.target(*args, **kwargs)
        except (KeyError, RuntimeError, TypeError, ValueError):
            return None

    def _operand(self, node: fx.Node) -> torch.Tensor:
        if node.target is aten.full.default and isinstance(node.args[1], (int, float)):
            return torch.tensor(node.args[1], dtype=torch.float64)
        if node.target is aten.scalar_tensor.default:
            return torch.tensor(node.args[0], dtype=torch.float64)
        return self.found[node]

    def _is_only_way_out(self, end: fx.Node) -> bool:
        """Whether whatever else was taken in has no users but what was taken in."""
        return all(user in self.found for node in self.found if node is not end for user in node.users)

    def _judged(self, end: fx.Node) -> Epilogue | None:
        dtype = value(end).dtype
        name = self._activation(self.found[end])
        # Inductor casts in the kernel that reads the result, if there is one: written in float32 it would be twice
        # the bytes.
        is_cast = dtype != self.dtype
        if name is None or (is_cast and not all(user.op == "output" for user in end.users)):
            return None
        if name == NO_ACTIVATION and self.bias is None and not is_cast:
            return None
        return Epilogue(end, name, self.bias, tuple(self._views_to(end)))

    def _activation(self, found: torch.Tensor) -> str | None:
        if found is self.start:
            return NO_ACTIVATION
        for name, function in ACTIVATIONS.items():
            wanted = function(self.start)
            if found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=1e-12, atol=1e-300, equal_nan=True):
                return name
        return None

    def _views_to(self, end: fx.Node) -> list[fx.Node]:
        """The changes of shape on a way from the product to ``end``, in order; none if both have the same."""
        if _sizes(end) == _sizes(self.product):
            return []
        views, node = [], end
        while node is not self.product:
            if node.target in VIEWS:
                views.insert(0, node)
            node = next(operand for operand in node.all_input_nodes if operand in self.found)
        return views


def _is_pointwise(node: fx.Node) -> bool:
    """Whether the operation is one of torch's own on each number, and always the same."""
    tags = getattr(node.target, "tags", ())
    is_torchs = getattr(node.target, "namespace", "") in ("aten", "prims")
    return is_torchs and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _sizes(node: fx.Node) -> str:
    """A result's sizes as they are written: sizes that happen to be equal in the traced call may not be in the next."""
    return str(list(value(node).shape))


def _every_number(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a 16-bit dtype in float64, infinities and NaN among them; bfloat16's for a wider one."""
    pattern = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    return pattern.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).double()
