"""Models of other families in transformers' own classes: what is NVFP4 in them is rewritten, whatever it is called."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
import transformers
from expecttest import assert_expected_inline
from safetensors.torch import save_file
from torch import nn

import fp4pass
from fp4pass import nvfp4
from fp4pass.checkpoint.modules import NVFP4Linear
from fp4pass.lowering.reference import dequantize
from fp4pass.match.reasons import Apart

from .running import called, compiling, relative_error

LAYERS, E, VOCABULARY = 1, 4, 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OF_EXPERTS = {"num_experts": E, "num_local_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
IDS = torch.arange(3, 15)[None]
ONE_BY_ONE = {"grouped_mm": "fp4pass.grouped_linear", "batched_mm": "fp4pass.gathered_linear"}


def model_of(family, dtype=torch.float32, **settings):
    """A model with random weights, all of its linear layers but routers' and all experts quantized."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    config._experts_implementation = settings.get("experts_implementation")
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not (name == "lm_head" and config.tie_word_embeddings):
            model.set_submodule(name, linear(module))
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            pack(module, "gate_up_proj", "down_proj")
    return model


def linear(module):
    """Our own module in the place of a dense one."""
    packed = NVFP4Linear(module.in_features, module.out_features, bias=None).to_empty(device="cpu")
    parts = nvfp4.quantize(module.weight.detach().float())
    packed.weight.data, packed.weight_scale.data, packed.weight_scale_2.data = parts
    return packed


class Packed:
    """Attributes that are decoded from packed parameters when they are read, in the module's dtype."""


def pack(module, *names):
    """Keep parameters packed. The module stays what it is, but for these names."""

    def decoded(name):
        def decode(self):
            codes, scale, factor = (getattr(self, f"{name}_{part}") for part in ("codes", "scale", "factor"))
            return dequantize(codes, scale, factor, torch.float32).to(self.dtype)

        return property(decode)

    module.dtype = getattr(module, names[0]).dtype
    for name in names:
        codes, scale, factor = nvfp4.quantize(module._parameters.pop(name).detach().float())
        for part, tensor in (("codes", codes), ("scale", scale.view(torch.uint8)), ("factor", factor)):
            module.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
    kind = type(module)
    module.__class__ = type(f"Packed{kind.__name__}", (Packed, kind), {name: decoded(name) for name in names})


class Head(nn.Module):
    """Multiplies by the table of embeddings."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return nn.functional.linear(x, self.table.weight)


def in_float64(model):
    """The same model with every weight decoded and everything computed in float64."""
    wide = copy.deepcopy(model)
    wide.config._experts_implementation = "batched_mm"  # grouped products have no float64
    for name, module in list(wide.named_modules()):
        if isinstance(module, NVFP4Linear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(module.dense("weight", torch.float64), requires_grad=False)
            wide.set_submodule(name, dense)
        elif isinstance(module, Packed):
            module.dtype = torch.float64
    return wide.double()


def logits_of(model):
    return lambda ids: model(ids, use_cache=False).logits


@torch.no_grad()
def assert_rewritten(model, expected):
    """All of these ops and nothing refused; logits as near to those in float64 as the model's own."""
    run = compiling(logits_of(model), {"check": True})
    logits = run(IDS)
    assert not run.report.refused
    assert Counter(entry.op for entry in run.report.rewritten) == expected
    exact, plain = logits_of(in_float64(model))(IDS), logits_of(model)(IDS)
    assert relative_error(logits, exact) <= max(1.1 * relative_error(plain, exact), 1e-6)
    return run.graphs[0]


ATTENTION_AND_GATED_MLP = 4 + 3
DENSE = LAYERS * ATTENTION_AND_GATED_MLP


@pytest.mark.parametrize(("family", "dtype"), [("Llama", torch.float32), ("Qwen3", torch.bfloat16)])
def test_gated_layers_and_a_quantized_head(family, dtype):
    assert_rewritten(model_of(family, dtype), {"fp4pass.linear": DENSE + 1})


def test_a_head_that_is_tied_to_dense_embeddings():
    assert_rewritten(model_of("Llama", tie_word_embeddings=True), {"fp4pass.linear": DENSE})


def test_a_head_that_is_tied_to_quantized_embeddings():
    model = model_of("Llama", tie_word_embeddings=True)
    pack(model.model.embed_tokens, "weight")
    model.lm_head = Head(model.model.embed_tokens)
    graph = assert_rewritten(model, {"fp4pass.linear": DENSE + 1, "gather, then decode": 1})
    assert "aten.embedding.default" not in called(graph)


@pytest.mark.parametrize("form", ONE_BY_ONE)
@pytest.mark.parametrize(("family", "dtype"), [("Mixtral", torch.float32), ("Qwen3Moe", torch.bfloat16)])
def test_gated_experts_product_by_product(family, form, dtype):
    model = model_of(family, dtype, experts_implementation=form, **OF_EXPERTS)
    assert_rewritten(model, {"fp4pass.linear": LAYERS * 4 + 1, ONE_BY_ONE[form]: LAYERS * 2})


@torch.no_grad()
def test_the_graph_of_gated_experts():
    """Between the products; routing is as transformers' version has it."""
    model = model_of("Qwen3Moe", torch.bfloat16, experts_implementation="grouped_mm", **OF_EXPERTS)
    run = compiling(model.model.layers[0].mlp.experts)
    run(torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2))
    assert {entry.reason for entry in run.report.rewritten} == {Apart.GATED.sentence}
    ops = called(run.graphs[0])
    _, second = [i for i, op in enumerate(ops) if "fp4pass" in op]
    assert_expected_inline(
        "\n".join(ops[ops.index("aten.split.Tensor") : second]),
        """\
aten.split.Tensor
<built-in function getitem>
<built-in function getitem>
prims.convert_element_type.default
aten.neg.default
aten.exp.default
aten.add.Tensor
aten.div.Tensor
prims.convert_element_type.default
aten.mul.Tensor""",
    )


def test_a_dense_model_from_a_checkpoint(tmp_path):
    dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    tensors = dict(dense.state_dict())
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            parts = nvfp4.quantize(module.weight.detach())
            tensors |= dict(
                zip((f"{name}.weight", f"{name}.weight_scale", f"{name}.weight_scale_2"), parts, strict=True)
            )
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "group_size": 16}
    config = dense.config.to_dict() | {"quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    model = fp4pass.from_pretrained(tmp_path, dtype=torch.float32)
    assert_rewritten(model, {"fp4pass.linear": DENSE})
