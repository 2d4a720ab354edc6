"""The kernels in Triton's interpreter, on the CPU. Run by test_interpreter.py in a process that has TRITON_INTERPRET=1.

The interpreter has no inline assembly and no bfloat16 ``tl.dot``: the plain decoder is run here in float32 and float16,
and for bfloat16 the decoder alone.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fp4pass.lowering import arch, decode, layout, linear, moe, reference

from .operands import activations, every_product, relative_error, weight

PLAIN_FORM = {"arch": arch.target(80), "asm": False}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4}
DTYPES = tuple(TOLERANCE)


@triton.jit
def decode_kernel(words, scale, out, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    word_tile = tl.load(words + rows * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :])
    scale_tile = tl.load(scale + rows * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)[None, :])
    tile = decode.decode_tile(word_tile, scale_tile, LAYOUT, out.dtype.element_ty, False)
    tl.store(out + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_the_decoder_is_exact_for_every_product(order, dtype):
    codes, scale, expected = every_product()
    out = torch.empty(256, 256, dtype=dtype)
    decode_kernel[(16,)](layout.from_plain(codes, order).view(torch.int32), scale, out, 256, order)
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layout.LAYOUTS)
@pytest.mark.parametrize("rows", (16, 256))
def test_all_finite_products_come_out_of_linear(order, dtype, rows):
    codes, scale, expected = every_product()
    stored = layout.from_plain(codes, order)
    eye = torch.eye(256, dtype=dtype)[:rows]
    assert torch.equal(linear.linear(eye, stored, scale, None, None, order, **PLAIN_FORM).double(), expected.mT[:rows])
    back = linear.linear_backward(eye, stored, scale, None, order, **PLAIN_FORM)
    assert torch.equal(back.double(), expected[:rows])


@pytest.mark.parametrize("order", layout.LAYOUTS)
@pytest.mark.parametrize("rows", (16, 256))
def test_all_finite_products_come_out_of_expert_products(order, rows):
    codes, scale, expected = every_product()
    stored = torch.stack((torch.zeros_like(codes), layout.from_plain(codes, order)))
    ids, eye = torch.ones(rows, dtype=torch.int32), torch.eye(256, dtype=torch.float16)[:rows]
    result = moe.gathered_linear(eye, stored, torch.stack((scale, scale)), None, ids, order, **PLAIN_FORM)
    assert torch.equal(result.double(), expected.mT[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 48, 80), (1, 48, 80), (3, 80, 1040), (17, 208, 48), (130, 144, 208)])
def test_linear_meets_the_oracle_on_ragged_shapes(m, n, k, dtype):
    operands = weight(n, k)
    x, bias = activations(m, k, dtype=dtype), activations(n, dtype=dtype, seed=5)
    result = linear.linear(x, *operands, bias, layout.PLAIN, **PLAIN_FORM)
    exact = reference.linear(x, *operands, bias, layout.PLAIN, torch.float64)
    assert result.shape == (m, n) and relative_error(result, exact) < TOLERANCE[dtype]
    grad = activations(m, n, dtype=dtype, seed=6)
    back = linear.linear_backward(grad, *operands, layout.PLAIN, **PLAIN_FORM)
    exact = reference.linear_backward(grad, *operands, layout.PLAIN, torch.float64)
    assert back.shape == (m, k) and relative_error(back, exact) < TOLERANCE[dtype]


def test_strides_and_ranks_of_x():
    operands = weight(48, 80)
    x = activations(80, 6).mT
    result = linear.linear(x, *operands, None, layout.PLAIN, **PLAIN_FORM)
    contiguous = linear.linear(x.contiguous(), *operands, None, layout.PLAIN, **PLAIN_FORM)
    assert torch.equal(result, contiguous)
    folded = linear.linear(x.reshape(2, 3, 80), *operands, None, layout.PLAIN, **PLAIN_FORM)
    assert torch.equal(folded.view(6, 48), contiguous)


@pytest.mark.parametrize("tokens", (1, 3, 40, 100))
@pytest.mark.parametrize("activation", tuple(reference.ACTIVATIONS))
def test_experts_meet_the_oracle_with_sentinels_and_empty_experts(tokens, activation):
    up, down = weight(7, 48, 80, seed=2), weight(7, 112, 48, seed=3)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 6, (tokens, 2), generator=generator)
    ids[ids == 3] = 7
    weights = torch.rand(tokens, 2, generator=generator)
    weights[(ids < 0) | (ids >= 7)] = torch.nan
    x = activations(tokens, 80)
    result = moe.experts(x, ids, weights, *up, *down, activation, layout.PLAIN, **PLAIN_FORM)
    exact = reference.experts(x, ids, weights, *up, *down, activation, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < 1e-6


@pytest.mark.parametrize("rows", (5, 150))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_and_grouped_meet_the_oracle(rows, dtype):
    operands = weight(5, 48, 80)
    x = activations(rows, 80, dtype=dtype)
    ids = torch.arange(rows) % 7 - 1
    result = moe.gathered_linear(x, *operands, ids, layout.PLAIN, **PLAIN_FORM)
    exact = reference.gathered_linear(x, *operands, ids, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[dtype]
    ends = torch.tensor([1, 1, rows // 2, rows // 2 + 1, rows - 1], dtype=torch.int32)
    result = moe.grouped_linear(x, *operands, ends, layout.PLAIN, **PLAIN_FORM)
    exact = reference.grouped_linear(x, *operands, ends, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[dtype]
    assert torch.equal(result[-1], torch.zeros(48, dtype=dtype))
