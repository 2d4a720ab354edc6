"""How programs of many_rows.py share out the work, as plain Python: nothing is left out, done twice or waited for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from fp4pass.lowering import bands, sharing

MULTIPROCESSORS = 132


@pytest.fixture
def here(monkeypatch):
    """What the functions call, as plain Python."""
    plain = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b
    )
    monkeypatch.setattr(sharing, "gl", plain)
    return plain


@pytest.fixture
def pieces(monkeypatch, here):
    """(tiles, steps, programs, lead, idle) -> each program's stretches [(tile, first step, end)], a range's length."""
    monkeypatch.setattr(sharing, "locate", sharing.locate.fn)

    def of_program(program, tiles, steps, programs, lead, idle):
        here.num_programs, here.program_id = (lambda axis: programs), (lambda axis: program)
        ways = sharing.ways.fn(tiles, programs, steps, lead, idle)
        share, total = sharing.shares.fn(tiles, ways, steps)
        found, it = [], 0
        while it < total:
            found.append(sharing.stretch.fn(it, share, steps))
            it += found[-1][2] - found[-1][1]
        assert it == total
        return share[3], found, ways[1]

    def of_all(tiles, steps, programs, lead, idle=0):
        everything = sorted(of_program(program, tiles, steps, programs, lead, idle) for program in range(programs))
        assert [number for number, _, _ in everything] == list(range(programs))
        return [found for _, found, _ in everything], everything[0][2]

    return of_all


def numbers_of_tiles(programs):
    """Fewer than there are programs, as many, some more, whole rounds, and far more."""
    some = {0, 1, 2, 3, 21, 42, 81, 97, 145, *(programs * n // 4 + d for n in range(1, 14) for d in (-1, 0, 1))}
    return sorted(number for number in some if number >= 0)


@pytest.mark.parametrize("programs", (1, 5, MULTIPROCESSORS, 2 * MULTIPROCESSORS))
@pytest.mark.parametrize("steps", (1, 2, 15, 21, 64))
@pytest.mark.parametrize(("lead", "idle"), ((0, 4), (2, 0), (2, 8), (4, 16)))
def test_every_step_is_done_once_and_those_who_share_a_tile_find_each_other(pieces, lead, idle, steps, programs):
    for tiles in numbers_of_tiles(programs):
        work, each = pieces(tiles, steps, programs, lead, idle)
        of_tile = {tile: [] for tile in range(tiles)}
        for number, found in enumerate(work):
            assert sum(first > 0 for _, first, _ in found) <= 1, "a program has one place to leave sums in"
            assert sum(first == 0 and last < steps for _, first, last in found) <= 1
            for tile, first, last in found:
                of_tile[tile].append((first, last, number))
        for shared in map(sorted, of_tile.values()):
            assert [first for first, _, _ in shared] + [steps] == [0] + [last for _, last, _ in shared]
            # Who begins a tile collects from the programs behind it, which started before; see exchange.py.
            (_, last, owner), *others = shared
            expected = -(-(steps - last) // each) if last < steps else 0
            assert [number for _, _, number in others] == list(range(owner + 1, owner + 1 + expected))


@pytest.mark.parametrize("lead", (0, 2, 4))
@pytest.mark.parametrize("tiles", (21, 42, 81, MULTIPROCESSORS))
def test_where_tiles_are_few_no_program_works_on_two(pieces, tiles, lead):
    work, _ = pieces(tiles, 64, MULTIPROCESSORS, lead)
    if tiles != 81:  # There 51 programs would have nothing to do.
        assert all(len(found) <= 1 for found in work)
    most = max(sum(last - first for _, first, last in found) for found in work)
    assert (most - lead) * 8 <= -(-tiles * 64 // MULTIPROCESSORS) * 9


def test_who_begins_a_tile_does_so_many_steps_more_than_the_others(pieces):
    work, _ = pieces(42, 29, MULTIPROCESSORS, 2)
    assert work[:3] == [[(0, 0, 11)], [(0, 11, 20)], [(0, 20, 29)]]
    even, _ = pieces(42, 29, MULTIPROCESSORS, 0)
    assert even[:3] == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 29)]]


@pytest.mark.parametrize("rounds", (1, 2, 8))
def test_tiles_stay_whole_where_programs_would_be_idle_for_no_more_steps_than_allowed(pieces, rounds):
    def whole(missing, steps, idle):
        work, _ = pieces(rounds * MULTIPROCESSORS - missing, steps, MULTIPROCESSORS, 2, idle)
        return all((first, last) == (0, steps) for found in work for _, first, last in found)

    assert whole(50, 21, 8) and not whole(51, 21, 8)
    assert whole(16, 64, 8) and not whole(17, 64, 8)
    assert whole(0, 64, 0) and not whole(20, 64, 0)


@pytest.mark.parametrize(("bm", "band"), ((8, 8), (32, 32), (64, 64), (128, 128), (192, 64), (256, 64), (256, 256)))
def test_boxes_hold_each_row_of_x_once_as_their_own_and_as_few_as_can_be_that_x_does_not_have(here, bm, band):
    box = sharing.rows_of_box(bm, band)
    for rows in (1, bm // 2, bm // 2 + 1, bm - 1, bm, bm + 1, 3 * bm - box, 3 * bm - 1, 3 * bm):
        own, missing = [], 0
        for first in range(0, -(-rows // bm) * bm, box):
            at = sharing.box_at.fn(first, rows, (None,), bm, band)
            held = range(at, at + box)
            assert at >= 0
            own += [row for row in held if first <= row < rows]
            missing += sum(row >= rows for row in held)
        assert own == list(range(rows))
        assert missing == 0 or rows < box or box == bm


def test_boxes_of_a_block_of_experts_follow_each_other(here):
    assert [sharing.box_at.fn(100 + first, 130, (object(),), 64, 64) for first in (0, 32)] == [100, 132]


@pytest.mark.parametrize(
    ("bm", "band", "sizes"), ((256, 64, [128, 64, 64]), (192, 64, [128, 64]), (256, 256, [256]), (8, 8, [8]))
)
def test_bands_follow_each_other_in_whole_boxes_and_only_those_with_rows_are_multiplied(
    monkeypatch, here, bm, band, sizes
):
    here.static_range = range
    monkeypatch.setattr(bands, "gl", here)
    numbers = range(bands.number_of_bands(bm, band))
    assert [bands.size_of(nth, bm, band) for nth in numbers] == sizes == bands.bands_of(bm, band)
    begins = [bands.begin_of(nth, bm, band) for nth in numbers]
    assert begins == [sum(sizes[:nth]) for nth in numbers] and sum(sizes) == bm
    assert not any(begin % sharing.rows_of_box(bm, band) for begin in begins)
    for rows in range(1, bm + 70):
        assert bands.bands_with.fn(rows, bm, band) == sum(begin < rows for begin in begins)
