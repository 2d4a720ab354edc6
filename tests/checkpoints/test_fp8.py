"""FP8 layers of mixed checkpoints: their module, its two modes, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fp4pass
from fp4pass import from_pretrained
from fp4pass.checkpoint.fp8 import FP8Linear
from fp4pass.checkpoint.packed import Scalar
from fp4pass.errors import CheckpointError
from fp4pass.lowering import fp8, reference

from .files import altered, same_bytes

IDS = torch.arange(5, 25)[None]
IN_PROJ = "backbone.layers.0.mixer.in_proj"


@pytest.fixture
def fp8_layer():
    """An FP8 layer of 80 to 48 with a static input scale for values up to 4, and its dense weight."""
    module = FP8Linear(80, 48, bias=torch.float32, input_scale=Scalar((1,)), device="cpu")
    module.weight.data = (100 * torch.randn(48, 80)).to(torch.float8_e4m3fn)
    module.weight_scale.data.fill_(0.01)
    module.input_scale.data.fill_(4 / 448)
    module.bias.data.normal_()
    dense = module.weight.to(torch.float64) * module.weight_scale.double()
    module.settle()
    return module, dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_only_fp8_multiplies_by_the_decoded_weight(fp8_layer, dtype):
    module, dense = fp8_layer
    module.to(dtype)
    x = torch.randn(2, 3, 80).to(dtype)
    expected = torch.nn.functional.linear(x.double(), dense, module.bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (module.weight.dtype, module.mode) == (torch.uint8, "w8a16")
    for got in (module(x), torch.compile(module, backend="eager", fullgraph=True)(x)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_w8a8_rounds_activations_by_the_static_scale_and_saturates(fp8_layer):
    module, dense = fp8_layer
    module.set_mode("w8a8")
    x = torch.randn(2, 3, 80)
    x[0, 0, 0] = 100.0
    rounded = (x / (4 / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * (4 / 448)
    expected = torch.nn.functional.linear(rounded, dense, module.bias.double())
    for call in (module, module.reference_forward, torch.compile(module, backend="eager", fullgraph=True)):
        torch.testing.assert_close(call(x).double(), expected, rtol=1e-4, atol=1e-3)


def every_byte(scale_dtype, shape, sm, mode):
    """A layer whose weight has every finite E4M3 byte, with scales as a checkpoint may have them, on such a GPU."""
    scalar = Scalar(shape, scale_dtype)
    module = FP8Linear(127, 2, weight_scale=scalar, input_scale=scalar, device="cpu")
    finite = torch.arange(256)[torch.arange(256) & 0x7F != 0x7F]
    module.weight.data = finite.to(torch.uint8).view(2, 127).view(torch.float8_e4m3fn)
    module.weight_scale.data.fill_(0.0371)
    module.input_scale.data.fill_(0.013)
    module.settle()
    module.suit(sm)
    module.mode = mode
    return module


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("sm", "mode"), [(None, "w8a16"), (80, "w8a16"), (90, "w8a16"), (80, "w8a8"), (90, "w8a8")])
def test_what_is_traced_has_the_bits_of_the_reference(sm, mode, shape, scale_dtype):
    torch.compiler.reset()  # the limit of recompiles is one for all modules of a class
    module = every_byte(scale_dtype, shape, sm, mode)
    factor, input_scale = (module.get_parameter(name).float() for name in ("weight_scale", "input_scale"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dense = (reference.decode_scale(module.weight) * factor).to(dtype)
        assert same_bytes(module.dense("weight", dtype), dense)
        x = torch.cat((torch.randn(200, 127), 100 * torch.randn(200, 127), torch.zeros(1, 127))).to(dtype)
        before = (fp8.rounded(x, input_scale).float() * input_scale).to(dtype) if mode == "w8a8" else x
        traced = torch.compile(module, backend="eager", fullgraph=True)(x)
        assert same_bytes(traced, torch.nn.functional.linear(before, dense))
    exact = reference.decode_scale(module.weight, torch.float64) * factor.double()
    assert torch.equal(module.dense("weight", torch.float64), exact)


@pytest.mark.parametrize(("sm", "mode", "most"), [(90, "w8a8", 12), (90, "w8a16", 5), (None, "w8a16", 5)])
def test_a_layer_is_traced_to_few_operations(sm, mode, most):
    """Ultra has two of them a layer, and tracing is what an explain of it spends its time on."""
    torch.compiler.reset()
    module, graphs = every_byte(torch.float32, (), sm, mode), []
    count = lambda gm, inputs: graphs.append(gm.graph) or gm  # noqa: E731
    torch.compile(module, backend=count, fullgraph=True)(torch.ones(4, 127, dtype=torch.bfloat16))
    (graph,) = graphs
    assert sum(node.op not in ("placeholder", "output") for node in graph.nodes) <= most


def test_bfloat16_scales_are_computed_with_in_float32_and_saved_as_they_were():
    module = every_byte(torch.bfloat16, (1,), None, "w8a16")
    assert module.weight_scale.dtype == module.input_scale.dtype == torch.float32
    saved = module.state_dict()
    assert saved["weight_scale"].dtype == saved["input_scale"].dtype == torch.bfloat16
    fresh = every_byte(torch.bfloat16, (1,), None, "w8a16")
    fresh.weight_scale.data.zero_()
    fresh.load_state_dict(saved)
    assert fresh.weight_scale.dtype == torch.float32 and torch.equal(fresh.weight_scale, module.weight_scale)


def test_w8a8_without_a_static_scale_is_an_error():
    module = FP8Linear(80, 48, device="cpu")
    with pytest.raises(CheckpointError, match="cannot round its activations") as caught:
        module.set_mode("w8a8")
    assert "no input_scale" in caught.value.seen and "no scale is made up" in caught.value.do
    with pytest.raises(CheckpointError, match="unknown mode"):
        module.set_mode("w4a4")


@pytest.mark.parametrize(("sm", "mode"), [(None, "w8a16"), (80, "w8a16"), (86, "w8a16"), (89, "w8a8"), (90, "w8a8")])
def test_the_mode_follows_the_gpu_unless_it_is_fixed(sm, mode, fp8_layer, monkeypatch):
    module, _ = fp8_layer
    monkeypatch.setattr(fp4pass.checkpoint.fp8, "sm_of", lambda device: sm if device.type == "meta" else None)
    assert module.to("meta").mode == mode
    for fixed in ("w8a16", "w8a8"):
        module.set_mode(fixed)
        module.settle()
        assert module.mode == fixed
    module.set_mode(None)
    assert module.mode == mode


@pytest.mark.parametrize("layer", [FP8Linear(80, 48), FP8Linear(80, 40, input_scale=Scalar())])
def test_without_a_static_scale_or_with_odd_widths_activations_are_never_rounded(layer):
    layer.suit(90)
    assert layer.mode == "w8a16"


def test_the_mode_can_be_asked_for_when_loading(mixed, tmp_path):
    modes = {
        wanted: {module.mode for module in from_pretrained(mixed("super"), fp8=wanted).modules() if is_fp8(module)}
        for wanted in (None, "w8a16", "w8a8")
    }
    assert modes == {None: {"w8a16"}, "w8a16": {"w8a16"}, "w8a8": {"w8a8"}}

    def edit(tensors):
        del tensors[f"{IN_PROJ}.input_scale"]

    directory = altered(mixed("super"), tmp_path / "unscaled", edit)
    assert from_pretrained(directory)(IDS).logits.isfinite().all()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.in_proj: an FP8 layer cannot round"):
        from_pretrained(directory, fp8="w8a8")


def is_fp8(module):
    return isinstance(module, FP8Linear)


def test_experts_in_fp8_are_refused(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["quant_algo"] = "FP8"

    with pytest.raises(CheckpointError, match="routed experts in FP8"):
        from_pretrained(altered(nano_dir, tmp_path / "bad", edit_config=edit))


@pytest.mark.parametrize(("value", "tensor"), [(200.0, "weight_scale"), (0.0, "input_scale"), (-1.0, "weight_scale")])
def test_impossible_scales_of_fp8_layers_are_refused(value, tensor, mixed, tmp_path):
    name = f"{IN_PROJ}.{tensor}"
    directory = altered(mixed("super"), tmp_path / "bad", lambda t: t.update({name: torch.tensor(value)}))
    with pytest.raises(CheckpointError, match=rf"tensor {name}: impossible"):
        from_pretrained(directory)
