"""Experts' tensors are read at once into their stack; the loader of transformers sees the first one's alone."""

import re

import pytest
import torch
from safetensors.torch import save_file

from fp4pass.checkpoint import stacks
from fp4pass.checkpoint.stacks import READ_WITH_FIRST, read_stack, stacking
from fp4pass.checkpoint.validate import read_headers
from fp4pass.errors import CheckpointError

from .files import same_bytes

CPU = torch.device("cpu")


def experts(dtype, shape, count=7):
    """``{name: tensor}`` with random bits."""
    size = torch.Size(shape).numel() * dtype.itemsize
    random = torch.Generator().manual_seed(size)
    return {
        f"experts.{at}": torch.randint(256, (size,), dtype=torch.uint8, generator=random).view(dtype).view(shape)
        for at in range(count)
    }


@pytest.fixture
def written(tmp_path):
    """Writes tensors into two files, in another order than their own, and gives their headers in theirs."""

    def write(tensors):
        names = sorted(tensors, reverse=True)
        for file, part in (("a", names[:4]), ("b", names[4:])):
            save_file({name: tensors[name] for name in part}, tmp_path / f"{file}.safetensors")
        headers = read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
        return [headers[name] for name in tensors]

    return write


@pytest.mark.parametrize("piece", [1, 100, 1 << 20], ids=["one at a time", "a few", "all"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.uint8, (5, 7)), (torch.float8_e4m3fn, (3, 4)), (torch.float32, ()), (torch.bfloat16, (1,))],
    ids=str,
)
def test_a_stack_has_every_byte_of_its_tensors(dtype, shape, piece, written, monkeypatch):
    monkeypatch.setattr(stacks, "_PIECE_BYTES", piece)
    tensors = experts(dtype, shape)
    assert same_bytes(read_stack(written(tensors), CPU), torch.stack([*tensors.values()]))


def test_a_stack_of_several_dtypes_takes_the_one_that_holds_all(written):
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    tensors = {f"experts.{at}": torch.tensor([0.1 + at]).to(dtype) for at, dtype in enumerate(dtypes)}
    wanted = torch.stack([tensor.float() for tensor in tensors.values()])
    assert same_bytes(read_stack(written(tensors), CPU), wanted)


def test_a_stack_elsewhere_than_in_host_memory_is_copied_there(written):
    stack = read_stack(written(experts(torch.uint8, (5, 7))), torch.device("meta"))
    assert stack.is_meta and stack.shape == (7, 5, 7)


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_a_file_that_has_become_shorter_is_refused(piece, written, monkeypatch):
    monkeypatch.setattr(stacks, "_PIECE_BYTES", piece)
    headers = written(experts(torch.uint8, (5, 7)))
    path = headers[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{re.escape(path.name)} has become shorter"):
        read_stack(headers, CPU)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("model.layers.1.mixer.experts.0.up_proj.weight", "model.layers.1.mixer.experts.up_proj"),
        ("model.layers.1.mixer.experts.10.up_proj.weight", READ_WITH_FIRST),
        ("model.layers.1.mixer.experts.3.up_proj.weight", READ_WITH_FIRST),
        ("model.layers.1.mixer.experts.3.up_proj.weight_scale", None),
        ("model.layers.1.mixer.experts.0.down_proj.weight", None),
        ("model.layers.1.mixer.shared_experts.up_proj.weight", None),
    ],
)
def test_only_the_first_experts_tensor_is_the_loaders(name, renamed):
    converter = stacking("up_proj", "weight", "up_proj", lambda model, parameter, device: None)
    assert converter.rename_source_key(name)[0] == (renamed or name)
