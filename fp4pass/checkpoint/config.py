"""ModelOpt's quantization config: which layer is stored in which precision.

Two files can carry it. config.json has it under ``quantization_config`` (``quant_method: modelopt``); older releases
have only hf_quant_config.json, where the same facts stand one level down under ``quantization``. Module names in both
are the checkpoint's (``backbone.layers...``), which transformers spells ``model.layers...``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fp4pass.errors import CheckpointError

NVFP4, W4A16_NVFP4, FP8 = "NVFP4", "W4A16_NVFP4", "FP8"
NVFP4_ALGOS = (NVFP4, W4A16_NVFP4)
"""Both store the same tensors; NVFP4 adds an input scale, which weight-only inference does not use."""

KNOWN_ALGOS = (*NVFP4_ALGOS, FP8)
GROUP_SIZE = 16


@dataclass(frozen=True)
class QuantConfig:
    """The precision of every layer, by the checkpoint's module names.

    ``default`` holds for every linear layer that neither ``layers`` nor an exclusion names; None means not quantized.
    """

    default: str | None
    layers: Mapping[str, str]
    excluded: frozenset[str] = frozenset()
    excluded_patterns: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QuantConfig:
        """Read the content of hf_quant_config.json or of config.json's ``quantization_config``.

        Raises CheckpointError for a quant_algo that is unknown or not computed here and for a group size other than 16.
        """
        facts = content.get("quantization", content)
        if not isinstance(facts, Mapping) or "quant_algo" not in facts:
            raise CheckpointError(
                "the quantization config does not say how the checkpoint is quantized",
                seen=f"keys {sorted(facts)}" if isinstance(facts, Mapping) else repr(facts),
                expected="quant_algo, as ModelOpt writes it",
                do="download config.json or hf_quant_config.json of the release again",
            )
        algo, layers = facts["quant_algo"], dict(_layers(facts))
        mixed = algo == "MIXED_PRECISION"
        if mixed and not layers:
            raise CheckpointError(
                "quant_algo MIXED_PRECISION without a precision for any layer",
                seen="neither quantized_layers nor config_groups with module names",
                expected="quantized_layers: {module: {quant_algo: ...}}",
                do="take hf_quant_config.json from the release itself; some mirrors keep only a stub of it",
            )
        if algo is not None and not mixed:
            _check_algo("the whole checkpoint", algo, facts.get("group_size"))
        names = facts.get("exclude_modules") or facts.get("ignore") or ()
        patterns = tuple(name for name in names if any(mark in name for mark in "*?["))
        return cls(
            default=None if mixed else algo,
            layers=layers,
            excluded=frozenset(names) - frozenset(patterns),
            excluded_patterns=patterns,
        )

    def algo(self, module: str) -> str | None:
        """The quant_algo of linear layer ``module`` (``backbone.*`` or ``model.*``), None if it is not quantized."""
        name = checkpoint_name(module)
        if name in self.excluded or any(fnmatchcase(name, pattern) for pattern in self.excluded_patterns):
            return None
        return self.layers.get(name, self.default)


def checkpoint_name(module: str) -> str:
    """How the checkpoint spells a module or tensor that transformers calls ``module``."""
    return "backbone." + module.removeprefix("model.") if module.startswith("model.") else module


def config_json_form(hf_quant_config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of hf_quant_config.json as ModelOpt puts them into config.json under ``quantization_config``."""
    facts = hf_quant_config.get("quantization", hf_quant_config)
    groups: dict[str | None, list[str]] = {}
    for name, entry in (facts.get("quantized_layers") or {}).items():
        groups.setdefault(entry.get("quant_algo"), []).append(name)
    if not groups:
        groups = {facts.get("quant_algo"): ["Linear"]}
    form = {
        "config_groups": {f"group_{i}": _group(algo, names) for i, (algo, names) in enumerate(groups.items())},
        "ignore": list(facts.get("exclude_modules") or ()),
        "producer": hf_quant_config.get("producer"),
        "quant_method": "modelopt",
    }
    if facts.get("kv_cache_quant_algo") == FP8:
        form["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return form | {name: facts[name] for name in ("quant_algo", "quantized_layers", "group_size") if name in facts}


def _group(algo: str | None, targets: list[str]) -> dict[str, Any]:
    eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
    four_bits = {"dynamic": False, "group_size": GROUP_SIZE, "num_bits": 4, "type": "float"}
    weights = eight_bits if algo == FP8 else four_bits
    group: dict[str, Any] = {"weights": weights, "targets": targets}
    return group if algo == W4A16_NVFP4 else {"input_activations": weights} | group


def _layers(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(module, quant_algo)`` of every layer that is named one by one, each checked."""
    entries = facts.get("quantized_layers")
    if entries is None:
        for group in (facts.get("config_groups") or {}).values():
            algo, group_size = _algo_of_group(group)
            for target in group.get("targets", ()):
                if "." in target or target == "lm_head":  # the rest are class names, which mean the whole model
                    _check_algo(target, algo, group_size)
                    yield target, algo
        return
    for name, entry in entries.items():
        _check_algo(name, entry.get("quant_algo"), entry.get("group_size"))
        yield name, entry["quant_algo"]


def _algo_of_group(group: Mapping[str, Any]) -> tuple[str, int | None]:
    """The quant_algo that a config group describes by its numbers of bits, and its group size."""
    weights = group.get("weights") or {}
    bits, kind, group_size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if (bits, kind) == (8, "float"):
        return FP8, group_size
    if (bits, kind) == (4, "float"):
        return (NVFP4 if group.get("input_activations") else W4A16_NVFP4), group_size
    return f"{bits} bits {kind}", group_size


def _check_algo(what: str, algo: str | None, group_size: int | None) -> None:
    if algo not in KNOWN_ALGOS:
        raise CheckpointError(
            f"{what}: quant_algo {algo} is not computed by fp4pass",
            seen=f"quant_algo {algo!r}",
            expected=f"one of {', '.join(KNOWN_ALGOS)}, or MIXED_PRECISION of them",
            do="use a release in one of these precisions, or the BF16 release",
        )
    if algo in NVFP4_ALGOS and group_size not in (None, GROUP_SIZE):
        raise CheckpointError(
            f"{what}: {algo} with an unsupported group size",
            seen=f"group_size {group_size}",
            expected=f"group_size {GROUP_SIZE}, one E4M3 scale for {GROUP_SIZE} weights",
            do=f"export the checkpoint again with group size {GROUP_SIZE}",
        )
