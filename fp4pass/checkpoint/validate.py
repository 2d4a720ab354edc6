"""Is what lies on disk what the quantization config and the model say? Asked before any weight is read.

Only the headers of the safetensors files are read here; what needs the numbers themselves is in ``values.py``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fp4pass.errors import CheckpointError

from .config import checkpoint_name
from .fp8 import FP8Linear
from .modules import MODELOPT, NVFP4Experts, stacked
from .packed import PackedModule

TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes that a tensor of a model may have on disk, by their names there."""
_SPELLING = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_DENSE = ("BF16", "F16", "F32", "F64")

KV_CACHE = r"\.[kv]_scale$"
"""Scales of an FP8 KV cache: caches are BF16 here, so that these tensors are not loaded."""
MTP = r"^mtp\."
"""The multi-token-prediction layers, which the model class of transformers does not have."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about one of its tensors, whose bytes begin ``offset`` bytes into file ``path``."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def file(self) -> str:
        """The file's name."""
        return self.path.name

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file}"


def read_headers(files: Iterable[str | os.PathLike], folder: str | os.PathLike | None = None) -> dict[str, Header]:
    """Headers of every tensor in ``files``, under the checkpoint's names (``backbone.*``).

    Raises CheckpointError for a file that is missing, unreadable, not safetensors, or (if ``folder`` is given) outside
    of ``folder``, and for a tensor that is there twice.
    """
    headers: dict[str, Header] = {}
    for path in map(Path, files):
        check_place(path, folder)
        for name, header in _headers_of(path).items():
            if name in headers:
                raise CheckpointError(
                    f"tensor {name} is there twice",
                    seen=f"one in {headers[name].file}, one in {path.name}",
                    expected="every tensor once",
                    do="download the checkpoint again, into an empty folder",
                )
            headers[name] = header
    return headers


def _headers_of(path: Path) -> dict[str, Header]:
    with open_safetensors(path):  # which looks whether header and file belong together
        entries, start = _raw_header(path)
    return {
        checkpoint_name(name): Header(entry["dtype"], tuple(entry["shape"]), path, start + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The opened file. Raises CheckpointError for one that is no complete safetensors file."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors",
            seen=str(error),
            expected="a complete safetensors file",
            do="download this file again",
        ) from error


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at the beginning of a safetensors file, and how many bytes into the file the data begin."""
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return json.loads(opened.read(length)), 8 + length


def check_place(path: Path, folder: str | os.PathLike | None) -> None:
    """Raise CheckpointError if ``path`` is not there, or lies outside of ``folder`` (if that is given)."""
    # Compared as written: files of the hub's cache are links to a place outside of the snapshot.
    outside = folder is not None and not os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)
    if outside:
        raise CheckpointError(
            "the checkpoint's index names a file outside of its folder",
            seen=str(path),
            expected=f"files in {folder}",
            do="do not load this checkpoint unless you know who wrote the index",
        )
    if not path.is_file():
        raise CheckpointError(
            f"a shard of the checkpoint is missing: {path.name}",
            seen=f"no file {path}",
            expected="every file that model.safetensors.index.json names",
            do="download the missing file",
        )


def check_headers(model: nn.Module, headers: Mapping[str, Header], prefix: str = "") -> None:
    """Every tensor of ``model`` (on meta, packed modules in place) must be on disk in its shape and kind of dtype.

    ``prefix`` is what stands before the model's names in the checkpoint's. Raises CheckpointError for the first tensor
    that is missing or has another shape or dtype, and for one that has no place in the model.
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
                seen=str(header),
                expected=want.described(),
                do="check that config files and weights come from the same release",
            )
    tied = {checkpoint_name(prefix + name) for name in _tied(model)}
    _refuse_extras(headers, tied | {want.name for want in wanted}, prefix)


@dataclass(frozen=True)
class _Want:
    """A tensor that the model needs from disk; dtype None stands for any dense float."""

    name: str
    dtype: str | None
    shape: tuple[int, ...]
    precision: str

    def described(self) -> str:
        dtype = self.dtype or "BF16, F16 or F32"
        return f"{dtype} {list(self.shape)}: the config says that this layer is {self.precision}"


def _wanted(model: nn.Module, prefix: str) -> Iterator[_Want]:
    for key, tensor in model.state_dict().items():
        if key in _tied(model):
            continue
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        precision, dtype = "not quantized", None
        if isinstance(module, PackedModule) and module.stored_dtype(name) is not None:
            precision, dtype = "FP8" if isinstance(module, FP8Linear) else "NVFP4", _SPELLING[tensor.dtype]
        stored, shape = stored_names(module, checkpoint_name(prefix + owner), name), tuple(tensor.shape)
        for file_name in stored:
            yield _Want(file_name, dtype, shape[1:] if is_experts(module) else shape, precision)


def _tied(model: nn.Module) -> Mapping[str, str]:
    """Names of weights that are others' weights, and need not be on disk."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def stored_names(module: nn.Module, file_name: str, parameter: str) -> list[str]:
    """The names under which ``parameter`` of ``module`` lies on disk: experts one by one, everything else as it is.

    ``file_name`` is how the checkpoint calls the module.
    """
    if not is_experts(module):
        return [f"{file_name}.{parameter}"]
    parts = module.parts if isinstance(module, NVFP4Experts) else MODELOPT
    for projection in ("up_proj", "down_proj"):
        for part, own in zip(astuple(parts)[:4], astuple(stacked(parts, projection))[:4], strict=True):
            if parameter == own:
                tail = part if isinstance(module, NVFP4Experts) else "weight"
                return [f"{file_name}.{expert}.{projection}.{tail}" for expert in range(module.num_experts)]
    return [f"{file_name}.{parameter}"]


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` stacks routed experts that the checkpoint stores one by one, packed or dense."""
    return isinstance(module, NVFP4Experts) or type(module).__name__ == "NemotronHExperts"


def _refuse_extras(headers: Mapping[str, Header], known: set[str], prefix: str) -> None:
    """Refuse tensors without a place: a model that leaves some out is another one (fewer layers, no input scaling)."""
    for name, header in headers.items():
        if name in known or re.search(f"{KV_CACHE}|{MTP}", name) or not name.startswith(checkpoint_name(prefix)):
            continue
        raise CheckpointError(
            f"tensor {name} has no place in the model",
            seen=str(header),
            expected="the tensors that config.json and the precision of each layer ask for; pre_quant_scale belongs to "
            "linear layers in NVFP4_AWQ",
            do="check that config files and weights come from the same release; other recipes are not computed",
        )
