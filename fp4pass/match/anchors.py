"""The matrix products that a quantized weight can feed, each with where its operands stand."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """Operand positions of one product op; ``left`` and ``right`` multiply as ``left @ right``."""

    left: int
    right: int
    bias: int | None = None
    offsets: int | None = None


ANCHORS: dict[torch._ops.OpOverload, Anchor] = {
    aten.mm.default: Anchor(0, 1),
    aten.mv.default: Anchor(0, 1),
    aten.addmm.default: Anchor(1, 2, bias=0),
    aten.bmm.default: Anchor(0, 1),
    aten.baddbmm.default: Anchor(1, 2, bias=0),
    aten._grouped_mm.default: Anchor(0, 1, offsets=2),
}

# Registered by transformers when its experts are imported; no import of ours may pull transformers in.
_BY_NAME = {
    "transformers::grouped_mm_fallback": Anchor(0, 1, offsets=2),
    "transformers::grouped_mm_fallback_backward": Anchor(0, 1, offsets=2),
}


OPAQUE_PRODUCTS = frozenset(
    {
        "_C::cutlass_fp4_group_mm",
        "_C::cutlass_scaled_fp4_mm",
        "aten::_scaled_grouped_mm_v2",
        "aten::_scaled_mm",
        "aten::_scaled_mm_v2",
        "auto_deploy::torch_fake_quant_nvfp4_linear",
        "auto_deploy::torch_quant_nvfp4_linear",
        "auto_deploy::torch_quant_nvfp4_moe",
        "auto_deploy::trtllm_nvfp4_gemm",
        "auto_deploy::trtllm_nvfp4_prequant_linear",
        "auto_deploy::trtllm_nvfp4_trtllm_gen_moe_fused",
        "auto_deploy::trtllm_quant_nvfp4_moe_fused",
        "trtllm::fp4_gemm",
        "trtllm::nvfp4_gemm",
        "trtllm::nvfp4_gemm_cublaslt",
        "trtllm::nvfp4_gemm_cutlass",
        "trtllm::cuda_core_nvfp4_gemm",
        "vllm::flashinfer_mm_fp4",
    }
)
"""Products with FP4 operands of other libraries: nothing to match in them, `fp4pass.passes.unfuse` replaces them."""


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` is a matrix product: one that can be matched, one of another library, or one of our own."""
    op = called_op(node)
    return op is not None and _multiplies(op)


def called_op(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that ``node`` calls, also where functionalization has wrapped one that writes to its arguments."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    wrapped = node.args[0] if node.args else None
    is_wrapper = str(getattr(node.target, "__name__", "")).startswith("auto_functionalized")
    return wrapped if is_wrapper and isinstance(wrapped, torch._ops.OpOverload) else None


def anchor_of(node: fx.Node) -> Anchor | None:
    """The operand positions of ``node`` if it is a product, else None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    return _anchor(node.target)


# Asked of every node of a graph, several times, and an op's name is slow to come by: each op is looked at once.
@functools.cache
def _anchor(op: torch._ops.OpOverload) -> Anchor | None:
    return ANCHORS.get(op) or _BY_NAME.get(op._schema.name)


@functools.cache
def _multiplies(op: torch._ops.OpOverload) -> bool:
    return _anchor(op) is not None or op._schema.name in OPAQUE_PRODUCTS or op.namespace == "fp4pass"
