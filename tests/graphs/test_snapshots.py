"""Whole graphs before and after the passes, as for a GPU: everything lies on the meta device."""

from __future__ import annotations

from dataclasses import replace

import torch
from expecttest import assert_expected_inline

from fp4pass.lowering.reference import decode_codes
from fp4pass.match.convention import DIVIDE, SWIZZLED

from .decodes import blocks
from .running import compiling
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, K, Packed, Spelling, linear, weight_on_the_left

LINEAR = LINEARS["our_modules_interleaved"]
GROUPED = PRODUCTS_OF_EXPERTS["grouped_interleaved"]
GATHERED = PRODUCTS_OF_EXPERTS["gathered_after_decode_interleaved"]


def tiles_divided(m: Packed, dtype: torch.dtype) -> torch.Tensor:
    rows, groups = m.scale.shape
    tiles = m.scale.view(rows // 128, groups // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, groups)
    return (blocks(decode_codes(m.codes)) * (tiles.float() / m.factor).unsqueeze(-1)).flatten(-2).to(dtype)


TILES = Spelling(tiles_divided, linear, shape=(128, 192), scales=SWIZZLED, global_scale=DIVIDE)


def compile_for_sm90(spelling: Spelling, *inputs: torch.Tensor, bias: bool = False) -> None:
    run = compiling(Packed(spelling, bias=bias, device="meta"), {"target_sm": 90, "check": True})
    with torch.set_grad_enabled(inputs[0].requires_grad):
        run(*inputs)
    assert run.report.rewritten and not run.report.refused


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_linear_before_and_after(passes):
    compile_for_sm90(LINEARS["bits_of_bfloat16"], on_meta(3, K))
    before, after = passes
    assert_expected_inline(
        before,
        """\
t4 = aten.bitwise_and.Scalar(in1, 15)  # uint8[48x40]
t5 = aten.__rshift__.Scalar(in1, 4)  # uint8[48x40]
t6 = aten.unsqueeze.default(t4, 2)  # uint8[48x40x1]
t7 = aten.unsqueeze.default(t5, 2)  # uint8[48x40x1]
t8 = aten.cat.default([t6, t7], -1)  # uint8[48x40x2]
t9 = aten.view.default(t8, [48, 80])  # uint8[48x80]
t10 = prims.convert_element_type.default(t9, torch.int16)  # int16[48x80]
t11 = aten.bitwise_and.Scalar(t10, 7)  # int16[48x80]
t12 = aten.__lshift__.Scalar(t11, 6)  # int16[48x80]
t13 = aten.bitwise_and.Scalar(t10, 8)  # int16[48x80]
t14 = aten.__lshift__.Scalar(t13, 12)  # int16[48x80]
t15 = aten.bitwise_or.Tensor(t12, t14)  # int16[48x80]
t16 = aten.view.dtype(t15, torch.bfloat16)  # bfloat16[48x80]
t17 = aten.alias.default(t16)  # bfloat16[48x80]
t18 = prims.convert_element_type.default(t17, torch.float32)  # float32[48x80]
t19 = aten.mul.Tensor(t18, 8.507059173023462e+37)  # float32[48x80]
t20 = aten.view.default(t19, [48, 5, 16])  # float32[48x5x16]
t21 = prims.convert_element_type.default(in2, torch.float32)  # float32[48x5]
t22 = aten.mul.Tensor(t21, in3)  # float32[48x5]
t23 = aten.unsqueeze.default(t22, -1)  # float32[48x5x1]
t24 = aten.mul.Tensor(t20, t23)  # float32[48x5x16]
t25 = aten.view.default(t24, [48, 80])  # float32[48x80]
t26 = prims.convert_element_type.default(t25, torch.bfloat16)  # bfloat16[48x80]
t27 = aten.permute.default(t26, [1, 0])  # bfloat16[80x48]
t28 = aten.mm.default(in0, t27)  # bfloat16[3x48]
return [t28]""",
    )
    assert_expected_inline(
        after,
        """\
t4 = aten.view.dtype(in2, torch.uint8)  # uint8[48x5]
t5 = fp4pass.linear.default(in0, in1, t4, in3, None, plain)  # bfloat16[3x48]
return [t5]""",
    )


def test_linear_with_bias(passes):
    compile_for_sm90(LINEAR, on_meta(2, 3, K), bias=True)
    assert_expected_inline(
        passes[1],
        """\
t5 = prims.convert_element_type.default(in4, torch.bfloat16)  # bfloat16[48]
t6 = aten.view.default(in0, [6, 80])  # bfloat16[6x80]
t7 = aten.view.dtype(in1, torch.uint8)  # uint8[48x5]
t8 = fp4pass.linear.default(t6, in2, t7, in3, t5, interleaved)  # bfloat16[6x48]
t9 = aten.view.default(t8, [2, 3, 48])  # bfloat16[2x3x48]
return [t9]""",
    )


def test_weight_on_the_left(passes):
    compile_for_sm90(replace(LINEAR, multiply=weight_on_the_left), on_meta(3, K))
    assert_expected_inline(
        passes[1],
        """\
t4 = aten.permute.default(in0, [1, 0])  # bfloat16[80x3]
t5 = aten.permute.default(t4, [1, 0])  # bfloat16[3x80]
t6 = aten.view.dtype(in1, torch.uint8)  # uint8[48x5]
t7 = fp4pass.linear.default(t5, in2, t6, in3, None, interleaved)  # bfloat16[3x48]
t8 = aten.permute.default(t7, [1, 0])  # bfloat16[48x3]
t9 = aten.clone.default(t8)  # bfloat16[48x3]
t10 = aten.permute.default(t9, [1, 0])  # bfloat16[3x48]
return [t10]""",
    )


def test_scales_in_tiles_and_a_global_scale_that_divides(passes):
    compile_for_sm90(TILES, on_meta(3, 192))
    assert_expected_inline(
        passes[1],
        """\
t4 = aten.view.dtype(in1, torch.uint8)  # uint8[128x12]
t5 = aten.reshape.default(t4, [1, 3, 32, 4, 4])  # uint8[1x3x32x4x4]
t6 = aten.permute.default(t5, [0, 3, 2, 1, 4])  # uint8[1x4x32x3x4]
t7 = aten.reshape.default(t6, [128, 12])  # uint8[128x12]
t8 = aten.reciprocal.default(in3)  # float32[]
t9 = fp4pass.linear.default(in0, in2, t7, t8, None, plain)  # bfloat16[3x128]
return [t9]""",
    )


def test_grouped_experts(passes):
    compile_for_sm90(GROUPED, on_meta(7, K), on_meta(3, dtype=torch.int32))
    assert_expected_inline(
        passes[1],
        """\
t5 = aten.view.dtype(in1, torch.uint8)  # uint8[3x48x5]
t6 = fp4pass.grouped_linear.default(in0, in2, t5, in3, in4, interleaved)  # bfloat16[7x48]
return [t6]""",
    )


def test_gathered_experts(passes):
    compile_for_sm90(GATHERED, on_meta(7, K), on_meta(7, dtype=torch.int64))
    assert_expected_inline(
        passes[1],
        """\
t5 = aten.unsqueeze.default(in0, -1)  # bfloat16[7x80x1]
t6 = aten.squeeze.dim(t5, 2)  # bfloat16[7x80]
t7 = aten.view.dtype(in1, torch.uint8)  # uint8[3x48x5]
t8 = aten.lt.Scalar(in4, 0)  # bool[7]
t9 = aten.add.Tensor(in4, 3)  # int64[7]
t10 = aten.where.self(t8, t9, in4)  # int64[7]
t11 = fp4pass.gathered_linear.default(t6, in2, t7, in3, t10, interleaved)  # bfloat16[7x48]
t12 = aten.unsqueeze.default(t11, 2)  # bfloat16[7x48x1]
t13 = aten.squeeze.dim(t12, -1)  # bfloat16[7x48]
return [t13]""",
    )


def test_forward_and_backward_of_a_linear(passes):
    compile_for_sm90(LINEAR, on_meta(3, K).requires_grad_())
    assert_expected_inline(
        passes[1],
        """\
t5 = aten.view.dtype(in1, torch.uint8)  # uint8[48x5]
t6 = fp4pass.linear.default(in0, in2, t5, in3, None, interleaved)  # bfloat16[3x48]
t7 = aten.view.dtype(in1, torch.uint8)  # uint8[48x5]
t8 = fp4pass.linear_backward.default(in4, in2, t7, in3, interleaved)  # bfloat16[3x80]
return [t6, t8, None, None, None]""",
    )
