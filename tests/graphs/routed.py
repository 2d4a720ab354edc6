"""Small MoE blocks with random packed experts: how transformers writes them, and by hand with a step changed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from fp4pass import nvfp4
from fp4pass.checkpoint.modules import NVFP4Experts
from fp4pass.lowering.reference import relu2

from .running import activations

E, H, INNER, K = 4, 32, 48, 2
FORMS = {"grouped": grouped_mm_experts_forward, "gathered": batched_mm_experts_forward}


class Dense:
    """Decoded experts, as transformers' functions want them."""

    has_gate = has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self, packed: Routed, dtype: torch.dtype) -> None:
        self.up_proj, self.down_proj = packed.dense("up_proj", dtype), packed.dense("down_proj", dtype)
        self.num_experts, self.act_fn, self._is_expert_parallel = packed.num_experts, packed.act, packed.parallel


class Routed(NVFP4Experts):
    """Random packed experts that compute ``form(decoded experts, hidden, ids, weights)``, compiled or not."""

    def __init__(
        self,
        form: Callable,
        act: Callable = relu2,
        parallel: bool = False,
        experts: int = E,
        hidden: int = H,
        inner: int = INNER,
    ) -> None:
        super().__init__(SimpleNamespace(mlp_hidden_act="relu2"), experts, hidden, inner, device="cpu")
        self.form, self.act, self.parallel = form, act, parallel
        shapes = {"up_proj": (experts, inner, hidden), "down_proj": (experts, hidden, inner)}
        for i, (name, shape) in enumerate(shapes.items()):
            for part, tensor in zip(self._matrices[name], nvfp4.quantize(activations(*shape, seed=i)), strict=True):
                self._parameters[part].data = tensor

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.form(Dense(self, x.dtype), x, ids, weights)


def unchanged(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """What a step does that is as in a block."""
    return value


def written(
    ids: Callable = unchanged,
    rows: Callable = unchanged,
    up: Callable = unchanged,
    inner: Callable = unchanged,
    ids_down: Callable = unchanged,
    shares: Callable = unchanged,
    total: Callable = lambda y, x: y.sum(1),
) -> Callable:
    """The gathered form, written by hand, with something else done at one of its steps."""

    def form(e: Dense, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, choices = chosen.shape
        flat, given = ids(chosen.reshape(-1)), weights.reshape(-1, 1)
        copies = rows(x.repeat_interleave(choices, 0))
        hidden = e.act_fn(up(torch.bmm(e.up_proj[flat], copies.unsqueeze(-1)).squeeze(-1), given))
        out = torch.bmm(e.down_proj[ids_down(flat)], inner(hidden, given).unsqueeze(-1)).squeeze(-1)
        return total((out * shares(given)).view(tokens, choices, -1), x).to(x.dtype)

    return form


def read_in_between() -> Callable:
    """A form that gives, beside the block's result, what goes into the second product."""
    kept = []

    def form(e: Dense, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        block = written(inner=lambda h, given: (kept.append(h), h)[1])(e, x, ids, weights)
        return torch.cat((block, kept.pop()[:, :H]))

    return form


def later_by_number(x: torch.Tensor) -> torch.Tensor:
    """Rows from the eighth on doubled."""
    return torch.where(torch.arange(x.shape[0]).unsqueeze(1) >= 8, 2 * x, x)


def routing(
    tokens: int, dtype: torch.dtype = torch.float32, choices: int = K, hidden: int = H
) -> tuple[torch.Tensor, ...]:
    """hidden, ids (no expert twice for a token) and weights as a router gives them."""
    scores = activations(tokens, E, seed=5).sigmoid()
    weights, ids = scores.topk(choices, -1)
    return activations(tokens, hidden, dtype=dtype, seed=6), ids, weights
