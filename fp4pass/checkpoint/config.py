"""ModelOpt's quantization config: which layer is stored in which precision.

Two files can carry it. config.json has it under ``quantization_config`` (``quant_method: modelopt``); older releases
have only hf_quant_config.json, where the same facts stand one level down under ``quantization``. Module names in both
are the checkpoint's (``backbone.layers...``), which transformers spells ``model.layers...``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fp4pass.errors import CheckpointError

NVFP4, W4A16_NVFP4, NVFP4_AWQ, FP8 = "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "FP8"
NVFP4_ALGOS = (NVFP4, W4A16_NVFP4, NVFP4_AWQ)
"""All store the same weight. NVFP4 adds an input scale, which weight-only inference does not use; NVFP4_AWQ adds, to
some layers, a ``pre_quant_scale`` that multiplies the layer's input."""

KNOWN_ALGOS = (*NVFP4_ALGOS, FP8)
GROUP_SIZE = 16
_GROUP_SIZES = {W4A16_NVFP4: (GROUP_SIZE, 32)}
"""How many weights may share a block scale; 16 for an algo that is not named."""

_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class QuantConfig:
    """The precision of every layer, by the checkpoint's module names.

    ``default`` holds for every linear layer that neither ``layers`` nor an exclusion names; None means not quantized.
    ``groups`` has the group size of layers that are named one by one, ``default_group`` that of the others.
    """

    default: str | None
    layers: Mapping[str, str]
    groups: Mapping[str, int] = field(default_factory=dict)
    default_group: int = GROUP_SIZE
    excluded: frozenset[str] = frozenset()
    excluded_patterns: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QuantConfig:
        """Read the content of hf_quant_config.json or of config.json's ``quantization_config``.

        Raises CheckpointError for content of another form, for a quant_algo that is unknown or not computed here and
        for a group size other than 16, or 32 where only weights are quantized.
        """
        facts = _facts(content)
        groups = _groups(facts)
        algo = facts["quant_algo"] if "quant_algo" in facts else _algo_of_classes(groups)
        entries = list(_layers(facts, groups))
        layers = {name: algo for name, algo, _ in entries}
        if algo == _MIXED and not layers:
            raise CheckpointError(
                "quant_algo MIXED_PRECISION without a precision for any layer",
                seen="neither quantized_layers nor config_groups with module names",
                expected="quantized_layers: {module: {quant_algo: ...}}",
                do="take hf_quant_config.json from the release itself; some mirrors keep only a stub of it",
            )
        group_sizes = [facts.get("group_size"), *(size for _, size, _ in groups)]
        if algo not in (None, _MIXED):
            for group_size in group_sizes:
                _check_algo("the whole checkpoint", algo, group_size)
        names = [checkpoint_name(name) for name in _names(facts)]
        patterns = tuple(name for name in names if any(mark in name for mark in "*?["))
        return cls(
            default=None if algo == _MIXED else algo,
            layers=layers,
            groups={name: group_size for name, _, group_size in entries if group_size is not None},
            default_group=next((size for size in group_sizes if size is not None), GROUP_SIZE),
            excluded=frozenset(names) - frozenset(patterns),
            excluded_patterns=patterns,
        )

    def algo(self, module: str, kind: str = "Linear") -> str | None:
        """The quant_algo of layer ``module`` (``backbone.*`` or ``model.*``), None if it is not quantized.

        ``kind`` is the layer's class; the precision of the whole checkpoint holds for linear layers alone.
        """
        name = checkpoint_name(module)
        if name in self.excluded or any(fnmatchcase(name, pattern) for pattern in self.excluded_patterns):
            return None
        return self.layers.get(name, self.default if kind == "Linear" else None)

    def group(self, module: str) -> int:
        """How many neighbouring weights of layer ``module`` share a block scale, if it is in NVFP4."""
        return self.groups.get(checkpoint_name(module), self.default_group)


def checkpoint_name(module: str) -> str:
    """How the checkpoint spells a module or tensor that transformers calls ``module``."""
    return "backbone." + module.removeprefix("model.") if module.startswith("model.") else module


def config_json_form(hf_quant_config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of hf_quant_config.json as ModelOpt puts them into config.json under ``quantization_config``."""
    facts = _facts(hf_quant_config)
    groups: dict[str | None, list[str]] = {}
    for name, entry in (facts.get("quantized_layers") or {}).items():
        groups.setdefault(entry.get("quant_algo"), []).append(name)
    if not groups:
        groups = {facts.get("quant_algo"): ["Linear"]}
    form = {
        "config_groups": {f"group_{i}": _group(algo, names) for i, (algo, names) in enumerate(groups.items())},
        "ignore": list(_names(facts)),
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


def _facts(content: Any) -> Mapping[str, Any]:
    """The level of ``content`` that has the facts, checked to be of the form that the rest relies on."""
    facts = content.get("quantization", content) if isinstance(content, Mapping) else content
    if not isinstance(facts, Mapping):
        refuse_form("the whole", facts, "a JSON object")
    if "quant_algo" not in facts and not facts.get("config_groups"):
        raise CheckpointError(
            "the quantization config does not say how the checkpoint is quantized",
            seen=f"keys {sorted(map(str, facts))}",
            expected="quant_algo, as ModelOpt writes it",
            do="download config.json or hf_quant_config.json of the release again",
        )
    for name in ("quantized_layers", "config_groups"):
        entries = facts.get(name)
        if entries is not None and not (
            isinstance(entries, Mapping) and all(isinstance(entry, Mapping) for entry in entries.values())
        ):
            refuse_form(name, entries, "an object of objects")
    return facts


def _names(facts: Mapping[str, Any]) -> list[str]:
    """The names and patterns of layers that are not quantized."""
    names = facts.get("exclude_modules") or facts.get("ignore") or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        refuse_form("exclude_modules (ignore)", names, "a list of module names")
    return list(names)


def refuse_form(what: str, seen: Any, expected: str) -> None:
    """Raise CheckpointError for a part of a quantization config that is not of the ``expected`` form."""
    raise CheckpointError(
        f"{what} of the quantization config has a form that no exporter writes",
        seen=repr(seen)[:200],
        expected=expected,
        do="download config.json or hf_quant_config.json of the release again",
    )


def _groups(facts: Mapping[str, Any]) -> list[tuple[str, int | None, list[str]]]:
    """``(quant_algo, group size, targets)`` of each config group, its algo told by the numbers of bits."""
    found = []
    for name, group in (facts.get("config_groups") or {}).items():
        weights, targets = group.get("weights"), group.get("targets", [])
        if not isinstance(weights, Mapping) or not isinstance(targets, list):
            refuse_form(f"config_groups.{name}", group, "an object with weights and a list of targets")
        bits, kind, group_size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
        algo = f"{bits} bits {kind}"
        if (bits, kind) == (8, "float"):
            algo, group_size = FP8, None
        elif (bits, kind) == (4, "float"):
            algo = NVFP4 if group.get("input_activations") else W4A16_NVFP4
        found.append((algo, group_size, targets))
    return found


def _is_module(target: str) -> bool:
    """Whether a group's target names one module; the others are class names, which mean the whole model."""
    return "." in target or target == "lm_head"


def _algo_of_classes(groups: list[tuple[str, int | None, list[str]]]) -> str:
    """Without a quant_algo: what the group of all linear layers says, else each layer for itself."""
    return next((algo for algo, _, targets in groups if "Linear" in targets), _MIXED)


def _layers(
    facts: Mapping[str, Any], groups: list[tuple[str, int | None, list[str]]]
) -> Iterator[tuple[str, str, int | None]]:
    """``(module, quant_algo, group size)`` of every layer that is named one by one, each checked."""
    entries = facts.get("quantized_layers")
    if entries is None:
        entries = {
            target: {"quant_algo": algo, "group_size": group_size}
            for algo, group_size, targets in groups
            for target in targets
            if _is_module(target)
        }
    for name, entry in entries.items():
        _check_algo(name, entry.get("quant_algo"), entry.get("group_size"))
        yield checkpoint_name(name), entry["quant_algo"], entry.get("group_size")


def _check_algo(what: str, algo: str | None, group_size: int | None) -> None:
    if algo not in KNOWN_ALGOS:
        raise CheckpointError(
            f"{what}: quant_algo {algo} is not computed by fp4pass",
            seen=f"quant_algo {algo!r}",
            expected=f"one of {', '.join(KNOWN_ALGOS)}, or MIXED_PRECISION of them",
            do="use a release in one of these precisions, or the BF16 release",
        )
    allowed = _GROUP_SIZES.get(algo, (GROUP_SIZE,))
    if algo in NVFP4_ALGOS and group_size not in (None, *allowed):
        sizes = " or ".join(map(str, allowed))
        raise CheckpointError(
            f"{what}: {algo} with an unsupported group size",
            seen=f"group_size {group_size}",
            expected=f"group_size {sizes}, one E4M3 scale for so many weights",
            do=f"export the checkpoint again with group size {GROUP_SIZE}",
        )
