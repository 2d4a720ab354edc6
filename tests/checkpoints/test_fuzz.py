"""Damaged checkpoints load to the right numbers or are refused by one error of ours: nothing else may happen."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from fp4pass.checkpoint.load import from_pretrained
from fp4pass.errors import CheckpointError
from fp4pass.synthesize import synthesize

from .mutations import MARKER, MUTATIONS, Checkpoint

IDS = torch.arange(5, 17)[None]
BASES = {
    "modelopt": {"like": "nano", "quantization_in_config": True},
    "mixed": {"like": "super", "latent": 32},
    "compressed": {"like": "nano", "format": "compressed-tensors"},
}
NAMES = r"\.json|index|safetensors|tensor |quant|config|layer|group_size"
"""What an error must name one of: where to look."""

SMALL = {"layers": 3, "experts": 4, "shard_bytes": 25_000}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_sizes):
    """``{kind: (folder, logits)}`` of the sound checkpoints."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}
    for kind, wishes in BASES.items():
        folder = synthesize(tmp_path_factory.mktemp("fuzz") / kind, **(tiny_sizes | SMALL | wishes))
        assert len(list(folder.glob("*.safetensors"))) > 2
        made[kind] = folder, logits(folder)
    yield made
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def logits(folder):
    with torch.no_grad():
        return from_pretrained(folder, dtype=torch.float32)(IDS, use_cache=False).logits


def outcome(seed, name, kind, bases, workspace):
    """Apply one mutation and load; the error, or None for the right numbers. Anything else fails."""
    sound, expected = bases[kind]
    folder = Path(shutil.copytree(sound, workspace / f"{kind}-{name}-{seed}"))
    said = MUTATIONS[name](Checkpoint(folder, random.Random(f"{name}-{kind}-{seed}")))
    case = f"seed {seed}, {kind}, {name}: {said}"
    try:
        found = logits(folder)
    except CheckpointError as error:
        assert all((error.what, error.seen, error.expected, error.do)), case
        assert re.search(NAMES, str(error)), (case, str(error))
        return error
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__} escaped") from error
    finally:
        assert not list(folder.rglob(MARKER)), case
        shutil.rmtree(folder)
    assert torch.equal(found, expected), f"{case}: loaded to other numbers"
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_checkpoint_is_refused_or_right(name, bases, tmp_path):
    refused = 0
    for kind in BASES:
        refused += sum(outcome(seed, name, kind, bases, tmp_path) is not None for seed in range(3))
    assert refused or name in ("index_with_another_tensor", "remote_code"), "every copy loaded: nothing was tested"


@pytest.mark.fuzz
@pytest.mark.parametrize("name", MUTATIONS)
def test_10000_damaged_checkpoints(name, bases, tmp_path):
    each = 10_000 // (len(MUTATIONS) * len(BASES)) + 1
    for kind in BASES:
        for seed in range(1000, 1000 + each):
            outcome(seed, name, kind, bases, tmp_path)
