"""Every tensor of a Nemotron-H NVFP4 release, the precision of each layer, and the quantization config.

At full size the lists equal the releases' own: 24,147 tensors for 3 Nano, 165,860 for 3 Super.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .compressed import compressed_form
from .config import FP8, NVFP4, W4A16_NVFP4
from .modules import MODELOPT
from .packed import Parts
from .releases import Release, Sizes


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: dtype as safetensors spells it, ``role`` says which numbers belong in it.

    ``fan_in`` is the K of the product that the tensor serves (1 where there is none).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    fan_in: int = 1


@dataclass(frozen=True)
class Product:
    """A linear layer [n, k], or the table of embeddings.

    ``kind`` is e.g. in_proj, expert or shared_up, ``layer`` is -1 outside the blocks.
    """

    name: str
    n: int
    k: int
    kind: str
    layer: int


FP8_WEIGHT_ONLY = "FP8, weight-only"
"""Called FP8 in the config files, and without an input scale."""

Precision = Callable[[Sizes, Product], "str | None"]
"""Says the quant_algo of a product, None for BF16."""


def _nano(sizes: Sizes, product: Product) -> str | None:
    if product.kind in ("in_proj", "out_proj"):
        # The release leaves the Mamba layer in front of each attention layer in BF16.
        return None if sizes.pattern[product.layer + 1 : product.layer + 2] == "*" else NVFP4
    return NVFP4 if product.kind in ("expert", "shared_up", "shared_down") else None


def _lightning(sizes: Sizes, product: Product) -> str | None:
    if product.kind in ("in_proj", "out_proj"):
        return FP8
    return W4A16_NVFP4 if product.kind in ("expert", "shared_up", "shared_down", "lm_head") else None


# 3 Super's precisions come from a search over layers. Which Mamba layers got FP8 is not published, only how many.
_SUPER_EXCEPTIONS = {
    ("shared_down", 1): NVFP4,
    ("shared_up", 41): None,
    ("shared_down", 8): None,
    ("shared_down", 76): None,
    **{("o_proj", layer): FP8 for layer in (69, 78)},
    **{("fc1_latent_proj", layer): FP8 for layer in (1, 3, 5)},
    ("fc2_latent_proj", 3): FP8,
}
_SUPER_FP8_MAMBAS = {"in_proj": 28, "out_proj": 29}


def _super(sizes: Sizes, product: Product) -> str | None:
    if (product.kind, product.layer) in _SUPER_EXCEPTIONS:
        return _SUPER_EXCEPTIONS[product.kind, product.layer]
    if product.kind in _SUPER_FP8_MAMBAS:
        mambas_before = sizes.pattern[: product.layer].count("M")
        return FP8 if mambas_before < _SUPER_FP8_MAMBAS[product.kind] else None
    return {"expert": NVFP4, "shared_up": FP8, "shared_down": FP8}.get(product.kind)


def _ultra(sizes: Sizes, product: Product) -> str | None:
    fp8 = ("in_proj", "out_proj", "shared_up", "shared_down")
    return NVFP4 if product.kind == "expert" else FP8 if product.kind in fp8 else None


def _nano_4b(sizes: Sizes, product: Product) -> str | None:
    if product.kind == "mlp_down" and product.layer % 8 == 1:
        return FP8
    return {"embedding": W4A16_NVFP4, "lm_head": FP8_WEIGHT_ONLY}.get(product.kind, NVFP4)


PRECISION: dict[str, Precision] = {
    "nano": _nano,
    "lightning": _lightning,
    "super": _super,
    "ultra": _ultra,
    "nano-4b": _nano_4b,
}
"""For each release the precision of its layers; MTP layers are BF16 everywhere."""


def products(sizes: Sizes) -> Iterator[Product]:
    """The table of embeddings and every linear layer of the model proper, in file order."""
    yield _embeddings(sizes)
    for layer, kind in enumerate(sizes.pattern):
        yield from _mixer_products(sizes, f"backbone.layers.{layer}.mixer", kind, layer)
    yield _head(sizes)


def _embeddings(sizes: Sizes) -> Product:
    return Product("backbone.embeddings", sizes.vocab, sizes.hidden, "embedding", -1)


def _head(sizes: Sizes) -> Product:
    return Product("lm_head", sizes.vocab, sizes.hidden, "lm_head", -1)


def tensors(like: str, sizes: Sizes, parts: Parts = MODELOPT) -> Iterator[TensorSpec]:
    """Every tensor of release ``like`` at ``sizes``, in file order, without any data.

    ``parts`` names those of an NVFP4 weight, as ModelOpt or compressed-tensors does.
    """
    precision = PRECISION[like] if parts is MODELOPT else functools.partial(_in_nvfp4_alone, PRECISION[like])
    yield from _product_tensors(_embeddings(sizes), precision(sizes, _embeddings(sizes)), parts)
    for layer, kind in enumerate(sizes.pattern):
        prefix = f"backbone.layers.{layer}"
        yield TensorSpec(f"{prefix}.norm.weight", "BF16", (sizes.hidden,), "norm")
        yield from _mixer_extras(sizes, f"{prefix}.mixer", kind, _gate_dtype(like))
        for product in _mixer_products(sizes, f"{prefix}.mixer", kind, layer):
            yield from _product_tensors(product, precision(sizes, product), parts)
        if kind == "*" and like != "nano" and parts is MODELOPT:
            for name in ("k_proj.k_scale", "v_proj.v_scale"):
                yield TensorSpec(f"{prefix}.mixer.{name}", "F32", (), "input_scale")
    yield TensorSpec("backbone.norm_f.weight", "BF16", (sizes.hidden,), "norm")
    yield from _product_tensors(_head(sizes), precision(sizes, _head(sizes)), parts)
    yield from _mtp_tensors(like, sizes)


def compressed_quantization(like: str, sizes: Sizes) -> dict[str, Any]:
    """``quantization_config`` of release ``like`` as compressed-tensors would have exported it.

    As in exports that are around, the multi-token-prediction layers are not among the exceptions.
    """
    algos = {p.name: _in_nvfp4_alone(PRECISION[like], sizes, p) for p in products(sizes) if p.kind != "embedding"}
    return compressed_form(set(algos.values()), [name for name, algo in algos.items() if algo is None])


def _in_nvfp4_alone(precision: Precision, sizes: Sizes, product: Product) -> str | None:
    """What compressed-tensors' NVFP4 format holds of a release: the NVFP4 linear layers; the rest is in BF16."""
    algo = precision(sizes, product)
    return algo if algo in (NVFP4, W4A16_NVFP4) and product.kind != "embedding" else None


def quantization(like: str, made: Release, sizes: Sizes) -> dict[str, Any]:
    """The content of hf_quant_config.json for release ``like``."""
    algos = {product.name: PRECISION[like](sizes, product) for product in products(sizes)}
    content: dict[str, Any] = {"quant_algo": "NVFP4" if like == "nano" else "MIXED_PRECISION"}
    content["kv_cache_quant_algo"] = "FP8"
    unquantized = [name for name, algo in algos.items() if algo is None and name != "backbone.embeddings"]
    convolutions = [f"backbone.layers.{i}.mixer.conv1d" for i, kind in enumerate(sizes.pattern) if kind == "M"]
    if like == "nano":
        content |= {"group_size": 16, "exclude_modules": unquantized + convolutions}
    else:
        content["quantized_layers"] = {name: _layer_entry(algo) for name, algo in sorted(algos.items()) if algo}
    if like == "lightning":
        gates = [f"backbone.layers.{i}.mixer.gate" for i, kind in enumerate(sizes.pattern) if kind == "E"]
        content["exclude_modules"] = [*sorted(["backbone.embeddings", *unquantized, *convolutions, *gates]), "mtp*"]
    return {"producer": {"name": "modelopt", "version": made.producer}, "quantization": content}


def _layer_entry(algo: str) -> dict[str, Any]:
    return {"quant_algo": FP8} if algo in (FP8, FP8_WEIGHT_ONLY) else {"quant_algo": algo, "group_size": 16}


def _mixer_products(sizes: Sizes, mixer: str, kind: str, layer: int) -> Iterator[Product]:
    hidden, inner, q, kv = sizes.hidden, sizes.inner, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    width = sizes.latent or hidden
    if kind == "M":
        in_width = inner + sizes.conv_channels + sizes.mamba_heads
        shapes = {"in_proj": (in_width, hidden), "out_proj": (hidden, inner)}
    elif kind == "*":
        shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    elif kind == "-":
        yield Product(f"{mixer}.up_proj", sizes.intermediate, hidden, "mlp_up", layer)
        yield Product(f"{mixer}.down_proj", hidden, sizes.intermediate, "mlp_down", layer)
        return
    else:
        shapes = {"fc1_latent_proj": (width, hidden), "fc2_latent_proj": (hidden, width)} if sizes.latent else {}
        for expert in range(sizes.experts):
            yield Product(f"{mixer}.experts.{expert}.up_proj", sizes.intermediate, width, "expert", layer)
            yield Product(f"{mixer}.experts.{expert}.down_proj", width, sizes.intermediate, "expert", layer)
        yield Product(f"{mixer}.shared_experts.up_proj", sizes.shared, hidden, "shared_up", layer)
        yield Product(f"{mixer}.shared_experts.down_proj", hidden, sizes.shared, "shared_down", layer)
    for name, (n, k) in shapes.items():
        yield Product(f"{mixer}.{name}", n, k, name, layer)


def _mixer_extras(sizes: Sizes, mixer: str, kind: str, gate_dtype: str) -> Iterator[TensorSpec]:
    """What a mixer has beside its products: convolution, norm and state parameters, or the router."""
    if kind == "M":
        heads, channels = (sizes.mamba_heads,), sizes.conv_channels
        yield TensorSpec(f"{mixer}.A_log", "BF16", heads, "A_log")
        yield TensorSpec(f"{mixer}.D", "BF16", heads, "norm")
        yield TensorSpec(f"{mixer}.dt_bias", "BF16", heads, "dt_bias")
        yield TensorSpec(f"{mixer}.conv1d.weight", "BF16", (channels, 1, 4), "matrix", 4)
        yield TensorSpec(f"{mixer}.conv1d.bias", "BF16", (channels,), "bias")
        yield TensorSpec(f"{mixer}.norm.weight", "BF16", (sizes.inner,), "norm")
    elif kind == "E":
        yield TensorSpec(f"{mixer}.gate.weight", gate_dtype, (sizes.experts, sizes.hidden), "matrix", sizes.hidden)
        yield TensorSpec(f"{mixer}.gate.e_score_correction_bias", "F32", (sizes.experts,), "bias")


def _gate_dtype(like: str) -> str:
    return "F32" if like == "nano" else "BF16"


def _product_tensors(product: Product, algo: str | None, parts: Parts = MODELOPT) -> Iterator[TensorSpec]:
    name, n, k = product.name, product.n, product.k
    # Rows of the table are as large as other layers' outputs; logits three wide part the winner from the rest by more
    # than BF16's error.
    fan_in = {"embedding": 1, "lm_head": max(1, k // 9)}.get(product.kind, k)
    if algo in (NVFP4, W4A16_NVFP4):
        factor = "global_divisor" if parts.divides else "global_scale"
        yield TensorSpec(f"{name}.{parts.codes}", "U8", (n, k // 2), "codes", k)
        yield TensorSpec(f"{name}.{parts.scale}", "F8_E4M3", (n, k // 16), "block_scale", k)
        yield TensorSpec(f"{name}.{parts.global_scale}", "F32", _scalar_shape(parts), factor, fan_in)
    elif algo in (FP8, FP8_WEIGHT_ONLY):
        yield TensorSpec(f"{name}.weight", "F8_E4M3", (n, k), "fp8", k)
        yield TensorSpec(f"{name}.weight_scale", "F32", (), "fp8_scale", fan_in)
    else:
        yield TensorSpec(f"{name}.weight", "BF16", (n, k), "matrix", fan_in)
    if algo in (NVFP4, FP8):
        role = "fp8_input_scale" if algo == FP8 else "input_divisor" if parts.divides else "input_scale"
        yield TensorSpec(f"{name}.{parts.input_scale}", "F32", _scalar_shape(parts), role)


def _scalar_shape(parts: Parts) -> tuple[int, ...]:
    return (1,) if parts.divides else ()


def _mtp_tensors(like: str, sizes: Sizes) -> Iterator[TensorSpec]:
    """The multi-token-prediction layers, BF16; transformers' Nemotron-H does not load them."""
    hidden = sizes.hidden
    for layer, kind in enumerate(sizes.mtp):
        prefix = f"mtp.layers.{layer}"
        if layer == 0:
            yield TensorSpec(f"{prefix}.enorm.weight", "BF16", (hidden,), "norm")
            yield TensorSpec(f"{prefix}.hnorm.weight", "BF16", (hidden,), "norm")
            yield TensorSpec(f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden), "matrix", 2 * hidden)
        yield TensorSpec(f"{prefix}.norm.weight", "BF16", (hidden,), "norm")
        yield from _mixer_extras(sizes, f"{prefix}.mixer", kind, _gate_dtype(like))
        for product in _mixer_products(sizes, f"{prefix}.mixer", kind, layer):
            yield from _product_tensors(product, None)
        if layer == len(sizes.mtp) - 1:
            yield TensorSpec(f"{prefix}.final_layernorm.weight", "BF16", (hidden,), "norm")
