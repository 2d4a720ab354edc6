"""What a module with packed parameters must do: keep them packed, keep their bytes, and own their layout.

A parameter has the checkpoint's form on disk and in a state dict. In memory it may be held in another one that is
better to compute from: the same bits under another dtype's name, a number in a wider dtype, or a block scale of 32
weights as two of 16. The layout of NVFP4 weights is
chosen where the weights live: when they are loaded onto a device and when they move to another, never by a compile and
never by a change of dtype. ``state_dict`` and ``load_state_dict`` speak the checkpoint's forms and layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp4pass.errors import CheckpointError
from fp4pass.lowering import (
    ops,  # noqa: F401  (registers torch.ops.fp4pass)
    reference,
)
from fp4pass.lowering.layout import PLAIN, check_layout, layout_for, repack_codes_, repack_scale_

BLOCK = reference.GROUP


@dataclass(frozen=True)
class Scalar:
    """How a checkpoint stores one number: ``shape`` [] or [1], float32 or bfloat16."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Parts:
    """Names of an NVFP4 matrix's parameters. ``divides``: the weight is code x scale / global scale."""

    codes: str
    scale: str
    global_scale: str
    input_scale: str
    divides: bool = False


class PackedModule(nn.Module):
    """Base of the modules that hold packed matrices as parameters.

    ``layout`` is the order of NVFP4 weights in memory (a name from ``fp4pass.lowering.layout``). ``divides`` says that
    the weight is code x scale / global scale.
    """

    layout: str

    def __init__(self) -> None:
        super().__init__()
        self.layout = PLAIN
        self._matrices: dict[str, tuple[str, str, str]] = {}
        self.divides = False
        self._stored: dict[str, torch.dtype] = {}
        self._held: dict[str, torch.dtype] = {}
        self._blocks: dict[str, tuple[int, int]] = {}

    def _add(self, name: str, tensor: torch.Tensor, held: torch.dtype | None = None) -> None:
        """Register a parameter in the dtype that the checkpoint has; ``settle`` turns it into ``held``."""
        # Parameters rather than buffers: the loader of transformers sees only parameters.
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._stored[name] = tensor.dtype
        if held is not None:
            self._held[name] = held

    def _add_matrix(
        self,
        parts: Parts,
        shape: tuple[int, ...],
        *,
        global_scale: Scalar,
        input_scale: Scalar | None,
        device: torch.device | str,
        group: int = BLOCK,
    ) -> None:
        """Register the parameters of an NVFP4 matrix of logical ``shape`` [..., N, K], named by its codes.

        codes uint8 [..., N, K/2], scale float8_e4m3fn [..., N, K/group] (held as [..., N, K/16]), global scale and
        input scale (if any) of one number a matrix.
        """
        *outer, n, k = shape
        if n % BLOCK or k % group:
            raise CheckpointError(
                f"{parts.codes} has a shape that fp4pass does not compute in NVFP4",
                seen=f"N={n}, K={k}",
                expected=f"multiples of {BLOCK}" + ("" if group == BLOCK else f", K of {group}"),
                do="exclude this layer from quantization when exporting the checkpoint",
            )
        self._add(parts.codes, torch.empty(*outer, n, k // 2, dtype=torch.uint8, device=device))
        self._add(parts.scale, torch.empty(*outer, n, k // group, dtype=torch.float8_e4m3fn, device=device))
        if group != BLOCK:
            self._blocks[parts.scale] = (k // group, k // BLOCK)
        self._add_scalar(parts.global_scale, global_scale, device, outer, torch.float32)
        if input_scale is not None:
            self._add_scalar(parts.input_scale, input_scale, device, outer)
        self._matrices[parts.codes] = (parts.codes, parts.scale, parts.global_scale)
        self.divides = parts.divides

    def _add_scalar(
        self,
        name: str,
        scalar: Scalar,
        device: torch.device | str,
        outer: Sequence[int] = (),
        held: torch.dtype | None = None,
    ) -> None:
        self._add(name, torch.empty((*outer, *scalar.shape), dtype=scalar.dtype, device=device), held)

    def operands(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(codes, scale bytes, global scale)`` of matrix ``name`` as fp4pass's ops take them, in ``layout``."""
        _, scale_name, factor_name = self._matrices[name]
        scale = getattr(self, scale_name).view(torch.uint8)
        codes, factor = getattr(self, name), getattr(self, factor_name).float()
        factor = factor.reciprocal() if self.divides else factor
        return codes, scale, factor.flatten() if factor.dim() == 2 else factor

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Matrix ``name`` decoded to [..., N, K] in ``dtype``, rounded once (from float32, or float64 for float64)."""
        return torch.ops.fp4pass.dequantize(*self.operands(name), self.layout, dtype)

    def packed_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything whose bytes are the checkpoint's: codes, scales, input scales."""
        for name in self._stored:
            yield name, self._parameters[name]

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the packed matrices, which are also the names of their codes."""
        return tuple(self._matrices)

    def names_of_matrices(self) -> Iterator[tuple[str, str, str]]:
        """Names of the parameters of each NVFP4 matrix: codes, block scales, global scale."""
        yield from self._matrices.values()

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._parameters[next(iter(self._stored))].device

    @property
    def is_plain(self) -> bool:
        """Whether codes and block scales lie in the checkpoint's own order."""
        return self.layout == PLAIN

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of parameter ``name`` in the checkpoint; None for one that follows the model's dtype."""
        return self._stored.get(name)

    def set_layout(self, layout: str) -> None:
        """Reorder codes and block scales to ``layout`` in place; at most 256 MB beside them.

        Raises ArgumentError, with nothing moved, for a layout that is unknown or not for these shapes.
        """
        check_layout(layout, f"{type(self).__name__}.set_layout", *self._shapes())
        for codes, scale, _ in self._matrices.values():
            repack_codes_(self._parameters[codes].data, self.layout, layout)
            repack_scale_(self._parameters[scale].data, self.layout, layout)
        self.layout = layout

    def _shapes(self) -> Iterator[tuple[int, ...]]:
        """``[..., N, K]`` of each matrix."""
        for name in self._matrices:
            *rows, half = self._parameters[name].shape
            yield *rows, half * 2

    def _layout_on(self, device: torch.device) -> str:
        """The layout that the weights take on ``device``."""
        return layout_for(device, self._shapes())

    def settle(self) -> None:
        """Take the dtypes to compute from, and the layout that belongs to the device that the weights arrived on."""
        for name, dtype in self._held.items():
            parameter = self._parameters[name]
            parameter.data = recast(parameter.data, dtype)
        for name, (stored, held) in self._blocks.items():
            parameter = self._parameters[name]
            parameter.data = _rescaled(parameter.data, stored, held)
        self.set_layout(self._layout_on(self.device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        before = self.device
        packed = {id(parameter) for _, parameter in self.packed_parameters()}

        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in packed:
                return fn(tensor)
            # One element tells whether ``fn`` would change the dtype, without converting a whole weight to see it.
            probe = fn(tensor.new_empty(1))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        super()._apply(move_only, recurse)
        if self.device != before:
            self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._held:
            destination[prefix + name] = recast(destination[prefix + name], self._stored[name])
        for codes, scale, _ in self._matrices.values():
            for name, repack in ((codes, repack_codes_), (scale, repack_scale_)):
                destination[prefix + name] = _repacked(repack, destination[prefix + name], self.layout, PLAIN)
        for name, (stored, held) in self._blocks.items():
            destination[prefix + name] = _rescaled(destination[prefix + name], held, stored)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        arriving = dict(state_dict)
        for name, parameter in self.packed_parameters():
            tensor = arriving.get(prefix + name)
            if tensor is None:
                continue
            stored = self._stored[name]
            if tensor.dtype not in (stored, parameter.dtype):
                # copy_ would convert silently, and a weight rounded to uint8 is lost.
                error_msgs.append(f"{prefix}{name} is {tensor.dtype}, the packed parameter is {stored}.")
                return
            stored_blocks, _ = self._blocks.get(name, (0, 0))
            if tensor.shape[-1:] == (stored_blocks,):
                tensor = _rescaled(tensor, stored_blocks, parameter.shape[-1])
            if tensor.shape == recast(parameter.data, tensor.dtype).shape:
                arriving[prefix + name] = recast(tensor, parameter.dtype)
        if local_metadata.get("assign_to_params_buffers"):
            arrived = [arriving[prefix + name] for name in self._matrices if prefix + name in arriving]
            if arrived and arrived[0].device != self.device:
                self.layout = self._layout_on(arrived[0].device)
        for codes, scale, _ in self._matrices.values():
            for name, repack in ((codes, repack_codes_), (scale, repack_scale_)):
                tensor = arriving.get(prefix + name)
                if tensor is not None and tensor.shape == self._parameters[name].shape:
                    arriving[prefix + name] = _repacked(repack, tensor, PLAIN, self.layout)
        super()._load_from_state_dict(
            arriving, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def recast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype``: the same number between wide floats, else the same bits (along the last dimension)."""
    if tensor.dtype == dtype:
        return tensor
    numbers = all(each.is_floating_point and each.itemsize > 1 for each in (tensor.dtype, dtype))
    return tensor.to(dtype) if numbers else tensor.view(dtype)


def _rescaled(scale: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Block scales [..., ``source``] of one number a block as [..., ``target``]: each repeated, or of each group one.
    Those that have another size stay as they are."""
    if scale.shape[-1] != source or source == target:
        return scale
    if target < source:
        return scale[..., :: source // target].contiguous()
    return scale.view(torch.uint8).repeat_interleave(target // source, -1).view(scale.dtype)


def _repacked(
    repack: Callable[[torch.Tensor, str, str], torch.Tensor], tensor: torch.Tensor, source: str, target: str
) -> torch.Tensor:
    """``tensor`` itself where nothing changes, else a reordered copy, with at most 256 MB beside it."""
    return tensor if source == target else repack(tensor.detach().clone(), source, target)
