"""Grouped FP4 products and whole blocks of experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .fused import FACTOR, K, Layer, N, ops
from .running import activations, called, compiling, relative_error
from .standins import relu_squared, silu_times
from .test_unfuse import ROUNDED, emulates, foreign

EXPERTS = 3
SIZES = (4, 0, 7)


pytestmark = pytest.mark.usefixtures("libraries")
E4M3, E2M1 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2


def starts() -> torch.Tensor:
    return torch.tensor([0, *SIZES[:-1]], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def grouped(m: Layer, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """vLLM's: quantize each expert's rows by its own factor, then all products at once."""
    rows, columns = x.shape
    codes, scale = x.new_empty(rows, columns // 2, dtype=torch.uint8), x.new_empty(3 * 128, 8, dtype=torch.uint8)
    quantize = ops._C.scaled_fp4_experts_quant if gate is None else ops._C.silu_and_mul_scaled_fp4_experts_quant
    quantize(codes, scale, x if gate is None else torch.cat((x, gate), -1), m.factors, m.starts, m.scale_starts)
    out = x.new_empty(rows, N)
    ops._C.cutlass_fp4_group_mm(out, codes, m.codes, scale, m.scale, m.alpha, m.sizes, m.starts, m.scale_starts)
    return out


def layer_of_experts(run) -> Layer:
    layer = Layer(run, experts=EXPERTS)
    factors = FACTOR * torch.tensor([1.0, 2.0, 0.5])
    layer.register_buffer("factors", factors)
    layer.alpha /= factors / FACTOR
    layer.register_buffer("starts", starts())
    layer.register_buffer("scale_starts", torch.tensor([0, 128, 256], dtype=torch.int32))
    layer.register_buffer("tile_starts", torch.tensor([0, 128, 128], dtype=torch.int32))
    layer.register_buffer("ends", torch.tensor(SIZES, dtype=torch.int32).cumsum(0, dtype=torch.int32))
    layer.register_buffer("sizes", torch.tensor([[size, N, K] for size in SIZES], dtype=torch.int32))
    return layer


def grouped_by_torch(m: Layer, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """torch's product behind vLLM's quantization."""
    rows, columns = x.shape
    codes, scale = x.new_empty(rows, columns // 2, dtype=torch.uint8), x.new_empty(3 * 128, 8, dtype=torch.uint8)
    quantize = ops._C.scaled_fp4_experts_quant if gate is None else ops._C.silu_and_mul_scaled_fp4_experts_quant
    values = x if gate is None else torch.cat((x, gate), -1)
    quantize(codes, scale, values, m.factors, m.starts, m.tile_starts)
    scales = [scale.view(E4M3), 1 / m.factors], [m.scale.view(E4M3), m.alpha * m.factors]
    return ops.aten._scaled_grouped_mm_v2(
        codes.view(E2M1), m.codes.mT.view(E2M1), scales[0], [2, 0], [1, 0], scales[1], [2, 0], [1, 0], m.ends, None,
        torch.bfloat16
    )  # fmt: skip


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("run_layer", [grouped, grouped_by_torch])
@torch.no_grad()
def test_a_grouped_product_is_one_of_ours(run_layer, with_gate, emulate):
    layer = layer_of_experts(run_layer)
    x = activations(sum(SIZES), K, dtype=torch.bfloat16)
    gate = activations(sum(SIZES), K, dtype=torch.bfloat16, seed=2) if with_gate else None
    run = compiling(layer, {"check": True, "activations": "emulate" if emulate else "bf16"})
    got, want = run(x, gate), layer(x, gate)
    assert foreign(run) == [] and not any("scaled" in name for name in called(run.graphs[0]))
    (entry,) = run.report.rewritten
    assert (entry.op, entry.n, entry.k, entry.experts) == ("fp4pass.grouped_linear", N, K, EXPERTS)
    values = x.double() if gate is None else silu_times(torch.cat((x, gate), -1))
    exact = torch.cat(
        [
            rows @ (layer.exact_weight(e) * layer.factors[e].double() / FACTOR).T
            for e, rows in enumerate(values.split(SIZES))
        ]
    )
    if emulate:
        assert emulates(got, want, exact, nothing_rounded=not with_gate)
    else:
        assert relative_error(got, exact) < ROUNDED


# --- Whole blocks.

HIDDEN, INNER, TOKENS, CHOICES = 96, 64, 5, 2


class Block(nn.Module):
    """Experts as TensorRT-LLM calls them, fused or listed, with a gate or without."""

    def __init__(self, listed: bool, with_gate: bool) -> None:
        super().__init__()
        self.listed, self.with_gate = listed, with_gate
        up = 2 if with_gate and not listed else 1
        self.up = Layer(None, EXPERTS, n=up * INNER, k=HIDDEN, seed=1)
        self.gate = Layer(None, EXPERTS, n=INNER, k=HIDDEN, seed=2) if with_gate and listed else None
        self.down = Layer(None, EXPERTS, n=HIDDEN, k=INNER, seed=3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        act = (self.with_gate, 5 if self.with_gate else 8)
        up, down, gate = self.up, self.down, self.gate
        if not self.listed:
            return ops.auto_deploy.trtllm_quant_nvfp4_moe_fused(
                x, ids, routing, up.codes, down.codes, up.scale, down.scale, up.factor, down.factor, up.alpha,
                down.alpha, *act
            )  # fmt: skip
        first, third = (up, None) if gate is None else (gate, up)
        sides = (first, down, third)
        parts = [
            [] if side is None else each(side)
            for each in (
                lambda side: list(side.codes.unbind()),
                lambda side: [side.factor] * EXPERTS,
                lambda side: [scale.flatten() for scale in side.scale.unbind()],
                lambda side: list(side.alpha.unbind()),
            )
            for side in sides
        ]
        return ops.auto_deploy.torch_quant_nvfp4_moe(x, ids, routing, *parts, *act)

    def exact(self, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """In float64, no activation quantized."""
        rows = x.double().reshape(-1, HIDDEN)
        total = torch.zeros_like(rows)
        for t in range(rows.shape[0]):
            for e, weight in zip(ids[t].tolist(), routing[t].double(), strict=True):
                hidden = rows[t] @ self.up.exact_weight(e).T
                if self.gate is not None:
                    hidden = silu_times(torch.cat((rows[t] @ self.gate.exact_weight(e).T, hidden)))
                else:
                    hidden = silu_times(torch.cat(hidden.chunk(2)[::-1])) if self.with_gate else relu_squared(hidden)
                total[t] += weight * (hidden @ self.down.exact_weight(e).T)
        return total.reshape(x.shape)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@torch.no_grad()
def test_a_block_of_experts_is_one_of_ours(listed, with_gate):
    block = Block(listed, with_gate)
    x = activations(1, TOKENS, HIDDEN, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [1, 2]])
    routing = torch.rand(TOKENS, CHOICES, generator=torch.Generator().manual_seed(4))
    run = compiling(block, {"check": True})
    got = run(x, ids, routing)
    assert foreign(run) == [] and not run.report.refused
    assert relative_error(got, block.exact(x, ids, routing)) < 2 * ROUNDED
    assert ("fp4pass.experts.default" in called(run.graphs[0])) == (not with_gate)
    emulating = compiling(block, {"check": True, "activations": "emulate"})
    exact = block.exact(x, ids, routing)
    assert emulates(emulating(x, ids, routing), block(x, ids, routing), exact)
    assert foreign(emulating) == []
