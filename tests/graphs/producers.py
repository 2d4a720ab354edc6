"""How the libraries that write NVFP4 decode it, written out by hand: layers with their parameters, by name and shape.

The real libraries are tried in `test_producers.py` where they are installed; these forms stay when they change.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fp4pass import nvfp4

from .recipes import to_tiles
from .running import activations

# Module-level tensors, as the libraries have them: inputs of the traced graph.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES_WITHOUT_MINUS_ZERO = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Layer(nn.Module):
    """A random quantized weight ``[(E,) N, K]``; ``exact`` is what it stands for, in float64."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.packed = nvfp4.quantize(activations(*shape, seed=11))
        self.exact = nvfp4.dequantize(*self.packed, torch.float64)

    def keep(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight(x.dtype)
        if ids is None:
            return functional.linear(x, weight)
        return torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)


class CompressedTensors(Layer):
    """``nvfp4-pack-quantized``: magnitudes and a sign, scales rounded to bfloat16, a global scale that divides."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        codes, scale, factor = self.packed
        divisor = (1 / factor).reshape(1) if factor.dim() == 0 else 1 / factor
        self.keep(weight_packed=codes, weight_scale=scale, weight_global_scale=divisor)
        wide = divisor.double() if factor.dim() == 0 else divisor.double().view(-1, 1, 1)
        self.exact = nvfp4.dequantize(codes, scale, torch.ones_like(factor), torch.float64) / wide

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        *lead, half = self.weight_packed.shape
        flat = self.weight_packed.flatten()
        numbers = torch.stack((flat & 0x0F, (flat & 0xF0) >> 4), dim=1).flatten()
        values = MAGNITUDES[(numbers & 7).to(torch.long)] * torch.where((numbers & 8).to(torch.bool), -1.0, 1.0)
        values = values.reshape(*lead, 2 * half).to(torch.bfloat16)
        divisor = self.weight_global_scale
        divisor = divisor.view(-1, 1, 1, 1) if len(lead) == 2 else divisor
        scale = self.weight_scale.to(torch.bfloat16).unsqueeze(-1) / divisor
        return (values.unflatten(-1, (-1, 16)).to(scale.dtype) * scale).flatten(-2).to(dtype)


class TorchAO(Layer):
    """NVFP4Tensor, weight only: bits of float32 put together with masked writes; scales in rows or in 128x4 tiles."""

    def __init__(self, *shape: int, tiles: bool, per_tensor: bool = True) -> None:
        super().__init__(*shape)
        codes, scale, factor = self.packed
        self.keep(qdata=codes, scale=to_tiles(scale).view(-1, 4 * -(-scale.shape[1] // 4) * 4) if tiles else scale)
        self.tiles, self.shape = tiles, shape
        self.per_tensor_scale = nn.Parameter(factor, requires_grad=False) if per_tensor else None
        if not per_tensor:
            self.exact = nvfp4.dequantize(codes, scale, torch.ones([]), torch.float64)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        numbers = torch.stack((self.qdata & 0xF, self.qdata >> 4), dim=-1).view(*self.shape)
        sign = numbers & 8
        rest = numbers ^ sign
        bits = (((rest >> 1) - 1 + 127).to(torch.int32) << 23) | ((rest & 1).to(torch.int32) << 22)
        bits[rest == 0] = 0
        bits[torch.logical_and(rest > 0, (rest >> 1) == 0)] = 0x3F000000
        values = (bits | (sign.to(torch.int32) << 28)).view(torch.float32)
        scale = self._scale_by_rows().to(torch.float32)
        if self.per_tensor_scale is not None:
            scale = self.per_tensor_scale * scale
        rows, columns = self.shape
        wide = values.view(rows, columns // 16, 16) * scale.view(rows, columns // 16, 1)
        return wide.view(rows, columns).to(dtype)

    def _scale_by_rows(self) -> torch.Tensor:
        rows, groups = self.shape[0], self.shape[1] // 16
        if not self.tiles:
            return self.scale
        tall, wide = -(-rows // 128), -(-groups // 4)
        tiles = self.scale.view(tall * wide, 32, 16).view(tall * wide, 32, 4, 4).transpose(1, 2)
        plain = tiles.reshape(tall, wide, 128, 4).permute(0, 2, 1, 3).reshape(tall * 128, wide * 4)
        return plain[:rows, :groups]


class ModelOpt(Layer):
    """`mtq.compress`: strided writes of nibbles into bfloat16, a table of 16 in which code 8 is plain zero."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        codes, scale, factor = self.packed
        self.keep(quantized=codes, _scale=scale, _double_scale=factor)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        rows, half = self.quantized.shape
        numbers = torch.empty((rows, 2 * half), dtype=dtype)
        numbers[..., 1::2] = self.quantized >> 4
        numbers[..., 0::2] = self.quantized & 0x0F
        values = VALUES_WITHOUT_MINUS_ZERO[numbers.view(-1).to(torch.long)].view(rows, -1, 16)
        scale = self._scale.to(torch.float32) * self._double_scale
        return (values * scale.unsqueeze(-1)).view(rows, 2 * half).to(dtype)
