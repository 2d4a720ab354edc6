"""Graphs before and after un-fusing FP4 products."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from . import fused, test_unfuse_activations, test_unfuse_experts
from .fused import Layer, compile_for_sm90, rows
from .running import activations

pytestmark = pytest.mark.usefixtures("libraries")


def test_linear_with_bias_that_quantizes_itself(passes):
    compile_for_sm90(Layer(fused.auto_linear), rows())
    assert_expected_inline(
        passes[0],
        """\
t6 = aten.view.default(in3, [1024])  # uint8[1024]
t7 = auto_deploy.torch_quant_nvfp4_linear.default(in5, in0, in1, in2, t6, in4)  # bfloat16[5x80]
return [t7]""",
    )
    assert_expected_inline(
        passes[1],
        """\
t6 = aten.view.default(in3, [1024])  # uint8[1024]
t7 = aten.mul.Tensor(in4, in2)  # float32[]
t8 = aten.view.default(t6, [1, 2, 32, 4, 4])  # uint8[1x2x32x4x4]
t9 = aten.permute.default(t8, [0, 3, 2, 1, 4])  # uint8[1x4x32x2x4]
t10 = aten.clone.default(t9)  # uint8[1x4x32x2x4]
t11 = aten.view.default(t10, [128, 8])  # uint8[128x8]
t12 = aten.slice.Tensor(t11, 0, 0, 80)  # uint8[80x8]
t13 = aten.slice.Tensor(t12, 1, 0, 6)  # uint8[80x6]
t14 = aten.clone.default(t13)  # uint8[80x6]
t15 = fp4pass.linear.default(in5, in0, t14, t7, in1, plain)  # bfloat16[5x80]
return [t15]""",
    )


def test_grouped_product(passes):
    layer = test_unfuse_experts.layer_of_experts(test_unfuse_experts.grouped)
    compile_for_sm90(layer, activations(11, fused.K, dtype=torch.bfloat16), None)
    assert_expected_inline(
        passes[0],
        """\
t8 = aten.empty.memory_format([11, 48])  # uint8[11x48]
t9 = aten.empty.memory_format([384, 8])  # uint8[384x8]
t10 = auto_functionalized_v2(_C.scaled_fp4_experts_quant.default)
t11 = <built-in function getitem>(t10, 1)  # uint8[11x48]
t12 = <built-in function getitem>(t10, 2)  # uint8[384x8]
t13 = aten.empty.memory_format([11, 80])  # bfloat16[11x80]
t14 = auto_functionalized_v2(_C.cutlass_fp4_group_mm.default)
t15 = <built-in function getitem>(t14, 1)  # bfloat16[11x80]
return [t15]""",
    )
    assert_expected_inline(
        passes[1],
        """\
t8 = aten.slice.Tensor(in2, 0, 0, 3)  # int32[3]
t9 = aten.select.int(in7, 1, 0)  # int32[3]
t10 = aten.add.Tensor(t8, t9)  # int32[3]
t11 = aten.mul.Tensor(in6, in1)  # float32[3]
t12 = aten.view.default(in5, [3, 1, 2, 32, 4, 4])  # uint8[3x1x2x32x4x4]
t13 = aten.permute.default(t12, [0, 1, 4, 3, 2, 5])  # uint8[3x1x4x32x2x4]
t14 = aten.clone.default(t13)  # uint8[3x1x4x32x2x4]
t15 = aten.view.default(t14, [3, 128, 8])  # uint8[3x128x8]
t16 = aten.slice.Tensor(t15, 1, 0, 80)  # uint8[3x80x8]
t17 = aten.slice.Tensor(t16, 2, 0, 6)  # uint8[3x80x6]
t18 = aten.clone.default(t17)  # uint8[3x80x6]
t19 = fp4pass.grouped_linear.default(in0, in4, t18, t11, t10, plain)  # bfloat16[11x80]
return [t19]""",
    )


def test_block_of_experts(passes):
    block = test_unfuse_experts.Block(listed=False, with_gate=False)
    ids, routing = torch.tensor([[0, 2]] * 5), torch.ones(5, 2)
    compile_for_sm90(block, rows(), ids, routing)
    assert_expected_inline(
        passes[1],
        """\
t11 = aten.view.default(in2, [3, 1, 2, 32, 4, 4])  # uint8[3x1x2x32x4x4]
t12 = aten.permute.default(t11, [0, 1, 4, 3, 2, 5])  # uint8[3x1x4x32x2x4]
t13 = aten.clone.default(t12)  # uint8[3x1x4x32x2x4]
t14 = aten.view.default(t13, [3, 128, 8])  # uint8[3x128x8]
t15 = aten.slice.Tensor(t14, 1, 0, 64)  # uint8[3x64x8]
t16 = aten.slice.Tensor(t15, 2, 0, 6)  # uint8[3x64x6]
t17 = aten.clone.default(t16)  # uint8[3x64x6]
t18 = aten.view.default(in3, [3, 1, 1, 32, 4, 4])  # uint8[3x1x1x32x4x4]
t19 = aten.permute.default(t18, [0, 1, 4, 3, 2, 5])  # uint8[3x1x4x32x1x4]
t20 = aten.clone.default(t19)  # uint8[3x1x4x32x1x4]
t21 = aten.view.default(t20, [3, 128, 4])  # uint8[3x128x4]
t22 = aten.slice.Tensor(t21, 1, 0, 96)  # uint8[3x96x4]
t23 = aten.clone.default(t22)  # uint8[3x96x4]
t24 = aten.view.default(in8, [-1, 96])  # bfloat16[5x96]
t25 = aten.view.default(in6, [-1])  # float32[3]
t26 = aten.view.default(in4, [-1])  # float32[1]
t27 = aten.mul.Tensor(t25, t26)  # float32[3]
t28 = aten.view.default(in7, [-1])  # float32[3]
t29 = aten.view.default(in5, [-1])  # float32[1]
t30 = aten.mul.Tensor(t28, t29)  # float32[3]
t31 = fp4pass.experts.default(t24, in9, in10, in0, t17, t27, in1, t23, t30, relu2, plain)  # bfloat16[5x96]
t32 = aten.view.default(t31, [5, 96])  # bfloat16[5x96]
return [t32]""",
    )


def test_product_of_torch_behind_a_quantizer_written_out(passes):
    layer = test_unfuse_activations.torch_layer(
        test_unfuse_activations.scaled_mm_v2, test_unfuse_activations.dynamic_unit
    )
    compile_for_sm90(layer, activations(5, 128, dtype=torch.bfloat16))
    assert_expected_inline(
        passes[1],
        """\
t5 = aten.abs.default(in0)  # bfloat16[5x128]
t6 = aten.max.default(t5)  # bfloat16[]
t7 = prims.convert_element_type.default(t6, torch.float32)  # float32[]
t8 = aten.div.Tensor(t7, 2688.0)  # float32[]
t9 = aten.mul.Tensor(in2, in3)  # float32[]
t10 = aten.permute.default(in4, [1, 0])  # uint8[64x256]
t11 = aten.reciprocal.default(t8)  # float32[]
t12 = aten.mul.Tensor(t8, t9)  # float32[]
t13 = aten.mul.Tensor(t12, t11)  # float32[]
t14 = aten.permute.default(t10, [1, 0])  # uint8[256x64]
t15 = aten.view.default(in1, [2, 2, 32, 4, 4])  # uint8[2x2x32x4x4]
t16 = aten.permute.default(t15, [0, 3, 2, 1, 4])  # uint8[2x4x32x2x4]
t17 = aten.clone.default(t16)  # uint8[2x4x32x2x4]
t18 = aten.view.default(t17, [256, 8])  # uint8[256x8]
t19 = aten.alias.default(t18)  # uint8[256x8]
t20 = fp4pass.linear.default(in0, t14, t19, t13, None, plain)  # bfloat16[5x256]
return [t20]""",
    )
