"""The proofs for products in FP8: a weight is E4M3 with one scale, an activation is rounded by a static scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fp4pass.lowering.fp8 import rounded
from fp4pass.lowering.reference import decode_scale
from fp4pass.match.cone import CODE_DTYPES, Cone, extract, value
from fp4pass.match.dims import Symbol, plain
from fp4pass.match.proof import BYTES_A_WEIGHT, FULL_RUN_BYTES
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import CANNOT_RUN, Part, Replay
from fp4pass.match.roles import size_of_the_call
from fp4pass.match.shapes import ROWS, Sizes
from fp4pass.match.structure import Memo, structure

prims = torch.ops.prims

_FINITE = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
_ELEMENTS = 4096  # among so many random bytes each of the 254 finite ones is there
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_VERDICTS = Memo()
_EXACT_SCALES, _OTHER_SCALES = (0.0625, 4.0), (0.0371, 1.7)


@dataclass(frozen=True)
class FP8Weight:
    """``e4m3(codes) * scale``, codes ``[N, K]``. ``transposed``: the operand of the product is its transpose."""

    codes: fx.Node
    scale: fx.Node | None
    transposed: bool


@dataclass(frozen=True)
class Rounded:
    """An activation that is ``source``, rounded to E4M3 by ``scale`` and scaled back."""

    source: fx.Node
    scale: fx.Node


def prove_weight(root: fx.Node, codes: fx.Node) -> FP8Weight | Refusal:
    """Prove that ``root`` is an E4M3 weight in one byte an element, or say why it is not taken for one.

    Run on random bytes at two numbers of rows, with scales that are powers of two (then every step is exact) and with
    one that is not.
    """
    cone = extract(root, set())
    others = [leaf for leaf in cone.leaves if leaf is not codes]
    if value(codes).dtype not in CODE_DTYPES or value(codes).dim() != 2:
        return Refusal(Reason.EIGHT_BIT, f"{value(codes).dtype}, {list(value(codes).shape)}")
    if len(others) > 1 or not all(is_one_number(leaf) for leaf in others):
        names = ", ".join(leaf.name for leaf in cone.leaves)
        return Refusal(Reason.EIGHT_BIT, f"expected bytes and one scale, found {names}")
    if (size := size_of_the_call(cone)) is not None:
        return Refusal(Reason.ACTIVATION, f"a size of the call, {size}")
    scale = others[0] if others else None
    key = (structure((codes, *others), cone.nodes), "weight")
    verdict = _VERDICTS(key, lambda: _read(cone, codes, scale))
    return verdict if isinstance(verdict, Refusal) else FP8Weight(codes, scale, transposed=verdict)


def _read(cone: Cone, codes: fx.Node, scale: fx.Node | None) -> bool | Refusal:
    """Whether the cone gives the transpose of the decoded bytes, or why neither that nor these."""
    try:
        replay = Replay(_part(cone, codes, scale))
        if replay.why_full and value(codes).numel() * BYTES_A_WEIGHT > FULL_RUN_BYTES:
            return Refusal(Reason.TOO_LARGE, replay.why_full)
        for turned in (False, True):
            if all(_is_decoded(replay, codes, scale, sizes, by, turned) for sizes, by in _runs(replay, codes)):
                return turned
    except CANNOT_RUN as error:
        return Refusal(Reason.UNKNOWN_OP, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return Refusal(Reason.EIGHT_BIT, "its values are others")


def is_one_number(node: fx.Node) -> bool:
    """Whether a node gives a tensor with a single element, of a float dtype."""
    tensor = value(node)
    return tensor is not None and tensor.is_floating_point() and all(size == 1 for size in _known(tensor))


def _known(tensor: torch.Tensor) -> list[int]:
    """The sizes, 0 for those that are not known: to ask for these would put a guard on them."""
    return [size if isinstance(size, int) else 0 for size in tensor.shape]


def _part(cone: Cone, codes: fx.Node, scale: fx.Node | None) -> Part:
    n, k = value(codes).shape
    symbols = [Symbol(ROWS, n)] if n > 1 else []
    shapes = {codes: (tuple(symbols), plain(k))}
    if scale is not None:
        shapes[scale] = tuple(() for _ in value(scale).shape)
    return Part(cone.nodes, cone.root, shapes, symbols, frozenset((k,)))


def _runs(replay: Replay, codes: fx.Node) -> Iterator[tuple[Sizes | None, float]]:
    """Sizes and scales to try."""
    _, k = value(codes).shape
    needs = replay.needs.get(ROWS, 1)
    rows = -(-_ELEMENTS // (k * needs)) + 2
    for at, scale in enumerate((*_EXACT_SCALES, _OTHER_SCALES[0])):
        yield None if replay.why_full else {ROWS: (rows + at % 2) * needs}, scale


def _is_decoded(
    replay: Replay, codes: fx.Node, scale: fx.Node | None, sizes: Sizes | None, by: float, turned: bool
) -> bool:
    tensor = value(codes)
    n, k = tensor.shape
    rows = n if sizes is None or n == 1 else sizes[ROWS]
    picks = torch.randint(0, len(_FINITE), (rows, k), generator=torch.Generator().manual_seed(0xE4E3))
    wanted = decode_scale(_FINITE[picks], torch.float64)
    leaves = {codes: _FINITE[picks].view(tensor.dtype)}
    if scale is not None:
        leaves[scale] = torch.full(value(scale).shape, by, dtype=value(scale).dtype)
        wanted = wanted * leaves[scale].double().item()
    found = replay(leaves, sizes).double()
    found = found.mT if turned and found.dim() == 2 else found
    if found.shape != wanted.shape:
        return False
    return torch.equal(found, wanted) if by in _EXACT_SCALES else torch.allclose(found, wanted, rtol=2**-7, atol=0)


def rounded_from(root: fx.Node) -> Rounded | None:
    """What ``root`` is rounded from, if it is an activation in E4M3 by a static scale, decoded again.

    Every bfloat16 number is tried, or every float16 one; where the scale is no power of two, a division may be written
    as a product and round one number in a thousand to the other side.
    """
    # From afar: where a cast comes first, what stands before it is meant.
    for cone, source in reversed(list(_chain(root))):
        (scale,) = (leaf for leaf in cone.leaves if leaf is not source)
        key = (structure((source, scale), cone.nodes), "rounding")
        if _VERDICTS(key, lambda found=(cone, source, scale): _is_rounding(*found)):
            return Rounded(source, scale)
    return None


def _chain(root: fx.Node) -> Iterator[tuple[Cone, fx.Node]]:
    """Going back from ``root`` by elementwise operations on one tensor: each float before the cast to E4M3, and the
    cone from it and one scale to ``root``."""
    path: list[fx.Node] = []
    numbers: list[fx.Node] = []
    node, in_fp8 = root, False
    while _is_elementwise(node):
        numbers += [each for each in node.all_input_nodes if is_one_number(each)]
        tensors = [each for each in node.all_input_nodes if not is_one_number(each)]
        if len(tensors) != 1 or value(tensors[0]) is None:
            break
        in_fp8 |= value(node).dtype == torch.float8_e4m3fn
        path.append(node)
        node = tensors[0]
        cones = [extract(number, set()) for number in numbers]
        scales = {leaf for cone in cones for leaf in cone.leaves}
        if not all(is_one_number(scale) and scale.op == "placeholder" for scale in scales):
            break
        if in_fp8 and len(scales) == 1 and value(node).dtype in _FLOATS:
            nodes = dict.fromkeys((*(n for cone in cones for n in cone.nodes), *reversed(path)))
            yield Cone(root, tuple(nodes), (node, *scales), ()), node


def _is_elementwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target is prims.convert_element_type.default


def _is_rounding(cone: Cone, source: fx.Node, scale: fx.Node) -> bool:
    """Whether the cone rounds as `fp4pass.lowering.fp8.rounded` does."""
    numbers = _every_number(value(source).dtype)
    shapes = {leaf: tuple(() for _ in value(leaf).shape) for leaf in (source, scale)}
    replay = Replay(Part(cone.nodes, cone.root, shapes, []))
    for by in (*_EXACT_SCALES, *_OTHER_SCALES):
        factor = torch.full(value(scale).shape, by, dtype=value(scale).dtype)
        exact = factor.float().reshape(())
        wanted = (rounded(numbers, exact).float() * exact).to(value(cone.root).dtype)
        try:
            found = replay({source: numbers, scale: factor}, None)
        except CANNOT_RUN:
            return False
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return False
        allowed = 0 if by in _EXACT_SCALES else len(numbers) // 1000
        if int((found != wanted).sum()) > allowed:
            return False
    return True


def _every_number(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit dtype; for float32 those of bfloat16."""
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(half)
    return numbers[numbers.isfinite()].to(dtype)
