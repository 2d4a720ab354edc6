"""Which GPU generation a graph is compiled for, and whether the passes run there at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fp4pass.match.reasons import Reason

OLDEST_SM, NATIVE_SM = 80, 100


@dataclass(frozen=True)
class Target:
    """``sm`` 90 is compute capability 9.0; None is the CPU (and the meta device, unless a target is asked for)."""

    sm: int | None

    @property
    def name(self) -> str:
        """For reports: ``sm_90`` or ``cpu``."""
        return "cpu" if self.sm is None else f"sm_{self.sm}"

    @property
    def lowering(self) -> str:
        """What computes a rewritten product there."""
        return "plain torch on the CPU" if self.sm is None else f"Triton, sm_{self.sm}"

    @property
    def refusal(self) -> Reason | None:
        """Why nothing is rewritten there; None where it is."""
        if self.sm is None:
            return None
        if self.sm >= NATIVE_SM:
            return Reason.NATIVE_FP4
        return Reason.TOO_OLD if self.sm < OLDEST_SM else None


def choose_target(asked: int | None, examples: Sequence[Any]) -> Target:
    """The asked-for generation, else that of the GPU on which the inputs lie, else the CPU."""
    if asked is not None:
        return Target(asked)
    device = next((e.device for e in examples if isinstance(e, torch.Tensor) and e.device.type == "cuda"), None)
    if device is None:
        return Target(None)
    major, minor = torch.cuda.get_device_capability(device)
    return Target(10 * major + minor)
