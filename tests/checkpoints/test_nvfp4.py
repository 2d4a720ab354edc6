"""The format itself: quantize and dequantize."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pass import nvfp4
from fp4pass.errors import ArgumentError

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weights():
    return st.builds(
        lambda seed, experts, n, blocks, spread: (
            torch.randn((experts, n, 16 * blocks)[experts == 0 :], generator=torch.Generator().manual_seed(seed))
            * torch.logspace(-spread, 0, n)[:, None]
        ),
        st.integers(0, 2**32 - 1),
        st.integers(0, 3),
        st.integers(1, 5),
        st.integers(1, 4),
        st.floats(0, 6),
    )


@settings(max_examples=60, deadline=None)
@given(weights())
def test_error_of_every_weight_is_at_most_one_unit_of_its_block_scale(weight):
    codes, scale, global_scale = nvfp4.quantize(weight)
    back = nvfp4.dequantize(codes, scale, global_scale, torch.float64)
    error = (weight.double() - back).abs().unflatten(-1, (-1, 16)).amax(-1)
    # Half the widest gap of E2M1 is one unit; what a scale that was rounded down cuts off the maximum is less.
    unit = global_scale.double().reshape(-1, *[1] * (weight.ndim - 1)) if weight.ndim == 3 else global_scale.double()
    assert (error <= unit * (scale.double() * 1.01 + 6 * 2.0**-10)).all()


@settings(max_examples=30, deadline=None)
@given(weights())
def test_shapes_and_dtypes_are_the_checkpoints(weight):
    codes, scale, global_scale = nvfp4.quantize(weight)
    *outer, n, k = weight.shape
    assert (codes.dtype, list(codes.shape)) == (torch.uint8, [*outer, n, k // 2])
    assert (scale.dtype, list(scale.shape)) == (torch.float8_e4m3fn, [*outer, n, k // 16])
    assert (global_scale.dtype, list(global_scale.shape)) == (torch.float32, outer)
    assert (scale.float() >= 2.0**-9).all() and (scale.float() <= 448).all()


def test_values_on_the_grid_come_back_exactly_with_even_k_in_the_low_nibble():
    row = torch.tensor([*VALUES, *[-value for value in VALUES]]) * 448
    codes, scale, global_scale = nvfp4.quantize(row[None])
    assert global_scale == 1 and scale.float().item() == 448
    assert (codes & 0x0F).tolist() == [[0, 2, 4, 6, 8, 10, 12, 14]]
    assert (codes >> 4).tolist() == [[1, 3, 5, 7, 9, 11, 13, 15]]
    assert torch.equal(nvfp4.dequantize(codes, scale, global_scale, torch.float32)[0], row)


def test_ties_go_to_the_even_code():
    halfway = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.zeros(16)
    row[: len(halfway)] = torch.tensor(halfway)
    row[-1] = 6.0
    codes, scale, global_scale = nvfp4.quantize(row[None] * 448)
    got = nvfp4.dequantize(codes, scale, global_scale, torch.float32)[0] / 448
    assert got[: len(halfway)].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_rounding_is_to_the_nearest_of_the_sixteen_values():
    row = torch.linspace(-6, 6, 4096)
    row[row.unflatten(0, (-1, 16)).argmax(-1) + 16 * torch.arange(256)] = 6.0  # every block gets the scale 448
    codes, scale, global_scale = nvfp4.quantize(row[None] * 448)
    grid = torch.tensor([*VALUES, *[-value for value in VALUES]])
    nearest = (row[:, None] - grid).abs().min(-1).values
    got = nvfp4.dequantize(codes, scale, global_scale, torch.float32)[0] / 448
    assert torch.equal((row - got).abs(), nearest)


def test_zero_matrices_and_zero_blocks_stay_zero():
    weight = torch.randn(3, 16, 32)
    weight[1] = 0
    weight[2, 5, :16] = 0
    codes, scale, global_scale = nvfp4.quantize(weight)
    back = nvfp4.dequantize(codes, scale, global_scale, torch.float32)
    assert (back[1] == 0).all() and (back[2, 5, :16] == 0).all()
    assert (global_scale > 0).all() and global_scale.isfinite().all()


def test_every_expert_has_its_own_global_scale():
    weight = torch.randn(2, 16, 32)
    weight[1] *= 100
    codes, _, global_scale = nvfp4.quantize(weight)
    alone = nvfp4.quantize(weight[1])
    assert torch.equal(codes[1], alone[0]) and global_scale[1] == alone[2] and global_scale[0] < global_scale[1] / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dequantize_rounds_once_to_the_asked_dtype(dtype):
    parts = nvfp4.quantize(torch.randn(32, 64))
    exact = nvfp4.dequantize(*parts, torch.float64)
    got = nvfp4.dequantize(*parts, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, exact.float().to(dtype) if dtype != torch.float64 else exact)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.randn(16, 24), "[16, 24]"),
        (torch.randn(32), "[32]"),
        (torch.randn(2, 2, 16, 16), "[2, 2, 16, 16]"),
        (torch.empty(0, 16), "[0, 16]"),
        (torch.zeros(16, 16, dtype=torch.int8), "torch.int8"),
        (torch.zeros(16, 16, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.full((16, 16), torch.nan), "NaN"),
        (torch.full((16, 16), torch.inf), "Inf"),
        (torch.full((16, 16), 1e300, dtype=torch.float64), "Inf"),
    ],
)
def test_quantize_refuses(weight, words):
    with pytest.raises(ArgumentError, match="quantize") as caught:
        nvfp4.quantize(weight)
    assert words in caught.value.seen


def test_dequantize_refuses_tensors_that_do_not_belong_together():
    codes, scale, global_scale = nvfp4.quantize(torch.randn(32, 64))
    with pytest.raises(ArgumentError, match="wrong dtype"):
        nvfp4.dequantize(codes, scale.view(torch.uint8), global_scale)
    with pytest.raises(ArgumentError, match="do not belong together"):
        nvfp4.dequantize(codes, scale[:, :2], global_scale)
    with pytest.raises(ArgumentError, match="do not belong together"):
        nvfp4.dequantize(codes, scale, global_scale.expand(32))
