"""Sizes that keep the memory of where they come from.

A traced cone holds literal shapes: ``view(codes, [128, 8, 16])`` for a weight of 128 rows. To run it with fewer rows
one must know which literals count rows. Values do not tell (N may equal K), but order does: a reshape keeps the
row-major order of elements, so when every dimension is written as a sequence of factors, major to minor, the factors
of the output are those of the input, cut at other places. A `Dim` is that sequence; rows (N), experts (E) and gathered
rows (S) are symbols in it, everything else is a plain number. Symbols are never mixed with numbers by guessing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

LARGEST_TILE = 1024


class NotRescalableError(Exception):
    """The operation treats single rows or experts apart, so it can only be run at its full size."""


@dataclass(frozen=True)
class Symbol:
    """The size called ``name``, over ``divisor`` where a view has split tiles of that many off it."""

    name: str
    full: int
    divisor: int = 1

    @property
    def size(self) -> int:
        """Its size in the traced graph."""
        return self.full // self.divisor


Factor = int | Symbol
Dim = tuple[Factor, ...]
Shape = tuple[Dim, ...]


def size_of(dim: Iterable[Factor]) -> int:
    """The dimension's size in the traced graph."""
    size = 1
    for factor in dim:
        size *= factor.size if isinstance(factor, Symbol) else factor
    return size


def plain(size: int) -> Dim:
    """A dimension that does not scale."""
    return (size,) if size != 1 else ()


def is_plain(dim: Dim) -> bool:
    """Whether the dimension is a number alone."""
    return not any(isinstance(f, Symbol) for f in dim)


def scaled(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The dimension's size when each symbol has the given one."""
    size = 1
    for factor in dim:
        size *= sizes[factor.name] // factor.divisor if isinstance(factor, Symbol) else factor
    return size


def divisors(dims: Iterable[Dim]) -> dict[str, int]:
    """For each symbol, what its size must be a multiple of."""
    needed: dict[str, int] = {}
    for factor in (f for dim in dims for f in dim if isinstance(f, Symbol)):
        needed[factor.name] = math.lcm(needed.get(factor.name, 1), factor.divisor)
    return needed


def reshape(shape: Shape, literals: Sequence[int]) -> Shape:
    """The shape after a view to ``literals`` (one may be -1)."""
    total = math.prod(size_of(d) for d in shape)
    known = math.prod(size for size in literals if size != -1)
    queue = list(merge(f for dim in shape for f in dim))
    out = []
    for literal in literals:
        need = literal if literal != -1 else total // max(known, 1)
        dim: list[Factor] = []
        while need > 1:
            if not queue:
                raise NotRescalableError("a view to a larger size")
            need = _take(queue, need, dim)
        out.append(merge(dim))
    return tuple(out)


def _take(queue: list[Factor], need: int, dim: list[Factor]) -> int:
    """Move what fits of the first factor into ``dim``; return what is still needed. The queue stays merged."""
    head = queue.pop(0)
    size = head.size if isinstance(head, Symbol) else head
    if need % size == 0:
        dim.append(head)
        return need // size
    if size % need:
        raise NotRescalableError("a view that cuts across rows")
    rest = size // need
    if isinstance(head, int):
        dim.append(need)
        queue[:] = merge((rest, *queue))
    elif rest <= LARGEST_TILE:  # [N / tile, tile]: the major part still counts rows
        dim.append(Symbol(head.name, head.full, head.divisor * rest))
        queue[:] = merge((rest, *queue))
    else:  # [parts, N / parts]
        dim.append(need)
        queue[:] = merge((Symbol(head.name, head.full, head.divisor * need), *queue))
    return 1


def merge(dim: Iterable[Factor]) -> Dim:
    """Neighbouring numbers as one, and tiles put back to the symbol that they were split off."""
    out: list[Factor] = []
    for factor in dim:
        if factor == 1:
            continue
        if out and isinstance(factor, int) and isinstance(out[-1], int):
            factor *= out.pop()
        if out and isinstance(factor, int) and isinstance(out[-1], Symbol) and factor % out[-1].divisor == 0:
            symbol = out.pop()
            out.append(replace(symbol, divisor=1))
            factor //= symbol.divisor
        if factor != 1:
            out.append(factor)
    return tuple(out)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of a pointwise operation on tensors of these shapes."""
    shapes = [shape for shape in shapes if shape]
    if not shapes:
        return ()
    if shapes.count(shapes[0]) == len(shapes):  # as nearly always
        return shapes[0]
    rank = max(map(len, shapes))
    out: list[Dim] = []
    for position in range(-rank, 0):
        dims = {s[position] for s in shapes if len(s) >= -position and s[position]}
        if len(dims) > 1:
            raise NotRescalableError("rows meet a constant of the same size")
        out.append(dims.pop() if dims else ())
    return tuple(out)


def last_resized(shape: Shape, old_bytes: int, new_bytes: int) -> Shape:
    """The shape after a view as a dtype of another width."""
    if new_bytes == old_bytes:
        return shape
    *lead, last = shape
    if new_bytes < old_bytes:
        return (*lead, merge((*last, old_bytes // new_bytes)))
    ratio = new_bytes // old_bytes
    if not last or not isinstance(last[-1], int) or last[-1] % ratio:
        raise NotRescalableError("a dtype view that joins elements of different rows")
    return (*lead, merge((*last[:-1], last[-1] // ratio)))
