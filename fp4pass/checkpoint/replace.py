"""Put packed modules in the place of the layers that a quantization config calls NVFP4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from fp4pass.errors import CheckpointError

from .config import NVFP4_ALGOS, QuantConfig, checkpoint_name
from .modules import NVFP4Experts, NVFP4Linear
from .packed import PackedModule
from .validate import Header, is_experts


def replace_quantized(
    model: nn.Module, precision: QuantConfig, headers: Mapping[str, Header], prefix: str = ""
) -> None:
    """Replace in ``model`` (on meta) every Linear and experts module that ``precision`` calls NVFP4.

    ``headers`` tell which layers have an input scale, ``prefix`` is what stands before the model's names in the
    checkpoint's. Raises CheckpointError for precisions that are not computed, for experts of one layer that differ, and
    for quantized layers that the model does not have or that are no linear layers.
    """
    found = {
        name: algos for name, module in model.named_modules() if (algos := _algos(prefix + name, module, precision))
    }
    _refuse_fp8({layer: algo for algos in found.values() for layer, algo in algos.items()})
    _refuse_strangers(precision, {layer for algos in found.values() for layer in algos})
    for name, algos in found.items():
        kinds = {algo in NVFP4_ALGOS for algo in algos.values()}
        if len(kinds) > 1:
            _refuse_mixture(name, algos)
        if kinds == {True}:
            module = model.get_submodule(name)
            model.set_submodule(name, _packed(module, checkpoint_name(prefix + name), headers))


def _algos(name: str, module: nn.Module, precision: QuantConfig) -> dict[str, str | None]:
    """``{layer as the config names it: quant_algo}`` of the layers in ``module`` itself; empty for other modules."""
    if is_experts(module):
        layers = [f"{name}.{e}.{p}" for e in range(module.num_experts) for p in ("up_proj", "down_proj")]
    else:
        layers = [name] if isinstance(module, nn.Linear) else []
    return {checkpoint_name(layer): precision.algo(layer) for layer in layers}


def _packed(module: nn.Module, name: str, headers: Mapping[str, Header]) -> PackedModule:
    try:
        return _packed_experts(module, name, headers) if is_experts(module) else _packed_linear(module, name, headers)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.what}", seen=error.seen, expected=error.expected, do=error.do) from None


def _packed_linear(module: nn.Linear, name: str, headers: Mapping[str, Header]) -> NVFP4Linear:
    scalar = headers.get(f"{name}.weight_scale_2")
    return NVFP4Linear(
        module.in_features,
        module.out_features,
        bias=None if module.bias is None else module.bias.dtype,
        input_scale=f"{name}.input_scale" in headers,
        # Some exports write one number, others a list of one.
        global_shape=(1,) if scalar is not None and scalar.shape == (1,) else (),
    )


def _packed_experts(module: nn.Module, name: str, headers: Mapping[str, Header]) -> NVFP4Experts:
    experts, intermediate, hidden = module.up_proj.shape
    has_input_scale = f"{name}.0.up_proj.input_scale" in headers
    return NVFP4Experts(module.config, experts, hidden, intermediate, input_scale=has_input_scale)


def _refuse_fp8(algos: Mapping[str, str | None]) -> None:
    fp8 = [layer for layer, algo in algos.items() if algo == "FP8"]
    if fp8:
        raise CheckpointError(
            "the checkpoint has FP8 layers, which fp4pass does not load yet",
            seen=f"{len(fp8)} layers in FP8, the first is {fp8[0]}",
            expected="layers in NVFP4, W4A16_NVFP4 or BF16",
            do="use a release that is NVFP4 alone, such as Nemotron 3 Nano",
        )


def _refuse_strangers(precision: QuantConfig, found: set[str]) -> None:
    strangers = [name for name in precision.layers if name not in found and not name.startswith("mtp.")]
    if strangers:
        raise CheckpointError(
            "the quantization config names layers that are not linear layers of this model",
            seen=f"{len(strangers)} such names, the first is {strangers[0]}",
            expected="names of linear layers and experts",
            do="check that config.json and the quantization config come from the same release",
        )


def _refuse_mixture(name: str, algos: Mapping[str, str | None]) -> None:
    counts: Iterator[str] = (f"{count} in {algo or 'BF16'}" for algo, count in Counter(algos.values()).items())
    raise CheckpointError(
        f"{name}: experts of one layer have different precisions",
        seen=", ".join(counts),
        expected="one precision for all experts of a layer",
        do="export the checkpoint again with one precision for each layer's experts",
    )
