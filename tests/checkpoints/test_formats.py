"""Everything that a ModelOpt checkpoint can hold beside plain NVFP4: mixed precisions, AWQ, scalars of other forms."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import fp4pass
from fp4pass import nvfp4
from fp4pass.checkpoint.embedding import NVFP4Embedding
from fp4pass.checkpoint.fp8 import FP8Linear
from fp4pass.checkpoint.load import from_pretrained, skeleton
from fp4pass.checkpoint.modules import NVFP4Experts, NVFP4Linear
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.errors import CheckpointError
from fp4pass.synthesize import synthesize

from .files import altered, read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]
IN_PROJ = "backbone.layers.0.mixer.in_proj"
MIXED = ["lightning", "super", "ultra", "nano-4b"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_sizes):
    """The directory of a tiny checkpoint like one of the mixed releases, written once."""
    made = {}

    def get(like):
        if like not in made:
            latent = {"latent": 32} if like in ("super", "ultra") else {}
            made[like] = synthesize(tmp_path_factory.mktemp(like) / "tiny", like, **tiny_sizes, **latent)
        return made[like]

    return get


def assert_saves_what_it_read(directory, target):
    model = from_pretrained(directory)
    model.save_pretrained(target)
    wanted = {name: part for name, part in read_tensors(directory).items() if name not in model.hf_quantizer.dropped}
    got = read_tensors(target)
    assert set(got) == set(wanted)
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []


@pytest.mark.parametrize("like", MIXED)
def test_mixed_releases_load_compute_and_save(like, mixed, dense_twin, tmp_path):
    directory = mixed(like)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert_saves_what_it_read(directory, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_each_layer_has_the_precision_that_the_config_names(mixed):
    model = from_pretrained(mixed("super"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert kinds == {
        "model.layers.0.mixer.in_proj": FP8Linear,
        "model.layers.0.mixer.out_proj": FP8Linear,
        "model.layers.1.mixer.fc1_latent_proj": FP8Linear,
        "model.layers.3.mixer.fc1_latent_proj": FP8Linear,
        "model.layers.3.mixer.fc2_latent_proj": FP8Linear,
        "model.layers.1.mixer.shared_experts.up_proj": FP8Linear,
        "model.layers.1.mixer.shared_experts.down_proj": NVFP4Linear,
        "model.layers.3.mixer.shared_experts.up_proj": FP8Linear,
        "model.layers.3.mixer.shared_experts.down_proj": FP8Linear,
        **{f"model.layers.{layer}.mixer.experts": NVFP4Experts for layer in (1, 3)},
    }


def test_a_dense_model_with_packed_table_and_fp8_head(mixed):
    model = from_pretrained(mixed("nano-4b"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert kinds["model.embeddings"] == NVFP4Embedding and kinds["lm_head"] == FP8Linear
    assert kinds["model.layers.1.mixer.down_proj"] == FP8Linear
    assert kinds["model.layers.3.mixer.down_proj"] == kinds["model.layers.2.mixer.q_proj"] == NVFP4Linear
    assert model.lm_head.input_scale is None and len(kinds) == 12


def test_what_is_not_loaded_is_named_with_the_reason(mixed, caplog):
    with caplog.at_level(logging.INFO, "fp4pass.checkpoint"):
        model = from_pretrained(mixed("lightning"))
    assert "2 tensors are not loaded, scales of an FP8 KV cache" in caplog.text
    assert "of multi-token prediction" in caplog.text
    assert "FP8 layers: 2 as w8a16" in caplog.text
    assert {name.split(".")[0] for name in model.hf_quantizer.dropped} == {"backbone", "mtp"}


@pytest.mark.parametrize("like", MIXED)
def test_in_the_graph_4_bit_products_are_rewritten_and_fp8_ones_are_listed(like, mixed):
    model = skeleton(mixed(like))
    report = fp4pass.explain(model, IDS.to("meta"), use_cache=False, options={"target_sm": 80})
    fp8 = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert {entry.module for entry in report.refused} == fp8
    assert all("one byte an element" in entry.reason for entry in report.refused)
    products = (NVFP4Linear, NVFP4Experts)
    packed = {name for name, module in model.named_modules() if isinstance(module, products)}
    assert {entry.module for entry in report.rewritten} == packed


def test_scalars_may_be_lists_of_one_and_bfloat16(nano_dir, nano_model, dense_twin, tmp_path):
    def edit(tensors):
        for name in tensors:
            if name.endswith(("weight_scale_2", "input_scale")):
                tensors[name] = tensors[name].reshape(1).bfloat16()

    directory = altered(nano_dir, tmp_path / "scalars", edit)
    model = from_pretrained(directory, dtype=torch.float32)
    experts = model.model.layers[1].mixer.experts
    assert (experts.up_proj_scale_2.dtype, list(experts.up_proj_scale_2.shape)) == (torch.float32, [8, 1])
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model(IDS).logits, nano_model(dtype=torch.float32)(IDS).logits)
    assert_saves_what_it_read(directory, tmp_path / "saved")


def with_awq(names):
    """An edit that gives layers a ``pre_quant_scale`` and divides it out of their weights' global scale."""

    def edit(tensors):
        for name in names:
            tensors[f"{name}.pre_quant_scale"] = torch.full((tensors[f"{name}.weight"].shape[1] * 2,), 4.0).bfloat16()
            tensors[f"{name}.weight_scale_2"] = tensors[f"{name}.weight_scale_2"] / 4

    return edit


def awq(config):
    config["quantization_config"]["quant_algo"] = "NVFP4_AWQ"


def test_a_pre_quant_scale_is_applied_once(nano_dir, nano_model, tmp_path):
    """Powers of two change nothing but the place where they are applied, so that the logits are equal to the bit."""
    names = ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.shared_experts.down_proj"]
    names += ["backbone.layers.3.mixer.shared_experts.down_proj"]
    directory = altered(nano_dir, tmp_path / "awq", with_awq(names), awq)
    model = from_pretrained(directory, dtype=torch.float32)
    expected = nano_model(dtype=torch.float32)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert_saves_what_it_read(directory, tmp_path / "saved")


def test_a_pre_quant_scale_of_routed_experts_is_refused(nano_dir, tmp_path):
    names = ["backbone.layers.1.mixer.experts.3.up_proj"]
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.pre_quant_scale has no place"):
        from_pretrained(altered(nano_dir, tmp_path / "awq", with_awq(names), awq))


def test_a_pre_quant_scale_that_some_layers_lack_is_refused(nano_dir, tmp_path):
    names = ["backbone.layers.1.mixer.shared_experts.down_proj"]
    with pytest.raises(CheckpointError, match=r"tensor backbone\.layers\.3\.mixer\.shared_experts\.down_proj\.pre_q"):
        from_pretrained(altered(nano_dir, tmp_path / "awq", with_awq(names), awq))


def quantized_embedding(tensors):
    parts = nvfp4.quantize(tensors.pop("backbone.embeddings.weight"))
    names = ("weight", "weight_scale", "weight_scale_2")
    tensors |= {f"backbone.embeddings.{name}": part for name, part in zip(names, parts, strict=True)}


def name_embedding(config):
    quantized = config["quantization_config"]
    quantized["quantized_layers"] = {"backbone.embeddings": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}


def test_a_quantized_embedding_is_looked_up_packed(nano_dir, tmp_path, dense_twin):
    directory = altered(nano_dir, tmp_path / "embedding", quantized_embedding, name_embedding)
    model = from_pretrained(directory, dtype=torch.float32)
    table = model.get_input_embeddings()
    assert isinstance(table, NVFP4Embedding) and table.weight.dtype == torch.int64
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert_saves_what_it_read(directory, tmp_path / "saved")
    report = fp4pass.explain(model, IDS, use_cache=False)
    assert len(report.rewritten) == 8 and not report.refused


def test_rows_of_an_embedding_take_the_models_dtype(nano_dir, tmp_path):
    model = from_pretrained(altered(nano_dir, tmp_path / "embedding", quantized_embedding, name_embedding))
    table = model.get_input_embeddings()
    assert table(IDS).dtype == torch.bfloat16 and table.half()(IDS).dtype == torch.float16
    assert torch.equal(table(IDS)[0], table.dense("weight", torch.float16)[IDS[0]])


@pytest.fixture
def fp8_layer():
    """An FP8 layer of 80 to 48 with a static input scale for values up to 4, and its dense weight."""
    torch.manual_seed(0)
    module = FP8Linear(80, 48, bias=torch.float32, input_scale=fp4pass.checkpoint.packed.Scalar((1,)), device="cpu")
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


def test_large_fp8_weights_are_decoded_in_pieces(fp8_layer, monkeypatch):
    module, dense = fp8_layer
    x = torch.randn(3, 80)
    monkeypatch.setattr(fp4pass.checkpoint.fp8, "_PIECE_BYTES", 80 * 8 * 7)
    expected = torch.nn.functional.linear(x.double(), dense, module.bias.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("native", [False, True])
def test_w8a8_rounds_activations_by_the_static_scale_and_saturates(fp8_layer, native, monkeypatch):
    if native and torch.__version__ < "2.12":
        pytest.skip("this torch multiplies FP8 on GPUs alone")
    monkeypatch.setattr(fp4pass.checkpoint.fp8, "multiplies_fp8", lambda device: native)
    module, dense = fp8_layer
    module.set_mode("w8a8")
    x = torch.randn(2, 3, 80)
    x[0, 0, 0] = 100.0
    rounded = (x / (4 / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * (4 / 448)
    expected = torch.nn.functional.linear(rounded, dense, module.bias.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-3)
    got = torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


def test_w8a8_without_a_static_scale_is_an_error():
    module = FP8Linear(80, 48, device="cpu")
    with pytest.raises(CheckpointError, match="cannot round its activations") as caught:
        module.set_mode("w8a8")
    assert "no input_scale" in caught.value.seen and "no scale is made up" in caught.value.do
    with pytest.raises(CheckpointError, match="unknown mode"):
        module.set_mode("w4a4")


def test_the_mode_follows_the_device_unless_it_is_fixed(fp8_layer, monkeypatch):
    module, _ = fp8_layer
    monkeypatch.setattr(fp4pass.checkpoint.fp8, "multiplies_fp8", lambda device: device.type == "meta")
    assert module.to("meta").mode == "w8a8"
    module.set_mode("w8a16")
    assert module.mode == "w8a16"
    unscaled = FP8Linear(80, 48)
    unscaled.settle()
    assert unscaled.mode == "w8a16"


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


def test_files_in_the_spelling_of_transformers_load(nano_dir, nano_model, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace("backbone.", "model.")] = tensors.pop(name)

    def rename(config):
        text = json.dumps(config["quantization_config"]).replace("backbone.", "model.")
        config["quantization_config"] = json.loads(text)

    model = from_pretrained(altered(nano_dir, tmp_path / "model", edit, rename))
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)
