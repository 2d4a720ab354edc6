"""How ops are registered: each once as anybody calls it, and once as compiled graphs do.

``fp4pass::linear`` asks its operands whether they fit, and autograd asks it for a gradient, both in Python: on the host
that takes longer than many of its kernels run. Of a graph that was traced both are known, and its guards see to it
that they stay true. So it may call ``fp4pass_traced::linear``: the same schema and implementations, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

CALLED, TRACED = "fp4pass", "fp4pass_traced"
IN_BOTH = ("linear", "linear_backward", "gathered_linear", "grouped_linear", "experts", "fp8_linear")
"""The ops that have a traced form. ``dequantize`` is none of them: of it a graph has the parts."""


def register(
    op: str,
    schema: str,
    check: Callable[..., None],
    implementations: Mapping[str, Callable[..., torch.Tensor]],
    fake: Callable[..., torch.Tensor],
    gradients: Callable[..., Any],
    save: Callable[..., None],
) -> None:
    """Define ``op`` in both namespaces.

    check: raises for operands that do not fit. implementations: by device, for operands that do. fake: the result
    without its values. gradients, save: ``backward`` and ``setup_context`` of `torch.library.register_autograd`.
    """

    def checked(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any) -> torch.Tensor:
            check(*args)
            return run(*args)

        return call

    for namespace, wrapped in ((CALLED, checked), (TRACED, lambda run: run)):
        name = f"{namespace}::{op}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device, run in implementations.items():
            torch.library.impl(name, device, wrapped(run))
        torch.library.register_fake(name, wrapped(fake))
    torch.library.register_autograd(f"{CALLED}::{op}", gradients, setup_context=save)


def traced_forms() -> dict[Any, Any]:
    """For each op as anybody calls it the one that compiled graphs call, as graphs name them."""
    called, traced = getattr(torch.ops, CALLED), getattr(torch.ops, TRACED)
    return {getattr(called, op).default: getattr(traced, op).default for op in IN_BOTH}


def is_registered(op: str) -> bool:
    """Whether ``op`` is there already: the registry of torch outlives the modules that fill it."""
    return hasattr(getattr(torch.ops, CALLED), op)
