"""Loading by path, also for releases that keep their quantization in hf_quant_config.json alone (Nemotron 3 Nano)."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from fp4pass.errors import CheckpointError, Fp4passError, VersionError

from .compressed import PARTS as COMPRESSED
from .compressed import THEIR_METHOD, CompressedConfig, is_compressed
from .config import QuantConfig, config_json_form
from .folder import check_folder, has_weights, read_json, weight_files
from .fp8 import FP8Linear, set_fp8_mode
from .modules import MODELOPT
from .packed import PackedModule
from .quantizer import COMPRESSED_METHOD, METHOD, register
from .replace import replace_quantized
from .validate import read_headers

logger = logging.getLogger("fp4pass.checkpoint")

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(path: str | Path, *, fp8: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model whose NVFP4 weights stay packed, from a folder or a hub repository.

    Takes the arguments of ``AutoModelForCausalLM.from_pretrained`` and does the same; it also reads
    hf_quant_config.json where config.json has no quantization_config, and compressed-tensors checkpoints in NVFP4,
    which transformers itself would unpack for good. The model class is always the one in
    transformers: ``trust_remote_code`` is ignored, with a warning. No parameter takes gradients; set requires_grad
    where you want them. ``fp8`` says how FP8 layers multiply: ``"w8a16"``, ``"w8a8"``, or None for what suits the GPU
    (see ``FP8Linear``).

    Raises CheckpointError for a checkpoint whose files, config or tensors are not what they should be, and VersionError
    if another package has taken ``quant_method: modelopt``.
    """
    if not register():
        raise VersionError(
            "another package loads ModelOpt checkpoints in this process",
            seen=f"quant_method {METHOD!r} is registered with transformers by another package",
            expected="fp4pass's own registration",
            do="import fp4pass before that package, or leave it out",
        )
    if kwargs.pop("trust_remote_code", False):
        logger.warning("trust_remote_code is ignored: fp4pass uses the model class of transformers")
    if os.path.isdir(path) and not kwargs.get("subfolder"):
        check_folder(Path(path))
    kwargs["config"] = _config(path, kwargs)
    _check_routing(kwargs["config"])
    try:
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **kwargs)
    except Fp4passError:
        raise
    except Exception:
        # Each of these says so if its file is to blame.
        _on_meta(kwargs["config"], None)
        _read_generation_config(path)
        raise
    if fp8 is not None:
        set_fp8_mode(model, fp8)
    return model


def skeleton(path: str | Path, *, target_sm: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of ``path`` on the meta device, packed layers in place, from its config files alone.

    It has no weights and serves for tracing and proofs. Where ``path`` is a folder with safetensors files their headers
    tell which layers have which scales; else FP8 layers are taken to have a static one for their input. These multiply
    as they would on a GPU of generation ``target_sm``. ``dtype`` (default: the checkpoint's) and the arguments that
    locate files on the hub are understood. Raises CheckpointError for config files as ``from_pretrained`` does.
    """
    config = _config(path, kwargs)
    facts = _facts(config) or {"quant_algo": None}
    compressed = facts.get("quant_method") == COMPRESSED_METHOD
    reader, parts = (CompressedConfig, COMPRESSED) if compressed else (QuantConfig, MODELOPT)
    precision = reader.from_dict(facts)
    model = _on_meta(config, kwargs.get("dtype") or config.dtype)
    headers = read_headers(weight_files(Path(path))) if has_weights(Path(path)) else {}
    replace_quantized(model, precision, headers, parts=parts)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.settle()
        if isinstance(module, FP8Linear):
            module.suit(target_sm)
    return model.eval()


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model as transformers builds it, without weights and before any layer is replaced.

    Raises CheckpointError if no model can be built from ``config``.
    """
    bare = copy.deepcopy(config)
    bare.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(bare, dtype=dtype)
    except Exception as error:  # of any kind: a config's values go into arithmetic, shapes and names
        raise CheckpointError(
            "no model can be built from config.json",
            seen=f"{type(error).__name__}: {error}",
            expected="the config of a Nemotron-H model",
            do="download config.json of the release again",
        ) from error


def _config(path: str | Path, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The model's config, with the quantization from whichever file has it."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = kwargs.pop("config", None) or _read_config(path, hub)
    facts = _facts(config)
    if is_compressed(facts):
        config.quantization_config = {**facts, "quant_method": COMPRESSED_METHOD}
    if facts is not None:
        _check_method(facts.get("quant_method"))
        return config
    file = cached_file(path, "hf_quant_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if file is not None:
        config.quantization_config = config_json_form(read_json(Path(file)))
    return config


def _read_config(path: str | Path, hub: dict[str, Any]) -> PreTrainedConfig:
    """The config as transformers reads it, never by code from the checkpoint."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            "config.json is not a config that transformers understands",
            seen=f"{type(error).__name__}: {error}",
            expected="the config of a Nemotron-H model",
            do="download config.json of the release again",
        ) from error


def _read_generation_config(path: str | Path) -> None:
    """Raise CheckpointError if ``path`` is a folder with a generation_config.json that transformers cannot use."""
    if not (Path(path) / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_pretrained(path)
    except Exception as error:  # of any kind, as above
        raise CheckpointError(
            "generation_config.json is not one that transformers understands",
            seen=f"{type(error).__name__}: {error}",
            expected="settings of generate()",
            do="download this file again, or remove it: the weights do not need it",
        ) from error


def _check_method(method: Any) -> None:
    """Refuse by name what is quantized in neither of the two ways that are read here."""
    if method not in (METHOD, COMPRESSED_METHOD, THEIR_METHOD):
        raise CheckpointError(
            f"quant_method {method} is not computed by fp4pass",
            seen=f"quantization_config of config.json with quant_method {method!r}",
            expected=f"{METHOD!r} or {THEIR_METHOD!r}",
            do="load the checkpoint with transformers, or use an NVFP4 release",
        )


def _check_routing(config: PreTrainedConfig) -> None:
    """Refuse numbers that no tensor's shape shows and that the router stumbles over in its first call."""
    experts, chosen, groups = (
        getattr(config, name, None) for name in ("n_routed_experts", "num_experts_per_tok", "n_group")
    )
    if not all(isinstance(each, int) for each in (experts, chosen, groups)):
        return
    if not (1 <= chosen <= experts and groups >= 1 and experts % groups == 0):
        raise CheckpointError(
            "config.json asks for a choice of experts that there is not",
            seen=f"num_experts_per_tok {chosen} and n_group {groups} with n_routed_experts {experts}",
            expected="1 <= num_experts_per_tok <= n_routed_experts, in groups of one size",
            do="download config.json of the release again",
        )


def _facts(config: PreTrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()
