"""Nemotron-H of transformers, its layers as an engine for Blackwell has them: every norm and activation before a
quantized product gives FP4, every quantized product takes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4pass.checkpoint.modules import NVFP4Experts, NVFP4Linear

from .fused import FACTOR, ops
from .running import compiling, relative_error
from .standins import in_tiles
from .test_unfuse import foreign
from .test_unfuse_model import fp4_or_fp8

pytestmark = pytest.mark.usefixtures("libraries")


class Fused(nn.Module):
    """A product that takes what its producer has left for it in FP4, or quantizes for itself."""

    def __init__(self, packed: NVFP4Linear) -> None:
        super().__init__()
        codes, scale, factor = packed.operands("weight")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", in_tiles(scale.view(torch.uint8)))
        self.register_buffer("factor", torch.tensor(FACTOR))
        self.register_buffer("alpha", factor / FACTOR)
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, self.given = self.given, None
        codes, scale = given or ops.trtllm.fp4_quantize(x.reshape(-1, x.shape[-1]), self.factor, 16)
        out = ops.trtllm.nvfp4_gemm(codes, self.codes, scale, self.scale, self.alpha, torch.bfloat16)
        return out.reshape(*x.shape[:-1], -1)


class Producer(nn.Module):
    """What stood before a product, and leaves FP4 for it now."""

    def __init__(self, before: nn.Module, product: Fused) -> None:
        super().__init__()
        self.before, self.products = before, [product]  # a list: the product is no part of it

    @property
    def weight(self) -> torch.Tensor:
        return self.before.weight


class Norm(Producer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m, product = self.before, self.products[0]
        fused = ops.auto_deploy.trtllm_rms_norm_quant_nvfp4
        normed, codes, scale = fused(x, m.weight, m.variance_epsilon, product.factor)
        product.given = codes, scale
        return normed


class GatedNorm(Producer):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        m, product = self.before, self.products[0]
        fused = ops.auto_deploy.trtllm_fused_gated_rmsnorm_quant_nvfp4
        product.given = fused(x, gate, m.weight, product.factor, m.variance_epsilon, m.group_size)
        return x  # the product has its own


class Relu2(Producer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.products[0]
        product.given = ops.trtllm.fused_relu2_quantize(x.reshape(-1, x.shape[-1]), product.factor)
        return x


class Experts(nn.Module):
    def __init__(self, packed: NVFP4Experts) -> None:
        super().__init__()
        self.sides = nn.ModuleList()
        for name in ("up_proj", "down_proj"):
            codes, scale, factor = packed.operands(name)
            side = nn.Module()
            side.register_buffer("codes", codes)
            side.register_buffer("scale", in_tiles(scale.view(torch.uint8)))
            side.register_buffer("factor", torch.tensor(FACTOR))
            side.register_buffer("alpha", factor / FACTOR)
            self.sides.append(side)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, down = self.sides
        return ops.auto_deploy.trtllm_quant_nvfp4_moe_fused(
            x, ids, weights, up.codes, down.codes, up.scale, down.scale, up.factor, down.factor, up.alpha, down.alpha,
            False, 8
        )  # fmt: skip


def for_blackwell(model: nn.Module) -> nn.Module:
    """``model`` with its quantized layers, and what stands before them, fused; in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (NVFP4Linear, NVFP4Experts)):
            model.set_submodule(name, Fused(module) if isinstance(module, NVFP4Linear) else Experts(module))
    for block in model.model.layers:
        mixer = block.mixer
        if isinstance(getattr(mixer, "in_proj", None), Fused):
            block.norm, mixer.norm = Norm(block.norm, mixer.in_proj), GatedNorm(mixer.norm, mixer.out_proj)
        elif hasattr(mixer, "shared_experts"):
            shared = mixer.shared_experts
            block.norm, shared.act_fn = Norm(block.norm, shared.up_proj), Relu2(shared.act_fn, shared.down_proj)
    return model


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
def test_nemotron_h_prepared_for_blackwell_is_the_plain_model_again(nano_model, dense_twin):
    plain = nano_model(dtype=torch.bfloat16).eval()
    exact = dense_twin(plain, torch.float32)(ids := torch.arange(4).reshape(1, 4), use_cache=False).logits.double()
    of_plain = relative_error(plain(ids, use_cache=False).logits, exact)
    prepared = Logits(for_blackwell(plain))
    on_blackwell = prepared(ids).double()
    of_blackwell = relative_error(on_blackwell, exact)
    run = compiling(prepared, {"target_sm": 90, "check": True})
    got = run(ids)
    assert foreign(run) == [] and not fp4_or_fp8(run.graphs[0]) and not run.report.refused
    assert {entry.op for entry in run.report.rewritten} == {"fp4pass.linear", "fp4pass.experts"}
    assert relative_error(got, exact) < 1.5 * of_plain < 0.5 * of_blackwell
    emulating = compiling(prepared, {"target_sm": 80, "check": True, "activations": "emulate"})
    assert relative_error(emulating(ids), on_blackwell) < 0.5 * of_blackwell
