"""The plain-torch twins against tables written out by hand, and against float64."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import layout, reference

from .operands import E2M1, NAN_BYTES, activations, e4m3, every_product, pack, relative_error, stored, weight

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_every_code_decodes_exactly(order, dtype):
    codes = layout.from_plain(pack(torch.arange(16)).repeat(16, 4), order)
    decoded = reference.decode_codes(codes, order, dtype)
    expected = torch.tensor(E2M1, dtype=dtype).repeat(16, 4)
    assert decoded.dtype == dtype and torch.equal(decoded, expected)
    assert torch.equal(decoded.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_byte_decodes_exactly(dtype):
    decoded = reference.decode_scale(torch.arange(256, dtype=torch.uint8), dtype)
    for byte in range(256):
        if byte in NAN_BYTES:
            assert decoded[byte].isnan()
        else:
            assert decoded[byte].item() == e4m3(byte)
            assert decoded[byte].signbit().item() == (byte >= 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_all_finite_products_are_bit_exact(order, dtype):
    codes, scale, expected = every_product()
    decoded = reference.dequantize(*stored(codes, scale, order), None, dtype, order)
    assert torch.equal(decoded.double(), expected)
    finite = [byte for byte in range(256) if byte not in NAN_BYTES]
    assert len({(byte, code) for byte in finite for code in range(16)}) == 4064


def test_a_nan_scale_byte_gives_nan_weights():
    codes = pack(torch.full((1, 16), 2))
    for byte in NAN_BYTES:
        assert reference.dequantize(codes, torch.tensor([[byte]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("order", (layout.INTERLEAVED, layout.FRAGMENTS))
def test_decoding_traces_without_graph_breaks_and_on_meta(order, dtype):
    codes, scale, global_scale = weight(3, 32, 64, order=order)

    def decode(*operands):
        return reference.dequantize(*operands, dtype, order)

    expected = decode(codes, scale, global_scale)
    traced = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(codes, scale, global_scale), expected)
    assert decode(codes.to("meta"), scale.to("meta"), global_scale.to("meta")).shape == expected.shape


def test_global_scale_forms_agree():
    codes, scale, _ = weight(1, 16, 32)
    forms = (torch.tensor(0.25), torch.tensor([0.25]))
    first, second = (reference.dequantize(codes, scale, form, torch.float64) for form in forms)
    assert torch.equal(first, second)
    assert torch.equal(first, reference.dequantize(codes, scale, None, torch.float64) * 0.25)


@pytest.mark.parametrize(("order", "k"), [(layout.PLAIN, 80), (layout.FRAGMENTS, 128)])
@pytest.mark.parametrize(("rows_at_once", "pieces"), [(1, 7), (40, 4)])
def test_pieces_change_nothing(order, k, rows_at_once, pieces, monkeypatch):
    arguments = codes, *_ = weight(112, k, order=order)
    x, grad = activations(5, k), activations(5, 112)
    whole = reference.linear(x, *arguments, None, order, accumulate=torch.float64)
    whole_backward = reference.linear_backward(grad, *arguments, order, accumulate=torch.float64)
    monkeypatch.setattr(reference, "_PIECE_BYTES", 8 * 4 * k * rows_at_once)
    assert len(list(reference._pieces(codes, torch.float64))) == pieces
    assert torch.equal(reference.linear(x, *arguments, None, order, accumulate=torch.float64), whole)
    pieces = reference.linear_backward(grad, *arguments, order, accumulate=torch.float64)
    assert relative_error(pieces, whole_backward) < 1e-6


def test_global_scale_comes_after_the_sum_and_before_the_bias():
    # 2^100 on every weight would overflow fp32 sums of 448 * 6 * 2^100 * x; after the sum nothing does.
    codes, scale = pack(torch.full((16, 16), 2)), torch.full((16, 1), 0x38, dtype=torch.uint8)
    x = torch.full((1, 16), 2.0**28)
    total = reference.linear(x, codes, scale, torch.tensor(2.0**-30), torch.ones(16), layout.PLAIN)
    assert torch.equal(total, torch.full((1, 16), 5.0))


def test_rows_belong_to_the_experts_between_their_ends():
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert reference.expert_of_row(ends, 7).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_experts_round_the_hidden_row_and_nothing_else():
    up, down = weight(4, 32, 48, seed=3), weight(4, 80, 32, seed=4)
    x, ids = activations(6, 48, dtype=torch.bfloat16), torch.tensor([[0, 1], [3, 2], [1, 1], [2, 0], [3, 3], [0, 2]])
    weights = torch.rand(6, 2)
    result = reference.experts(x, ids, weights, *up, *down, "relu2", layout.PLAIN, torch.float64)
    up_weight, down_weight = (reference.dequantize(*w, torch.float64) for w in (up, down))
    for token in range(6):
        expected = torch.zeros(80, dtype=torch.float64)
        for slot in range(2):
            expert = ids[token, slot]
            hidden = reference.relu2(up_weight[expert] @ x[token].double()).bfloat16().double()
            expected += weights[token, slot].double() * (down_weight[expert] @ hidden)
        assert relative_error(result[token], expected) < 2**-8
