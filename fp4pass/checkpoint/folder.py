"""A checkpoint's folder as it lies there: which files it must have, and what its JSON files must be.

Asked before transformers reads any of it, since what goes wrong there is said without the file's name, if at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp4pass.errors import CheckpointError

from .validate import check_place, open_safetensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_AGAIN = "download this file again"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises CheckpointError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last for brackets within brackets
        raise CheckpointError(
            f"{file.name} is not JSON", seen=str(error), expected="a JSON object", do=_AGAIN
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file.name} is not a JSON object", seen=repr(content)[:200], expected="a JSON object", do=_AGAIN
        )
    return content


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless ``folder`` has a config.json, and safetensors files as its index says."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the checkpoint has no config.json",
            seen=f"no file {folder / 'config.json'}",
            expected="config.json beside the weights",
            do="download the checkpoint again",
        )
    for name in ("config.json", "generation_config.json", "hf_quant_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    for file in weight_files(folder):
        check_place(file, folder)
        _check_safetensors(file)


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` has safetensors files, or an index of them."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read. Raises CheckpointError if there are none."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise CheckpointError(
            "the checkpoint has no weights",
            seen=f"neither {SINGLE} nor {INDEX} in {folder}",
            expected="safetensors files; other formats can hold code, and are not read",
            do="download the checkpoint again",
        )
    content = read_json(folder / INDEX)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(
            f"{INDEX} does not say where the tensors are",
            seen=f"weight_map: {places!r}"[:200],
            expected="weight_map: {tensor: file}",
            do=_AGAIN,
        )
    return [folder / place for place in sorted(set(places.values()))]


def _check_safetensors(file: Path) -> None:
    """Refuse a header that says ``format`` something else than PyTorch's, which transformers would stumble over."""
    with open_safetensors(file) as opened:
        found = (opened.metadata() or {}).get("format", "pt")
    if found != "pt":
        raise CheckpointError(
            f"{file.name} is not a file of PyTorch tensors",
            seen=f"format {found!r} in its metadata",
            expected="format 'pt', or none",
            do="download the checkpoint again; if it is your own export, save it with metadata={'format': 'pt'}",
        )
