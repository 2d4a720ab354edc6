"""The modules that stand in for a model's linear layers and experts while their weights stay in NVFP4.

Traced, their forward decodes the weight and multiplies, in plain PyTorch once dynamo is done (see ``dequantize`` in
lowering/ops.py): that is the reference, and what the compiler pass sees and replaces. Outside tracing it calls
fp4pass's op, which never holds a decoded weight.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fp4pass.errors import CheckpointError
from fp4pass.lowering import reference

from .packed import BLOCK, PackedModule, Parts, Scalar

_TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")

MODELOPT = Parts("weight", "weight_scale", "weight_scale_2", "input_scale")
"""How ModelOpt calls the tensors of an NVFP4 matrix."""


def stacked(parts: Parts, projection: str) -> Parts:
    """Names of the parameters that hold ``projection`` of all experts: ``up_proj``, ``up_proj_scale`` and so on."""
    rest = (f"{projection}_{name.removeprefix('weight_')}" for name in astuple(parts)[1:4])
    return Parts(projection, *rest, divides=parts.divides)


class NVFP4Linear(PackedModule):
    """``x [..., K] -> x @ weight.T + bias [..., N]`` with an NVFP4 weight.

    Parameters, none of which takes gradients, as ``parts`` names them: ``weight`` uint8 [N, K/2], ``weight_scale``
    float8_e4m3fn [N, K/16], ``weight_scale_2`` [] or [1], ``input_scale`` if the checkpoint has one (kept for saving,
    never used), ``pre_quant_scale`` [K] if the layer has one (it multiplies x), and ``bias`` [N] in the model's dtype,
    if any. Raises CheckpointError if N or K is no multiple of 16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: torch.dtype | None = None,
        parts: Parts = MODELOPT,
        global_scale: Scalar = Scalar(),  # noqa: B008  (immutable)
        input_scale: Scalar | None = None,
        group: int = BLOCK,
        pre_quant_scale: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self._weight = in_features, out_features, parts.codes
        shape = (out_features, in_features)
        self._add_matrix(parts, shape, global_scale=global_scale, input_scale=input_scale, device=device, group=group)
        if pre_quant_scale is None:
            self.pre_quant_scale = None
        else:
            self._add("pre_quant_scale", torch.empty(in_features, dtype=pre_quant_scale, device=device))
        self.bias = None if bias is None else nn.Parameter(torch.empty(out_features, dtype=bias, device=device), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in x's dtype (bfloat16, float16 or float32)."""
        x = self._prescaled(x)
        if torch.compiler.is_compiling():
            return functional.linear(x, self.dense(self._weight, x.dtype), self.bias)
        return torch.ops.fp4pass.linear(x, *self.operands(self._weight), self.bias, self.layout)

    def reference_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch on any device, decoding at most 256 MB at a time."""
        return reference.linear(self._prescaled(x), *self.operands(self._weight), self.bias, self.layout)

    def _prescaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pre_quant_scale is None else (x * self.pre_quant_scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={self.layout}"


class NVFP4Experts(PackedModule):
    """Routed experts without gate: ``down_proj(act(up_proj(x)))`` of the chosen ones, weighted and summed.

    Parameters, none of which takes gradients, for ``p`` in up_proj [I, H] and down_proj [H, I] of each of E experts:
    ``p`` uint8 [E, N, K/2], ``p_scale`` float8_e4m3fn [E, N, K/16], ``p_scale_2`` [E] or [E, 1], and
    ``p_input_scale`` likewise if the checkpoint has one (``stacked`` names them). Raises CheckpointError for widths
    that are no multiple of 16 and for an activation that has no kernel.
    """

    # What transformers' experts functions ask of the module that they serve.
    has_gate = has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False

    def __init__(
        self,
        config: Any,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        parts: Parts = MODELOPT,
        global_scale: Scalar = Scalar(),  # noqa: B008  (immutable)
        input_scale: Scalar | None = None,
        group: int = BLOCK,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        if config.mlp_hidden_act not in reference.ACTIVATIONS:
            raise CheckpointError(
                "experts with an activation that fp4pass does not compute",
                seen=f"mlp_hidden_act {config.mlp_hidden_act!r}",
                expected=f"one of {', '.join(reference.ACTIVATIONS)}",
                do="load the BF16 release with transformers alone",
            )
        self.config = config
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, intermediate
        self.act_fn = ACT2FN[config.mlp_hidden_act]
        self.parts = parts
        shapes = {"up_proj": (num_experts, intermediate, hidden), "down_proj": (num_experts, hidden, intermediate)}
        for name, shape in shapes.items():
            names = stacked(parts, name)
            self._add_matrix(
                names, shape, global_scale=global_scale, input_scale=input_scale, device=device, group=group
            )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, k] integer, top_k_weights [T, k] float -> [T, H] in x's dtype."""
        if not torch.compiler.is_compiling():
            return torch.ops.fp4pass.experts(hidden_states, top_k_index, top_k_weights, *self._arguments())
        wanted = self.config._experts_implementation
        # The per-expert loop of "eager" depends on data and cannot be traced.
        function = ALL_EXPERTS_FUNCTIONS[wanted if wanted in _TRACEABLE_EXPERTS else "grouped_mm"]
        return function(_DenseExperts(self, hidden_states.dtype), hidden_states, top_k_index, top_k_weights)

    def reference_forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The same in plain PyTorch on any device, decoding at most 256 MB at a time."""
        return reference.experts(hidden_states, top_k_index, top_k_weights, *self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        up, down = self.operands("up_proj"), self.operands("down_proj")
        return (*up, *down, self.config.mlp_hidden_act, self.layout)

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, layout={self.layout}"


class _DenseExperts:
    """The decoded experts as transformers' functions expect them; lives for one traced call."""

    def __init__(self, packed: NVFP4Experts, dtype: torch.dtype) -> None:
        self.up_proj = packed.dense("up_proj", dtype)
        self.down_proj = packed.dense("down_proj", dtype)
        self.num_experts = packed.num_experts
        self.act_fn = packed.act_fn
        self.config = packed.config
        self.has_gate = packed.has_gate
        self.has_bias = packed.has_bias
        self.is_transposed = packed.is_transposed
        self.has_post_expert_norm = packed.has_post_expert_norm
        self._is_expert_parallel = packed._is_expert_parallel
