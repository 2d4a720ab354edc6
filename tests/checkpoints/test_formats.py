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
from fp4pass.lowering.layout import INTERLEAVED
from fp4pass.synthesize import synthesize

from .files import altered, read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]
MIXED = ["lightning", "super", "ultra", "nano-4b"]
PRODUCTS = (NVFP4Linear, NVFP4Experts, FP8Linear)


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
@pytest.mark.parametrize("sm", [80, 90])
def test_in_the_graph_every_product_is_rewritten(sm, like, mixed):
    model = skeleton(mixed(like), target_sm=sm)
    report = fp4pass.explain(model, IDS.to("meta"), use_cache=False, options={"target_sm": sm})
    products = {name: type(module) for name, module in model.named_modules() if isinstance(module, PRODUCTS)}
    assert report.refused == () and {entry.module for entry in report.rewritten} == set(products)
    in_fp8 = [entry for entry in report.rewritten if products[entry.module] is FP8Linear]
    assert in_fp8 and {entry.op for entry in in_fp8} == {"fp4pass.fp8_linear"}
    assert all((entry.n, entry.k) == tuple(model.get_submodule(entry.module).weight.shape) for entry in in_fp8)
    rounding = {entry.module for entry in in_fp8 if "activations E4M3" in entry.source}
    # Of these layers only nano-4b's head has no static scale for its input.
    assert rounding == ({entry.module for entry in in_fp8} - {"lm_head"} if sm == 90 else set())


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


def test_with_a_quantized_embedding_the_models_dtype_is_that_of_its_activations(mixed, tmp_path):
    model = from_pretrained(mixed("nano-4b"))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


GROUPS_OF_32 = {"hidden": 96, "intermediate": 64, "shared": 96, "mamba_head_dim": 6}
"""Widths that have whole groups of 32."""


@pytest.fixture(scope="module")
def wide_groups(tmp_path_factory, tiny_sizes):
    """A checkpoint in W4A16 with one scale for 32 weights, and the same weights with one for 16."""
    made = tmp_path_factory.mktemp("groups")
    source = synthesize(made / "source", "nano", quantization_in_config=True, **(tiny_sizes | GROUPS_OF_32))

    def edit(tensors, keep):
        for name in [name for name in tensors if name.endswith("input_scale")]:
            del tensors[name]
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            halves = tensors[name].view(torch.uint8)[:, ::2]
            halves = halves if keep else halves.repeat_interleave(2, -1)
            tensors[name] = halves.contiguous().view(torch.float8_e4m3fn)

    def declare(config, group):
        quantization = config["quantization_config"] | {"quant_algo": "W4A16_NVFP4", "group_size": group}
        del quantization["config_groups"]
        config["quantization_config"] = quantization

    return tuple(
        altered(source, made / str(group), lambda t, keep=group == 32: edit(t, keep), lambda c, g=group: declare(c, g))
        for group in (32, 16)
    )


def test_one_scale_may_serve_32_weights_where_only_weights_are_quantized(wide_groups, tmp_path, monkeypatch):
    coarse, fine = wide_groups
    model, same = (from_pretrained(directory, dtype=torch.float32) for directory in (coarse, fine))
    assert torch.equal(model(IDS).logits, same(IDS).logits)
    assert_saves_what_it_read(coarse, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not fp4pass.explain(skeleton(coarse), IDS.to("meta"), use_cache=False).refused


def test_scales_for_32_weights_are_saved_from_any_layout(wide_groups, tmp_path):
    coarse, _ = wide_groups
    model = from_pretrained(coarse)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.set_layout(INTERLEAVED)
    model.save_pretrained(tmp_path)
    read, saved = read_tensors(coarse), read_tensors(tmp_path)
    assert [name for name in read if not same_bytes(read[name], saved[name])] == []


def test_scales_for_16_under_a_config_for_32_are_refused(wide_groups, tmp_path):
    _, fine = wide_groups

    def edit(config):
        config["quantization_config"]["group_size"] = 32

    with pytest.raises(CheckpointError, match=r"weight_scale is not what the quantization config says"):
        from_pretrained(altered(fine, tmp_path / "bad", edit_config=edit))


def test_experts_in_groups_of_two_sizes_are_refused(wide_groups, tmp_path):
    coarse, _ = wide_groups

    def edit(config):
        layers = {f"backbone.layers.1.mixer.experts.{e}.{p}_proj": {} for e in range(8) for p in ("up", "down")}
        for expert, entry in enumerate(layers.values()):
            entry |= {"quant_algo": "W4A16_NVFP4", "group_size": 16 if expert == 3 else 32}
        config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    with pytest.raises(CheckpointError, match="different precisions") as caught:
        from_pretrained(altered(coarse, tmp_path / "bad", edit_config=edit))
    assert "1 in NVFP4" in caught.value.seen and "15 in NVFP4 in groups of 32" in caught.value.seen


def test_rows_of_an_embedding_take_the_models_dtype(nano_dir, tmp_path):
    model = from_pretrained(altered(nano_dir, tmp_path / "embedding", quantized_embedding, name_embedding))
    table = model.get_input_embeddings()
    assert table(IDS).dtype == torch.bfloat16 and table.half()(IDS).dtype == torch.float16
    assert torch.equal(table(IDS)[0], table.dense("weight", torch.float16)[IDS[0]])


def test_files_in_the_spelling_of_transformers_load(nano_dir, nano_model, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace("backbone.", "model.")] = tensors.pop(name)

    def rename(config):
        text = json.dumps(config["quantization_config"]).replace("backbone.", "model.")
        config["quantization_config"] = json.loads(text)

    model = from_pretrained(altered(nano_dir, tmp_path / "model", edit, rename))
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)
