"""Random experts, random routings to them, and weights as they lie on a GPU."""

from __future__ import annotations

import torch

from fp4pass import nvfp4
from fp4pass.bench.cases import Moe
from fp4pass.bench.clock import BYTES_IN_TURN, copies
from fp4pass.lowering.layout import FRAGMENTS, from_plain, scale_from_plain

EXPERTS_AT_ONCE = 16
"""Of a weight: quantizing, and turning back, holds several copies of these in float32."""

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes, scale bytes and global scale or scales."""

Routing = tuple[torch.Tensor, torch.Tensor]
"""Experts' ids and weights ``[tokens, top_k]``."""


def random_experts(experts: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Codes, scale and global scales of normal weights with variance 1/K, so that activations keep their size."""
    counts = (min(EXPERTS_AT_ONCE, experts - start) for start in range(0, experts, EXPERTS_AT_ONCE))
    pieces = [nvfp4.quantize(torch.randn(count, n, k, device=device) / k**0.5) for count in counts]
    codes, scale, factor = zip(*pieces, strict=True)
    scale_bytes = torch.cat([part.view(torch.uint8) for part in scale])
    return torch.cat(codes), scale_bytes.view(torch.float8_e4m3fn), torch.cat(factor)


def in_fragments(codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> Weight:
    """A quantized weight as it lies on a GPU."""
    return from_plain(codes, FRAGMENTS), scale_from_plain(scale.view(torch.uint8), FRAGMENTS), factor


def random_block(case: Moe, device: torch.device) -> tuple[Weight, Weight]:
    """Both weights of a case's experts, as they lie on a GPU: up and down."""
    up, down = (
        in_fragments(*random_experts(case.experts, n, k, device))
        for n, k in ((case.inner, case.width), (case.width, case.inner))
    )
    return up, down


def routings(case: Moe, tokens: int, device: torch.device, bytes_in_turn: int = BYTES_IN_TURN) -> list[Routing]:
    """Those for calls in turn. With few tokens each goes to other experts than the one before it."""
    scores, ids = torch.rand(tokens, case.experts, device=device).topk(case.top_k, -1)
    weights = scores / scores.sum(-1, keepdim=True)
    active, ranks = ids.unique(return_inverse=True)
    others = torch.randperm(case.experts, device=device)
    turns = range(copies(len(active) * case.expert_bytes(), bytes_in_turn))
    return [(others[(ranks + turn * len(active)) % case.experts], weights) for turn in turns]
