"""Quantizers of activations that a graph spells out in plain operations, found by what they compute.

Nothing is matched by form. Between the operand of a product and a node that everything before passes through, the graph
is run on values that NVFP4 holds exactly: a quantizer leaves these as they are, and puts values that lie near them onto
them. Nothing else does both, and then the node is what was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.lowering.reference import GROUP, decode_codes, decode_scale
from fp4pass.match.anchors import is_product
from fp4pass.match.cone import Inputs, sizes_computed_with, value
from fp4pass.match.replay import CANNOT_RUN, Part, Replay
from fp4pass.match.shapes import concrete
from fp4pass.match.structure import Memo, structure
from fp4pass.passes.rewriter import ACTIVATION_DTYPES
from fp4pass.passes.unfuse.emit import emit
from fp4pass.passes.unfuse.twins import row_major

MOST_NODES, MOST_ELEMENTS = 400, 1 << 22
_NEAR = 2.0**-4  # an eighth of the smallest step between E2M1 values, and exact in bfloat16 beside any of them
_FAR = 10  # a power of two at which float16 still holds all of the values
_VERDICTS = Memo()


@dataclass(frozen=True)
class Written:
    """``source`` was multiplied by a factor and rounded to FP4: ``scalar``, or its reciprocal, or 1 if that is None."""

    source: fx.Node
    scalar: fx.Node | None
    inverse: bool

    def factor(self, at: fx.Node) -> fx.Node | None:
        """The factor as a node before ``at``, in float32."""
        if self.scalar is None:
            return None
        if not self.inverse:
            return self.scalar
        return emit(at, lambda scalar: scalar.float().reciprocal(), self.scalar)


def find_written_out(codes: fx.Node, scale: fx.Node, inputs: Inputs) -> Written | None:
    """What the operand ``codes [M, K/2]`` with block scales ``scale`` was quantized from; None if that is not shown.

    Gives up on more than ``MOST_NODES`` operations or ``MOST_ELEMENTS`` values.
    """
    columns = 2 * value(codes).shape[-1]

    def verdict(region: Region) -> tuple[int, bool] | None:
        return _factor_of(region, lambda leaves: _decoded(region, codes, scale, leaves), columns)

    with _torch.real_tensors(), torch.no_grad():
        for region in _regions([codes, scale], columns, inputs):
            found = _VERDICTS(("codes", *region.key), lambda r=region: verdict(r))
            if found is not None:
                position, inverse = found
                return Written(region.source, region.scalars[position] if position >= 0 else None, inverse)
    return None


def find_round_trip(quantized: fx.Node, inputs: Inputs) -> fx.Node | None:
    """What ``quantized`` was before it was rounded to FP4 and back, in the same units; None if it was not."""
    columns = value(quantized).shape[-1]

    def verdict(region: Region) -> bool:
        return _is_round_trip(region, lambda leaves: region.run(quantized, leaves), columns)

    with _torch.real_tensors(), torch.no_grad():
        for region in _regions([quantized], columns, inputs):
            if _VERDICTS(("round trip", *region.key), lambda r=region: verdict(r)):
                return region.source
    return None


@dataclass(frozen=True)
class Region:
    """The operations between ``source`` and some results, and the other values that they start from."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    scalars: tuple[fx.Node, ...]
    tables: Mapping[fx.Node, torch.Tensor]
    fixed: tuple[fx.Node, ...]

    @property
    def key(self) -> tuple:
        """What a verdict depends on."""
        tables = tuple(str(table.tolist()) for table in self.tables.values())
        return structure((self.source, *self.fixed, *self.tables), self.nodes), tables

    def run(self, result: fx.Node, leaves: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        """``result`` on the given leaves, at the traced sizes."""
        shapes = {node: tuple((int(n),) for n in each.shape) for node, each in leaves.items()}
        return Replay(Part(self.nodes, result, shapes, ()))(leaves, None)

    def leaves(self, source: torch.Tensor, power: int) -> dict[fx.Node, torch.Tensor]:
        """Values for all leaves: every static scale is ``2 ** power``."""
        like = value(self.source)
        shape = [int(concrete(size)) for size in like.shape]
        given = {self.source: source.reshape(shape).to(like.dtype), **self.tables}
        for node in self.fixed:
            given[node] = torch.full(value(node).shape, 2.0**power, dtype=value(node).dtype)
        return given


def _regions(results: Sequence[fx.Node], columns: int, inputs: Inputs) -> Iterator[Region]:
    """Every part of the graph that ends in ``results`` and has one activation to start from, the smallest first."""
    behind = _walk_back(results)
    if len(behind) > MOST_NODES or not any(casts_to_e4m3(node) for node in behind):
        return
    for source in sorted(behind, reverse=True):
        tensor = value(source)
        if source in results or tensor is None or tensor.dtype not in ACTIVATION_DTYPES:
            continue
        if tensor.dim() == 0 or _count(source) % columns or _count(source) > MOST_ELEMENTS:
            continue
        region = _between(source, results, inputs)
        if region is not None and any(map(casts_to_e4m3, region.nodes)):
            yield region


def _count(node: fx.Node) -> int:
    """How many elements there are, without a guard on a size that varies."""
    return math.prod(int(concrete(size)) for size in value(node).shape)


def casts_to_e4m3(node: fx.Node) -> bool:
    """Whether ``node`` computes E4M3 values, as quantizing to NVFP4 must for its block scales."""
    tensor = value(node)
    return node.op == "call_function" and tensor is not None and tensor.dtype == torch.float8_e4m3fn


def _walk_back(results: Sequence[fx.Node], source: fx.Node | None = None) -> set[fx.Node]:
    """Everything that the results are computed from, back to ``source``, inputs, products and operations of other
    libraries, these among it. Soon after more than ``MOST_NODES`` it is no longer everything."""
    seen: set[fx.Node] = set()
    stack = list(results)
    while stack and len(seen) <= MOST_NODES:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node is not source and not _is_end(node) and not _is_size(node):
                stack.extend(node.all_input_nodes)
    return seen


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _is_end(node: fx.Node) -> bool:
    if node.op != "call_function" or is_product(node):
        return True
    namespace = getattr(node.target, "namespace", None)
    return namespace not in (None, "aten", "prims")


def _between(source: fx.Node, results: Sequence[fx.Node], inputs: Inputs) -> Region | None:
    """The region from ``source`` to the results, if besides there are only single values and tables of the model."""
    walked = _walk_back(results, source)
    if source not in walked:
        return None
    nodes, fixed, tables = [], [], {}
    for node in sorted(walked - {source}):
        if _is_size(node):
            continue
        if sizes_computed_with(node):
            return None
        if not _is_end(node):
            nodes.append(node)
        elif (table := inputs.table(node)) is not None:
            tables[node] = table
        elif _is_scalar(node):
            fixed.append(node)
        else:
            return None
    scalars = [node for node in (*fixed, *nodes) if _is_scalar(node)]
    return Region(source, tuple(nodes), tuple(scalars), tables, tuple(fixed))


def _is_scalar(node: fx.Node) -> bool:
    return value(node) is not None and value(node).dtype in ACTIVATION_DTYPES and _count(node) == 1


# --- The values that it is tried on.


def _exact_values(count: int, columns: int, seed: int) -> torch.Tensor:
    """``[rows, columns]`` that NVFP4 holds exactly: E2M1 values, every block with a 6, times a power of two a block."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count // GROUP, GROUP // 2), generator=random, dtype=torch.uint8)
    values = decode_codes(codes)
    values[:, 0] = 6.0
    powers = torch.randint(-3, 4, (count // GROUP, 1), generator=random).float()
    powers[0] = 3  # one block has the largest of all, so that a factor found from the values is known
    return (values * torch.exp2(powers)).reshape(-1, columns)


def _near(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Values that round to the same: all but each block's largest moved by less than half a step."""
    random = torch.Generator().manual_seed(seed)
    blocks = values.reshape(-1, GROUP)
    power = blocks.abs().amax(-1, keepdim=True) / 6.0
    sign = torch.randint(0, 2, blocks.shape, generator=random) * 2.0 - 1.0
    moved = blocks + sign * power * _NEAR
    return torch.where(blocks.abs() == 6.0 * power, blocks, moved).reshape(values.shape)


Trial = tuple[torch.Tensor, list[dict[fx.Node, torch.Tensor]]]


def _trial(region: Region, columns: int, seed: int, reach: int, power: int) -> Trial:
    """Exact values, times ``2 ** reach``, and two sets of leaves that must both give them."""
    exact = _exact_values(_count(region.source), columns, seed) * 2.0**reach
    return exact, [region.leaves(exact, power), region.leaves(_near(exact, seed), power)]


def _trials(region: Region, columns: int) -> Iterator[Trial]:
    """Values with a factor of their own each, also where it is found from them; then some whose block scales come near
    to both ends that quantizers bound them by, 2^-6 and 448."""
    for seed, (reach, power) in enumerate(((-1, 0), (0, 2), (1, -1), (5, 0), (-3, 0))):
        yield _trial(region, columns, seed, reach, power)


def _far_trials(region: Region, columns: int) -> Iterator[list[Trial]]:
    """Large values and small ones, that would show a bound on what is given back, with the static scales to match:
    these multiply or divide, so either pair will do."""
    for way in (1, -1):
        yield [_trial(region, columns, 7, reach, -way * reach) for reach in (_FAR, -_FAR)]


Run = Callable[[Mapping[fx.Node, torch.Tensor]], torch.Tensor]


def _is_round_trip(region: Region, run: Run, columns: int) -> bool:
    def gives_back(trials: Iterable[Trial]) -> bool:
        pairs = ((exact, leaves) for exact, both in trials for leaves in both)
        return all(_close(run(leaves).double().reshape(exact.shape), exact) for exact, leaves in pairs)

    try:
        return gives_back(_trials(region, columns)) and any(map(gives_back, _far_trials(region, columns)))
    except CANNOT_RUN:
        return False


def _factor_of(region: Region, run: Run, columns: int) -> tuple[int, bool] | None:
    """Which scalar of the region, or whose reciprocal, the values were multiplied by; position -1 for none at all."""
    known: list[tuple[int, bool]] | None = None
    try:
        for exact, both in _trials(region, columns):
            found = [run(leaves).double().reshape(exact.shape) for leaves in both]
            ratio = found[0].flatten()[0] / exact.flatten()[0]
            if ratio == 0 or not all(_close(each, exact * ratio) for each in found):
                return None
            fits = _fitting(region, both[0], float(ratio))
            known = fits if known is None else [each for each in known if each in fits]
    except CANNOT_RUN:
        return None
    return known[0] if known else None


def _fitting(region: Region, leaves: Mapping[fx.Node, torch.Tensor], ratio: float) -> list[tuple[int, bool]]:
    fits = [(-1, False)] if abs(ratio - 1) < 1e-5 else []
    for i, node in enumerate(region.scalars):
        found = float(leaves[node] if node in leaves else region.run(node, leaves))
        for inverse, factor in ((False, found), (True, 1 / found if found else 0.0)):
            if abs(factor - ratio) <= 1e-5 * abs(ratio):
                fits.append((i, inverse))
    return fits


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.allclose(found, wanted.double(), rtol=1e-5, atol=0))


def _decoded(region: Region, codes: fx.Node, scale: fx.Node, leaves: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """Code x block scale, as the product reads both: scales in rows, or in 128x4 tiles."""
    packed = region.run(codes, leaves).view(torch.uint8)
    rows, half = packed.shape
    groups = 2 * half // GROUP
    scales = region.run(scale, leaves).view(torch.uint8)
    in_rows = row_major(scales, (rows, groups))
    return (decode_codes(packed).unflatten(-1, (-1, GROUP)) * decode_scale(in_rows).unsqueeze(-1)).flatten(-2)
