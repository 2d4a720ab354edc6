"""The published Nemotron-H NVFP4 releases: their dimensions and config.json, at full size or shortened.

Which tensors such a checkpoint has, and in which precision, is in ``tensors.py``; ``fp4pass.synthesize`` writes one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from fp4pass.errors import OptionError

_NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
_ULTRA_PATTERN = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
)
_NANO_4B_PATTERN = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
_LAYER_TYPES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


@dataclass(frozen=True)
class Sizes:
    """The dimensions of one model; ``pattern`` has a letter a layer (M mamba, E experts, * attention, - dense MLP).

    ``intermediate`` is the width of a routed expert or of a dense MLP.
    """

    pattern: str
    hidden: int
    experts: int = 128
    top_k: int = 6
    intermediate: int = 1856
    shared: int = 3712
    latent: int | None = None
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    mamba_heads: int = 64
    mamba_head_dim: int = 64
    groups: int = 8
    state: int = 128
    vocab: int = 131072
    routed_scaling: float = 2.5
    max_positions: int = 262144
    mtp: str = ""

    @property
    def inner(self) -> int:
        """Width of a Mamba mixer's inner state."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of a Mamba mixer's convolution: inner state, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True)
class Release:
    """A published checkpoint: full sizes, and what differs in its config files.

    ``remote_code`` names the auto classes for which the release brings code of its own. ``counts_by_list``: the number
    of layers is told by the list of their kinds alone.
    """

    name: str
    sizes: Sizes
    producer: str
    transformers: str
    remote_code: tuple[str, ...]
    pattern_field: str
    quantization_in_config: bool
    dtype_field: str = "dtype"
    time_step_limit: float | None = None
    counts_by_list: bool = False


RELEASES = {
    "nano": Release(
        "NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
        Sizes(_NANO_PATTERN, 2688),
        "0.29.0",
        "4.53.2",
        remote_code=("AutoConfig", "AutoModel", "AutoModelForCausalLM"),
        pattern_field="hybrid_override_pattern",
        quantization_in_config=False,
        dtype_field="torch_dtype",
    ),
    "lightning": Release(
        "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
        Sizes(_NANO_PATTERN, 2688, max_positions=1048576, mtp="*E"),
        "0.44.0rc5",
        "5.8.1",
        remote_code=(),
        pattern_field="layers_block_type",
        quantization_in_config=True,
    ),
    "super": Release(
        "NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4",
        Sizes(_SUPER_PATTERN, 4096, 512, 22, 2688, 5376, 1024, mamba_heads=128, routed_scaling=5.0, mtp="*E"),
        "0.43.0.dev63",
        "4.57.1",
        remote_code=("AutoConfig", "AutoModelForCausalLM"),
        pattern_field="hybrid_override_pattern",
        quantization_in_config=True,
        time_step_limit=math.inf,
    ),
    "ultra": Release(
        "NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4",
        Sizes(_ULTRA_PATTERN, 8192, 512, 22, 5120, 10240, 2048, 64, mamba_heads=256, routed_scaling=5.0, mtp="*E"),
        "0.43.0",
        "4.57.6",
        remote_code=("AutoConfig", "AutoModelForCausalLM"),
        pattern_field="layers_block_type",
        quantization_in_config=True,
        time_step_limit=1e308,
        counts_by_list=True,
    ),
    # The dimensions are those of the BF16 release; which layers are in FP8 is in no file that we could compare with.
    "nano-4b": Release(
        "NVIDIA-Nemotron-3-Nano-4B-NVFP4",
        Sizes(
            _NANO_4B_PATTERN,
            3136,
            intermediate=12544,
            heads=40,
            kv_heads=8,
            mamba_heads=96,
            mamba_head_dim=80,
        ),
        "0.43.0",
        "4.57.1",
        remote_code=("AutoConfig", "AutoModelForCausalLM"),
        pattern_field="hybrid_override_pattern",
        quantization_in_config=True,
    ),
}


def release(like: str) -> Release:
    """The release called ``like`` (a name in ``RELEASES``). Raises OptionError for another name."""
    if like not in RELEASES:
        raise OptionError(
            "unknown release to imitate",
            seen=repr(like),
            expected=f"one of {', '.join(RELEASES)}",
            do="pass one of these names as like=",
        )
    return RELEASES[like]


def shorten(pattern: str, layers: int) -> str:
    """A pattern of ``layers`` letters that begins as ``pattern`` does and, from three layers on, has every kind."""
    if not 1 <= layers <= len(pattern):
        raise OptionError(
            "number of layers out of range",
            seen=str(layers),
            expected=f"1 to {len(pattern)}, the release's own depth",
            do="pass fewer layers, or none for all of them",
        )
    prefix = pattern[:layers]
    if "*" in prefix or layers < 3:
        return prefix
    return pattern[:2] + "*" if layers == 3 else f"{pattern[: layers - 2]}*{pattern[1]}"


def resize(full: Sizes, layers: int | None = None, **changes: int | None) -> Sizes:
    """``full`` with ``layers`` layers and other dimensions (named as in ``Sizes``); None keeps the release's.

    Raises OptionError for a name that is no dimension.
    """
    known = [field.name for field in fields(Sizes) if field.name not in ("pattern", "mtp")]
    for name in changes:
        if name not in known:
            raise OptionError(
                "unknown dimension",
                seen=name,
                expected=f"one of {', '.join(known)}, or layers",
                do=f"did you mean {next(iter(get_close_matches(name, known, 1, 0)))!r}?",
            )
    given = {name: value for name, value in changes.items() if value is not None}
    sizes = replace(full, **given)
    if "experts" in given and "top_k" not in given:
        sizes = replace(sizes, top_k=min(full.top_k, sizes.experts))
    return sizes if layers is None else replace(sizes, pattern=shorten(full.pattern, layers))


def config(made: Release, sizes: Sizes) -> dict[str, Any]:
    """The content of config.json for ``made`` at ``sizes``, without quantization_config."""
    types = [_LAYER_TYPES[letter] for letter in sizes.pattern]
    content = _COMMON_CONFIG | {
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "mamba_head_dim": sizes.mamba_head_dim,
        "mamba_num_heads": sizes.mamba_heads,
        "max_position_embeddings": sizes.max_positions,
        "moe_intermediate_size": sizes.intermediate,
        "moe_shared_expert_intermediate_size": sizes.shared,
        "n_groups": sizes.groups,
        "n_routed_experts": sizes.experts,
        "num_attention_heads": sizes.heads,
        "num_experts_per_tok": sizes.top_k,
        **({} if made.counts_by_list else {"num_hidden_layers": len(types)}),
        "num_key_value_heads": sizes.kv_heads,
        "routed_scaling_factor": sizes.routed_scaling,
        "ssm_state_size": sizes.state,
        "transformers_version": made.transformers,
        "vocab_size": sizes.vocab,
        made.dtype_field: "bfloat16",
    }
    as_letters = made.pattern_field == "hybrid_override_pattern"
    content[made.pattern_field] = sizes.pattern if as_letters else types
    if made.time_step_limit is not None:
        content["time_step_limit"] = [0.0, made.time_step_limit]
    if made.remote_code:
        content["auto_map"] = {each: _REMOTE_CODE[each] for each in made.remote_code}
    if sizes.mtp or sizes.latent:
        content["moe_latent_size"] = sizes.latent
    if sizes.mtp:
        content |= {"moe_shared_expert_overlap": sizes.latent is None, "num_nextn_predict_layers": 1}
        field = "mtp_hybrid_override_pattern" if as_letters else "mtp_layers_block_type"
        content[field] = sizes.mtp if as_letters else [_LAYER_TYPES[letter] for letter in sizes.mtp]
    return content


_REMOTE_CODE = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}

_COMMON_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}
