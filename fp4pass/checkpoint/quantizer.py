"""transformers' entry for packed checkpoints: ``from_pretrained`` meets ``quant_method: modelopt`` and comes here.

The model is built on meta, its quantized layers are replaced by packed ones, and the loader of transformers fills them:
the bytes on disk are the bytes in memory. On the way back the same conversions are undone, so that ``save_pretrained``
gives the original names and bytes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4pass.errors import CheckpointError, DeviceError

from .compressed import PARTS as COMPRESSED
from .compressed import THEIR_METHOD, CompressedConfig
from .config import QuantConfig, checkpoint_name
from .fp8 import FP8Linear
from .modules import MODELOPT, stacked
from .packed import PackedModule, Parts
from .replace import replace_quantized
from .stacks import READ_WITH_FIRST, read_stack, stacking
from .validate import KV_CACHE, MTP, TORCH_DTYPES, Header, check_headers, read_headers, stored_names
from .values import check_values

METHOD, COMPRESSED_METHOD = "modelopt", "fp4pass-compressed-tensors"
logger = logging.getLogger("fp4pass.checkpoint")

_PROJECTIONS = ("up_proj", "down_proj")


class ModelOptConfig(QuantizationConfigMixin):
    """``quantization_config`` of a ModelOpt checkpoint, kept word for word so that it is saved as it was loaded."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)
        self.quant_method = METHOD


class CompressedTensorsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed-tensors checkpoint, under a method of our own while it is loaded.

    transformers has a quantizer for the method's own name. What is saved has that name again.
    """

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)
        self.quant_method = COMPRESSED_METHOD

    def to_dict(self) -> dict[str, Any]:
        """The facts as they stood in config.json."""
        return super().to_dict() | {"quant_method": THEIR_METHOD}


class ModelOptQuantizer(HfQuantizer):
    """Loads ModelOpt's NVFP4 checkpoints packed. ``dropped`` names the tensors that were knowingly not loaded."""

    parts: Parts = MODELOPT
    reader: type[QuantConfig] | type[CompressedConfig] = QuantConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # A config that is passed as an argument describes the files no less than one that stands in config.json.
        self.pre_quantized = True
        self.precision = self.reader.from_dict(quantization_config.to_dict())
        self.dropped: tuple[str, ...] = ()
        self._headers: dict[str, Header] = {}
        self._prefix = ""
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a GPU that is not there and weights that would be offloaded, before anything is read."""
        wanted = device_map.values() if isinstance(device_map, dict) else [device_map]
        names = {str(each) for each in wanted if each is not None}
        on_gpu = {name for name in names if name.isdigit() or name.startswith("cuda")}
        if on_gpu and not torch.cuda.is_available():
            raise DeviceError(
                "the model is to be put on a GPU, and there is none",
                seen=f"device_map {device_map!r}; torch {torch.__version__} sees no CUDA device",
                expected="a CUDA device and a CUDA build of torch",
                do="leave device_map out to load on the CPU; `python -m fp4pass doctor` shows what torch sees",
            )
        if "disk" in names or (on_gpu and "cpu" in names):
            raise DeviceError(
                "packed weights are not offloaded",
                seen=f"a device_map with {', '.join(sorted(names))}",
                expected="every layer on a GPU, or all of them on the CPU",
                do="use more or larger GPUs, give them more memory in max_memory, or leave device_map out",
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "there is nothing to load",
                seen="no checkpoint files",
                expected="a folder or hub repository with safetensors files",
                do="call from_pretrained with the checkpoint's path",
            )
        source = model.config.name_or_path
        headers = read_headers(checkpoint_files, source if source and os.path.isdir(source) else None)
        prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
        replace_quantized(model, self.precision, headers, prefix, self.parts)
        check_headers(model, headers, prefix)
        self._drop(model, headers)
        _ignore(model, re.escape(READ_WITH_FIRST))
        _keep_routers_in_float32(model, headers, prefix)
        self._headers, self._prefix = headers, prefix
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _drop(self, model: nn.Module, headers: Mapping[str, Header]) -> None:
        """Leave out, and name, what is of no use here."""
        reasons = {
            KV_CACHE: "scales of an FP8 KV cache (the cache is in the model's dtype)",
            MTP: "of multi-token prediction (the model class has no such layers)",
        }
        for pattern, what in reasons.items():
            names = tuple(name for name in headers if re.search(pattern, name))
            if names:
                logger.info("%d tensors are not loaded, %s: %s", len(names), what, _shortened(names))
                _ignore(model, pattern)
            self.dropped += names

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_values(model, self._headers, self._prefix)
        for name, parameter in model.named_parameters():
            # Some versions of the loader leave tensors of a renamed module in the dtype of the file.
            if parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        # The loader turns gradients on for every floating dtype, E4M3 included. Experts have no backward, so that a
        # call outside of no_grad would fail on account of an embedding that nobody trains.
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.settle()
        _log_fp8(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Stack each part of the experts' matrices along a new first dimension; replaces the model's own stacking."""
        own = [
            stacking(projection, *names, self._read_stack)
            for projection in _PROJECTIONS
            for names in self._expert_parts(projection)
        ]
        stacks = {f"mixer.experts.{projection}" for projection in _PROJECTIONS}
        return [*(entry for entry in weight_conversions if not stacks & set(entry.target_patterns)), *own]

    def _expert_parts(self, projection: str) -> Iterator[tuple[str, str]]:
        """``(name in the file, name of the stacked parameter)`` of an expert's matrix; BF16 experts have ``weight``."""
        names = dict(zip(astuple(self.parts)[:4], astuple(stacked(self.parts, projection))[:4], strict=True))
        yield from ({"weight": projection} | names).items()

    def _read_stack(self, model: nn.Module, parameter: str, device: torch.device) -> torch.Tensor:
        """All of ``parameter``, which stacks the experts' tensors, on ``device``."""
        owner, _, name = parameter.rpartition(".")
        stored = stored_names(model.get_submodule(owner), checkpoint_name(self._prefix + owner), name)
        return read_stack([self._headers[each] for each in stored], device)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state dict to save. Reordered codes go to host memory one module at a time, never twice on the device."""
        state: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            before = len(state)
            module._save_to_state_dict(state, f"{name}." if name else "", False)
            if isinstance(module, PackedModule) and not module.is_plain:
                state |= {key: state[key].cpu() for key in list(state)[before:]}
        for key, tensor in state.items():
            stored = self._headers.get(checkpoint_name(self._prefix + key))
            if stored is not None and tensor.dtype == torch.float32 != model.dtype:
                # One that its class keeps in float32 whatever the model's dtype, and the files do not.
                state[key] = tensor.to(TORCH_DTYPES[stored.dtype])
        return state, {}

    def is_serializable(self) -> bool:
        """Saving gives the loaded bytes back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights take no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the model."""
        return True


class CompressedTensorsQuantizer(ModelOptQuantizer):
    """The same for compressed-tensors checkpoints in NVFP4; only ``fp4pass.from_pretrained`` leads here."""

    parts = COMPRESSED
    reader = CompressedConfig


def _ignore(model: nn.Module, pattern: str) -> None:
    """Have the loader say nothing of tensors whose names match ``pattern``."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}


def _keep_routers_in_float32(model: nn.Module, headers: Mapping[str, Header], prefix: str) -> None:
    """A router computes in float32 whatever its weight's dtype; where a release stores it in float32, it stays so."""
    for name, module in model.named_modules():
        stored = headers.get(checkpoint_name(f"{prefix}{name}.weight"))
        if name.endswith("mixer.gate") and stored is not None and stored.dtype == "F32":
            module.weight = nn.Parameter(module.weight.float())


def _log_fp8(model: nn.Module) -> None:
    modes = Counter(module.mode for module in model.modules() if isinstance(module, FP8Linear))
    if modes:
        logger.info("FP8 layers: %s", ", ".join(f"{count} as {mode}" for mode, count in modes.items()))


def _shortened(names: tuple[str, ...], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


_OURS = {
    METHOD: (ModelOptConfig, ModelOptQuantizer),
    COMPRESSED_METHOD: (CompressedTensorsConfig, CompressedTensorsQuantizer),
}


def register() -> bool:
    """Make ``from_pretrained`` know ``quant_method: modelopt``; called when fp4pass is imported.

    Returns False, and leaves things as they are, where another package has taken the name.
    """
    registered = [_register(method, *classes) for method, classes in _OURS.items()]
    return all(registered)


def _register(method: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]) -> bool:
    taken = {AUTO_QUANTIZER_MAPPING.get(method), AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)} - {None}
    if taken == {quantizer, config}:
        return True
    if taken:
        logger.warning("quant_method %r is taken by %s; fp4pass leaves it", method, next(iter(taken)).__module__)
        return False
    register_quantization_config(method)(config)
    register_quantizer(method)(quantizer)
    return True
