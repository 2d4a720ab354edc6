"""Reading ModelOpt's quantization configs: excerpts of the releases' files, and what is refused."""

import pytest

from fp4pass.checkpoint.config import QuantConfig, checkpoint_name, config_json_form
from fp4pass.errors import CheckpointError

NANO = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": [
            "lm_head",
            "backbone.layers.4.mixer.in_proj",
            "backbone.layers.4.mixer.out_proj",
            "backbone.layers.5.mixer.q_proj",
            "backbone.layers.0.mixer.conv1d",
        ],
    },
}
LIGHTNING = {
    "producer": {"name": "modelopt", "version": "0.44.0rc5"},
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "quantized_layers": {
            "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
            "backbone.layers.1.mixer.experts.0.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        },
        "exclude_modules": ["backbone.embeddings", "backbone.layers.12.mixer.k_proj", "mtp*"],
    },
}
SUPER = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["backbone.layers.0.mixer.in_proj"],
        },
        "group_1": {
            "input_activations": {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"},
            "weights": {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"},
            "targets": ["backbone.layers.1.mixer.experts.0.up_proj"],
        },
    },
    "ignore": [],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.43.0.dev63"},
    "quant_algo": "MIXED_PRECISION",
    "quant_method": "modelopt",
}


@pytest.mark.parametrize("content", [NANO, config_json_form(NANO)], ids=["hf_quant_config", "config.json"])
def test_one_algo_for_all_but_the_excluded(content):
    config = QuantConfig.from_dict(content)
    assert config.algo("backbone.layers.0.mixer.in_proj") == "NVFP4"
    assert config.algo("model.layers.0.mixer.in_proj") == "NVFP4"
    assert config.algo("model.layers.1.mixer.experts.7.up_proj") == "NVFP4"
    assert config.algo("model.layers.4.mixer.in_proj") is None
    assert config.algo("model.layers.40.mixer.in_proj") == "NVFP4"
    assert config.algo("lm_head") is None


@pytest.mark.parametrize("content", [LIGHTNING, config_json_form(LIGHTNING)], ids=["hf_quant_config", "config.json"])
def test_mixed_precision_names_each_layer(content):
    config = QuantConfig.from_dict(content)
    assert config.algo("model.layers.0.mixer.in_proj") == "FP8"
    assert config.algo("model.layers.1.mixer.experts.0.down_proj") == "W4A16_NVFP4"
    assert config.algo("lm_head") == "W4A16_NVFP4"
    assert config.algo("model.layers.12.mixer.k_proj") is None
    assert config.algo("model.layers.2.mixer.in_proj") is None


def test_config_groups_alone_say_the_same_as_quantized_layers():
    config = QuantConfig.from_dict(SUPER)
    assert config.layers == {
        "backbone.layers.0.mixer.in_proj": "FP8",
        "backbone.layers.1.mixer.experts.0.up_proj": "NVFP4",
    }


def test_config_groups_without_a_quant_algo_say_it_by_their_bits():
    bits = {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"}
    group = {"weights": bits, "targets": ["Linear"]}
    assert QuantConfig.from_dict({"config_groups": {"group_0": group}}).algo("lm_head") == "W4A16_NVFP4"
    activations = {"input_activations": bits}
    assert QuantConfig.from_dict({"config_groups": {"group_0": group | activations}}).algo("lm_head") == "NVFP4"
    with pytest.raises(CheckpointError, match="8 bits int is not computed"):
        QuantConfig.from_dict(
            {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}, "targets": ["Linear"]}}}
        )


def test_names_in_the_spelling_of_transformers_are_understood():
    content = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"model.layers.0.mixer.in_proj": {"quant_algo": "NVFP4_AWQ"}},
    }
    assert QuantConfig.from_dict(content).algo("model.layers.0.mixer.in_proj") == "NVFP4_AWQ"
    config = QuantConfig.from_dict({"quant_algo": "NVFP4", "exclude_modules": ["model.layers.3.*"]})
    assert config.algo("backbone.layers.3.mixer.in_proj") is None


def test_only_linear_layers_take_the_precision_of_the_whole():
    content = {"quant_algo": "NVFP4", "quantized_layers": {"model.embeddings": {"quant_algo": "W4A16_NVFP4"}}}
    config = QuantConfig.from_dict(content)
    assert config.algo("model.embeddings", "Embedding") == "W4A16_NVFP4"
    assert config.algo("model.other", "Embedding") is None


def test_wildcards_exclude():
    content = {"quant_algo": "NVFP4", "exclude_modules": ["mtp*", "backbone.layers.3.*", "*.q_proj"]}
    config = QuantConfig.from_dict(content)
    assert config.algo("mtp.layers.0.eh_proj") is None
    assert config.algo("model.layers.3.mixer.in_proj") is None
    assert config.algo("model.layers.5.mixer.q_proj") is None
    assert config.algo("model.layers.30.mixer.in_proj") == "NVFP4"


def test_no_algo_quantizes_nothing():
    assert QuantConfig.from_dict({"quant_algo": None}).algo("lm_head") is None


def test_names_of_both_spellings_meet():
    assert checkpoint_name("model.layers.1.norm.weight") == "backbone.layers.1.norm.weight"
    assert checkpoint_name("backbone.norm_f.weight") == "backbone.norm_f.weight"
    assert checkpoint_name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize(
    "algo", ["NVFP4_SVD", "W4A8_NVFP4_FP8", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A16", "NVFP5"]
)
def test_algos_that_are_not_computed_are_refused_by_name(algo):
    with pytest.raises(CheckpointError, match=f"quant_algo {algo} is not computed"):
        QuantConfig.from_dict({"quant_algo": algo})
    with pytest.raises(CheckpointError, match=f"lm_head: quant_algo {algo}"):
        layers = {"lm_head": {"quant_algo": algo}}
        QuantConfig.from_dict({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})


def test_the_group_size_is_told_for_all_layers_or_for_each():
    whole = QuantConfig.from_dict({"quant_algo": "W4A16_NVFP4", "group_size": 32})
    assert (whole.group("lm_head"), QuantConfig.from_dict({"quant_algo": "NVFP4"}).group("lm_head")) == (32, 16)
    bits = {"num_bits": 4, "type": "float", "group_size": 32}
    by_class = QuantConfig.from_dict({"config_groups": {"group_0": {"weights": bits, "targets": ["Linear"]}}})
    assert by_class.group("lm_head") == 32
    layers = {"lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 32}, "backbone.a": {"quant_algo": "NVFP4"}}
    mixed = QuantConfig.from_dict({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert (mixed.group("lm_head"), mixed.group("model.a")) == (32, 16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quant_algo": "NVFP4", "group_size": 32}, "group size"),
        ({"quant_algo": "W4A16_NVFP4", "group_size": 64}, "group size"),
        (
            {
                "quant_algo": "NVFP4",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "targets": ["Linear"]}
                },
            },
            "group size",
        ),
        ({"quant_algo": "MIXED_PRECISION"}, "without a precision for any layer"),
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "does not say how"),
        ({"quantization": "NVFP4"}, "a form that no exporter writes"),
        (["NVFP4"], "a form that no exporter writes"),
        ({"quant_algo": "NVFP4", "ignore": "lm_head"}, "a list of module names"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["lm_head"]}, "quantized_layers of the"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "group_0 of the"),
    ],
)
def test_incomplete_configs_are_refused(content, words):
    with pytest.raises(CheckpointError, match=words):
        QuantConfig.from_dict(content)
