"""How each operation of a cone moves dimensions: its output's `Shape` and its arguments at other sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fp4pass.lowering.layout import UNIT_ROWS
from fp4pass.match import dims
from fp4pass.match.dims import Dim, NotRescalableError, Shape, Symbol

ROWS, EXPERTS, GATHERED, PADDED_ROWS = "N", "E", "S", "P"

aten, prims = torch.ops.aten, torch.ops.prims

Sizes = Mapping[str, int]
Arguments = Callable[[Sizes], tuple]


class Step:
    """One node of a cone: the shape it gives and its positional arguments at given symbol sizes."""

    def __init__(self, shape: Shape | list[Shape], arguments: Arguments | None = None) -> None:
        self.shape, self.arguments = shape, arguments


class Context:
    """What a rule may ask: the shapes of the node's inputs, and which symbol a literal may mean."""

    def __init__(self, shapes: Mapping[fx.Node, Any], symbols: Sequence[Symbol], columns: frozenset[int]) -> None:
        self._shapes, self._symbols, self._columns = shapes, symbols, columns

    def shape(self, node: Any) -> Shape:
        """The shape of an input; numbers and sizes count as scalars."""
        return self._shapes.get(node, ()) if isinstance(node, fx.Node) else ()

    def is_plain(self, node: fx.Node) -> bool:
        """Whether no dimension of the input scales."""
        found = self._shapes.get(node, ())
        return all(dims.is_plain(d) for shape in (found if isinstance(found, list) else [found]) for d in shape)

    def outputs(self, node: fx.Node) -> list[Shape]:
        """The shapes of an input that is a list of tensors."""
        return self._shapes[node]

    def rows_without_padding(self, dim: Dim, cut: fx.Node) -> Symbol | None:
        """The rows, if ``dim`` holds them with padding at their end and the slice ``cut`` takes just that off."""
        rows = next((s for s in self._symbols if s.name == ROWS), None)
        holds_padded = bool(dim) and isinstance(dim[0], Symbol) and dim[0].name == PADDED_ROWS
        if rows is None or not holds_padded or dims.size_of(dim) != dim[0].full:
            return None
        start, end, stride = _argument(cut, 2, "start"), _argument(cut, 3, "end"), _argument(cut, 4, "step", 1)
        return rows if not start and end == rows.full and stride == 1 else None

    def is_one_unit(self) -> bool:
        """Whether the rows are as many as a unit of the layout ``fragments`` has."""
        return any(s.name == ROWS and s.size == UNIT_ROWS for s in self._symbols)

    def literal(self, size: Any, from_end: int) -> Dim:
        """A size that stands in a factory or an expand. A wrong reading makes the scaled run fail, never pass."""
        gathered = next(((s,) for s in self._symbols if s.name == GATHERED), None)
        if isinstance(size, fx.Node) and gathered is not None and not isinstance(size.meta["val"], int):
            return gathered  # the only size that may be another in the next call
        size = concrete(size)
        if from_end == 1:
            return self.counted(size)
        return next(((s,) for s in self._symbols if s.size == size), dims.plain(size))

    def counted(self, size: int) -> Dim:
        """A size that may be one of columns: if it can be, it is. Should it count rows it meets them, and nothing
        passes."""
        return dims.plain(size) if size in self._columns else self.literal(size, 0)


def concrete(argument: Any, of: Mapping[fx.Node, Any] = MappingProxyType({})) -> Any:
    """The argument with what ``of`` has for a node in the node's place, and traced sizes replaced by their hints (no
    guard is added)."""

    def one(each: Any) -> Any:
        kind = type(each)
        if kind in _WITHOUT_SIZES:
            return each
        if kind is fx.Node:
            if each in of:
                return of[each]
            size = each.meta.get("val")
            if not isinstance(size, (int, torch.SymInt)):
                return each
            each = size
        return each.node.hint if isinstance(each, torch.SymInt) else each

    return fx.node.map_aggregate(argument, one)


_WITHOUT_SIZES = frozenset((int, float, bool, str, type(None), torch.dtype))


def step(node: fx.Node, context: Context) -> Step:
    """The node's step, by its operation's rule.

    Raises:
        NotRescalableError: the operation has no rule or picks rows or experts by constants.
    """
    rule = _rule(node.target)
    if rule is not None:
        return rule(node, context)
    if node.all_input_nodes and all(context.is_plain(n) for n in node.all_input_nodes):
        return _unscaled(node)
    raise NotRescalableError(f"{node.target} has no rule")


@functools.cache
def _rule(target: Callable[..., Any]) -> Callable[[fx.Node, Context], Step] | None:
    """The rule of an operation. Looked for once for each: the hash of an op is slow."""
    rule = _RULES.get(target) or _RULES.get(getattr(target, "overloadpacket", None))
    is_pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return _pointwise if rule is None and is_pointwise else rule


def _pointwise(node: fx.Node, context: Context) -> Step:
    return Step(dims.broadcast([context.shape(n) for n in node.all_input_nodes]))


def _unscaled(node: fx.Node) -> Step:
    """The node's own shape, or shapes, as traced."""

    def shape(tensor: torch.Tensor) -> Shape:
        return tuple(dims.plain(int(concrete(size))) for size in tensor.shape)

    found = node.meta["val"]
    return Step(shape(found) if isinstance(found, torch.Tensor) else [shape(each) for each in found])


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    found = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return concrete(found)


def _sizes(shape: Shape, sizes: Sizes) -> list[int]:
    return [dims.scaled(d, sizes) for d in shape]


def _plain_dim(shape: Shape, dim: int) -> int:
    """The dimension's index from the front, if it holds no rows or experts."""
    dim %= max(len(shape), 1)
    if not dims.is_plain(shape[dim]):
        raise NotRescalableError("rows or experts are picked by constants")
    return dim


def _full_size(node: fx.Node, dim: int) -> Dim:
    return dims.plain(int(concrete(node.meta["val"].shape[dim])))


def _same(node: fx.Node, context: Context) -> Step:
    return Step(context.shape(node.args[0]))


def _scalar(node: fx.Node, context: Context) -> Step:
    return Step(())


def _view(node: fx.Node, context: Context) -> Step:
    literals = concrete(node.args[1])
    if 1 in literals and context.is_one_unit() and not context.is_plain(node.args[0]):
        raise NotRescalableError("a size of 1 that may count units of rows")
    shape = dims.reshape(context.shape(node.args[0]), literals)
    return Step(shape, lambda sizes: (node.args[0], _sizes(shape, sizes)))


def _view_dtype(node: fx.Node, context: Context) -> Step:
    old = node.args[0].meta["val"].dtype.itemsize
    return Step(dims.last_resized(context.shape(node.args[0]), old, node.args[1].itemsize))


def _expand(node: fx.Node, context: Context) -> Step:
    literals = node.args[1]
    old = context.shape(node.args[0])
    old = ((),) * (len(literals) - len(old)) + old
    shape = tuple(
        dim if dim or concrete(size) in (-1, 1) else context.literal(size, len(literals) - i)
        for i, (dim, size) in enumerate(zip(old, literals, strict=True))
    )
    return Step(shape, lambda sizes: (node.args[0], _sizes(shape, sizes)))


def _factory(node: fx.Node, context: Context) -> Step:
    literals = node.args[0]
    shape = tuple(context.literal(size, len(literals) - i) for i, size in enumerate(literals))
    return Step(shape, lambda sizes: (_sizes(shape, sizes), *node.args[1:]))


def _iota(node: fx.Node, context: Context) -> Step:
    shape = tuple(context.counted(int(concrete(size))) for size in node.meta["val"].shape)
    if not all(dims.is_plain(dim) for dim in shape):
        raise NotRescalableError("rows or experts are numbered")
    return Step(shape)


def _permute(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    return Step(tuple(shape[d] for d in node.args[1]))


def _transpose(node: fx.Node, context: Context) -> Step:
    shape = list(context.shape(node.args[0]))
    if len(shape) > 1:
        a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1)
        shape[a], shape[b] = shape[b], shape[a]
    return Step(tuple(shape))


def _unsqueeze(node: fx.Node, context: Context) -> Step:
    shape = list(context.shape(node.args[0]))
    shape.insert(node.args[1] % (len(shape) + 1), ())
    return Step(tuple(shape))


def _squeeze(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    given = node.args[1] if len(node.args) > 1 else range(len(shape))
    gone = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    return Step(tuple(d for i, d in enumerate(shape) if i not in gone or d))


def _cat(node: fx.Node, context: Context) -> Step:
    parts = [context.shape(part) for part in node.args[0]]
    dim = _plain_dim(parts[0], _argument(node, 1, "dim", 0))
    for part in parts:
        _plain_dim(part, dim)
        dims.broadcast([part[:dim] + part[dim + 1 :], parts[0][:dim] + parts[0][dim + 1 :]])
    return Step((*parts[0][:dim], _full_size(node, dim), *parts[0][dim + 1 :]))


def _stack(node: fx.Node, context: Context) -> Step:
    shape = list(dims.broadcast([context.shape(part) for part in node.args[0]]))
    dim = _argument(node, 1, "dim", 0) % _rank(node)
    shape.insert(dim, dims.plain(len(node.args[0])))
    return Step(tuple(shape))


def _is_whole(node: fx.Node, first: int) -> bool:
    """Whether slice arguments (dim, start, end, step), the first at ``first``, take everything."""
    dim = _argument(node, first, "dim", 0)
    start, end = _argument(node, first + 1, "start"), _argument(node, first + 2, "end")
    full = concrete(node.args[0].meta["val"].shape[dim])
    return not start and (end is None or end >= full) and _argument(node, first + 3, "step", 1) == 1


def _slice(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    if _is_whole(node, 1):
        return Step(shape)
    dim = _argument(node, 1, "dim", 0) % len(shape)
    if (rows := context.rows_without_padding(shape[dim], node)) is not None:
        return Step((*shape[:dim], (rows,), *shape[dim + 1 :]), lambda sizes: (node.args[0], dim, 0, sizes[rows.name]))
    _plain_dim(shape, dim)
    return Step((*shape[:dim], _full_size(node, dim), *shape[dim + 1 :]))


def _slice_scatter(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    if not _is_whole(node, 2):
        _plain_dim(shape, _argument(node, 2, "dim", 0))
    return Step(shape)


def _select(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    dim = _plain_dim(shape, node.args[1])
    return Step(shape[:dim] + shape[dim + 1 :])


def _reduce(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    given = _argument(node, 1, "dim")
    if given is None or given == []:
        raise NotRescalableError("a reduction over everything")
    over = {_plain_dim(shape, d) for d in ([given] if isinstance(given, int) else given)}
    keep = _argument(node, 2, "keepdim", False)
    return Step(tuple(() if i in over else d for i, d in enumerate(shape) if keep or i not in over))


def _repeat(node: fx.Node, context: Context) -> Step:
    repeats = node.args[1]
    old = context.shape(node.args[0])
    old = ((),) * (len(repeats) - len(old)) + old
    return Step(tuple(dims.merge((times, *dim)) for times, dim in zip(repeats, old, strict=True)))


def _index(node: fx.Node, context: Context) -> Step:
    source, indices = context.shape(node.args[0]), node.args[1]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].meta["val"].dtype == torch.bool:
        raise NotRescalableError("an index other than one tensor of numbers")
    return Step(_picked(source, given[0][0], context.shape(given[0][1])))


def _picked(source: Shape, dim: int, index: Shape) -> Shape:
    """The shape of ``source`` with entries of dimension ``dim`` picked by ``index``."""
    if not dim:
        return _looked_up(source, index)
    _plain_dim(source, dim)
    return (*source[:dim], *index, *source[dim + 1 :])


def _gather(node: fx.Node, context: Context) -> Step:
    source, index = context.shape(node.args[0]), context.shape(node.args[2])
    dim = _plain_dim(source, node.args[1])
    if source[:dim] + source[dim + 1 :] != index[:dim] + index[dim + 1 :]:
        raise NotRescalableError("entries picked for some of the rows")
    return Step(index)


def _looked_up(source: Shape, index: Shape) -> Shape:
    """The shape of ``source[index]``: experts picked by ids, or a table's entries picked by codes."""
    if not dims.is_plain(source[0]) and [f.name for f in source[0] if isinstance(f, Symbol)] != [EXPERTS]:
        raise NotRescalableError("rows picked one by one")
    return (*index, *source[1:])


def _embedding(node: fx.Node, context: Context) -> Step:
    return Step(_looked_up(context.shape(node.args[0]), context.shape(node.args[1])))


def _index_select(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    return Step(_picked(shape, node.args[1] % len(shape), context.shape(node.args[2])))


def _index_put(node: fx.Node, context: Context) -> Step:
    shape, masks = context.shape(node.args[0]), node.args[1]
    if all(context.is_plain(n) for n in node.all_input_nodes):
        return Step(shape)
    if len(masks) != 1 or masks[0].meta["val"].dtype != torch.bool or len(context.shape(masks[0])) != len(shape):
        raise NotRescalableError("a write to rows by index")
    dims.broadcast([shape, context.shape(masks[0])])
    return Step(shape)


def _split(node: fx.Node, context: Context) -> Step:
    shape = context.shape(node.args[0])
    position, default = (1, 0) if node.target.overloadpacket is aten.unbind else (2, 0)
    dim = _plain_dim(shape, _argument(node, position, "dim", default))
    removed = node.target.overloadpacket is aten.unbind
    parts = [() if removed else (dims.plain(int(concrete(part.shape[dim]))),) for part in node.meta["val"]]
    return Step([(*shape[:dim], *part, *shape[dim + 1 :]) for part in parts])


def _getitem(node: fx.Node, context: Context) -> Step:
    return Step(context.outputs(node.args[0])[node.args[1]])


def _table(*entries: tuple[Callable[[fx.Node, Context], Step], Sequence[Any]]) -> dict[Any, Callable]:
    return {target: rule for rule, targets in entries for target in targets}


_RULES = _table(
    (_same, [aten.clone, aten.contiguous, aten.alias, aten.detach, aten._to_copy, aten.lift_fresh_copy, aten.copy]),
    (_same, [aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, prims.device_put]),
    (_view, [aten.view.default, aten.reshape, aten._unsafe_view]),
    (_view_dtype, [aten.view.dtype]),
    (_expand, [aten.expand]),
    (_factory, [aten.full, aten.empty, aten.zeros, aten.ones]),
    (_scalar, [aten.scalar_tensor]),
    (_iota, [prims.iota, aten.arange, aten.eye]),
    (_permute, [aten.permute]),
    (_transpose, [aten.transpose, aten.t]),
    (_unsqueeze, [aten.unsqueeze]),
    (_squeeze, [aten.squeeze]),
    (_cat, [aten.cat]),
    (_stack, [aten.stack]),
    (_slice, [aten.slice]),
    (_slice_scatter, [aten.slice_scatter]),
    (_select, [aten.select]),
    (_reduce, [aten.sum.dim_IntList, aten.amax, aten.amin, aten.mean.dim]),
    (_repeat, [aten.repeat]),
    (_index, [aten.index, aten._unsafe_index]),
    (_embedding, [aten.embedding]),
    (_index_select, [aten.index_select]),
    (_gather, [aten.gather]),
    (_index_put, [aten.index_put]),
    (_split, [aten.split, aten.split_with_sizes, aten.unbind]),
    (_getitem, [operator.getitem]),
)
