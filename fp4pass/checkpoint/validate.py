"""Is what lies on disk what the quantization config and the model say? Asked before any weight is read.

Only the headers of the safetensors files are read here; what needs the numbers themselves (NaN scales, impossible
global scales) is asked once they have arrived on their device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fp4pass.errors import CheckpointError

from .config import checkpoint_name
from .modules import NVFP4Experts, NVFP4Linear
from .packed import PackedModule

_SPELLING = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
_DENSE = ("BF16", "F16", "F32", "F64")

DROPPED = r"(k_proj\.k_scale|v_proj\.v_scale)$"
"""Scales of an FP8 KV cache: caches are BF16 here, so that these tensors are not loaded."""
_MTP = r"^mtp\."

# The largest weight is at most 6 * 448 * global scale; a trained layer's stays far below this bound, an inverted
# global scale (as compressed-tensors stores it, under another name) lies far above it.
_LARGEST_GLOBAL_SCALE = 1.0


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about one of its tensors."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_headers(files: Iterable[str | os.PathLike], folder: str | os.PathLike | None = None) -> dict[str, Header]:
    """Headers of every tensor in ``files``, under the checkpoint's names (``backbone.*``).

    Raises CheckpointError for a file that is missing, unreadable, not safetensors, or (if ``folder`` is given) outside
    of ``folder``.
    """
    headers: dict[str, Header] = {}
    for path in map(Path, files):
        _check_place(path, folder)
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                    part = opened.get_slice(name)
                    headers[checkpoint_name(name)] = Header(part.get_dtype(), tuple(part.get_shape()), path.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name} cannot be read as safetensors",
                seen=str(error),
                expected="a complete safetensors file",
                do="download this file again",
            ) from error
    return headers


def _check_place(path: Path, folder: str | os.PathLike | None) -> None:
    # Compared as written: files of the hub's cache are links to a place outside of the snapshot.
    outside = folder is not None and not os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)
    if outside:
        raise CheckpointError(
            "the checkpoint's index names a file outside of its folder",
            seen=str(path),
            expected=f"files in {folder}",
            do="do not load this checkpoint unless you know who wrote the index",
        )
    if not path.exists():
        raise CheckpointError(
            f"a shard of the checkpoint is missing: {path.name}",
            seen=f"no file {path}",
            expected="every file that model.safetensors.index.json names",
            do="download the missing file",
        )


def check_headers(model: nn.Module, headers: Mapping[str, Header], prefix: str = "") -> None:
    """Every tensor of ``model`` (on meta, packed modules in place) must be on disk in its shape and kind of dtype.

    ``prefix`` is what stands before the model's names in the checkpoint's. Raises CheckpointError for the first tensor
    that is missing, has another shape or dtype, or belongs to a linear layer and has no place in it.
    """
    wanted = list(_wanted(model, prefix))
    for want in wanted:
        header = headers.get(want.name)
        if header is None:
            raise CheckpointError(
                f"tensor {want.name} is missing",
                seen=f"{len(headers)} tensors, this one not among them",
                expected=want.described(),
                do="download the checkpoint again; if it is your own export, export this tensor with it",
            )
        right_dtype = header.dtype in _DENSE if want.dtype is None else header.dtype == want.dtype
        if not right_dtype or header.shape != want.shape:
            raise CheckpointError(
                f"tensor {want.name} is not what the quantization config says",
                seen=f"{header.dtype} {list(header.shape)} in {header.file}",
                expected=want.described(),
                do="check that config files and weights come from the same release",
            )
    _refuse_extras(model, headers, {want.name for want in wanted}, prefix)


def dropped(headers: Mapping[str, Header]) -> tuple[str, ...]:
    """Names of the tensors that are knowingly not loaded: KV-cache scales and the multi-token-prediction layers."""
    return tuple(name for name in headers if re.search(f"{DROPPED}|{_MTP}", name))


@dataclass(frozen=True)
class _Want:
    """A tensor that the model needs from disk; dtype None stands for any dense float."""

    name: str
    dtype: str | None
    shape: tuple[int, ...]

    def described(self) -> str:
        reason = "not quantized" if self.dtype is None else "NVFP4"
        return f"{self.dtype or 'BF16, F16 or F32'} {list(self.shape)}: the config says that this layer is {reason}"


def _wanted(model: nn.Module, prefix: str) -> Iterator[_Want]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        packed = isinstance(module, PackedModule) and name in dict(module.packed_parameters())
        for stored, shape in _stored(module, checkpoint_name(prefix + owner), name, tuple(tensor.shape)):
            yield _Want(stored, _SPELLING[tensor.dtype] if packed else None, shape)


def _stored(
    module: nn.Module, file_name: str, parameter: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes under which a parameter lies on disk: experts one by one, everything else as it is."""
    matrix = re.match(r"(up_proj|down_proj)(?:_(.+))?$", parameter)
    if not is_experts(module) or matrix is None:
        yield f"{file_name}.{parameter}", shape
        return
    projection, rest = matrix.groups()
    tail = rest if rest == "input_scale" else "weight" if rest is None else f"weight_{rest}"
    for expert in range(shape[0]):
        yield f"{file_name}.{expert}.{projection}.{tail}", shape[1:]


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` stacks routed experts that the checkpoint stores one by one, packed or dense."""
    return isinstance(module, NVFP4Experts) or type(module).__name__ == "NemotronHExperts"


def _refuse_extras(model: nn.Module, headers: Mapping[str, Header], known: set[str], prefix: str) -> None:
    """Refuse tensors of linear layers that would change their meaning (``pre_quant_scale``, say)."""
    linears = (NVFP4Linear, nn.Linear)
    owners = {checkpoint_name(prefix + name) for name, module in model.named_modules() if isinstance(module, linears)}
    for name in headers:
        if name in known or re.search(DROPPED, name) or name.rpartition(".")[0] not in owners:
            continue
        raise CheckpointError(
            f"tensor {name} has no place in its layer",
            seen=f"{headers[name].dtype} {list(headers[name].shape)} in {headers[name].file}",
            expected="weight, weight_scale, weight_scale_2, input_scale and bias for NVFP4, weight and bias for BF16",
            do="check that config files and weights come from the same release; other recipes are not computed",
        )


@torch.no_grad()
def check_values(model: nn.Module) -> None:
    """After loading: no NaN among the block scales, every global scale finite, positive and of a possible size.

    Raises CheckpointError for the first layer that fails. Waits for each device once.
    """
    verdicts: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.device.type != "meta":
            for matrix in module.matrices:
                _, scale, global_scale = module.operands(matrix)
                nan = ((scale & 0x7F) == 0x7F).any()
                bad = ~((global_scale > 0) & (global_scale <= _LARGEST_GLOBAL_SCALE)).all()
                verdicts.setdefault(module.device, []).append((f"{name}.{matrix}", torch.stack((nan, bad))))
    for found in verdicts.values():
        flags = torch.stack([flag for _, flag in found]).tolist()
        for (name, _), (nan, bad) in zip(found, flags, strict=True):
            if nan or bad:
                _refuse_values(model, name, nan)


def _refuse_values(model: nn.Module, name: str, nan: bool) -> None:
    owner, _, matrix = name.rpartition(".")
    _, scale, global_scale = model.get_submodule(owner).operands(matrix)
    if nan:
        count = int(((scale & 0x7F) == 0x7F).sum())
        raise CheckpointError(
            f"{name}: NaN among the block scales",
            seen=f"{count} of {scale.numel()} scale bytes are 0x7F or 0xFF",
            expected="finite E4M3 numbers",
            do="download the checkpoint again; if it is your own export, look for overflow in calibration",
        )
    values = global_scale.reshape(-1)
    wrong = values[~((values > 0) & (values <= _LARGEST_GLOBAL_SCALE))][0]
    raise CheckpointError(
        f"{name}: impossible global scale (weight_scale_2)",
        seen=f"{float(wrong)}",
        expected=f"above 0 and at most {_LARGEST_GLOBAL_SCALE}: amax / (6 * 448), and no trained weight reaches 2688",
        do="if it is the reciprocal (as compressed-tensors stores it), invert it; else download the checkpoint again",
    )
