"""The kernel for 8-bit weights in Triton's interpreter. Run by test_fp8.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fp4pass.lowering import arch, fp8
from fp4pass.lowering.fp8_linear import decode_e4m3, fp8_linear
from fp4pass.lowering.reference import decode_scale

from .interpreting import bounds_of_loops_are_numbers  # noqa: F401
from .operands import activations, relative_error
from .test_fp8 import fp8_weight

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _assembly(monkeypatch):
    """The only assembly here is an empty instruction."""
    monkeypatch.setattr(tl, "inline_asm_elementwise", lambda asm, constraints, args, **_: args[0])


@triton.jit
def decode_kernel(codes, out):
    at = tl.arange(0, 256)
    tl.store(out + at, decode_e4m3(tl.load(codes + at), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_every_finite_byte_is_decoded_exactly(dtype):
    codes, out = torch.arange(256).to(torch.uint8), torch.empty(256, dtype=dtype)
    decode_kernel[(1,)](codes, out)
    finite = (codes & 0x7F) != 0x7F
    assert torch.equal(out.double()[finite] * 256, decode_scale(codes, torch.float64)[finite])


@pytest.mark.parametrize("turned", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 80, 600), (17, 72, 144), (130, 40, 72)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_product_meets_the_oracle(dtype, rows, n, k, turned):
    weight, scale = fp8_weight(n, k)
    weight = weight.t().contiguous().t() if turned else weight
    x, bias = activations(rows, k, dtype=dtype), activations(n, dtype=dtype, seed=3)
    result = fp8_linear(x, weight, scale, bias, arch=arch.target(80))
    exact = fp8.reference(x.double(), weight, scale, None, bias, accumulate=torch.float64)
    assert result.dtype == dtype and relative_error(result, exact) < TOLERANCE[dtype]


def test_a_long_k_is_cut_into_parts_that_are_summed():
    weight, scale = fp8_weight(16, 1100)
    x = activations(2, 3, 1100)
    assert arch.target(80).splits(1, -(-1100 // 32), arch.target(80).tile(6, torch.float32)) > 1
    exact = fp8.reference(x.double(), weight, scale, None, None, accumulate=torch.float64)
    assert relative_error(fp8_linear(x, weight, scale, None, arch=arch.target(80)), exact) < 1e-6
