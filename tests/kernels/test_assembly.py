"""The decoder's assembly by itself: every product, every layout, both 16-bit formats."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import layout

from .assembly import WORD, Machine, number
from .operands import E2M1, NAN_BYTES, e4m3, pack

decode = pytest.importorskip("fp4pass.lowering.decode", reason="Triton is not installed", exc_type=ImportError)


def words_of(nibbles, order):
    """Integers 0..15 ``[16, 8]`` -> the word of ``order`` that holds each eight of them, int64 ``[16]``."""
    if order == layout.FRAGMENTS:
        # One unit, each of whose rows has but one word, eight times: [row % 8, block, row // 8, word of the block].
        whole = nibbles.repeat(1, 8)
        lanes = layout.from_plain(pack(whole), order).view(torch.int32).view(8, 4, 2, 2)
        return lanes[:, 0, :, 0].T.flatten().to(torch.int64) & WORD
    return layout.from_plain(pack(nibbles), order).view(torch.int32).to(torch.int64).flatten() & WORD


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_of_the_assembly_are_exact(order, dtype):
    half = dtype == torch.float16
    scale_bytes = torch.tensor([byte for byte in range(256) if byte not in NAN_BYTES])
    nibbles = (torch.arange(16)[:, None] + torch.arange(8)) % 16
    words = words_of(nibbles, order)
    scales = Machine(**{"$1": scale_bytes}).run(decode.scale_assembly(half)).registers["$0"]
    machine = Machine(**{"$8": words.repeat(254), "$9": scales.repeat_interleave(16)})
    machine.run(decode.codes_assembly(order, half))
    products = torch.stack([number(dtype, machine.registers[f"${k}"]) for k in range(8)], -1)
    values = torch.tensor([e4m3(byte) for byte in scale_bytes.tolist()], dtype=torch.float64)
    expected = values[:, None, None] * torch.tensor(E2M1, dtype=torch.float64)[nibbles]
    undone = products.view(254, 16, 8) * decode.undo_factor(True)
    assert torch.equal(undone, expected)
    assert torch.equal(undone.signbit(), expected.signbit())


@pytest.mark.parametrize("half", (False, True))
def test_two_scales_at_once_are_each_as_by_itself(half):
    one, other = torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256)
    pair = Machine(**{"$2": one | other << 8 | 0xABCD << 16}).run(decode.scale_pair_assembly(half)).registers
    for byte, register in ((one, "$0"), (other, "$1")):
        alone = Machine(**{"$1": byte}).run(decode.scale_assembly(half)).registers["$0"]
        assert torch.equal(pair[register], alone)
