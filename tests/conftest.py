"""Fixtures that several rooms share: a tiny checkpoint, the model in it, its dense twin."""

import copy

import pytest
import torch

from fp4pass.checkpoint.load import from_pretrained
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.synthesize import synthesize

# Widths are multiples of 16 but not of 64; layers mamba, moe, attention, moe; in_proj has N = 240.
TINY = {
    "layers": 4,
    "hidden": 80,
    "experts": 8,
    "top_k": 2,
    "intermediate": 48,
    "shared": 112,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mamba_heads": 16,
    "mamba_head_dim": 5,
    "groups": 2,
    "state": 16,
    "vocab": 320,
}


def pytest_addoption(parser):
    """``--as-sm 80``: GPU tests of the kernels that a GPU of SM80 would get."""
    parser.addoption("--as-sm", type=int, help="run the kernels of an older GPU generation on this GPU")


def pytest_configure(config):
    if sm := config.getoption("--as-sm"):
        from fp4pass.lowering.older import act_as

        act_as(sm)


@pytest.fixture(autouse=True)
def same_numbers():
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sizes():
    """Dimensions of the tiny checkpoint, as keyword arguments of ``synthesize``."""
    return dict(TINY)


@pytest.fixture(scope="session")
def nano_dir(tmp_path_factory):
    """A tiny nano-like checkpoint in three shards, its quantization in both config files. Do not write into it."""
    directory = tmp_path_factory.mktemp("nano") / "tiny"
    return synthesize(directory, "nano", quantization_in_config=True, shard_bytes=100_000, **TINY)


@pytest.fixture
def nano_model(nano_dir):
    """``nano_model(dtype=..., **kwargs)`` loads a fresh model from ``nano_dir``."""
    return lambda **kwargs: from_pretrained(nano_dir, **kwargs)


@pytest.fixture(scope="session")
def dense_twin():
    """``dense_twin(model, dtype)``: the same model of transformers alone, NVFP4 weights decoded in ``dtype``."""
    return _dense_twin


def _dense_twin(model, dtype=torch.float32):
    config = copy.deepcopy(model.config)
    del config.quantization_config
    twin = type(model)(config).to(dtype).eval()
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for part, _ in module.packed_parameters():
                if f"{name}.{part}" in state:
                    del state[f"{name}.{part}"]
            state |= {
                f"{name}.{matrix.removesuffix('_packed')}": module.dense(matrix, dtype) for matrix in module.matrices
            }
    twin.load_state_dict(state)
    # The loop over experts computes in any dtype.
    twin.config._experts_implementation = "eager"
    return twin.requires_grad_(False)
