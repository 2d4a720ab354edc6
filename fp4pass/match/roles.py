"""Which leaf of a cone is what: codes, block scales, global scale, expert ids, decode tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from fp4pass.match.cone import GATHERS, Cone, holds_codes, value
from fp4pass.match.dims import Dim, Shape, Symbol, merge, plain
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import Part
from fp4pass.match.shapes import EXPERTS, GATHERED, ROWS, concrete

GROUP = 16
TABLE_BYTES = 4096
TABLE_SIZES = (8, 16, 256, 512)  # magnitudes, codes, bytes, and the two codes of each byte
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(Protocol):
    """What the caller of the match knows of the graph's inputs and constants."""

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the tensor belongs to the model (parameter, buffer, constant), not to the call."""

    def table(self, node: fx.Node) -> torch.Tensor | None:
        """The values of a small constant, where they are known and part of the cache key."""


@dataclass(frozen=True)
class Roles:
    """The leaves of one quantized weight, N x K, of ``experts`` experts (None: a single matrix)."""

    codes: fx.Node
    scale: fx.Node
    global_scale: fx.Node | None
    ids: fx.Node | None
    tables: tuple[tuple[fx.Node, torch.Tensor], ...]
    n: int
    k: int
    experts: int | None

    def symbols(self) -> dict[str, Symbol]:
        """The sizes that a scaled run may change. A size of 1 says nothing and stays."""
        full = {ROWS: self.n, EXPERTS: self.experts or 1}
        if self.ids is not None:
            full[GATHERED] = _numel(self.ids)
        return {name: Symbol(name, size) for name, size in full.items() if size > 1}

    def leaf_shapes(self) -> dict[fx.Node, Shape]:
        """The symbolic shape of every leaf.

        Raises:
            ScaleShapeError: no known arrangement of block scales has the scale tensor's shape.
        """
        symbols = self.symbols()
        rows: Dim = (symbols[ROWS],) if ROWS in symbols else ()
        lead: Shape = () if self.experts is None else ((symbols[EXPERTS],) if EXPERTS in symbols else (),)
        shapes = {self.codes: (*lead, rows, plain(self.k // 2)), self.scale: self._scale_shape(lead, rows)}
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
        columns = frozenset((self.k, self.k // 2, self.k // GROUP, 2, 4, 8, 16))
        return Part(cone.nodes, cone.root, self.leaf_shapes(), list(self.symbols().values()), columns)

    def _scale_shape(self, lead: Shape, rows: Dim) -> Shape:
        groups = self.k // GROUP
        found = tuple(value(self.scale).shape)
        experts = () if self.experts is None else (self.experts,)
        if found == (*experts, self.n, groups):
            return (*lead, rows, plain(groups))
        if found == (*experts, groups, self.n):
            return (*lead, plain(groups), rows)
        if found == (self.n * groups,) and self.experts is None:
            return (merge((*rows, groups)),)
        if self.experts is None and self.n % 128 == 0 and found == (self.n // 128 * 32, groups // 4 * 16):
            return (merge((Symbol(ROWS, self.n, 128), 32)), plain(found[1]))
        want = [*experts, self.n, groups]
        raise ScaleShapeError(f"block scales {list(found)}, expected {want} for codes {list(value(self.codes).shape)}")


class ScaleShapeError(Exception):
    """The scale tensor has a shape that no known arrangement gives."""


def _numel(node: fx.Node) -> int:
    total = 1
    for size in value(node).shape:
        total *= int(concrete(size))
    return total


def assign(cone: Cone, inputs: Inputs) -> Roles | Refusal:
    """Give every leaf its role, or say which leaf has none."""
    if len(cone.ids) > 1:
        return Refusal(Reason.IDS, ", ".join(str(n) for n in cone.ids))
    codes = max((n for n in cone.leaves if holds_codes(n)), key=_numel)
    tensor = value(codes)
    scale = _scale_leaf(cone, codes)
    if not cone.ids and value(cone.root).numel() == tensor.numel():
        return Refusal(Reason.EIGHT_BIT, f"{tensor.dtype}, {list(tensor.shape)}")
    if scale is None:
        return Refusal(Reason.NO_SCALES, f"inputs of the weight: {', '.join(leaf.name for leaf in cone.leaves)}")
    if cone.ids and tensor.dim() != 3:
        return Refusal(Reason.ROWS_PICKED, f"by {cone.ids[0].name}")
    if not (tensor.is_contiguous() and value(scale).is_contiguous()):
        return Refusal(Reason.STRIDED, f"codes {tensor.stride()}, scales {value(scale).stride()}")
    if tensor.dim() > 3:
        return Refusal(Reason.UNKNOWN_OP, f"codes of {tensor.dim()} dimensions")
    experts = tensor.shape[0] if tensor.dim() == 3 else None
    global_scale, tables = None, []
    for leaf in cone.leaves:
        if leaf in (codes, scale):
            continue
        found = value(leaf)
        if found is None or leaf.op == "call_function":
            return Refusal(Reason.ACTIVATION, f"{leaf.name}")
        if global_scale is None and _is_global(cone, leaf, experts):
            global_scale = leaf
            continue
        refusal = _table_refusal(leaf, found, inputs)
        if refusal is not None:
            return refusal
        tables.append((leaf, inputs.table(leaf)))
    ids = cone.ids[0] if cone.ids else None
    return Roles(codes, scale, global_scale, ids, tuple(tables), tensor.shape[-2], 2 * tensor.shape[-1], experts)


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
        if set(node.all_input_nodes) <= derived | set(cone.ids):
            derived.add(node)
    return False


def _scale_leaf(cone: Cone, codes: fx.Node) -> fx.Node | None:
    """The largest other tensor of bytes: E4M3, or uint8 of an eighth of the codes' number."""

    def is_scale(leaf: fx.Node) -> bool:
        tensor = value(leaf)
        if leaf is codes or tensor is None or tensor.dim() == 0:
            return False
        if tensor.dtype == torch.uint8:
            return 8 * _numel(leaf) >= _numel(codes)
        return tensor.dtype == torch.float8_e4m3fn

    return max(filter(is_scale, cone.leaves), key=_numel, default=None)


def _table_refusal(leaf: fx.Node, tensor: torch.Tensor, inputs: Inputs) -> Refusal | None:
    shown = f"{leaf.name}: {tensor.dtype}, {list(tensor.shape)}"
    if not inputs.is_constant(leaf):
        looks_like_table = _numel(leaf) in TABLE_SIZES
        return Refusal(Reason.TABLE_CHANGES if looks_like_table else Reason.ACTIVATION, shown)
    if tensor.numel() * tensor.element_size() > TABLE_BYTES:
        return Refusal(Reason.WRONG_VALUES, f"a further tensor takes part: {shown}")
    return Refusal(Reason.TABLE_UNKNOWN, shown) if inputs.table(leaf) is None else None
