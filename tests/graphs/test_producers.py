"""Layers of every library that writes NVFP4: by hand, and with the library itself where it is installed."""

from __future__ import annotations

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

import fp4pass
from fp4pass.match.reasons import Reason

from . import producers
from .running import activations, called, compiling, listing, relative_error

SHAPE, K = (96, 80), 80
"""Neither whole tiles of 128 rows nor of 4 blocks."""
EXPERTS, IDS = 3, torch.tensor([0, 2, 2, 1, 0])

LAYERS = {
    "compressed-tensors": (lambda: producers.CompressedTensors(*SHAPE), "linear scales, global scale divides"),
    "torchao in rows": (lambda: producers.TorchAO(*SHAPE, tiles=False), "linear scales, global scale multiplies"),
    "torchao in tiles": (lambda: producers.TorchAO(*SHAPE, tiles=True), "swizzled scales, global scale multiplies"),
    "torchao in whole tiles": (
        lambda: producers.TorchAO(128, 128, tiles=True),
        "swizzled scales, global scale multiplies",
    ),
    "torchao without per-tensor scale": (
        lambda: producers.TorchAO(*SHAPE, tiles=True, per_tensor=False),
        "swizzled scales, no global scale",
    ),
    "modelopt": (lambda: producers.ModelOpt(*SHAPE), "linear scales, global scale multiplies"),
}


@torch.no_grad()
def assert_rewritten(module, inputs, exact, op, source):
    """Returns the graph; the result is as near to the exact one as a result in this dtype can be."""
    run = compiling(module, {"check": True})
    result = run(*inputs)
    (entry,) = run.report.rewritten
    assert not run.report.refused
    assert (entry.op, entry.source) == (op, f"plain codes, {source}")
    assert relative_error(result, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[inputs[0].dtype]
    return run.graphs[0], entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_hand(name, dtype):
    make, source = LAYERS[name]
    layer = make()
    x = activations(5, layer.exact.shape[1], dtype=dtype)
    assert_rewritten(layer, (x,), x.double() @ layer.exact.T, "fp4pass.linear", source)


def test_experts_of_compressed_tensors_by_hand():
    layer, x = producers.CompressedTensors(EXPERTS, *SHAPE), activations(5, K)
    exact = torch.einsum("snk,sk->sn", layer.exact[IDS], x.double())
    assert_rewritten(layer, (x, IDS), exact, "fp4pass.gathered_linear", "linear scales, global scale divides")


def test_the_graph_of_compressed_tensors():
    layer, x = producers.CompressedTensors(*SHAPE), activations(5, K, dtype=torch.bfloat16)
    source = LAYERS["compressed-tensors"][1]
    graph, _ = assert_rewritten(layer, (x,), x.double() @ layer.exact.T, "fp4pass.linear", source)
    assert_expected_inline(
        listing(graph),
        """\
t5 = aten.view.dtype(in4, torch.uint8)  # uint8[96x5]
t6 = aten.reciprocal.default(in3)  # float32[1]
t7 = aten.reshape.default(t6, [])  # float32[]
t8 = fp4pass.linear.default(in0, in1, t5, t7, None, plain)  # bfloat16[5x96]
return [t8]""",
    )


def test_the_graph_of_torchao_in_tiles():
    layer, x = producers.TorchAO(*SHAPE, tiles=True), activations(5, K, dtype=torch.bfloat16)
    source = LAYERS["torchao in tiles"][1]
    graph, _ = assert_rewritten(layer, (x,), x.double() @ layer.exact.T, "fp4pass.linear", source)
    assert_expected_inline(
        listing(graph),
        """\
t4 = aten.view.dtype(in2, torch.uint8)  # uint8[32x32]
t5 = aten.reshape.default(t4, [1, 2, 32, 4, 4])  # uint8[1x2x32x4x4]
t6 = aten.permute.default(t5, [0, 3, 2, 1, 4])  # uint8[1x4x32x2x4]
t7 = aten.reshape.default(t6, [128, 8])  # uint8[128x8]
t8 = aten.slice.Tensor(t7, 0, 0, 96)  # uint8[96x8]
t9 = aten.slice.Tensor(t8, 1, 0, 5)  # uint8[96x5]
t10 = aten.clone.default(t9)  # uint8[96x5]
t11 = fp4pass.linear.default(in0, in1, t10, in3, None, plain)  # bfloat16[5x96]
return [t11]""",
    )


# --- The libraries themselves.


class Model(nn.Module):
    """A layer with a name."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=bias, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [96, 128])
def test_torchao_weight_only(rows, bias):
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model, x = Model(rows, 256, bias), activations(5, 256, dtype=torch.bfloat16)
    quantize_(model, NVFP4WeightOnlyConfig())
    exact = x.double() @ model.layer.weight.dequantize(torch.float64).T
    exact = exact + model.layer.bias.double() if bias else exact
    source = "swizzled scales, global scale multiplies"
    assert assert_rewritten(model, (x,), exact, "fp4pass.linear", source)[1].module == "layer"


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_torchao_tensors(tiles, per_tensor):
    nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    model, x = Model(96, 80), activations(5, 80, dtype=torch.bfloat16)
    factor = torch.tensor(0.01) if per_tensor else None
    packed = nvfp4_tensor.NVFP4Tensor.to_nvfp4(
        model.layer.weight.detach(), per_tensor_scale=factor, is_swizzled_scales=tiles
    )
    model.layer.weight = nn.Parameter(packed, requires_grad=False)
    exact = x.double() @ packed.dequantize(torch.float64).T
    order, factor = "swizzled" if tiles else "linear", "global scale multiplies" if per_tensor else "no global scale"
    assert_rewritten(model, (x,), exact, "fp4pass.linear", f"{order} scales, {factor}")


@torch.no_grad()
def assert_unquantized(module, x, exact, source):
    """Activations that a graph quantizes are plain again, or rounded to FP4 where that is asked for."""
    for option, least, most in (("bf16", 0.0, 0.005), ("emulate", 0.05, 0.15)):
        run = compiling(module, {"check": True, "target_sm": 90, "activations": option})
        assert least < relative_error(run(x), exact) < most
        (entry,) = run.report.rewritten
        assert (entry.op, entry.source) == ("fp4pass.linear", source) and not run.report.refused
        assert not [name for name in called(run.graphs[0]) if "scaled_mm" in name]


@pytest.mark.parametrize("shape", [(96, 80), (128, 256)])
@pytest.mark.parametrize("per_call", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
def test_torchao_with_activations_in_fp4(tiles, per_call, shape):
    """torchao's own config asks for SM100 before it builds these; ``per_call``: their factor is found at every call."""
    nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    model, x = Model(*shape, bias=True), activations(5, shape[1], dtype=torch.bfloat16)
    unit_of = nvfp4_tensor.per_tensor_amax_to_scale
    weight = model.layer.weight.detach()
    packed = nvfp4_tensor.NVFP4Tensor.to_nvfp4(
        weight,
        per_tensor_scale=unit_of(weight.abs().max()),
        act_per_tensor_scale=None if per_call else unit_of(x.abs().max()),
        is_swizzled_scales=tiles,
        act_quant_kwargs=nvfp4_tensor.QuantizeTensorToNVFP4Kwargs(
            is_swizzled_scales=tiles, use_dynamic_per_tensor_scale=per_call
        ),
    )
    model.layer.weight = nn.Parameter(packed, requires_grad=False)
    exact = x.double() @ packed.dequantize(torch.float64).T + model.layer.bias.double()
    assert_unquantized(model, x, exact, "aten::_scaled_mm")


def test_compressed_tensors_with_activations_in_fp4():
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, dynamic="local"
    )

    class Real(producers.CompressedTensors):
        def forward(self, x):
            unit = self.input_global_scale
            scale, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=self, global_scale=unit)
            x = forward.fake_quantize(x, scale, zero, args, global_scale=unit)
            return functional.linear(x, self.weight(x.dtype))

    layer, x = Real(*SHAPE), activations(5, K, dtype=torch.bfloat16)
    layer.register_buffer("input_global_scale", torch.tensor([300.0]))
    source = f"plain codes, {LAYERS['compressed-tensors'][1]}"
    assert_unquantized(layer, x, x.double() @ layer.exact.T, source)


def test_compressed_tensors_functions():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)

    class Real(producers.CompressedTensors):
        def weight(self, dtype):
            rows, half = self.weight_packed.shape
            values = helpers.unpack_fp4_from_uint8(self.weight_packed, rows, 2 * half)
            scale = self.weight_scale.to(values.dtype)
            return dequantize(values, scale, args=args, global_scale=self.weight_global_scale, dtype=dtype)

    layer, x = Real(*SHAPE), activations(5, K, dtype=torch.bfloat16)
    source = LAYERS["compressed-tensors"][1]
    assert_rewritten(layer, (x,), x.double() @ layer.exact.T, "fp4pass.linear", source)


def modelopt_layer():
    """A layer quantized by ModelOpt, its input, and the library."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    model, x = Model(96, 80), activations(5, 80, dtype=torch.bfloat16)
    quantization.quantize(model, copy.deepcopy(quantization.NVFP4_DEFAULT_CFG), lambda m: m(x))
    return model, x, quantization


def exact_of_compressed(model, x):
    quantizer = model.layer.weight_quantizer
    packed = model.layer.weight.data.view(torch.uint8), quantizer._scale, quantizer._double_scale
    return x.double() @ producers.nvfp4.dequantize(*packed, torch.float64).T


def test_modelopt_with_a_dense_weight():
    """Its op runs on GPUs alone. The activation's is taken out; the weight's stays and is listed with what to do."""
    model, x, _ = modelopt_layer()
    run = compiling(model, {"check": True, "target_sm": 90})
    with pytest.raises(Exception, match="CUDA"):
        run(x)
    (entry,) = run.report.refused
    assert entry.reason == Reason.DENSE.sentence and "compress" in entry.remedy
    assert sum("dynamic_block_quantize" in name for name in called(run.graphs[0])) == 1


@torch.no_grad()
def test_modelopt_compressed_with_activations_in_fp4(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x, quantization = modelopt_layer()
    quantization.compress(model)
    torch.compiler.reset()
    # Not as one graph: the layer tries to import tensorrt_llm at every call.
    result = torch.compile(model, backend="fp4pass", options={"target_sm": 90})(x)
    assert relative_error(result, exact_of_compressed(model, x)) < 4e-3
    (entry,) = fp4pass.last_report().rewritten
    assert entry.op == "fp4pass.linear" and not fp4pass.last_report().refused


def test_modelopt_compressed():
    model, x, quantization = modelopt_layer()
    model.layer.input_quantizer.disable()
    quantization.compress(model)
    exact = exact_of_compressed(model, x)
    assert assert_rewritten(model, (x,), exact, "fp4pass.linear", LAYERS["modelopt"][1])[1].module == "layer"
