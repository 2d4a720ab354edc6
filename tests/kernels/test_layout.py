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
# Which bit of which code is in bits 15 to 0 of half a word; an exponent's high bit comes first.
BITS_OF_FRAGMENTS = ("s0", "e3", "s3", "e2", "e2", "m2", "s1", "e0", "e0", "m0", "e3", "m3", "s2", "e1", "e1", "m1")
DTYPES_OF_SCALES = (torch.uint8, torch.float8_e4m3fn)

lead = st.lists(st.integers(0, 3), max_size=2)
whole_units = st.tuples(lead, st.integers(1, 3), st.integers(1, 3)).map(lambda s: (*s[0], 16 * s[1], 64 * s[2]))
ragged = st.tuples(lead, st.integers(1, 5), st.integers(1, 5)).map(lambda s: (*s[0], s[1], 16 * s[2]))


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_codes(shape):
    *rows, k = shape
    return random_bytes(*rows, k // 2)


def random_scale(shape):
    *rows, k = shape
    return random_bytes(*rows, k // 16)


def test_every_layout_is_covered_here():
    assert {*SLOTS, layout.FRAGMENTS} == set(layout.LAYOUTS)


@pytest.mark.parametrize("name", SLOTS)
def test_slots_hold_the_documented_k(name):
    word = layout.from_plain(pack(torch.arange(8)), name).view(torch.int32).item()
    assert [(word >> 4 * slot) & 15 for slot in range(8)] == SLOTS[name]


def half_of(codes, other):
    """Four codes as the 16 bits that the table of ``fragments`` makes of them, with those of the ``other`` half."""
    codes = [*codes[:2], codes[2] & 8 | other[2] & 7, codes[3]]
    bits = {f"{part}{i}": [(code >> shift) & 1 for shift in shifts] for i, code in enumerate(codes)
            for part, shifts in (("s", [3]), ("e", [2, 1]), ("m", [0]))}  # fmt: skip
    return sum(bits[name].pop(0) << bit for bit, name in zip(range(15, -1, -1), BITS_OF_FRAGMENTS, strict=True))


def test_fragments_hold_the_documented_codes_and_scales():
    nibbles = torch.randint(0, 16, (2, 32, 128))
    scale = torch.arange(2 * 32 * 8, dtype=torch.int16).view(2, 32, 8)
    words = layout.from_plain(pack(nibbles), layout.FRAGMENTS).view(torch.int32).view(2, 2, 2, 32, 4)
    scales = layout.scale_from_plain(scale, layout.FRAGMENTS).view(2, 2, 2, 32, 2)
    for expert, rows, columns, lane in torch.cartesian_prod(*(torch.arange(size) for size in (2, 2, 2, 32))).tolist():
        for half in range(2):
            row, block = 16 * rows + 8 * half + lane // 4, 4 * columns + lane % 4
            assert scales[expert, rows, columns, lane, half] == scale[expert, row, block]
            for part in range(2):
                first = 64 * columns + 32 * part + 2 * (lane % 4)
                even, odd = (nibbles[expert, row, first + parity :: 8][:4].tolist() for parity in range(2))
                word = words[expert, rows, columns, lane, 2 * half + part].item() & 0xFFFFFFFF
                assert word == half_of(even, odd) | half_of(odd, even) << 16


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


@settings(max_examples=60, deadline=None)
@given(shape=whole_units, source=st.sampled_from(layout.LAYOUTS), target=st.sampled_from(layout.LAYOUTS))
def test_round_trip_is_the_identity(shape, source, target):
    assert_round_trip(random_codes(shape), source, target, layout.to_plain, layout.from_plain, layout.repack_codes_)
    scale_forms = layout.scale_to_plain, layout.scale_from_plain, layout.repack_scale_
    for dtype in DTYPES_OF_SCALES:
        assert_round_trip(random_scale(shape).view(dtype), source, target, *scale_forms)


@settings(max_examples=40, deadline=None)
@given(shape=ragged, source=st.sampled_from(list(SLOTS)), target=st.sampled_from(list(SLOTS)))
def test_round_trip_of_ragged_shapes_is_the_identity_in_the_layouts_of_words(shape, source, target):
    assert_round_trip(random_codes(shape), source, target, layout.to_plain, layout.from_plain, layout.repack_codes_)
    scale = random_scale(shape)
    assert layout.repack_scale_(scale, source, target) is scale
    assert layout.scale_to_plain(scale, source) is scale and layout.scale_from_plain(scale, target) is scale


def assert_round_trip(tensor, source, target, to_plain, from_plain, repack_):
    changed = from_plain(to_plain(tensor, source), target)
    assert changed.shape == tensor.shape and changed.dtype == tensor.dtype and changed.is_contiguous()
    assert torch.equal(from_plain(to_plain(changed, target), source).view(torch.uint8), tensor.view(torch.uint8))
    in_place = tensor.clone()
    assert repack_(in_place, source, target) is in_place
    assert torch.equal(in_place.view(torch.uint8), changed.view(torch.uint8))


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_codes_one_by_one_from_any_byte(order, offset):
    codes = random_codes((32, 128))
    there = torch.cat((codes.new_zeros(offset), layout.from_plain(codes, order).flatten()))[offset:].view(codes.shape)
    assert torch.equal(layout.to_plain(there, order), codes)
    assert torch.equal(layout.nibbles(there, order), torch.stack((codes & 15, codes >> 4), -1).flatten(-2))


@pytest.mark.parametrize("name", (layout.INTERLEAVED, layout.FRAGMENTS))
@pytest.mark.parametrize("piece_bytes", (1, 64, 16 * 96 * 2))
def test_repack_in_pieces_equals_repack_at_once(name, piece_bytes, monkeypatch):
    codes, scale = random_codes((3, 48, 192)), random_scale((3, 48, 192))
    expected = layout.from_plain(codes, name), layout.scale_from_plain(scale, name)
    monkeypatch.setattr(layout, "_REPACK_PIECE_BYTES", piece_bytes)
    assert torch.equal(layout.repack_codes_(codes, layout.PLAIN, name), expected[0])
    assert torch.equal(layout.repack_scale_(scale, layout.PLAIN, name), expected[1])


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_meta_tensors_and_tracing(name):
    on_meta = torch.empty(3, 16, 64, dtype=torch.uint8, device="meta")
    for function in (layout.to_plain, layout.from_plain, layout.scale_to_plain, layout.scale_from_plain):
        assert function(on_meta, name).shape == (3, 16, 64)
    for repack_ in (layout.repack_codes_, layout.repack_scale_):
        assert repack_(on_meta, layout.PLAIN, name) is on_meta
    codes, scale = random_codes((2, 32, 128)), random_scale((2, 32, 128))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def there_and_back(codes, scale):
        stored = layout.from_plain(codes, name), layout.scale_from_plain(scale, name)
        return *stored, layout.to_plain(stored[0], name), layout.scale_to_plain(stored[1], name)

    expected = layout.from_plain(codes, name), layout.scale_from_plain(scale, name), codes, scale
    assert all(torch.equal(a, b) for a, b in zip(there_and_back(codes, scale), expected, strict=True))


def test_layout_for_a_device_and_shapes():
    gpu = torch.device("cuda", 1)
    assert layout.layout_for(gpu, [(48, 128), (3, 16, 64)]) == layout.FRAGMENTS
    assert layout.layout_for(gpu, [(48, 80)]) == layout.INTERLEAVED
    assert layout.layout_for(gpu, [(3, 48, 128), (3, 128, 48)]) == layout.INTERLEAVED
    for device in ("cpu", "meta"):
        assert layout.layout_for(torch.device(device), [(48, 128)]) == layout.PLAIN


def test_bad_input_is_refused_by_name():
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="unknown layout"):
        layout.to_plain(codes, "swizzled")
    with pytest.raises(ArgumentError, match="unknown layout"):
        layout.repack_codes_(codes, "plain", "swizzled")
    with pytest.raises(ArgumentError, match="not contiguous"):
        layout.repack_codes_(codes[:, ::2].expand(16, 16), layout.PLAIN, layout.INTERLEAVED)
    with pytest.raises(ArgumentError, match="32-bit words"):
        layout.from_plain(codes[:, :6], layout.INTERLEAVED)


@pytest.mark.parametrize("shape", [(64,), (8, 64), (24, 64), (16, 48), (16, 80), (2, 8, 64), (32, 2, 8, 64)])
def test_what_is_no_whole_unit_is_refused_before_anything_moves(shape):
    codes, scale = random_codes(shape), random_scale(shape)
    before = codes.clone(), scale.clone()
    for function, tensor in (
        (layout.to_plain, codes),
        (layout.from_plain, codes),
        (layout.scale_to_plain, scale),
        (layout.scale_from_plain, scale),
        (lambda codes, name: layout.repack_codes_(codes, layout.PLAIN, name), codes),
        (lambda scale, name: layout.repack_scale_(scale, name, layout.PLAIN), scale),
    ):
        with pytest.raises(ArgumentError, match="units of 16 rows by 64 columns") as caught:
            function(tensor, layout.FRAGMENTS)
        assert str(tuple(shape)) in str(caught.value) and layout.INTERLEAVED in str(caught.value)
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1])
