"""Reading and altering checkpoints on disk."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_tensors(directory):
    """Every tensor of the checkpoint in ``directory``."""
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def altered(source, target, edit_tensors=None, edit_config=None):
    """Copy checkpoint ``source`` to ``target``, edited by ``edit_tensors(dict)`` and ``edit_config(dict)`` if given."""
    shutil.copytree(source, target)
    if edit_tensors is not None:
        tensors = read_tensors(target)
        for file in [*target.glob("*.safetensors"), target / "model.safetensors.index.json"]:
            file.unlink()
        edit_tensors(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if edit_config is not None:
        config = json.loads((target / "config.json").read_text())
        edit_config(config)
        (target / "config.json").write_text(json.dumps(config))
    return target


def same_bytes(a, b):
    """Whether two tensors agree in dtype, shape and every bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
