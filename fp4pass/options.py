"""The options of the backend: one frozen value, all of it part of the cache key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4pass import _torch
from fp4pass.errors import OptionError

BF16, EMULATE = "bf16", "emulate"
ACTIVATIONS = (BF16, EMULATE)


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., backend="fp4pass", options={...})`` takes.

    mode: one of torch.compile's modes (torch allows ``mode=`` or ``options=``, not both; this carries it in options).
    target_sm: compile as for this GPU generation (80, 86, 89, 90, ...) instead of the one at hand.
    require_match: raise UnmatchedError when a quantized product is left as it was, instead of warning.
    disable: names of passes to leave out (see ``fp4pass.pipeline.PASSES``).
    check: re-derive the metadata of every node after each pass and compare.
    activations: ``"bf16"`` removes activation quantization, ``"emulate"`` rounds to FP4 as Blackwell would, in plain
        operations.
    inductor: further settings of Inductor's, as (name, value) pairs.
    """

    mode: str | None = None
    target_sm: int | None = None
    require_match: bool = False
    disable: tuple[str, ...] = ()
    check: bool = False
    activations: str = "bf16"
    inductor: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """From what torch.compile hands a backend. Names that are Inductor's go to Inductor.

        Raises:
            OptionError: an unknown name (the nearest is named), or a value of the wrong kind.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"inductor"}
        own: dict[str, Any] = {}
        inductor: dict[str, Any] = {}
        for name, given in (options or {}).items():
            if name in known:
                own[name] = given
            elif _torch.is_inductor_option(name):
                inductor[name.replace("-", "_")] = given
            else:
                raise _unknown(name, known)
        if mode is not None:
            own.setdefault("mode", mode)
        if isinstance(own.get("disable"), (list, set, frozenset, tuple)):
            own["disable"] = tuple(sorted(own["disable"]))
        found = cls(**own, inductor=tuple(sorted(inductor.items())))
        found._validate()
        return found

    def patches(self) -> dict[str, Any]:
        """Inductor settings that follow from the options.

        Emulation needs the roundings between operations that fused kernels leave out: one could change a code.
        """
        rounding = {"emulate_precision_casts": True} if self.activations == EMULATE else {}
        return {**_torch.mode_patches(self.mode), **rounding, **dict(self.inductor)}

    def _validate(self) -> None:
        from fp4pass.pipeline import PASSES

        names = [each.name for each in PASSES]
        checks = {
            "mode": (self.mode is None or self.mode in _torch.mode_names(), f"one of {', '.join(_torch.mode_names())}"),
            "target_sm": (
                self.target_sm is None or (_is_int(self.target_sm) and 50 <= self.target_sm < 1000),
                "a compute capability such as 80 or 90",
            ),
            "require_match": (isinstance(self.require_match, bool), "True or False"),
            "check": (isinstance(self.check, bool), "True or False"),
            "activations": (self.activations in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
            "disable": (
                isinstance(self.disable, tuple) and all(name in names for name in self.disable),
                f"a list of passes among {', '.join(names)}",
            ),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise OptionError(
                    f"option {name!r} has a value that it does not take",
                    seen=repr(getattr(self, name)),
                    expected=expected,
                    do=f"pass options={{{name!r}: ...}} with such a value, or leave it out",
                )


def _is_int(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _unknown(name: str, known: set[str]) -> OptionError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return OptionError(
        f"unknown option {name!r}",
        seen=repr(name),
        expected=f"one of {', '.join(sorted(known))}, or a setting of Inductor's",
        do=f"did you mean {near[0]!r}?" if near else "see fp4pass.Options for what each option does",
    )
