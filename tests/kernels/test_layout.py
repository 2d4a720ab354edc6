"""Layouts are exact permutations of bits: shape, dtype and bytes kept, every one undone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pass.errors import ArgumentError
from fp4pass.lowering import layout

from .operands import pack

SLOTS = {
    layout.PLAIN: [0, 1, 2, 3, 4, 5, 6, 7],
    layout.PLAIN_HIGH_FIRST: [1, 0, 3, 2, 5, 4, 7, 6],
    layout.INTERLEAVED: [6, 4, 2, 0, 7, 5, 3, 1],
}

shapes = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 6)).map(lambda s: (*s[0], 8 * s[1]))


def test_every_layout_is_covered_here():
    assert set(SLOTS) == set(layout.LAYOUTS)


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_slots_hold_the_documented_k(name):
    word = layout.from_plain(pack(torch.arange(8)), name).view(torch.int32).item()
    assert [(word >> 4 * slot) & 15 for slot in range(8)] == SLOTS[name]


def test_one_mask_and_one_shift_give_a_pair_of_bf16():
    nibbles = torch.tensor([7, 9, 2, 15, 8, 1, 0, 4])
    word = layout.from_plain(pack(nibbles), layout.INTERLEAVED).view(torch.int32).item()
    raw = []
    for shift in (0, 4, 8, 12):
        shifted = word << shift
        bits = (shifted & 0x80008000) | ((shifted & 0x70007000) >> 6)
        raw += [bits & 0xFFFF, bits >> 16]
    values = torch.tensor(raw, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double() * 2.0**126
    assert values.tolist() == [6.0, -0.5, 1.0, -6.0, -0.0, 0.5, 0.0, 2.0]


@settings(max_examples=40, deadline=None)
@given(shape=shapes, source=st.sampled_from(layout.LAYOUTS), target=st.sampled_from(layout.LAYOUTS))
def test_round_trip_is_the_identity(shape, source, target):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    changed = layout.from_plain(layout.to_plain(codes, source), target)
    assert changed.shape == codes.shape and changed.dtype == torch.uint8
    assert torch.equal(layout.from_plain(layout.to_plain(changed, target), source), codes)
    in_place = codes.clone()
    assert layout.repack_(in_place, source, target).data_ptr() == in_place.data_ptr()
    assert torch.equal(in_place, changed)


def test_repack_in_pieces_equals_repack_at_once(monkeypatch):
    codes = torch.randint(0, 256, (3, 40, 24), dtype=torch.uint8)
    expected = layout.from_plain(codes, layout.INTERLEAVED)
    monkeypatch.setattr(layout, "_REPACK_PIECE_BYTES", 64)
    assert torch.equal(layout.repack_(codes, layout.PLAIN, layout.INTERLEAVED), expected)


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_meta_tensors_and_tracing(name):
    assert layout.to_plain(torch.empty(5, 16, dtype=torch.uint8, device="meta"), name).shape == (5, 16)
    codes = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    traced = torch.compile(
        lambda c: layout.to_plain(layout.from_plain(c, name), name), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(traced(codes), codes)


def test_layout_for_a_device():
    assert layout.layout_for(torch.device("cuda", 1)) == layout.INTERLEAVED
    assert layout.layout_for(torch.device("cpu")) == layout.PLAIN
    assert layout.layout_for(torch.device("meta")) == layout.PLAIN


def test_bad_input_is_refused_by_name():
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="unknown layout"):
        layout.to_plain(codes, "swizzled")
    with pytest.raises(ArgumentError, match="unknown layout"):
        layout.repack_(codes, "plain", "swizzled")
    with pytest.raises(ArgumentError, match="not contiguous"):
        layout.repack_(codes.mT, layout.PLAIN, layout.INTERLEAVED)
    with pytest.raises(ArgumentError, match="32-bit words"):
        layout.from_plain(codes[:, :6], layout.INTERLEAVED)
