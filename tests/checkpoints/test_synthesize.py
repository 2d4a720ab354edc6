"""Synthetic checkpoints: the releases' tensors and config files, at any size."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fp4pass.checkpoint.releases import RELEASES, shorten
from fp4pass.checkpoint.tensors import quantization, tensors
from fp4pass.errors import OptionError
from fp4pass.synthesize import synthesize

LIKES = list(RELEASES)


def headers(directory):
    found = {}
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}


@pytest.mark.parametrize(("like", "count"), [("nano", 24147), ("lightning", 18487), ("super", 165860)])
def test_at_full_size_the_tensors_are_the_releases(like, count):
    names = [spec.name for spec in tensors(like, RELEASES[like].sizes)]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize(("like", "layers", "fp8"), [("lightning", 5981, 46), ("super", 41100, 139)])
def test_at_full_size_the_quantized_layers_are_the_releases(like, layers, fp8):
    quantized = quantization(like, RELEASES[like], RELEASES[like].sizes)["quantization"]["quantized_layers"]
    algos = [entry["quant_algo"] for entry in quantized.values()]
    assert (len(algos), algos.count("FP8")) == (layers, fp8)


@pytest.mark.parametrize(("like", "gigabytes"), [("nano", 19.3), ("lightning", 21.5), ("super", 80), ("ultra", 351.9)])
def test_at_full_size_the_bytes_are_the_releases(like, gigabytes):
    sizes = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
    total = sum(math.prod(spec.shape) * sizes[spec.dtype] for spec in tensors(like, RELEASES[like].sizes))
    assert abs(total / 1e9 - gigabytes) < (0.1 if gigabytes != 80 else 1)


def test_full_ultra_has_fp8_mambas_and_shared_experts_and_nothing_else_in_8_bit():
    quantized = quantization("ultra", RELEASES["ultra"], RELEASES["ultra"].sizes)["quantization"]["quantized_layers"]
    kinds = Counter((entry["quant_algo"], re.sub(r"\d+", "#", name)) for name, entry in quantized.items())
    mixer = "backbone.layers.#.mixer"
    assert kinds == {
        ("FP8", f"{mixer}.in_proj"): 48,
        ("FP8", f"{mixer}.out_proj"): 48,
        ("FP8", f"{mixer}.shared_experts.up_proj"): 48,
        ("FP8", f"{mixer}.shared_experts.down_proj"): 48,
        ("NVFP4", f"{mixer}.experts.#.up_proj"): 48 * 512,
        ("NVFP4", f"{mixer}.experts.#.down_proj"): 48 * 512,
    }


def test_full_nano_excludes_the_mamba_layer_before_each_attention_layer():
    excluded = quantization("nano", RELEASES["nano"], RELEASES["nano"].sizes)["quantization"]["exclude_modules"]
    assert len(excluded) == 60
    assert [name for name in excluded if name.endswith("in_proj")] == [
        f"backbone.layers.{layer}.mixer.in_proj" for layer in (4, 11, 18, 25, 32, 41)
    ]


@pytest.mark.parametrize("like", LIKES)
def test_every_release_can_be_written_small(like, tmp_path, tiny_sizes):
    latent = {"latent": 32} if RELEASES[like].sizes.latent else {}
    directory = synthesize(tmp_path / like, like, **tiny_sizes, **latent)
    config = json.loads((directory / "config.json").read_text())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(headers(directory))
    assert ("quantization_config" in config) == (like != "nano")
    assert json.loads((directory / "hf_quant_config.json").read_text())["producer"]["name"] == "modelopt"
    pattern = "M-*-" if like == "nano-4b" else "ME*E"
    assert AutoConfig.from_pretrained(directory).hybrid_override_pattern == pattern


def test_nano_has_the_documented_dtypes_and_shapes(nano_dir):
    found = headers(nano_dir)
    mixer = "backbone.layers.1.mixer"
    assert found[f"{mixer}.experts.7.up_proj.weight"] == ("U8", (48, 40))
    assert found[f"{mixer}.experts.7.down_proj.weight_scale"] == ("F8_E4M3", (80, 3))
    assert found[f"{mixer}.experts.7.up_proj.weight_scale_2"] == ("F32", ())
    assert found[f"{mixer}.shared_experts.up_proj.input_scale"] == ("F32", ())
    assert found[f"{mixer}.gate.weight"] == ("F32", (8, 80))
    assert found["backbone.layers.0.mixer.in_proj.weight"] == ("U8", (240, 40))
    assert found["backbone.layers.2.mixer.q_proj.weight"] == ("BF16", (64, 80))
    assert found["lm_head.weight"] == ("BF16", (320, 80))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, tiny_sizes):
    def written(name, **arguments):
        directory = synthesize(tmp_path / name, **tiny_sizes, **arguments)
        return {file.name: file.read_bytes() for file in directory.iterdir()}

    first = written("a")
    assert written("b") == first
    other = written("c", seed=1)
    assert other["model-00001-of-00001.safetensors"] != first["model-00001-of-00001.safetensors"]
    assert other["config.json"] == first["config.json"]


def test_several_processes_write_the_same_bytes(tmp_path, tiny_sizes):
    alone, together = (synthesize(tmp_path / str(jobs), shard_bytes=60_000, jobs=jobs, **tiny_sizes) for jobs in (1, 2))
    names = {file.name for file in alone.iterdir()}
    assert names == {file.name for file in together.iterdir()} and len(names) > 8
    assert [name for name in names if (alone / name).read_bytes() != (together / name).read_bytes()] == []


def test_shards_stay_below_the_bound(tmp_path, tiny_sizes):
    directory = synthesize(tmp_path / "sharded", shard_bytes=60_000, **tiny_sizes)
    files = list(directory.glob("*.safetensors"))
    with_headers = 60_000 + 20_000
    assert len(files) > 3 and max(file.stat().st_size for file in files) <= with_headers


@pytest.mark.parametrize(("layers", "pattern"), [(1, "M"), (2, "ME"), (3, "ME*"), (4, "ME*E"), (5, "MEM*E")])
def test_short_models_have_every_kind_of_layer(layers, pattern):
    assert shorten(RELEASES["nano"].sizes.pattern, layers) == pattern
    assert shorten(RELEASES["nano-4b"].sizes.pattern, layers).replace("-", "E") == pattern


def test_the_tokenizer_round_trips_and_every_id_decodes(nano_dir):
    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    text = "Größe: 42 <é> \n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert all(tokenizer.decode([token]) for token in range(320)) and len(tokenizer) == 320


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"like": "nanno"}, "unknown release"),
        ({"hiden": 80}, "did you mean 'hidden'"),
        ({"layers": 53}, "number of layers"),
        ({"hidden": 88}, "multiples of 16"),
        ({"top_k": 9}, "top_k is at most experts"),
        ({"vocab": 100}, "vocab is at least 259"),
        ({"groups": 3}, "groups divides mamba_heads"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(arguments, words, tmp_path, tiny_sizes):
    with pytest.raises(OptionError, match=words):
        synthesize(tmp_path / "never", **(tiny_sizes | arguments))
    assert not (tmp_path / "never").exists()


def test_an_existing_checkpoint_is_not_overwritten(nano_dir, tiny_sizes):
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        synthesize(nano_dir, **tiny_sizes)
