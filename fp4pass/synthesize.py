"""Write a checkpoint with random weights in the layout of a published Nemotron-H NVFP4 release, at any size.

Names, dtypes, config files, shards and the precision of every layer are the release's; the numbers are drawn so that
activations keep their size from layer to layer and greedy decoding has clear winners. Each tensor is seeded by its own
name, so that it does not depend on the tensors before it.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fp4pass.checkpoint import releases
from fp4pass.checkpoint.compressed import PARTS as COMPRESSED
from fp4pass.checkpoint.compressed import THEIR_METHOD
from fp4pass.checkpoint.config import config_json_form
from fp4pass.checkpoint.modules import MODELOPT
from fp4pass.checkpoint.packed import Parts
from fp4pass.checkpoint.tensors import TensorSpec, compressed_quantization, quantization, tensors
from fp4pass.checkpoint.tokenizer import SPECIAL_TOKENS, tokenizer_files
from fp4pass.errors import OptionError

FORMATS = {"modelopt": MODELOPT, THEIR_METHOD: COMPRESSED}
"""Formats of a checkpoint's files, and how each names the tensors of an NVFP4 weight."""

_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}

# Block scales are E4M3 bytes from 32 up to 448. One in 64 is a subnormal: real checkpoints have them, readers forget.
_SCALE_BYTES = (0x60, 0x7F)
_SUBNORMAL_BYTES = (0x01, 0x08)
_RMS_SCALE = 208.0
_RMS_CODE = math.sqrt(8.5625)  # of the sixteen E2M1 values
_RMS_FP8 = 14.0


def synthesize(
    directory: str | Path,
    like: str = "nano",
    *,
    layers: int | None = None,
    seed: int = 0,
    format: str = "modelopt",
    quantization_in_config: bool | None = None,
    shard_bytes: int = 1 << 30,
    jobs: int = 1,
    **dimensions: int | None,
) -> Path:
    """Write a checkpoint like release ``like`` (a name in ``releases.RELEASES``) into ``directory``; returns its path.

    ``dimensions`` are the fields of ``releases.Sizes``: hidden, experts, top_k, intermediate, shared, latent, heads,
    kv_heads, head_dim, mamba_heads, mamba_head_dim, groups, state, vocab. One left out, or None, is the release's own.
    ``format`` is that of the files, ``"modelopt"`` or ``"compressed-tensors"``; the latter has the release's NVFP4
    linear layers, and everything else in BF16. ``quantization_in_config`` puts the quantization into config.json beside
    hf_quant_config.json; 3 Nano does not, the other releases do. ``jobs`` processes write shards of ``shard_bytes``,
    each holding one in memory; more than one process are spawned, so that a script that asks for them must have its
    ``if __name__ == "__main__"``. The same arguments give the same bytes.

    Raises OptionError for an unknown release, format or dimension and for values that the format or the model cannot
    have, and FileExistsError if ``directory`` holds a checkpoint already.
    """
    made = releases.release(like)
    sizes = releases.resize(made.sizes, layers, **dimensions)
    plan = list(tensors(like, sizes, _parts(format)))
    _check_sizes(sizes, plan)
    folder = Path(directory)
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a checkpoint already; choose another directory or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, plan, seed, shard_bytes, jobs)
    config, files = releases.config(made, sizes), {}
    if format == "modelopt":
        files["hf_quant_config.json"] = quant = quantization(like, made, sizes)
        if made.quantization_in_config if quantization_in_config is None else quantization_in_config:
            config["quantization_config"] = config_json_form(quant)
    else:
        config["quantization_config"] = compressed_quantization(like, sizes)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": made.transformers}
    files |= {"config.json": config, "generation_config.json": generation}
    for name, content in (files | tokenizer_files(sizes.vocab, sizes.max_positions)).items():
        _write_json(folder / name, content)
    return folder


def _parts(format: str) -> Parts:
    if format not in FORMATS:
        raise OptionError(
            "unknown format of a checkpoint",
            seen=repr(format),
            expected=f"one of {', '.join(FORMATS)}",
            do="pass one of these names as format=",
        )
    return FORMATS[format]


def _check_sizes(sizes: releases.Sizes, plan: list[TensorSpec]) -> None:
    """Refuse dimensions that NVFP4 or the model cannot have."""
    for spec in plan:
        if spec.role == "codes" and (spec.shape[0] % 16 or spec.fan_in % 16):
            raise OptionError(
                f"{spec.name} cannot be stored as NVFP4",
                seen=f"N={spec.shape[0]}, K={spec.fan_in}",
                expected="multiples of 16",
                do="choose other widths (in_proj has N = 2*mamba_heads*mamba_head_dim + 2*groups*state + mamba_heads)",
            )
    rules = {
        "top_k is at most experts": sizes.top_k <= sizes.experts,
        "experts is at least 2": sizes.experts >= 2,
        "kv_heads divides heads": sizes.heads % sizes.kv_heads == 0,
        "groups divides mamba_heads": sizes.mamba_heads % sizes.groups == 0,
        f"vocab is at least {len(SPECIAL_TOKENS) + 256}": sizes.vocab >= len(SPECIAL_TOKENS) + 256,
    }
    for rule, holds in rules.items():
        if not holds:
            raise OptionError(
                "dimensions that no Nemotron-H has", seen=str(sizes), expected=rule, do="change one of the two"
            )


def _write_shards(folder: Path, plan: list[TensorSpec], seed: int, shard_bytes: int, jobs: int) -> None:
    shards = list(_split(plan, shard_bytes))
    files = [folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if jobs > 1:
        # Fresh processes: a fork would take over the locks of this one's threads.
        with ProcessPoolExecutor(min(jobs, len(shards)), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_write_shard, files, shards, itertools.repeat(seed)))
    else:
        for file, shard in zip(files, shards, strict=True):
            _write_shard(file, shard, seed)
    weight_map = {spec.name: file.name for file, shard in zip(files, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_size": sum(map(_size, plan))}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(file: Path, shard: list[TensorSpec], seed: int) -> None:
    save_file({spec.name: _fill(spec, seed) for spec in shard}, file, metadata={"format": "pt"})


def _split(plan: list[TensorSpec], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    used = 0
    for spec in plan:
        if shard and used + _size(spec) > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(spec)
        used += _size(spec)
    yield shard


def _size(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _BYTES[spec.dtype]


def _fill(spec: TensorSpec, seed: int) -> torch.Tensor:
    """The numbers of one tensor; products of fan-in K get weights of variance 1/K."""
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.role == "codes":
        return torch.frombuffer(bytearray(rng.bytes(math.prod(spec.shape))), dtype=torch.uint8).view(spec.shape)
    if spec.role == "block_scale":
        rare = rng.random(spec.shape, dtype=np.float32) < 1 / 64
        usual = rng.integers(*_SCALE_BYTES, spec.shape, np.uint8)
        scale = np.where(rare, rng.integers(*_SUBNORMAL_BYTES, spec.shape, np.uint8), usual)
        return torch.from_numpy(scale).view(torch.float8_e4m3fn)
    if spec.role == "fp8":
        return torch.from_numpy(_RMS_FP8 * rng.standard_normal(spec.shape, np.float32)).to(torch.float8_e4m3fn)
    return torch.from_numpy(_values(spec, rng)).to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32)


def _values(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    """Float32 numbers for the roles that are stored in BF16 or F32."""
    shape, width = spec.shape, 1 / math.sqrt(spec.fan_in)
    spread = {"matrix": width, "bias": 0.02, "norm": 0.05}.get(spec.role)
    if spread is not None:
        values = rng.standard_normal(shape, np.float32)
        values *= spread
        if spec.role == "norm":
            values += 1
        return values
    if spec.role == "A_log":
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if spec.role == "dt_bias":
        step = np.exp(rng.uniform(math.log(0.001), math.log(0.1), shape))
        return (step + np.log(-np.expm1(-step))).astype(np.float32)  # the inverse of softplus
    constants = {
        "global_scale": width / (_RMS_CODE * _RMS_SCALE),
        "fp8_scale": width / _RMS_FP8,
        "global_divisor": _RMS_CODE * _RMS_SCALE / width,
        "input_scale": 0.01,
        "fp8_input_scale": 0.1,  # for activations up to 45: those of squared ReLU reach 30
        "input_divisor": 100,
    }
    return np.full(shape, constants[spec.role] * rng.uniform(0.9, 1.1), np.float32)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
