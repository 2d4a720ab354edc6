"""The decoder's assembly by itself: every product, every layout, both 16-bit formats."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import layout

from .assembly import WORD, Machine, number
from .operands import E2M1, NAN_BYTES, e4m3, pack

decode = pytest.importorskip("fp4pass.lowering.decode", reason="Triton is not installed", exc_type=ImportError)


HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
SCALE_BYTES = torch.tensor([byte for byte in range(256) if byte not in NAN_BYTES])
NIBBLES = (torch.arange(16)[:, None] + torch.arange(8)) % 16


def words_of(nibbles, order):
    """Integers 0..15 ``[16, 8]`` -> the word of ``order`` that holds each eight of them, int64 ``[16]``."""
    if order == layout.FRAGMENTS:
        # One unit, whose rows have their eight codes in the columns 0, 1, 8, 9, ... of both halves.
        whole = torch.zeros(16, 8, 4, 2, dtype=nibbles.dtype)
        whole[:, :, 0] = nibbles.view(16, 4, 2).repeat(1, 2, 1)
        lanes = layout.from_plain(pack(whole.view(16, 64)), order).view(torch.int32).view(8, 4, 2, 2)
        return lanes[:, 0, :, 0].T.flatten().to(torch.int64) & WORD
    return layout.from_plain(pack(nibbles), order).view(torch.int32).to(torch.int64).flatten() & WORD


def scales_of(scale_bytes, half):
    return Machine(**{"$1": scale_bytes}).run(decode.scale_assembly(half)).registers["$0"]


def products_of(machine, dtype, first=0):
    products = torch.stack([number(dtype, machine.registers[f"${first + k}"]) for k in range(8)], -1)
    return products * decode.undo_factor(True)


def exact(scale_bytes, nibbles):
    values = torch.tensor([e4m3(byte) for byte in scale_bytes.tolist()], dtype=torch.float64)
    return values[:, None] * torch.tensor(E2M1, dtype=torch.float64)[nibbles]


def assert_same(found, expected):
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@HALVES
@pytest.mark.parametrize("order", [order for order in layout.LAYOUTS if order != layout.FRAGMENTS])
def test_all_finite_products_of_the_assembly_are_exact(order, dtype):
    half = dtype == torch.float16
    scales = scales_of(SCALE_BYTES, half).repeat_interleave(16)
    machine = Machine(**{"$8": words_of(NIBBLES, order).repeat(254), "$9": scales})
    machine.run(decode.codes_assembly(order, half))
    assert_same(products_of(machine, dtype), exact(SCALE_BYTES.repeat_interleave(16), NIBBLES.repeat(254, 1)))


@HALVES
def test_all_finite_products_of_a_word_of_two_blocks_are_exact(dtype):
    half = dtype == torch.float16
    bytes_of = [SCALE_BYTES.roll(turn).repeat_interleave(16) for turn in (0, 5)]
    left, right = (scales_of(each, half) for each in bytes_of)
    machine = Machine(**{"$8": words_of(NIBBLES, layout.FRAGMENTS).repeat(254), "$9": left, "$10": right})
    machine.run(decode.fragments_assembly(half, 1))
    expected = [exact(each, NIBBLES.repeat(254, 1)) for each in bytes_of]
    assert_same(products_of(machine, dtype), torch.cat((expected[0][:, :4], expected[1][:, 4:]), 1))


@HALVES
def test_all_finite_products_of_two_words_are_exact(dtype):
    """Each with scales of its own: the first word's in the lower halves of the registers, the second's in the upper."""
    half = dtype == torch.float16
    words = words_of(NIBBLES, layout.FRAGMENTS).repeat(254)
    bytes_of = [[SCALE_BYTES.roll(turn + 7 * word).repeat_interleave(16) for turn in (0, 5)] for word in range(2)]
    packed = [
        scales_of(upper, half) & 0xFFFF | (scales_of(lower, half) & 0xFFFF) << 16
        for upper, lower in zip(*bytes_of, strict=True)
    ]
    machine = Machine(**{"$16": words, "$17": words.roll(3), "$18": packed[0], "$19": packed[1]})
    machine.run(decode.fragments_assembly(half, 2))
    nibbles = NIBBLES.repeat(254, 1)
    for word, codes in enumerate((nibbles, nibbles.roll(3, 0))):
        expected = [exact(each, codes) for each in bytes_of[word]]
        found = products_of(machine, dtype, 8 * word)
        assert_same(found, torch.cat((expected[0][:, :4], expected[1][:, 4:]), 1))


@pytest.mark.parametrize("half", (False, True))
def test_lanes_share_their_scales_by_fours(half):
    one, other = torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256)
    lanes = Machine(**{"$4": one | other << 8 | 0xABCD << 16})
    lanes.run(decode.scales_of_lanes_assembly(half))
    alone = scales_of(one, half) & 0xFFFF | (scales_of(other, half) & 0xFFFF) << 16
    for lane in range(4):
        assert torch.equal(lanes.registers[f"${lane}"], alone.view(-1, 4)[:, lane].repeat_interleave(4))


@HALVES
def test_every_finite_byte_of_an_8_bit_weight_is_exact(dtype):
    from fp4pass.lowering.fp8_units import bytes_assembly

    four = torch.stack([SCALE_BYTES.roll(turn) for turn in (0, 1, 17, 100)], -1)
    machine = Machine(**{"$4": (four << torch.arange(0, 32, 8)).sum(-1)})
    machine.run(bytes_assembly(dtype == torch.float16))
    found = torch.stack([number(dtype, machine.registers[f"${place}"]) for place in range(4)], -1)
    assert_same(found, torch.tensor([e4m3(byte) for byte in four.flatten().tolist()]).double().view_as(found))
