"""What a checkpoint's numbers must be, asked on the device once they have arrived there.

A scale of the wrong size or sign gives a model that runs and is wrong; these rules are wide enough for every trained
weight and too narrow for an inverted scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fp4pass.errors import CheckpointError

from .config import checkpoint_name
from .fp8 import FP8Linear
from .packed import PackedModule
from .validate import Header, stored_names


@dataclass(frozen=True)
class Rule:
    """``wrong`` gives a mask of a tensor's elements; the rest is what to say of one."""

    what: str
    wrong: Callable[[torch.Tensor], torch.Tensor]
    expected: str
    do: str


_AGAIN = "download the checkpoint again; if it is your own export, look for overflow in calibration"

_NO_NAN_SCALE = Rule(
    "NaN among the block scales", lambda t: (t.view(torch.uint8) & 0x7F) == 0x7F, "finite E4M3 numbers", _AGAIN
)
_NO_NAN_WEIGHT = Rule(
    "NaN among the weights", lambda t: (t.view(torch.uint8) & 0x7F) == 0x7F, "finite E4M3 numbers", _AGAIN
)
_FACTOR = Rule(
    "impossible global scale",
    lambda t: ~((t > 0) & (t <= 1)),
    "above 0 and at most 1: it is amax / (6 * 448), and no trained weight reaches 2688",
    "if it is the reciprocal (as compressed-tensors stores it), invert it; else download the checkpoint again",
)
_DIVISOR = Rule(
    "impossible global scale",
    lambda t: ~((t >= 1) & (t < torch.inf)),
    "at least 1 and finite: it is 6 * 448 / amax, and no trained weight reaches 2688",
    "if it is the reciprocal (as ModelOpt stores it), invert it; else download the checkpoint again",
)
_FP8_FACTOR = Rule(
    "impossible weight scale",
    lambda t: ~((t > 0) & (t <= 1)),
    "above 0 and at most 1: it is amax / 448, and no trained weight reaches 448",
    "if it is the reciprocal, invert it; else download the checkpoint again",
)
_FINITE = Rule("impossible values", lambda t: ~t.isfinite(), "finite numbers", _AGAIN)
_POSITIVE = Rule("impossible input scale", lambda t: ~((t > 0) & (t < torch.inf)), "above 0 and finite", _AGAIN)


def _rules(module: PackedModule) -> Iterator[tuple[str, Rule]]:
    """Which rule holds for which parameter."""
    if isinstance(module, FP8Linear):
        yield from (("weight", _NO_NAN_WEIGHT), ("weight_scale", _FP8_FACTOR))
        if module.input_scale is not None:
            yield "input_scale", _POSITIVE
        return
    for _, scale, factor in module.names_of_matrices():
        yield from ((scale, _NO_NAN_SCALE), (factor, _DIVISOR if module.divides else _FACTOR))
    if getattr(module, "pre_quant_scale", None) is not None:
        yield "pre_quant_scale", _FINITE


@torch.no_grad()
def check_values(model: nn.Module, headers: Mapping[str, Header], prefix: str = "") -> None:
    """After loading: no NaN among scales, every scale finite, positive and of a possible size.

    ``headers`` and ``prefix`` serve to name the tensor and its file. Raises CheckpointError for the first tensor that
    breaks a rule. Waits for each device once.
    """
    asked: dict[torch.device, list[tuple[str, PackedModule, str, Rule, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.device.type != "meta":
            for parameter, rule in _rules(module):
                broken = rule.wrong(module.get_parameter(parameter)).any()
                asked.setdefault(module.device, []).append((name, module, parameter, rule, broken))
    for entries in asked.values():
        flags = torch.stack([broken for *_, broken in entries]).tolist()
        for (name, module, parameter, rule, _), broken in zip(entries, flags, strict=True):
            if broken:
                names = stored_names(module, checkpoint_name(prefix + name), parameter)
                _refuse(module.get_parameter(parameter), names, rule, headers)


def _refuse(tensor: torch.Tensor, names: list[str], rule: Rule, headers: Mapping[str, Header]) -> None:
    """Name the first of the tensors on disk, of which ``tensor`` is made, that breaks ``rule``."""
    wrong = rule.wrong(tensor).reshape(len(names), -1)
    at = int(wrong.any(1).nonzero()[0])
    values = tensor.reshape(len(names), -1)[at][wrong[at]]
    seen = f"{hex(int(values[0]))}" if tensor.dtype == torch.uint8 else f"{float(values[0])}"
    file = headers[names[at]].file if names[at] in headers else "the checkpoint"
    raise CheckpointError(
        f"tensor {names[at]}: {rule.what}",
        seen=f"{seen}, {int(wrong[at].sum())} of {wrong.shape[1]} values, in {file}",
        expected=rule.expected,
        do=rule.do,
    )
