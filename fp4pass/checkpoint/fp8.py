"""Linear layers in FP8, as mixed checkpoints have them beside their NVFP4 ones.

Everything here is plain PyTorch. Weight-only (W8A16) decodes the weight for each product and works everywhere; W8A8
also rounds the activations to E4M3, by the static scale of the checkpoint, and multiplies in FP8 where the GPU can.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import ScalingType

from fp4pass.errors import CheckpointError
from fp4pass.lowering import reference

from .packed import PackedModule, Scalar

W8A16, W8A8 = "w8a16", "w8a8"
MODES = (W8A16, W8A8)

_E4M3_MAX = 448.0
_PIECE_BYTES = 256 << 20
_FLOAT_BYTES = 4


class FP8Linear(PackedModule):
    """``x [..., K] -> x @ weight.T + bias [..., N]`` with an E4M3 weight: ``weight * weight_scale``.

    Parameters, none of which takes gradients: ``weight`` float8_e4m3fn [N, K] (held as bytes), ``weight_scale`` [] or
    [1], ``input_scale`` likewise if the checkpoint has one, and ``bias`` [N] in the model's dtype, if any.

    ``mode`` is W8A16 or W8A8. By default it is W8A8 on GPUs that multiply FP8 (SM89 and up) where the layer has a
    static input scale and N and K are multiples of 16, else W8A16; ``set_mode`` fixes it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: torch.dtype | None = None,
        weight_scale: Scalar = Scalar(),  # noqa: B008  (immutable)
        input_scale: Scalar | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device)
        # As bytes the weight can be read in a graph on GPUs whose compiler has no E4M3.
        self._add("weight", weight, held=torch.uint8)
        self._add_scalar("weight_scale", weight_scale, device)
        if input_scale is None:
            self.input_scale = None
        else:
            self._add_scalar("input_scale", input_scale, device)
        self.bias = None if bias is None else nn.Parameter(torch.empty(out_features, dtype=bias, device=device), False)
        self.mode, self._fixed_mode, self._on_fp8_gpu = W8A16, None, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in x's dtype (bfloat16, float16 or float32)."""
        return self._in_fp8(x) if self.mode == W8A8 else self._weight_only(x)

    def _weight_only(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return functional.linear(x, self.dense("weight", x.dtype), self.bias)
        return self.reference_forward(x)

    def reference_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight-only product, decoding at most 256 MB at a time."""
        rows = max(1, _PIECE_BYTES // (2 * _FLOAT_BYTES * self.in_features))
        pieces = self.weight.view(torch.float8_e4m3fn).split(rows)
        total = [functional.linear(x, self._decoded(piece.float(), x.dtype)) for piece in pieces]
        total = total[0] if len(total) == 1 else torch.cat(total, -1)
        return total if self.bias is None else total + self.bias

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in ``dtype``, rounded once from float32 (float64 for float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self._decoded(reference.decode_scale(self._parameters[name].view(torch.uint8), wide), dtype)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The one packed matrix."""
        return ("weight",)

    def set_mode(self, mode: str | None) -> None:
        """Fix the mode, or leave it to the device again (None). Raises what ``check_mode`` raises."""
        self.check_mode(mode)
        self._fixed_mode = mode
        self._choose_mode()

    def check_mode(self, mode: str | None, name: str = "FP8Linear") -> None:
        """Raise CheckpointError for an unknown mode, and for W8A8 without a static input scale or with widths that no
        FP8 product takes. ``name`` is the layer's, for the message."""
        if mode not in (*MODES, None):
            raise CheckpointError(
                "unknown mode of FP8 layers", seen=repr(mode), expected=f"one of {', '.join(MODES)}", do="pass one"
            )
        if mode == W8A8 and not self._allows_w8a8:
            shape = f"N={self.out_features}, K={self.in_features}"
            raise CheckpointError(
                f"{name}: an FP8 layer cannot round its activations",
                seen=f"no input_scale ({shape})" if self.input_scale is None else shape,
                expected="a static input_scale, N and K multiples of 16",
                do=f"ask for {W8A16}, which multiplies activations as they are; no scale is made up",
            )

    def settle(self) -> None:
        """Take the bytes' dtype and the mode that belongs to the device that the weights arrived on."""
        super().settle()
        self._choose_mode()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.mode}"

    @property
    def _allows_w8a8(self) -> bool:
        return self.input_scale is not None and self.out_features % 16 == 0 and self.in_features % 16 == 0

    def _choose_mode(self) -> None:
        self._on_fp8_gpu = multiplies_fp8(self.device)
        natural = W8A8 if self._allows_w8a8 and self._on_fp8_gpu else W8A16
        self.mode = self._fixed_mode or natural

    def _decoded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (values * self.weight_scale.to(values.dtype)).to(dtype)

    def _in_fp8(self, x: torch.Tensor) -> torch.Tensor:
        """Both operands in E4M3; values beyond the static scale's range saturate."""
        scale = self.input_scale.float()
        rounded = (x.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        if not self._on_fp8_gpu:  # the same rounding, then a product that every device has
            return self._weight_only((rounded.float() * scale).to(x.dtype))
        weight, one = self.weight.view(torch.float8_e4m3fn).t(), ScalingType.TensorWise
        scales = (scale, one, self.weight_scale.float(), one)
        total = functional.scaled_mm(rounded.flatten(0, -2), weight, *scales, output_dtype=x.dtype)
        total = total.view(*x.shape[:-1], self.out_features)
        return total if self.bias is None else total + self.bias


def multiplies_fp8(device: torch.device) -> bool:
    """Whether ``device`` is a GPU with FP8 tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def set_fp8_mode(model: nn.Module, mode: str | None) -> None:
    """Fix the mode of every FP8 layer in ``model``, or leave it to the device again (None).

    Raises CheckpointError, before any layer is changed, for the first layer that cannot take it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    for name, module in layers.items():
        module.check_mode(mode, name)
    for module in layers.values():
        module.set_mode(mode)
