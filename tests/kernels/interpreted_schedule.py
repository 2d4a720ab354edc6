"""Experts' schedules in Triton's interpreter. Run by test_schedule.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering.arch import rows_of_expert
from fp4pass.lowering.schedule import schedule

from .interpreting import bounds_of_loops_are_numbers  # noqa: F401  (a fixture that all tests here have)

# Every E_PADDED below 16 is 16, and FEW, the parts that ends_kernel takes at a time, is 16 with the most experts.
EXPERTS = (1, 2, 5, 16, 17, 128, 512)
BLOCKS_M = (8, 16, 32, 64, 128)
# Around SLOTS (32), the most of one program (256), and PART (1024), and in between.
SLOTS = (1, 2, 17, 31, 32, 33, 100, 255, 256, 257, 600, 1023, 1024, 1025, 2048, 2600)


def expected(ids, experts, block_m):
    """Ends, block ends, experts of the blocks that are needed, and the valid slots in order, by torch alone."""
    slots = torch.arange(len(ids))[(ids >= 0) & (ids < experts)]
    counts = torch.bincount(ids[slots], minlength=experts)
    blocks = -(-counts // block_m)
    order = slots[ids[slots].sort(stable=True).indices]
    return counts.cumsum(0), blocks.cumsum(0), torch.arange(experts).repeat_interleave(blocks), order


def assert_right(ids, experts, block_m):
    plan = schedule(ids, experts, block_m)
    ends, block_ends, of_block, order = expected(ids.long(), experts, block_m)
    assert torch.equal(plan.ends.long(), ends)
    assert torch.equal(plan.block_ends.long(), block_ends)
    assert plan.experts.shape == (plan.blocks,) and len(of_block) <= plan.blocks
    assert torch.equal(plan.experts[: len(of_block)].long(), of_block)
    assert torch.equal(plan.experts[len(of_block) :], torch.full_like(plan.experts[len(of_block) :], experts))
    assert plan.order.shape == ids.shape
    assert torch.equal(plan.order[: len(order)].long(), order)
    return plan


def random_ids(slots, experts, seed, dtype=torch.int64):
    """Some of them too low or too high, by one or by a lot."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (slots,), generator=generator)
    far = torch.tensor([-1, -(2**31), experts, 2**31 - 1])
    wrong = torch.randint(0, 8, (slots,), generator=generator)
    return torch.where(wrong < 4, far[wrong % 4], ids).to(dtype)


@pytest.mark.parametrize("slots", SLOTS)
def test_random_ids_with_invalid_ones_among_them(slots):
    # The interpreter takes its time: many slots with every third number of experts.
    for index, experts in enumerate(EXPERTS if slots < 600 else EXPERTS[slots % 3 :: 3]):
        if rows_of_expert(slots, experts):
            dtype = (torch.int64, torch.int32)[index % 2]
            assert_right(random_ids(slots, experts, slots, dtype), experts, BLOCKS_M[(index + slots) % len(BLOCKS_M)])


@pytest.mark.parametrize("block_m", BLOCKS_M)
def test_every_block_size_around_its_multiples(block_m):
    for count in (1, block_m - 1, block_m, block_m + 1, 2 * block_m, 2 * block_m + 1):
        ids = torch.tensor([3] * count + [1] * block_m + [6] + [-1] * 17)
        assert_right(ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(count))], 8, block_m)


@pytest.mark.parametrize("expert", (0, 1, 127))
def test_one_expert_takes_everything(expert):
    plan = assert_right(torch.full((300,), expert), 128, 16)
    assert torch.equal(plan.order, torch.arange(300, dtype=torch.int32))


@pytest.mark.parametrize("invalid", (-1, 128, 2**40))
def test_without_a_valid_id_no_block_has_an_expert(invalid):
    plan = assert_right(torch.full((300,), invalid), 128, 16)
    assert not plan.ends.any() and not plan.block_ends.any()


def test_as_many_blocks_as_can_be_needed_are_there():
    # A slot for each expert, then as many more as fill whole blocks and open one.
    for experts, block_m in ((5, 8), (17, 16)):
        ids = torch.cat([torch.arange(experts), torch.zeros(3 * block_m, dtype=torch.int64)])
        plan = assert_right(ids, experts, block_m)
        assert plan.block_ends[-1] == plan.blocks


def test_a_schedule_repeats_itself():
    ids = random_ids(700, 128, 0)
    first, second = schedule(ids, 128, 16), schedule(ids, 128, 16)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("experts", "ends", "block_ends"))
    assert torch.equal(first.order[: first.ends[-1]], second.order[: second.ends[-1]])


def test_more_parts_than_are_summed_at_once():
    assert_right(random_ids(17 * 1024 + 5, 300, 1), 300, 64)


def test_few_slots_are_not_sorted():
    ids = random_ids(16, 128, 0)
    plan = schedule(ids, 128, 16)
    assert plan.blocks == 16 and plan.experts is ids and plan.order is None
    assert [rows_of_expert(*each) for each in ((33, 128), (6, 5), (5, 5), (32, 128))] == [1, 2, 0, 0]
