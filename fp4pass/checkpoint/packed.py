"""What a module with NVFP4 parameters must do: keep them packed, and own the layout of its codes.

The layout is chosen where the weights live: when they are loaded onto a device and when they move to another, never by
a compile and never by a change of dtype. ``state_dict`` and ``load_state_dict`` speak the checkpoint's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fp4pass.errors import CheckpointError
from fp4pass.lowering import reference
from fp4pass.lowering.layout import PLAIN, check_layout, layout_for, repack_

BLOCK = reference.GROUP


class PackedModule(nn.Module):
    """Base of the modules that hold NVFP4 matrices as parameters; see ``_add_matrix`` for their names and shapes.

    ``layout`` is the order of the codes in memory (a name from ``fp4pass.lowering.layout``).
    """

    layout: str

    def __init__(self) -> None:
        super().__init__()
        self.layout = PLAIN
        self._matrices: dict[str, tuple[str, ...]] = {}

    def _add_matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        global_shape: tuple[int, ...],
        input_scale: str | None,
        device: torch.device | str,
    ) -> None:
        """Register the parameters of the NVFP4 matrix ``name`` of logical ``shape`` [..., N, K].

        ``name`` uint8 [..., N, K/2], ``name_scale`` float8_e4m3fn [..., N, K/16], ``name_scale_2`` float32
        ``global_shape``, and ``input_scale`` (its whole name, or None) float32 of one number a matrix.
        """
        *outer, n, k = shape
        if n % BLOCK or k % BLOCK:
            raise CheckpointError(
                f"{name} has a shape that fp4pass does not compute in NVFP4",
                seen=f"N={n}, K={k}",
                expected=f"multiples of {BLOCK}",
                do="exclude this layer from quantization when exporting the checkpoint",
            )
        parts = {
            name: torch.empty(*outer, n, k // 2, dtype=torch.uint8, device=device),
            f"{name}_scale": torch.empty(*outer, n, k // BLOCK, dtype=torch.float8_e4m3fn, device=device),
            f"{name}_scale_2": torch.empty(global_shape, dtype=torch.float32, device=device),
        }
        if input_scale is not None:
            parts[input_scale] = torch.empty(global_shape, dtype=torch.float32, device=device)
        for part, tensor in parts.items():
            # Parameters rather than buffers: the loader of transformers sees only parameters.
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        self._matrices[name] = tuple(parts)

    def operands(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(codes, scale bytes, global scale)`` of matrix ``name`` as fp4pass's ops take them, codes in ``layout``."""
        scale = getattr(self, f"{name}_scale").view(torch.uint8)
        return getattr(self, name), scale, getattr(self, f"{name}_scale_2")

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Matrix ``name`` decoded to [..., N, K] in ``dtype``, rounded once (from float32, or float64 for float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return reference.dequantize(*self.operands(name), wide, self.layout).to(dtype)

    def packed_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything NVFP4 here: codes, scales, global scales, input scales."""
        for parts in self._matrices.values():
            for part in parts:
                yield part, self._parameters[part]

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the NVFP4 matrices, which are also the names of their codes."""
        return tuple(self._matrices)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._parameters[next(iter(self._matrices))].device

    @property
    def is_plain(self) -> bool:
        """Whether the codes lie in the checkpoint's own order."""
        return self.layout == PLAIN

    def set_layout(self, layout: str) -> None:
        """Reorder the codes to ``layout`` in place; at most 256 MB beside them."""
        check_layout(layout, f"{type(self).__name__}.set_layout")
        for name in self._matrices:
            repack_(self._parameters[name].data, self.layout, layout)
        self.layout = layout

    def settle(self) -> None:
        """Take the layout that belongs to the device on which the weights have arrived."""
        self.set_layout(layout_for(self.device))

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
        for name in self._matrices:
            destination[prefix + name] = _reordered(destination[prefix + name], self.layout, PLAIN)

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
        for part, parameter in self.packed_parameters():
            tensor = arriving.get(prefix + part)
            if tensor is not None and tensor.dtype != parameter.dtype:
                # copy_ would convert silently, and a weight rounded to uint8 is lost.
                error_msgs.append(f"{prefix}{part} is {tensor.dtype}, the packed parameter is {parameter.dtype}.")
                return
        if local_metadata.get("assign_to_params_buffers"):
            arrived = [arriving[prefix + name] for name in self._matrices if prefix + name in arriving]
            if arrived and arrived[0].device != self.device:
                self.layout = layout_for(arrived[0].device)
        for name in self._matrices:
            tensor = arriving.get(prefix + name)
            if tensor is not None and tensor.shape == self._parameters[name].shape:
                arriving[prefix + name] = _reordered(tensor, PLAIN, self.layout)
        super()._load_from_state_dict(
            arriving, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _reordered(codes: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """``codes`` themselves where nothing changes, else a reordered copy, with at most 256 MB beside it."""
    return codes if source == target else repack_(codes.detach().clone(), source, target)
