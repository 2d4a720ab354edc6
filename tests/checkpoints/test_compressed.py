"""compressed-tensors checkpoints in NVFP4, and what is said of a model that transformers unpacked."""

import json
from types import SimpleNamespace

import pytest
import torch

import fp4pass
from fp4pass.checkpoint.compressed import CompressedConfig
from fp4pass.checkpoint.load import from_pretrained, skeleton
from fp4pass.checkpoint.modules import NVFP4Experts, NVFP4Linear
from fp4pass.errors import CheckpointError, OptionError
from fp4pass.synthesize import synthesize

from .files import altered, read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


@pytest.fixture(scope="module")
def compressed_dir(tmp_path_factory, tiny_sizes):
    """A tiny nano-like checkpoint as compressed-tensors writes it."""
    return synthesize(tmp_path_factory.mktemp("compressed") / "tiny", "nano", format="compressed-tensors", **tiny_sizes)


def group(targets, **weights):
    return {"config_groups": {"group_0": {"targets": targets, "weights": WEIGHTS | weights}}}


def config(**changes):
    return {**group(["Linear"]), "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]} | changes


def test_loads_packed_computes_and_saves(compressed_dir, dense_twin, tmp_path):
    model, info = from_pretrained(compressed_dir, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model.model.layers[0].mixer.in_proj, NVFP4Linear)
    assert isinstance(model.model.layers[1].mixer.experts, NVFP4Experts)
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)
    saved = from_pretrained(compressed_dir)
    saved.save_pretrained(tmp_path / "saved")
    got, wanted = read_tensors(tmp_path / "saved"), read_tensors(compressed_dir)
    assert set(got) == set(wanted) and all(same_bytes(got[name], wanted[name]) for name in wanted)
    before, after = (json.loads((d / "config.json").read_text()) for d in (compressed_dir, tmp_path / "saved"))
    assert after["quantization_config"] == before["quantization_config"]
    assert torch.equal(from_pretrained(tmp_path / "saved")(IDS).logits, saved(IDS).logits)


def test_the_numbers_are_those_of_the_same_weights_in_modelopts_form(nano_dir, nano_model, tmp_path):
    names = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}

    def edit(tensors):
        for name in [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]:
            for theirs, ours in names.items():
                tensor = tensors.pop(f"{name}.{theirs}")
                tensors[f"{name}.{ours}"] = tensor if tensor.ndim else (1 / tensor).reshape(1)

    def describe(content):
        ignore = [name for name in content["quantization_config"]["ignore"] if "conv1d" not in name]
        content["quantization_config"] = config(ignore=ignore, quant_method="compressed-tensors")

    model = from_pretrained(altered(nano_dir, tmp_path / "same", edit, describe), dtype=torch.float32)
    expected = nano_model(dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_every_product_is_rewritten(compressed_dir):
    report = fp4pass.explain(skeleton(compressed_dir), IDS.to("meta"), use_cache=False, options={"target_sm": 80})
    assert len(report.rewritten) == 8 and not report.refused
    assert "model.layers.0.mixer.in_proj" in {entry.module for entry in report.rewritten}


@pytest.mark.parametrize("like", ["lightning", "super", "nano-4b"])
def test_other_releases_load_in_this_form_too(like, tmp_path, tiny_sizes):
    latent = {"latent": 32} if like == "super" else {}
    directory = synthesize(tmp_path / like, like, format="compressed-tensors", **tiny_sizes, **latent)
    model = from_pretrained(directory)
    assert model(IDS).logits.isfinite().all()
    assert all(name.startswith("mtp.") for name in model.hf_quantizer.dropped)
    inputs = [name for name in model.state_dict() if name.endswith("input_global_scale")]
    assert bool(inputs) == (like != "lightning")


@pytest.mark.parametrize(
    ("targets", "ignore", "quantized", "dense"),
    [
        (["Linear"], [], ["lm_head", "model.layers.0.mixer.in_proj"], []),
        (
            ["Linear"],
            ["lm_head", "re:.*mixer.*_proj"],
            ["model.layers.1.x"],
            ["lm_head", "model.layers.0.mixer.q_proj"],
        ),
        (
            ["re:.*experts.*"],
            ["re:backbone.layers.3"],
            ["model.layers.1.experts.0"],
            ["lm_head", "model.layers.3.experts"],
        ),
        (["model.layers.0.in_proj"], [], ["backbone.layers.0.in_proj"], ["model.layers.0.in_proj2"]),
        (["re:model.layers.0"], ["model.layers.0.in_proj"], ["model.layers.0.x"], ["model.layers.0.in_proj"]),
    ],
)
def test_targets_and_exceptions(targets, ignore, quantized, dense):
    read = CompressedConfig.from_dict(config(**group(targets), ignore=ignore))
    assert {read.algo(name) for name in quantized} == {"W4A16_NVFP4"}
    assert {read.algo(name) for name in dense} <= {None}
    assert read.algo("model.embeddings", "Embedding") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "pack-quantized"}, "format pack-quantized of compressed-tensors is not computed"),
        ({"format": None}, "format None"),
        ({"config_groups": {}}, "a group for each precision"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "targets and weights"),
        (group("Linear"), "a list of class names"),
        (group(["re:("]), "that Python's re understands"),
        (group(["Linear"], group_size=32), "does not compute"),
        (group(["Linear"], type="int"), "does not compute"),
        (group(["Linear"], dynamic=True), "does not compute"),
        ({"ignore": "lm_head"}, "a list of class names"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config of compressed"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of compressed"),
        ({"sparsity_config": "2:4"}, "sparsity_config of compressed"),
    ],
)
def test_other_recipes_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        CompressedConfig.from_dict(config(**changes))


@pytest.mark.parametrize("sparsity", [None, {}, {"format": "dense", "ignore": []}])
def test_what_exporters_write_where_there_is_nothing_to_say_is_accepted(sparsity):
    facts = config(transform_config={}, sparsity_config=sparsity, version="0.20.1", quantization_status="compressed")
    assert CompressedConfig.from_dict(facts).algo("model.layers.0.in_proj") == "W4A16_NVFP4"


@pytest.mark.parametrize("value", [0.5, 0.0, -100.0, torch.nan, torch.inf])
def test_a_divisor_that_is_no_divisor_is_refused(value, compressed_dir, tmp_path):
    name = "backbone.layers.1.mixer.experts.3.up_proj.weight_global_scale"
    directory = altered(compressed_dir, tmp_path / "bad", lambda t: t.update({name: torch.tensor([value])}))
    with pytest.raises(CheckpointError, match=rf"tensor {name}: impossible global scale"):
        from_pretrained(directory)


def test_modelopts_names_under_this_config_are_refused_and_the_reverse(compressed_dir, nano_dir, tmp_path):
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (compressed_dir, nano_dir))

    def take(other):
        return lambda content: content.update(quantization_config=other["quantization_config"])

    with pytest.raises(CheckpointError, match=r"tensor \S+weight_packed is missing"):
        from_pretrained(altered(nano_dir, tmp_path / "a", edit_config=take(theirs)))
    with pytest.raises(CheckpointError, match=r"tensor \S+weight is missing"):
        from_pretrained(altered(compressed_dir, tmp_path / "b", edit_config=take(ours)))


def test_an_unknown_format_is_not_written(tmp_path, tiny_sizes):
    with pytest.raises(OptionError, match="unknown format"):
        synthesize(tmp_path / "never", format="gguf", **tiny_sizes)


def test_the_quantizer_of_transformers_stays_in_its_place():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__.startswith("transformers.")


def test_explain_says_that_transformers_has_unpacked_the_model(nano_model):
    twin = torch.nn.Linear(16, 16)
    facts = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    twin.config = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=lambda: facts))
    report = fp4pass.explain(twin, torch.randn(2, 16))
    (entry,) = report.refused
    assert "unpacked" in entry.reason and "fp4pass.from_pretrained" in entry.remedy
    assert not fp4pass.explain(nano_model(), IDS, use_cache=False).refused
