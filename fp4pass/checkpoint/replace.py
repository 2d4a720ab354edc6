"""Put packed modules in the place of the layers that a quantization config calls quantized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fp4pass.errors import CheckpointError

from .compressed import CompressedConfig
from .config import FP8, GROUP_SIZE, NVFP4_ALGOS, NVFP4_AWQ, QuantConfig, checkpoint_name
from .embedding import NVFP4Embedding
from .fp8 import FP8Linear
from .modules import MODELOPT, NVFP4Experts, NVFP4Linear
from .packed import PackedModule, Parts, Scalar
from .validate import Header, is_experts

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def replace_quantized(
    model: nn.Module,
    precision: QuantConfig | CompressedConfig,
    headers: Mapping[str, Header],
    prefix: str = "",
    parts: Parts = MODELOPT,
) -> None:
    """Replace in ``model`` (on meta) every layer that ``precision`` calls quantized by a packed module.

    ``headers`` tell which layers have which scales, ``prefix`` is what stands before the model's names in the
    checkpoint's, ``parts`` names the tensors of an NVFP4 weight. Raises CheckpointError for precisions that are not
    computed, for experts of one layer that differ, and for quantized layers that the model does not have or that are of
    another kind.
    """
    found = {
        name: algos for name, module in model.named_modules() if (algos := _algos(prefix + name, module, precision))
    }
    _refuse_strangers(precision, {layer for algos in found.values() for layer in algos})
    _refuse_partial_awq({layer for algos in found.values() if (layer := _sole(algos, NVFP4_AWQ))}, headers)
    make = _Maker(precision, headers, parts)
    for name, algos in found.items():
        module, layer = model.get_submodule(name), checkpoint_name(prefix + name)
        packed = make(module, layer, algos)
        if packed is not None:
            model.set_submodule(name, packed)


def _algos(name: str, module: nn.Module, precision: QuantConfig | CompressedConfig) -> dict[str, str | None]:
    """``{layer as the config names it: quant_algo}`` of the layers in ``module`` itself; empty for other modules."""
    if is_experts(module):
        layers = [f"{name}.{e}.{p}" for e in range(module.num_experts) for p in ("up_proj", "down_proj")]
        return {checkpoint_name(layer): precision.algo(layer) for layer in layers}
    kind = "Linear" if isinstance(module, nn.Linear) else "Embedding" if isinstance(module, nn.Embedding) else None
    return {} if kind is None else {checkpoint_name(name): precision.algo(name, kind)}


class _Maker:
    """Makes the packed module for a dense one, with the scales that the files have."""

    def __init__(self, precision: QuantConfig | CompressedConfig, headers: Mapping[str, Header], parts: Parts) -> None:
        self._precision, self._headers, self._parts = precision, headers, parts

    def __call__(self, module: nn.Module, layer: str, algos: Mapping[str, str | None]) -> PackedModule | None:
        """None where the layer is not quantized."""
        described = {each: self._described(each, algo) for each, algo in algos.items()}
        if len(set(described.values())) > 1:
            _refuse_mixture(layer, described.values())
        kind = "NVFP4" if next(iter(algos.values())) in NVFP4_ALGOS else next(iter(algos.values()))
        if kind is None:
            return None
        try:
            if is_experts(module):
                return self._experts(module, layer, kind)
            if isinstance(module, nn.Embedding):
                return self._embedding(module, layer, kind)
            return self._fp8(module, layer) if kind == FP8 else self._linear(module, layer, algos[layer])
        except CheckpointError as error:
            what = f"{layer}: {error.what}"
            raise CheckpointError(what, seen=error.seen, expected=error.expected, do=error.do) from None

    def _described(self, layer: str, algo: str | None) -> str:
        """The form in which a layer is stored."""
        if algo not in NVFP4_ALGOS:
            return algo or "BF16"
        group = self._precision.group(layer)
        return "NVFP4" if group == GROUP_SIZE else f"NVFP4 in groups of {group}"

    def _linear(self, module: nn.Linear, layer: str, algo: str | None) -> NVFP4Linear:
        before = self._headers.get(f"{layer}.pre_quant_scale") if algo == NVFP4_AWQ else None
        return NVFP4Linear(
            module.in_features,
            module.out_features,
            bias=None if module.bias is None else module.bias.dtype,
            pre_quant_scale=None if before is None else _FLOATS.get(before.dtype, torch.float32),
            **self._scales(layer),
        )

    def _experts(self, module: nn.Module, layer: str, kind: str) -> NVFP4Experts:
        if kind == FP8:
            _refuse_fp8("routed experts")
        experts, intermediate, hidden = module.up_proj.shape
        return NVFP4Experts(module.config, experts, hidden, intermediate, **self._scales(f"{layer}.0.up_proj"))

    def _embedding(self, module: nn.Embedding, layer: str, kind: str) -> NVFP4Embedding:
        if kind == FP8:
            _refuse_fp8("a table of embeddings")
        shape = (module.num_embeddings, module.embedding_dim)
        return NVFP4Embedding(*shape, module.weight.dtype, padding_idx=module.padding_idx, **self._scales(layer))

    def _scales(self, layer: str) -> dict[str, Parts | Scalar | int | None]:
        parts = self._parts
        factor = self._scalar(f"{layer}.{parts.global_scale}") or Scalar()
        return {
            "parts": parts,
            "global_scale": factor,
            "input_scale": self._scalar(f"{layer}.{parts.input_scale}"),
            "group": self._precision.group(layer),
        }

    def _fp8(self, module: nn.Linear, layer: str) -> FP8Linear:
        # Without files to look into: what ModelOpt means by FP8 has a static scale for its input.
        usual = None if self._headers else Scalar()
        return FP8Linear(
            module.in_features,
            module.out_features,
            bias=None if module.bias is None else module.bias.dtype,
            weight_scale=self._scalar(f"{layer}.weight_scale") or Scalar(),
            input_scale=self._scalar(f"{layer}.input_scale") or usual,
        )

    def _scalar(self, name: str) -> Scalar | None:
        """One number as the files have it: some exports write a list of one, and some write it in BF16."""
        header = self._headers.get(name)
        if header is None:
            return None
        shape = (1,) if header.shape == (1,) else ()
        return Scalar(shape, torch.bfloat16 if header.dtype == "BF16" else torch.float32)


def _refuse_fp8(what: str) -> None:
    raise CheckpointError(
        f"{what} in FP8, which fp4pass does not compute",
        seen="quant_algo 'FP8'",
        expected="NVFP4 or BF16; FP8 is computed for linear layers",
        do="use a release with these weights in NVFP4 or BF16",
    )


def _refuse_strangers(precision: QuantConfig | CompressedConfig, found: set[str]) -> None:
    strangers = [name for name in precision.layers if name not in found and not name.startswith("mtp.")]
    if strangers:
        raise CheckpointError(
            "the quantization config names layers that are not linear layers of this model",
            seen=f"{len(strangers)} such names, the first is {strangers[0]}",
            expected="names of linear layers, experts and embeddings",
            do="check that config.json and the quantization config come from the same release",
        )


def _sole(algos: Mapping[str, str | None], algo: str) -> str | None:
    """The layer, where the module is one alone and in ``algo``."""
    (layer, found), *rest = algos.items()
    return layer if found == algo and not rest else None


def _refuse_partial_awq(layers: set[str], headers: Mapping[str, Header]) -> None:
    """Exports fold a ``pre_quant_scale`` into the norm before it for all layers of a kind, or for none."""
    with_scale = {layer for layer in layers if f"{layer}.pre_quant_scale" in headers}
    kinds = {_kind(layer) for layer in with_scale}
    lacking = sorted(layer for layer in layers - with_scale if _kind(layer) in kinds)
    if lacking:
        raise CheckpointError(
            f"tensor {lacking[0]}.pre_quant_scale is missing",
            seen=f"{len(with_scale)} layers with a pre_quant_scale; {len(lacking)} of the same kind without",
            expected="pre_quant_scale in all layers of a kind, or in none",
            do="download the checkpoint again; if it is your own export, export this tensor with it",
        )


def _kind(layer: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", layer)


def _refuse_mixture(name: str, kinds: Iterable[str]) -> None:
    raise CheckpointError(
        f"{name}: experts of one layer have different precisions",
        seen=", ".join(f"{count} in {kind}" for kind, count in Counter(kinds).items()),
        expected="one precision for all experts of a layer",
        do="export the checkpoint again with one precision for each layer's experts",
    )
