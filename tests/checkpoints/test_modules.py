"""The packed modules: what they compute, who owns the layout, what moves and what never changes."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fp4pass import nvfp4
from fp4pass.checkpoint import packed
from fp4pass.checkpoint.modules import NVFP4Experts, NVFP4Linear
from fp4pass.checkpoint.packed import Scalar
from fp4pass.errors import ArgumentError, CheckpointError
from fp4pass.lowering.layout import LAYOUTS, layout_for, scale_to_plain

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch.compiler.reset()


def linear(k=64, n=48, bias=None, layout="plain"):
    module = NVFP4Linear(k, n, bias=bias, input_scale=Scalar(), device="cpu")
    module.weight.data, module.weight_scale.data, module.weight_scale_2.data = nvfp4.quantize(torch.randn(n, k))
    module.input_scale.data.fill_(0.5)
    if bias is not None:
        module.bias.data.normal_()
    module.set_layout(layout)
    return module


def experts(implementation="grouped_mm", layout="plain", count=8, hidden=128, intermediate=64):
    config = SimpleNamespace(mlp_hidden_act="relu2", _experts_implementation=implementation)
    module = NVFP4Experts(config, count, hidden, intermediate, device="cpu")
    for name, shape in {"up_proj": (count, intermediate, hidden), "down_proj": (count, hidden, intermediate)}.items():
        parts = nvfp4.quantize(torch.randn(shape) / shape[-1] ** 0.5)
        for suffix, part in zip(("", "_scale", "_scale_2"), parts, strict=True):
            getattr(module, name + suffix).data = part
    module.set_layout(layout)
    return module


def routed(tokens=6, dtype=torch.float32, hidden=128, count=8):
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, 2)


def same_bytes(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same_state(a, b):
    assert set(a) == set(b)
    assert all(same_bytes(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_linear_multiplies_by_the_decoded_weight(layout, bias):
    module, x = linear(bias=bias, layout=layout), torch.randn(2, 3, 64)
    expected = torch.nn.functional.linear(x.double(), module.dense("weight", torch.float64))
    expected = expected if bias is None else expected + module.bias
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.reference_forward(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_compute_the_weighted_sum_of_their_products(layout):
    module, (x, ids, weights) = experts(layout=layout), routed()
    up, down = module.dense("up_proj", torch.float64), module.dense("down_proj", torch.float64)
    expected = torch.zeros(6, 128, dtype=torch.float64)
    for token in range(6):
        for slot in range(2):
            hidden = torch.relu(up[ids[token, slot]] @ x[token].double()) ** 2
            expected[token] += weights[token, slot] * (down[ids[token, slot]] @ hidden)
    torch.testing.assert_close(module(x, ids, weights).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.reference_forward(x, ids, weights).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["interleaved", "fragments"])
@pytest.mark.parametrize("gradients", [False, True])
def test_linear_traces_whole_to_plain_pytorch(dtype, gradients, layout):
    module, x = linear(layout=layout), torch.randn(3, 64, dtype=dtype)
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.set_grad_enabled(gradients):
        got = torch.compile(module, fullgraph=True, backend=backend)(x)
    assert torch.equal(got, torch.nn.functional.linear(x, module.dense("weight", dtype)))
    assert len(graphs) == 1 and "fp4pass" not in graphs[0].code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("implementation", "layout"), [("grouped_mm", "fragments"), ("batched_mm", "fragments"), ("eager", "plain")]
)
def test_experts_trace_whole_with_transformers_own_functions(dtype, implementation, layout):
    module, (x, ids, weights) = experts(implementation, layout), routed(dtype=dtype)
    graphs = []
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    got = compiled(x, ids, weights)
    torch.testing.assert_close(got, module(x, ids, weights), rtol=0.05, atol=0.05)
    assert len(graphs) == 1 and ("bmm" in graphs[0].code) == (implementation == "batched_mm")


def test_a_traced_linear_notices_a_change_of_layout():
    module, x = linear(), torch.randn(3, 64)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    expected = compiled(x)
    for layout in LAYOUTS:
        module.set_layout(layout)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("make", [lambda: linear(k=80), lambda: linear(k=48), lambda: experts(intermediate=48)])
def test_a_layout_that_is_not_for_the_shapes_is_refused_before_anything_moves(make):
    module = make()
    before = copy.deepcopy(dict(module.packed_parameters()))
    with pytest.raises(ArgumentError, match=r"set_layout.*units of 16 rows by 64 columns"):
        module.set_layout("fragments")
    assert module.layout == "plain"
    assert_same_state(before, dict(module.packed_parameters()))


def test_scales_move_with_their_codes():
    module = linear()
    before = module.weight_scale.view(torch.uint8).clone()
    module.set_layout("fragments")
    assert not torch.equal(module.weight_scale.view(torch.uint8), before)
    assert torch.equal(scale_to_plain(module.weight_scale.view(torch.uint8), "fragments"), before)


def test_traced_linear_has_a_backward_to_the_activations():
    module, x = linear(), torch.randn(3, 64, requires_grad=True)
    torch.compile(module, fullgraph=True, backend="eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dense("weight", torch.float32).sum(0).expand(3, -1))


@pytest.mark.parametrize("make", [linear, experts])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_speaks_the_checkpoints_layout_and_leaves_the_module_alone(make, layout):
    module = make()
    plain = copy.deepcopy(module.state_dict())
    module.set_layout(layout)
    before = copy.deepcopy(dict(module.packed_parameters()))
    assert_same_state(module.state_dict(), plain)
    assert module.layout == layout
    assert_same_state(before, dict(module.packed_parameters()))


@pytest.mark.parametrize("make", [linear, experts])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_the_checkpoints_layout(make, layout, assign):
    source, target = make(), make(layout=layout)
    arriving = source.state_dict()
    untouched = copy.deepcopy(arriving)
    target.load_state_dict(arriving, assign=assign)
    assert target.layout == layout
    assert_same_state(target.state_dict(), untouched)
    assert_same_state(arriving, untouched)
    source.set_layout(layout)
    assert_same_state(dict(target.packed_parameters()), dict(source.packed_parameters()))


def test_a_dense_weight_is_not_rounded_into_the_codes():
    module = linear()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32"):
        module.load_state_dict(before | {"weight": torch.randn(48, 40)})
    assert_same_state(module.state_dict(), before)


def test_missing_and_misshapen_entries_are_reported_as_usual():
    module = linear(layout="fragments")
    state = module.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(state | {"weight": state["weight"][:16]})
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        module.load_state_dict(state | {"weight_scale": state["weight_scale"][:, :2]})
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        module.load_state_dict(state)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [linear, experts])
@pytest.mark.parametrize("clone", [copy.deepcopy, saved_and_loaded])
def test_copies_keep_layout_and_bytes(make, clone):
    module = make(layout="fragments")
    twin = clone(module)
    assert twin.layout == "fragments"
    assert_same_state(dict(twin.packed_parameters()), dict(module.packed_parameters()))
    twin.set_layout("plain")
    assert module.layout == "fragments"
    assert_same_state(twin.state_dict(), module.state_dict())


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_of_dtype_reaches_the_bias_alone(change, layout):
    module = linear(bias=torch.float32, layout=layout)
    before = copy.deepcopy(dict(module.packed_parameters()))
    change(module)
    assert module.bias.dtype != torch.float32 and module.layout == layout
    assert_same_state(before, dict(module.packed_parameters()))


def test_no_whole_weight_is_converted_to_find_its_dtype():
    module, seen = linear(), []

    def convert(tensor):
        seen.append(tensor.numel())
        return tensor.half() if tensor.is_floating_point() else tensor

    module._apply(convert)
    assert max(seen) == module.weight.numel() and module.weight_scale.numel() not in seen


@pytest.fixture
def meta_is_a_gpu(monkeypatch):
    """Lets the meta device have the layouts of a GPU."""
    stand_in = {"meta": torch.device("cuda")}
    monkeypatch.setattr(packed, "layout_for", lambda at, shapes: layout_for(stand_in.get(at.type, at), shapes))


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (linear, "fragments"),
        (experts, "fragments"),
        (lambda: linear(k=80), "interleaved"),
        (lambda: experts(intermediate=48), "interleaved"),
    ],
)
def test_arriving_on_a_device_chooses_the_layout(make, layout, meta_is_a_gpu):
    module = make()
    module.to("cpu")
    assert module.layout == "plain"
    assert module.to("meta").layout == layout
    assert module.to("meta").layout == layout
    module.bfloat16()
    assert module.layout == layout and module.device.type == "meta"


def test_leaving_a_device_restores_the_checkpoints_layout(meta_is_a_gpu):
    module = linear().to("meta")
    state = linear().state_dict()
    module.to_empty(device="cpu")
    assert module.layout == "plain"
    module.load_state_dict(state)
    assert_same_state(module.state_dict(), state)


def test_assigned_weights_bring_their_devices_layout(meta_is_a_gpu):
    module, state = linear().to("meta"), linear().state_dict()
    module.load_state_dict(state, assign=True)
    assert module.layout == "plain" and module.device.type == "cpu"
    assert_same_state(module.state_dict(), state)


def test_packed_parameters_take_no_gradients():
    assert not any(parameter.requires_grad for parameter in [*linear().parameters(), *experts().parameters()])


@pytest.mark.parametrize(("k", "n"), [(72, 48), (80, 40)])
def test_widths_that_are_no_multiple_of_16_are_refused(k, n):
    with pytest.raises(CheckpointError, match="multiples of 16"):
        NVFP4Linear(k, n)


def test_an_activation_without_kernel_is_refused():
    with pytest.raises(CheckpointError, match="activation"):
        NVFP4Experts(SimpleNamespace(mlp_hidden_act="gelu_new"), 8, 80, 48)
