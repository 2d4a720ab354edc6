"""What is wrong with a checkpoint is said by name, before a model exists."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fp4pass.checkpoint import quantizer
from fp4pass.checkpoint.load import from_pretrained
from fp4pass.errors import CheckpointError
from fp4pass.synthesize import synthesize

from .files import altered

quantizer.register()
IN_PROJ = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"
Q_PROJ = "backbone.layers.2.mixer.q_proj"


def refused(directory, words):
    """The error that loading ``directory`` raises, the same by either way of loading."""
    with pytest.raises(CheckpointError, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(directory)
    error = caught.value
    assert all((error.what, error.seen, error.expected, error.do))
    return error


def put(name, change):
    """An edit that replaces one tensor by ``change`` of it."""
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_nan(byte):
    def change(scale):
        changed = scale.view(torch.uint8).clone()
        changed[-1, -1] = byte
        return changed.view(torch.float8_e4m3fn)

    return change


def test_a_missing_shard(nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    (directory / "model-00002-of-00003.safetensors").unlink()
    error = refused(directory, "a shard of the checkpoint is missing: model-00002-of-00003")
    assert error.do == "download the missing file"


def test_a_truncated_shard(nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(directory, "model-00002-of-00003.safetensors cannot be read")


def test_an_index_that_leads_out_of_the_folder(nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    shutil.move(directory / "model-00002-of-00003.safetensors", tmp_path / "outside.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003", "../outside"))
    refused(directory, "outside of its folder")


@pytest.mark.parametrize(
    "name", [f"{IN_PROJ}.weight_scale", f"{EXPERT}.weight_scale_2", f"{EXPERT}.weight", "lm_head.weight"]
)
def test_a_missing_tensor(name, nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", lambda tensors: tensors.pop(name))
    refused(directory, f"tensor {name} is missing")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{IN_PROJ}.weight_scale", lambda t: t.view(torch.uint8)),
        (f"{IN_PROJ}.weight_scale", lambda t: t.float()),
        (f"{IN_PROJ}.weight_scale", lambda t: t[:, :4]),
        (f"{IN_PROJ}.weight", lambda t: t.view(torch.int8)),
        (f"{IN_PROJ}.weight", lambda t: torch.zeros(240, 80, dtype=torch.bfloat16)),
        (f"{IN_PROJ}.weight_scale_2", lambda t: t.expand(240)),
        (f"{IN_PROJ}.weight_scale_2", lambda t: t.half()),
        (f"{EXPERT}.weight", lambda t: t[:32]),
        (f"{EXPERT}.weight_scale_2", lambda t: t.reshape(1)),
        (f"{Q_PROJ}.weight", lambda t: t[:32]),
        (f"{Q_PROJ}.weight", lambda t: torch.zeros(64, 40, dtype=torch.uint8)),
        ("backbone.embeddings.weight", lambda t: t[:, :64]),
    ],
)
def test_a_wrong_dtype_or_shape(name, change, nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", put(name, change))
    error = refused(directory, f"tensor {name} is not what the quantization config says")
    assert error.seen.endswith("in model.safetensors")


@pytest.mark.parametrize("name", [IN_PROJ, EXPERT])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_among_the_block_scales(name, byte, nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", put(f"{name}.weight_scale", with_nan(byte)))
    error = refused(directory, "NaN among the block scales")
    assert error.what.startswith(f"tensor {name}.weight_scale: ")
    assert "1 of " in error.seen and error.seen.endswith("in model.safetensors")


@pytest.mark.parametrize("name", [IN_PROJ, EXPERT])
@pytest.mark.parametrize("value", [0.0, -0.0, -1e-4, torch.nan, torch.inf, 27000.0])
def test_an_impossible_global_scale(name, value, nano_dir, tmp_path):
    edit = put(f"{name}.weight_scale_2", lambda scale: torch.full_like(scale, value))
    error = refused(altered(nano_dir, tmp_path / "bad", edit), "impossible global scale")
    assert error.what.startswith(f"tensor {name}.weight_scale_2: ")
    assert error.seen == f"{float(torch.tensor(value))}, 1 of 1 values, in model.safetensors"


def test_a_tensor_that_would_change_a_layers_meaning(nano_dir, tmp_path):
    def edit(tensors):
        tensors[f"{IN_PROJ}.pre_quant_scale"] = torch.ones(80)

    refused(altered(nano_dir, tmp_path / "bad", edit), "pre_quant_scale has no place in the model")


def test_an_unknown_quant_algo(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["quant_algo"] = "NVFP4_SVD"

    refused(altered(nano_dir, tmp_path / "bad", edit_config=edit), "quant_algo NVFP4_SVD is not computed")


def test_group_size_32_with_quantized_activations(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["group_size"] = 32

    refused(altered(nano_dir, tmp_path / "bad", edit_config=edit), "unsupported group size")


def test_a_config_that_excludes_a_quantized_layer(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["ignore"].append(IN_PROJ)

    error = refused(altered(nano_dir, tmp_path / "bad", edit_config=edit), f"tensor {IN_PROJ}.weight is not what")
    assert "U8 [240, 40]" in error.seen and "not quantized" in error.expected


def test_a_config_that_quantizes_a_dense_layer(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["ignore"].remove("lm_head")

    refused(altered(nano_dir, tmp_path / "bad", edit_config=edit), r"tensor lm_head\.weight is not what")


def test_experts_of_different_precisions(nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"]["ignore"].append(EXPERT)

    error = refused(
        altered(nano_dir, tmp_path / "bad", edit_config=edit), "experts of one layer have different precisions"
    )
    assert error.seen == "15 in NVFP4, 1 in BF16"


def test_a_layer_that_the_model_does_not_have(nano_dir, tmp_path):
    def edit(config):
        layers = {name: {"quant_algo": "NVFP4"} for name in (IN_PROJ, "backbone.norm_f")}
        config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    error = refused(altered(nano_dir, tmp_path / "bad", edit_config=edit), "not linear layers of this model")
    assert "backbone.norm_f" in error.seen


def test_a_tensor_in_two_shards(nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    first, last = (directory / f"model-0000{i}-of-00003.safetensors" for i in (1, 3))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor}, last, metadata={"format": "pt"})
    error = refused(directory, f"tensor {name} is there twice")
    assert first.name in error.seen and last.name in error.seen


def test_a_quantization_config_that_is_not_json(tmp_path, tiny_sizes):
    directory = synthesize(tmp_path / "bad", **tiny_sizes)
    (directory / "hf_quant_config.json").write_text('{"quantization": ')
    with pytest.raises(CheckpointError, match="is not JSON"):
        from_pretrained(directory)


def test_an_activation_that_experts_do_not_have(nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", edit_config=lambda config: config.update(mlp_hidden_act="gelu"))
    refused(directory, "activation that fp4pass does not compute")


def test_a_layer_whose_width_has_no_nvfp4_form(nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", edit_config=lambda config: config.update(moe_intermediate_size=40))
    refused(directory, r"backbone\.layers\.1\.mixer\.experts: up_proj has a shape")


@pytest.mark.parametrize("method", [None, "gptq", "bitsandbytes", 7])
def test_what_is_quantized_in_another_way_is_refused_by_name(method, nano_dir, tmp_path):
    def edit(config):
        config["quantization_config"] = {} if method is None else {"quant_method": method}

    with pytest.raises(CheckpointError, match=f"quant_method {method} is not computed"):
        from_pretrained(altered(nano_dir, tmp_path / "bad", edit_config=edit))


@pytest.mark.parametrize("wrong", [{"num_experts_per_tok": 9}, {"num_experts_per_tok": 0}, {"n_group": 3}])
def test_more_experts_than_there_are(wrong, nano_dir, tmp_path):
    directory = altered(nano_dir, tmp_path / "bad", edit_config=lambda config: config.update(wrong))
    with pytest.raises(CheckpointError, match="a choice of experts that there is not"):
        from_pretrained(directory)


@pytest.mark.parametrize("content", ['{"cache_implementation": "none such"}', '{"watermarking_config": {"a": 1}}'])
def test_a_generation_config_of_another_world(content, nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not one that transformers understands"):
        from_pretrained(directory)


@pytest.mark.parametrize(
    "name", ["config.json", "hf_quant_config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_brackets_within_brackets(name, nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    (directory / name).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        from_pretrained(directory)


def test_a_folder_in_the_place_of_a_file(nano_dir, tmp_path):
    directory = shutil.copytree(nano_dir, tmp_path / "bad")
    (directory / "hf_quant_config.json").unlink()
    (directory / "hf_quant_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json is not JSON"):
        from_pretrained(directory)
