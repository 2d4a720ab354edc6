"""compressed-tensors checkpoints in ``nvfp4-pack-quantized``: the same weights as ModelOpt's under other names.

Global scales are divisors there: ``weight = code * weight_scale / weight_global_scale``. transformers has a quantizer
of that name, which unpacks such weights for good; ours is reached through ``fp4pass.from_pretrained`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fp4pass.errors import CheckpointError

from .config import GROUP_SIZE, NVFP4, W4A16_NVFP4, checkpoint_name, refuse_form
from .packed import PackedModule, Parts

FORMAT = "nvfp4-pack-quantized"
THEIR_METHOD = "compressed-tensors"
PARTS = Parts("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divides=True)

_REGEX = "re:"


def is_compressed(facts: Mapping[str, Any] | None) -> bool:
    """Whether a quantization config is one of compressed-tensors, in whatever format."""
    return isinstance(facts, Mapping) and facts.get("quant_method") == THEIR_METHOD


def is_unpacked(model: Any) -> bool:
    """Whether ``model`` is one that the quantizer of transformers has loaded from an NVFP4 checkpoint."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    facts = found.to_dict() if hasattr(found, "to_dict") else found
    if not is_compressed(facts) or FORMAT not in str(facts):
        return False
    return not any(isinstance(module, PackedModule) for module in model.modules())


@dataclass(frozen=True)
class CompressedConfig:
    """The precision of every layer, told by targets and exceptions; answers as ``QuantConfig`` does.

    A target or exception is a class name, a module's name, or ``re:`` and a pattern that a name begins with.
    """

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> CompressedConfig:
        """Read config.json's ``quantization_config``.

        Raises CheckpointError for content of another form, for another format than ``nvfp4-pack-quantized``, for
        groups that are not NVFP4 with one scale for 16 weights, and for transforms or sparsity beside it.
        """
        groups = facts.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            refuse_form("config_groups", groups, "an object with a group for each precision")
        _check_additions(facts)
        ignored = facts.get("ignore") or []
        found = []
        for name, group in groups.items():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                refuse_form(f"config_groups.{name}", group, "an object with targets and weights")
            _check_format(name, group.get("format") or facts.get("format"))
            _check_weights(name, group["weights"])
            targets = group.get("targets") or []
            _check_names(f"config_groups.{name}.targets", targets)
            found.append((NVFP4 if group.get("input_activations") else W4A16_NVFP4, tuple(targets)))
        _check_names("ignore", ignored)
        return cls(tuple(found), tuple(ignored))

    @property
    def layers(self) -> Mapping[str, str]:
        """Layers named one by one, which must be in the model: none here, since a target may match nothing."""
        return {}

    def group(self, module: str) -> int:
        """How many neighbouring weights share a block scale: the same everywhere."""
        return GROUP_SIZE

    def algo(self, module: str, kind: str = "Linear") -> str | None:
        """The quant_algo of layer ``module`` (``backbone.*`` or ``model.*``) of class ``kind``; None: not quantized."""
        if _matches(self.ignored, module, kind):
            return None
        return next((algo for algo, targets in self.groups if _matches(targets, module, kind)), None)


def _matches(targets: Iterable[str], module: str, kind: str) -> bool:
    spelled = checkpoint_name(module)
    names = {spelled, re.sub(r"^backbone\.", "model.", spelled)}
    for target in targets:
        if target.startswith(_REGEX):
            if any(re.match(target.removeprefix(_REGEX), name) for name in names):
                return True
        elif target == kind or target in names:
            return True
    return False


def _check_names(what: str, names: Any) -> None:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        refuse_form(what, names, "a list of class names, module names and re: patterns")
    for name in names:
        try:
            re.compile(name.removeprefix(_REGEX) if name.startswith(_REGEX) else "")
        except re.error as error:
            refuse_form(what, f"{name!r}: {error}", "patterns that Python's re understands")


def _check_additions(facts: Mapping[str, Any]) -> None:
    """Refuse what changes the product beside the quantization: rotations of the activations, weights left out."""
    transforms, sparsity = facts.get("transform_config"), facts.get("sparsity_config")
    if not transforms and (not sparsity or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense")):
        return
    name = "transform_config" if transforms else "sparsity_config"
    raise CheckpointError(
        f"{name} of compressed-tensors is not computed by fp4pass",
        seen=str(transforms or sparsity)[:200],
        expected="NVFP4 weights alone: transform_config and sparsity_config empty, or sparsity in format 'dense'",
        do="load it with transformers and the package compressed-tensors, or use an NVFP4 release",
    )


def _check_format(group: str, found: Any) -> None:
    if found != FORMAT:
        raise CheckpointError(
            f"config_groups.{group}: format {found} of compressed-tensors is not computed by fp4pass",
            seen=f"format {found!r}",
            expected=FORMAT,
            do="load it with transformers and the package compressed-tensors, or use an NVFP4 release",
        )


def _check_weights(group: str, weights: Mapping[str, Any]) -> None:
    wanted = {"num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    found = {name: weights.get(name) for name in wanted}
    if found != wanted or weights.get("dynamic") or weights.get("symmetric") is False:
        raise CheckpointError(
            f"config_groups.{group}: weights that fp4pass does not compute",
            seen=str(dict(weights))[:300],
            expected=f"{wanted}, symmetric and static",
            do=f"export the checkpoint again as NVFP4 with group size {GROUP_SIZE}",
        )


def compressed_form(algos: Iterable[str], ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint whose linear layers, but for ``ignore``, all are in one of ``algos``."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    group: dict[str, Any] = {"format": FORMAT, "targets": ["Linear"], "weights": weights, "input_activations": None}
    if NVFP4 in algos:
        group["input_activations"] = weights | {"dynamic": "local"}
    return {
        "config_groups": {"group_0": group},
        "format": FORMAT,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": THEIR_METHOD,
        "quantization_status": "compressed",
    }
