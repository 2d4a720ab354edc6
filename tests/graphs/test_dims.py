"""The algebra of sizes: views keep row-major order, and what they do to a symbol holds at every size of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pass.match import dims
from fp4pass.match.dims import LARGEST_TILE, NotRescalableError, Symbol

N, E = Symbol("N", 48), Symbol("E", 3)
WIDTH = 40
SHAPE = (E,), (N,), (WIDTH,)
TINY = {"E": 2, "N": 5}


def sizes(shape, at):
    return [dims.scaled(dim, at) for dim in shape]


@pytest.mark.parametrize(
    "literals, scaled",
    [
        ((3, 48, 40), (2, 5, 40)),
        ((-1, 40), (10, 40)),
        ((144, 40), (10, 40)),
        ((3, 1920), (2, 200)),
        ((5760,), (400,)),
        ((3, 48, 5, 8), (2, 5, 5, 8)),
        ((3, 48, -1, 2, 4), (2, 5, 5, 2, 4)),
        ((3, 1, 48, 1, 40, 1), (2, 1, 5, 1, 40, 1)),
        ((3, 240, 8), (2, 25, 8)),
        ((720, -1), (50, 8)),
    ],
)
def test_a_view_scales_with_its_symbols(literals, scaled):
    shape = dims.reshape(SHAPE, literals)
    assert math.prod(map(dims.size_of, shape)) == 3 * 48 * 40
    assert sizes(shape, TINY) == list(scaled)


@pytest.mark.parametrize("literals", [(40, 144), (3, 32, 60), (7, -1), (2, 72, 40), (3, 48, 80)])
def test_a_view_that_cuts_across_rows_is_refused(literals):
    with pytest.raises(NotRescalableError):
        dims.reshape(SHAPE, literals)


def test_equal_sizes_are_told_apart_by_their_order():
    square = (Symbol("N", 64),), (64,)
    rows_first = dims.reshape(dims.reshape(square, (4096,)), (64, 64))
    assert sizes(rows_first, {"N": 5}) == [5, 64]
    # Columns ahead of rows, as after a transpose.
    columns_first = dims.reshape(dims.reshape(square[::-1], (-1,)), (64, 8, 8))
    assert sizes(columns_first, {"N": 8}) == [64, 1, 8]
    assert dims.divisors(columns_first) == {"N": 8}


def test_tiles_split_off_rows_are_kept_whole():
    tiles = dims.reshape(((Symbol("N", 384),), (4,)), (3, 32, 4, 4))
    assert tiles == ((Symbol("N", 384, 128),), (32,), (4,), (4,))
    assert dims.divisors(tiles) == {"N": 128}
    assert sizes(tiles, {"N": 256}) == [2, 32, 4, 4]
    assert sizes(dims.reshape(tiles, (384, 4)), {"N": 256}) == [256, 4]


def test_units_of_rows_and_columns_are_told_apart_and_put_back():
    stored = (E,), (N,), (96,)
    units = dims.reshape(stored, (3, 3, 3, 8, 4, 16))
    assert units == ((E,), (Symbol("N", 48, 16),), (3,), (8,), (4,), (16,))
    e, rows, columns, *_ = units
    assert dims.reshape((e, rows, (2,), (8,), columns, (32,)), (3, 48, 96)) == stored
    assert sizes(units, {"E": 2, "N": 32}) == [2, 2, 3, 8, 4, 16]


def test_parts_of_tiles_and_several_of_them_count_rows_too():
    tiles = (Symbol("N", 48, 16),)
    halves = dims.reshape((tiles, (8,), (40,)), (24, 40))
    assert halves == ((Symbol("N", 48, 2),), (40,))
    assert sizes(halves, {"N": 32}) == [16, 40]
    assert dims.reshape((tiles, (32,)), (96,)) == ((N, 2),)
    assert dims.merge((*tiles, 24)) == (*tiles, 24)


def test_divisors_are_what_all_dimensions_need_together():
    shape = ((Symbol("N", 384, 128),), (Symbol("N", 384, 48),), (E,))
    assert dims.divisors(shape) == {"N": 384, "E": 1}


def test_tiles_may_be_split_off_below_experts():
    tiles = dims.reshape(SHAPE, (9, 16, 40))
    assert tiles == ((E, Symbol("N", 48, 16)), (16,), (40,))
    assert sizes(tiles, {"E": 2, "N": 32}) == [4, 16, 40]


def test_few_large_parts_keep_their_number():
    parts = dims.reshape(((Symbol("N", 2 * 3 * LARGEST_TILE),), (8,)), (2, -1, 8))
    assert parts == ((2,), (Symbol("N", 2 * 3 * LARGEST_TILE, 2),), (8,))
    assert sizes(parts, {"N": 6}) == [2, 3, 8]


def test_a_size_of_one_is_no_factor():
    assert dims.plain(1) == () and dims.plain(7) == (7,)
    assert dims.merge((1, 2, 3, N, 1, 4, 5)) == (6, N, 20)
    assert dims.reshape(((), (N,), ()), (48,)) == ((N,),)


@pytest.mark.parametrize(
    "shapes, wanted",
    [
        ([((N,), (5,)), ((N,), ())], ((N,), (5,))),
        ([((N,), (5,)), ((5,),)], ((N,), (5,))),
        ([((N,), (5,)), ()], ((N,), (5,))),
        ([(), ((E,), (N,), ())], ((E,), (N,), ())),
        ([], ()),
    ],
)
def test_broadcast(shapes, wanted):
    assert dims.broadcast(shapes) == wanted


def test_rows_never_meet_a_number_of_the_same_size():
    with pytest.raises(NotRescalableError):
        dims.broadcast([((N,), (5,)), ((48,), ())])
    with pytest.raises(NotRescalableError):
        dims.broadcast([((N,),), ((Symbol("E", 48),),)])


def test_a_view_as_another_dtype_resizes_the_last_dimension():
    shape = (N,), (8,)
    assert dims.last_resized(shape, 4, 1) == ((N,), (32,))
    assert dims.last_resized(shape, 1, 4) == ((N,), (2,))
    assert dims.last_resized(((4,), (N,)), 4, 1) == ((4,), (N, 4))
    assert dims.last_resized((), 4, 4) == () and dims.last_resized(((N,),), 2, 2) == ((N,),)
    with pytest.raises(NotRescalableError):
        dims.last_resized(((8,), (N,)), 1, 4)
    with pytest.raises(NotRescalableError):
        dims.last_resized(((N,), (6,)), 1, 4)


@st.composite
def views(draw):
    """A shape of rows, experts and numbers, and literals for a view of it that keeps or joins its factors."""
    n, e = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    columns = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    shape = ((Symbol("E", e),), (Symbol("N", n),), *((c,) for c in columns))
    pieces = [e, n, *columns]
    cuts = draw(st.lists(st.booleans(), min_size=len(pieces) - 1, max_size=len(pieces) - 1))
    literals = [pieces[0]]
    for piece, cut in zip(pieces[1:], cuts, strict=True):
        if cut:
            literals.append(piece)
        else:
            literals[-1] *= piece
    return shape, literals


@settings(deadline=None, derandomize=True, max_examples=200)
@given(views(), st.integers(1, 11), st.integers(1, 11))
def test_a_view_can_be_undone_at_every_size(case, rows, experts):
    """The scaled sizes fit a real tensor, and no symbol is lost on the way there and back."""
    shape, literals = case
    viewed = dims.reshape(shape, literals)
    at = {"N": rows, "E": experts}
    assert [dims.size_of(dim) for dim in viewed] == literals
    small = torch.arange(math.prod(sizes(shape, at))).view(sizes(shape, at))
    assert small.view(sizes(viewed, at)).numel() == small.numel()
    # Back to the first shape: nothing of the symbols was lost on the way.
    assert sizes(dims.reshape(viewed, [dims.size_of(dim) for dim in shape]), at) == sizes(shape, at)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(2, 64), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_any_view_is_refused_or_right(rows, literals):
    """Whatever the literals: if a view is accepted at all, it has the literals' sizes and as many elements."""
    shape = ((Symbol("N", rows),), (math.prod(literals),))
    try:
        viewed = dims.reshape(shape, [*literals, -1])
    except NotRescalableError:
        return
    assert [dims.size_of(dim) for dim in viewed] == [*literals, rows]
    needed = dims.divisors(viewed).get("N", 1)
    assert math.prod(sizes(viewed, {"N": 7 * needed})) == 7 * needed * math.prod(literals)
