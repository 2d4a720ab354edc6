"""Linear layers in FP8, as mixed checkpoints have them beside their NVFP4 ones.

Weight-only (W8A16) multiplies activations as they are and works everywhere; W8A8 also rounds them to E4M3, by the
static scale of the checkpoint, and multiplies in FP8 where the GPU can. Traced, both are plain PyTorch that decodes the
weight and multiplies, in as few operations as there are: a large model has hundreds of such layers, and tracing one
costs what its operations cost. Outside tracing the module calls fp4pass's op.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fp4pass.errors import CheckpointError
from fp4pass.lowering import fp8, reference

from .packed import PackedModule, Scalar

W8A16, W8A8 = "w8a16", "w8a8"
MODES = (W8A16, W8A8)


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
        self._add_scalar("weight_scale", weight_scale, device, held=torch.float32)
        if input_scale is None:
            self.input_scale = None
        else:
            self._add_scalar("input_scale", input_scale, device, held=torch.float32)
        self.bias = None if bias is None else nn.Parameter(torch.empty(out_features, dtype=bias, device=device), False)
        self.mode, self._fixed_mode, self._sm = W8A16, None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in x's dtype (bfloat16, float16 or float32)."""
        if not torch.compiler.is_compiling():
            return torch.ops.fp4pass.fp8_linear(x, *self._arguments())
        if self.mode == W8A8:
            x = (fp8.rounded(x, self.input_scale).float() * self.input_scale).to(x.dtype)
        return functional.linear(x, self.dense("weight", x.dtype), self.bias)

    def reference_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch on any device, decoding at most 256 MB at a time."""
        return fp8.reference(x, *self._arguments())

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in ``dtype``, rounded once from float32 (float64 for float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self._parameters[name]
        if self._reads_bytes:
            values = reference.decode_scale(weight.view(torch.uint8), wide)
        else:
            values = weight.view(torch.float8_e4m3fn).to(wide)
        return (values * self.weight_scale).to(dtype)

    def _arguments(self) -> tuple[torch.Tensor | None, ...]:
        """What the op takes beside x: weight, its scale, the input scale in W8A8 alone, bias."""
        input_scale = self.input_scale.float() if self.mode == W8A8 else None
        return self.weight.view(torch.uint8), self.weight_scale.float(), input_scale, self.bias

    @property
    def matrices(self) -> tuple[str, ...]:
        """The one packed matrix."""
        return ("weight",)

    def set_mode(self, mode: str | None) -> None:
        """Fix the mode, or leave it to the device again (None). Raises what ``check_mode`` raises."""
        self.check_mode(mode)
        self._fixed_mode = mode
        self.suit(self._sm)

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
        self.suit(sm_of(self.device))

    def suit(self, sm: int | None) -> None:
        """Take the mode for GPUs of generation ``sm`` (None: no GPU), unless one is fixed."""
        self._sm = sm
        in_fp8 = sm is not None and sm >= fp8.FIRST_FP8_SM
        self.mode = self._fixed_mode or (W8A8 if in_fp8 and self._allows_w8a8 else W8A16)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.mode}"

    @property
    def _reads_bytes(self) -> bool:
        """Whether the device's compiler has no E4M3, so that a graph that keeps this layer decodes bytes."""
        return self._sm is not None and self._sm < fp8.FIRST_FP8_SM

    @property
    def _allows_w8a8(self) -> bool:
        return self.input_scale is not None and fp8.in_fp8(self.out_features, self.in_features)


def sm_of(device: torch.device) -> int | None:
    """The generation of a GPU, 90 for compute capability 9.0; None for other devices."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def set_fp8_mode(model: nn.Module, mode: str | None) -> None:
    """Fix the mode of every FP8 layer in ``model``, or leave it to the device again (None).

    Raises CheckpointError, before any layer is changed, for the first layer that cannot take it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    for name, module in layers.items():
        module.check_mode(mode, name)
    for module in layers.values():
        module.set_mode(mode)
