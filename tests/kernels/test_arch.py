"""Which GPU gets what."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from fp4pass.errors import DeviceError
from fp4pass.lowering import arch, heuristics_sm80, reference
from fp4pass.lowering.heuristics_sm90 import launch
from fp4pass.lowering.launches import FewRows, InParts, MmaRows
from fp4pass.lowering.layout import FRAGMENTS

from .operands import activations, weight

# Weights of every kind that launches are told apart by.
HEIGHTS, DEPTHS = (16, 768, 3072, 4240, 8192, 8464, 65536), (192, 4096, 8192)


@pytest.mark.parametrize(("sm", "settings"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90)])
def test_each_generation_gets_the_settings_at_or_below_it(sm, settings):
    assert arch.target(sm).sm == settings


@pytest.mark.parametrize(
    ("refused", "reason"), [(75, "below SM80"), (100, "native FP4"), (120, "native FP4"), (torch.device("cpu"), "CUDA")]
)
def test_other_devices_are_refused_by_name(refused, reason):
    with pytest.raises(DeviceError, match=reason):
        arch.target(refused)


def test_every_tile_that_can_be_picked_is_enumerated():
    for generation in arch.ARCHS.values():
        listed = {(regime, dtype, tile) for regime, dtype, tile in arch.configurations(generation)}
        for dtype in arch.DTYPES:
            assert ("backward", dtype, generation.backward_tile(dtype)) in listed
            for rows in range(0, 300):
                for columns in (0, 1 << 14):
                    assert ("product", dtype, generation.tile(rows, dtype, columns=columns)) in listed
                assert ("experts", dtype, generation.tile(rows, dtype, experts=True)) in listed
        assert len(listed) == len(list(arch.configurations(generation)))


def test_a_tile_holds_the_rows_that_it_is_picked_for_up_to_the_widest():
    for generation in arch.ARCHS.values():
        for dtype in arch.DTYPES:
            widest = generation.tile(1 << 20, dtype).block_m
            for rows in range(1, 300):
                assert generation.tile(rows, dtype).block_m >= min(rows, widest)


def test_several_rows_are_never_read_one_by_one():
    """Each would be read with the whole weight."""
    for generation, columns, depth in itertools.product(arch.ARCHS.values(), HEIGHTS, DEPTHS):
        one, *more = (
            generation.launch(rows, torch.bfloat16, FRAGMENTS, columns=columns, depth=depth) for rows in range(1, 40)
        )
        assert one.block_m <= 8
        assert all(each.block_m > 1 for each in more)


@pytest.mark.parametrize("sm", arch.ARCHS)
def test_every_launch_is_taken_for_some_rows_and_no_other(sm):
    """Each has the most rows that it is meant for: out of order, one would never be taken."""
    generation = arch.ARCHS[sm]
    taken = {
        (experts, generation.launch(rows, torch.bfloat16, FRAGMENTS, columns=columns, depth=depth, experts=experts))
        for experts, columns, depth in itertools.product((False, True), HEIGHTS, DEPTHS)
        for rows in (*range(129), 192, 256, 384, 512, 1024, 2048, 4096)
    }
    assert set(generation.launches()) == {each for each in taken if not isinstance(each[1], arch.Tile)}


@pytest.mark.parametrize(("columns", "depth"), itertools.product(HEIGHTS, DEPTHS))
def test_no_half_tile_is_empty_unless_there_are_many(columns, depth):
    for rows in (*range(300, 3072, 100), 513, 640, 641, 768, 3072):
        found = launch(rows, columns, depth, experts=False)
        if isinstance(found, InParts):
            assert found.full % found.first.block_m == 0
        else:
            assert found is None or -rows % found.block_m < 128
        by_experts = launch(rows, columns, depth, experts=True)
        assert by_experts is None or by_experts.block_m == 256
    assert launch(3072 + 65, 16384, 4096, experts=False).block_m == 256


@pytest.mark.parametrize(("columns", "depth"), itertools.product(HEIGHTS, DEPTHS))
def test_few_rows_beyond_full_tiles_run_as_the_same_number_of_rows_does(columns, depth):
    def of(rows):
        return launch(rows, columns, depth, experts=False)

    for rows in range(1, 1200):
        if isinstance(found := of(rows), InParts):
            assert 0 < found.full < rows and found.full % 128 == 0 and rows - found.full <= 64
            assert (found.first, found.rest) == (of(found.full), of(rows - found.full))
    medium, wide = columns == 3072, columns >= 8192 or columns * depth >= 1 << 26
    assert isinstance(of(256 + 16), InParts) == isinstance(of(2048 + 16), InParts) == (medium or wide)
    assert isinstance(of(256 + 17), InParts) == (wide and (depth >= 4096 or columns == 65536))
    assert isinstance(of(512 + 16), InParts) == (medium or (wide and depth >= 8192))
    assert isinstance(of(2048 + 64), InParts) == wide
    assert not any(isinstance(of(rows), InParts) for rows in (128 + 8, 192 + 1, 384 + 8))


@pytest.mark.parametrize(("columns", "depth"), itertools.product(HEIGHTS, DEPTHS))
def test_rows_that_fill_three_quarters_of_a_tile_have_one_of_that_height(columns, depth):
    def are_in_bands(*counts):
        found = {getattr(launch(rows, columns, depth, experts=False), "block_m", 0) == 192 for rows in counts}
        assert len(found) == 1
        return found.pop()

    wide, high, low = columns >= 8192 or columns * depth >= 1 << 26, columns >= 4225, 768 <= columns < 3072
    assert are_in_bands(129, 160, 192) == (wide or high)
    assert are_in_bands(513, 576) == (low or (high and not (wide and depth >= 8192)))
    assert not are_in_bands(128, 193, 256, 512, 577, 1024, 1153)
    for rows, expected in ((1025, True), (1152, True), (1024, False), (1153, False)):
        of_six = launch(rows, 2688, depth, experts=False)
        assert (of_six is not None and of_six.block_m == 192) == expected


def test_before_hopper_many_rows_have_tiles_that_fill_the_gpu():
    """With fewer tiles than multiprocessors warps share K."""
    for columns, rows, count in itertools.product(HEIGHTS, (33, 64, 65, 200, 1000, 4096), (28, 108)):
        found = heuristics_sm80.launch(rows, columns, 4096, experts=False, multiprocessors=count)
        tiles = -(-rows // 64) * -(-columns // 64)
        assert isinstance(found, MmaRows if tiles > count else FewRows)
        assert found.block_m <= 2 * rows
        by_bytes = heuristics_sm80.fp8_launch(rows, columns, count)
        assert (by_bytes is None) == (rows <= 64 and tiles <= count)
        assert by_bytes is None or by_bytes.warps == 4
    assert heuristics_sm80.fp8_launch(32, 1 << 20, 108) is None
    large = heuristics_sm80.launch(4096, 8192, 8192, experts=False, multiprocessors=128)
    assert (large.block_m, large.block_n) == (128, 256)


def test_a_gpu_has_the_number_of_multiprocessors_that_it_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    properties = types.SimpleNamespace(multi_processor_count=28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    arch._of_index.cache_clear()
    try:
        found = arch.target(torch.device("cuda", 3))
    finally:
        arch._of_index.cache_clear()
    assert (found.sm, found.multiprocessors, found.shared_memory) == (86, 28, arch.ARCHS[86].shared_memory)
    assert arch.ARCHS[86].multiprocessors == 84


def test_a_product_in_parts_has_each_row_of_x_from_its_own_launch(monkeypatch):
    linear = pytest.importorskip("fp4pass.lowering.linear")
    found = launch(264, 16384, 4096, experts=False)
    taken = []

    def twin(rows, weight, bias, out, activation, launch):
        taken.append((len(rows), launch))
        of_weight = weight.codes, weight.scale, weight.global_scale
        out.copy_(reference.linear(rows, *of_weight, bias, weight.layout, activation))

    monkeypatch.setattr(linear, "launch_for", lambda *_, **__: found)
    for kernel in (linear.few_rows, linear.many_rows):
        monkeypatch.setattr(kernel, "linear", twin)
    x, operands = activations(2, 132, 128, dtype=torch.bfloat16), weight(64, 128, order=FRAGMENTS)
    arguments = *operands, activations(64, seed=9, dtype=torch.bfloat16), FRAGMENTS, "relu2"
    result = linear.linear(x, *arguments, arch=arch.ARCHS[90])
    assert torch.equal(result, reference.linear(x, *arguments))
    assert taken == [(256, found.first), (8, found.rest)]


def test_splits_fill_the_gpu_and_keep_steps_together():
    hopper = arch.ARCHS[90]
    few, many = hopper.tile(1, torch.bfloat16), hopper.tile(64, torch.bfloat16)
    assert hopper.splits(tiles=264, steps=32, tile=few) == 4
    assert hopper.splits(tiles=66, steps=32, tile=many) == 4
    assert hopper.splits(tiles=2000, steps=32, tile=few) == 1
    assert hopper.splits(tiles=1, steps=3, tile=few) == 1
    assert hopper.splits(tiles=1, steps=1000, tile=few) == 8


def test_no_split_is_empty():
    hopper = arch.ARCHS[90]
    for steps in range(1, 100):
        splits = hopper.splits(tiles=1, steps=steps, tile=hopper.tile(1, torch.bfloat16))
        longest = -(-steps // splits)
        assert (splits - 1) * longest < steps <= splits * longest


def test_the_support_matrix_names_every_generation():
    matrix = arch.support_matrix()
    lines = matrix.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    for generation in arch.ARCHS.values():
        assert f"| {generation.example} | {generation.sm} |" in matrix
    assert "< 80" in matrix and ">= 100" in matrix
