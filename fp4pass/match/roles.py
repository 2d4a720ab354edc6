"""Which leaf of a cone is what: codes, block scales, global scale, expert ids, decode tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fp4pass.match.cone import GATHERS, Cone, Inputs, value, varying_sizes
from fp4pass.match.convention import (
    GROUP,
    LINEAR,
    SWIZZLED,
    TILE_GROUPS,
    TILE_ROWS,
    TRANSPOSED,
    Arrangement,
    tiles,
)
from fp4pass.match.dims import Dim, Shape, Symbol, plain, reshape
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import Part
from fp4pass.match.shapes import EXPERTS, GATHERED, PADDED_ROWS, ROWS, concrete

TABLE_BYTES = 4096
TABLE_SIZES = (8, 16, 256, 512)  # magnitudes, codes, bytes, and the two codes of each byte
_LARGEST_GROUP = 128  # of scales that are stored as plain bytes, where a small table may be meant
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Roles:
    """The leaves of one quantized weight, N x K, of ``experts`` experts (None: a single matrix), and their order."""

    codes: fx.Node
    scale: fx.Node
    global_scale: fx.Node | None
    ids: fx.Node | None
    tables: tuple[tuple[fx.Node, torch.Tensor], ...]
    n: int
    k: int
    experts: int | None
    arrangement: Arrangement

    @property
    def sizes(self) -> tuple[int | None, int, int]:
        """(experts, N, K)."""
        return self.experts, self.n, self.k

    @property
    def rows_vary(self) -> bool:
        """Whether another call may gather another number of rows."""
        return self.ids is not None and not all(isinstance(size, int) for size in value(self.ids).shape)

    @property
    def lead(self) -> list[int]:
        """``[E]``, or nothing for a single matrix."""
        return [] if self.experts is None else [self.experts]

    def symbols(self) -> dict[str, Symbol]:
        """The sizes that a scaled run may change. A size of 1 says nothing and stays."""
        full = {ROWS: self.n, EXPERTS: self.experts or 1}
        if self.ids is not None:
            full[GATHERED] = numel(self.ids)
        if self.arrangement.scales == SWIZZLED and self.n % TILE_ROWS:
            full[PADDED_ROWS] = tiles(self.n, 1)[0] * TILE_ROWS
        return {name: Symbol(name, size) for name, size in full.items() if size > 1}

    def leaf_shapes(self) -> dict[fx.Node, Shape]:
        """The symbolic shape of every leaf.

        Raises:
            NotRescalableError: a leaf's shape does not keep the order of its bytes.
        """
        symbols = self.symbols()
        lead = tuple((symbols[EXPERTS],) if size > 1 else () for size in self.lead)
        shapes = {self.codes: self._codes_shape(lead, symbols), self.scale: self._scale_shape(lead, symbols)}
        if self.global_scale is not None:
            sizes = value(self.global_scale).shape
            shapes[self.global_scale] = tuple(lead[0] if size == self.experts and size > 1 else () for size in sizes)
        if self.ids is not None:
            gathered: Dim = (symbols[GATHERED],) if GATHERED in symbols else ()
            ids = value(self.ids)
            shapes[self.ids] = (gathered,) if ids.dim() == 1 else tuple(plain(int(concrete(s))) for s in ids.shape)
        for node, tensor in self.tables:
            shapes[node] = tuple(plain(size) for size in tensor.shape)
        return shapes

    def part(self, cone: Cone) -> Part:
        """The cone as something that can be run again. Raises as `leaf_shapes`."""
        columns = frozenset((self.k, self.k // 2, self.k // 8, self.k // self.arrangement.group, 2, 4, 8, 16))
        return Part(cone.nodes, cone.root, self.leaf_shapes(), list(self.symbols().values()), columns)

    def _codes_shape(self, lead: Shape, symbols: Mapping[str, Symbol]) -> Shape:
        tensor = value(self.codes)
        rows: Dim = (symbols[ROWS],) if ROWS in symbols else ()
        columns = plain(self.k // 2 // tensor.element_size())
        order = (rows, columns) if self.arrangement.codes == LINEAR else (columns, rows)
        return reshape((*lead, *order), list(tensor.shape))

    def _scale_shape(self, lead: Shape, symbols: Mapping[str, Symbol]) -> Shape:
        rows: Dim = (symbols[ROWS],) if ROWS in symbols else ()
        groups = self.k // self.arrangement.group
        order: Shape = (rows, plain(groups))
        if self.arrangement.scales == TRANSPOSED:
            order = (plain(groups), rows)
        elif self.arrangement.scales == SWIZZLED:
            tall, wide = tiles(self.n, groups)
            padded = PADDED_ROWS if PADDED_ROWS in symbols else ROWS
            one_below_the_other: Dim = (Symbol(padded, tall * TILE_ROWS, TILE_ROWS),) if tall > 1 else ()
            order = (one_below_the_other, plain(wide * TILE_ROWS * TILE_GROUPS))
        return reshape((*lead, *order), list(value(self.scale).shape))


def numel(node: fx.Node) -> int:
    """The number of elements, as traced."""
    return math.prod(int(concrete(size)) for size in value(node).shape)


def _bytes(node: fx.Node) -> int:
    return numel(node) * value(node).element_size()


def assign(cone: Cone, codes: fx.Node, inputs: Inputs) -> list[Roles] | Refusal:
    """Every way to give all leaves a role that their shapes allow, the likeliest first, or which leaf has none."""
    if len(cone.ids) > 1:
        return Refusal(Reason.IDS, ", ".join(str(n) for n in cone.ids))
    if (size := size_of_the_call(cone)) is not None:
        return Refusal(Reason.ACTIVATION, f"a size of the call, {size}")
    tensor = value(codes)
    scale = scale_leaf(cone, codes)
    if not cone.ids and value(cone.root).numel() == _bytes(codes):
        return Refusal(Reason.EIGHT_BIT, f"{tensor.dtype}, {list(tensor.shape)}")
    if scale is None:
        return Refusal(Reason.NO_SCALES, f"inputs of the weight: {', '.join(leaf.name for leaf in cone.leaves)}")
    if not (tensor.is_contiguous() and value(scale).is_contiguous()):
        return Refusal(Reason.STRIDED, f"codes {tensor.stride()}, scales {value(scale).stride()}")
    stored = list(_stored(cone, codes, scale))
    if cone.ids and (tensor.dim() == 2 or (stored and all(s.experts is None for s in stored))):
        return Refusal(Reason.ROWS_PICKED, f"by {cone.ids[0].name}")
    if not stored:
        return Refusal(Reason.GROUPS, _unexpected_scales(codes, scale))
    global_scale, tables = None, []
    for leaf in cone.leaves:
        if leaf in (codes, scale):
            continue
        found = value(leaf)
        if found is None or leaf.op == "call_function":
            return Refusal(Reason.ACTIVATION, f"{leaf.name}")
        if global_scale is None and any(_is_global(cone, leaf, s.experts) for s in stored):
            global_scale = leaf
            continue
        refusal = _table_refusal(leaf, found, inputs)
        if refusal is not None:
            return refusal
        tables.append((leaf, inputs.table(leaf)))
    ids = cone.ids[0] if cone.ids else None
    return [Roles(codes, scale, global_scale, ids, tuple(tables), s.n, s.k, s.experts, s.arrangement) for s in stored]


def size_of_the_call(cone: Cone) -> str | None:
    """A size that may be another in the next call and takes part, other than as the number of gathered rows in a shape:
    a run at the traced sizes would not show what it does."""
    gathered = {str(size) for ids in cone.ids for size in value(ids).shape}
    read = ((str(size.meta["val"]), computed) for node in cone.nodes for size, computed in varying_sizes(node))
    return next((size for size, computed in read if computed or size not in gathered), None)


@dataclass(frozen=True)
class _Stored:
    """The sizes and the order that codes and scales of some shapes may have."""

    experts: int | None
    n: int
    k: int
    arrangement: Arrangement


def _stored(cone: Cone, codes: fx.Node, scale: fx.Node) -> Iterator[_Stored]:
    """Readings that account for every byte, those first in which the scales' shape says how they lie."""
    readings = list(dict.fromkeys(_sizes(cone, codes)))
    shape = [int(size) for size in value(scale).shape if size != 1]
    for exact in (True, False):
        for experts, n, k, order in readings:
            lead = [experts or 1]
            rows, held = lead[0] * n, numel(scale)
            groups = held // rows
            if held == rows * groups and groups and k % groups == 0 and (k // groups) % GROUP == 0:
                as_is = [size for size in (*lead, n, groups) if size != 1]
                turned = [size for size in (*lead, groups, n) if size != 1]
                if exact == (shape == as_is):
                    yield _Stored(experts, n, k, Arrangement(order, LINEAR, k // groups))
                if exact and shape == turned and min(n, groups) > 1:
                    yield _Stored(experts, n, k, Arrangement(order, TRANSPOSED, k // groups))
            tall, wide = tiles(n, k // GROUP)
            if exact and k % GROUP == 0 and held == lead[0] * tall * wide * TILE_ROWS * TILE_GROUPS:
                yield _Stored(experts, n, k, Arrangement(order, SWIZZLED))


def _sizes(cone: Cone, codes: fx.Node) -> Iterator[tuple[int | None, int, int, str]]:
    """(experts, N, K, order of the codes): by the codes' own shape, and by the shape of the weight."""
    tensor = value(codes)
    shape, width = [int(size) for size in tensor.shape], tensor.element_size()
    if len(shape) in (2, 3):
        experts = shape[0] if len(shape) == 3 else None
        yield experts, shape[-2], 2 * width * shape[-1], LINEAR
        if width == 1:
            yield experts, shape[-1], 2 * shape[-2], TRANSPOSED
    weight = [int(concrete(size)) for size in value(cone.root).shape]
    if len(weight) not in (2, 3):
        return
    for n, k in (weight[-2:], weight[:-3:-1]):
        matrices, rest = divmod(2 * _bytes(codes), max(n * k, 1))
        if not rest:
            yield matrices if cone.ids or (len(weight) == 3 and weight[0] > 1) else None, n, k, LINEAR


def _unexpected_scales(codes: fx.Node, scale: fx.Node) -> str:
    *lead, half = value(codes).shape
    want = [*lead, 2 * half * value(codes).element_size() // GROUP]
    return f"block scales {list(value(scale).shape)}, expected {want} for codes {list(value(codes).shape)}"


def _is_global(cone: Cone, leaf: fx.Node, experts: int | None) -> bool:
    """One float of the inputs, or one an expert, that only expert ids pick from, as nobody does from a table."""
    tensor = value(leaf)
    return (
        leaf.op == "placeholder"
        and tensor.dtype in _FLOATS
        and tensor.numel() in (1, experts)
        and not _is_looked_up(cone, leaf)
    )


def _is_looked_up(cone: Cone, leaf: fx.Node) -> bool:
    """Whether the codes pick entries of the leaf, as it is or after a cast or a view."""
    derived = {leaf}
    for node in cone.nodes:
        if node.target in GATHERS:
            source, index = node.args[0], node.args[-1]
            picked_by = index[0] if isinstance(index, (list, tuple)) else index
            if source in derived and picked_by not in cone.ids:
                return True
        inputs = node.all_input_nodes
        if not derived.isdisjoint(inputs) and all(n in derived or n in cone.ids for n in inputs):
            derived.add(node)
    return False


def scale_leaf(cone: Cone, codes: fx.Node) -> fx.Node | None:
    """The largest other tensor of bytes: E4M3, or uint8 and not far too few."""

    def is_scale(leaf: fx.Node) -> bool:
        tensor = value(leaf)
        if leaf is codes or tensor is None or tensor.dim() == 0:
            return False
        if tensor.dtype == torch.uint8:
            return 8 * _LARGEST_GROUP // GROUP * numel(leaf) >= _bytes(codes)
        return tensor.dtype == torch.float8_e4m3fn

    return max(filter(is_scale, cone.leaves), key=numel, default=None)


def _table_refusal(leaf: fx.Node, tensor: torch.Tensor, inputs: Inputs) -> Refusal | None:
    shown = f"{leaf.name}: {tensor.dtype}, {list(tensor.shape)}"
    if not inputs.is_constant(leaf):
        looks_like_table = numel(leaf) in TABLE_SIZES
        return Refusal(Reason.TABLE_CHANGES if looks_like_table else Reason.ACTIVATION, shown)
    if tensor.numel() * tensor.element_size() > TABLE_BYTES:
        return Refusal(Reason.WRONG_VALUES, f"a further tensor takes part: {shown}")
    return Refusal(Reason.TABLE_UNKNOWN, shown) if inputs.table(leaf) is None else None
