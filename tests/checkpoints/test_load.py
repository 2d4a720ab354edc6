"""From disk to a model and back."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.utils import hub

from fp4pass import nvfp4
from fp4pass.checkpoint import packed, quantizer
from fp4pass.checkpoint.load import from_pretrained, skeleton
from fp4pass.checkpoint.modules import NVFP4Experts, NVFP4Linear
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.errors import DeviceError, VersionError
from fp4pass.synthesize import synthesize

from .files import altered, read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]
quantizer.register()


def assert_same_tensors(got, expected):
    assert set(got) == set(expected)
    assert [name for name in expected if not same_bytes(got[name], expected[name])] == []


def test_auto_model_loads_with_every_key_in_its_place(nano_dir):
    model, info = AutoModelForCausalLM.from_pretrained(nano_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert kinds == {
        "model.layers.0.mixer.in_proj": NVFP4Linear,
        "model.layers.0.mixer.out_proj": NVFP4Linear,
        **{f"model.layers.{layer}.mixer.experts": NVFP4Experts for layer in (1, 3)},
        **{f"model.layers.{i}.mixer.shared_experts.{p}_proj": NVFP4Linear for i in (1, 3) for p in ("up", "down")},
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_logits_equal_the_dense_models_in_float32(nano_model, dense_twin):
    model = nano_model(dtype=torch.float32)
    twin = dense_twin(model)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-4, atol=1e-4)


def test_float32_generation_equals_the_dense_models(nano_model, dense_twin):
    model = nano_model(dtype=torch.float32)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **arguments), dense_twin(model).generate(IDS, **arguments))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_whole_model_traces_into_one_graph(nano_model, implementation, dtype):
    torch.compiler.reset()
    model, graphs = nano_model(dtype=dtype, experts_implementation=implementation), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    logits = compiled(IDS).logits
    assert len(graphs) == 1 and logits.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_asked_dtype_reaches_everything_but_packed_and_router_weights(nano_model, dtype):
    model = nano_model(dtype=dtype)
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, PackedModule):
            assert parameter.dtype == (torch.float32 if name.endswith("gate.weight") else dtype), name


def test_saving_gives_back_names_and_bytes(nano_dir, nano_model, tmp_path):
    model = nano_model()
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(nano_dir))
    before = json.loads((nano_dir / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == before


def test_saving_undoes_the_kernels_layout(nano_dir, nano_model, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "layout_for", lambda device, shapes: "interleaved")
    model = nano_model()
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert {module.layout for module in modules} == {"interleaved"}
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(nano_dir))
    assert {module.layout for module in modules} == {"interleaved"}


def test_push_to_hub_uploads_the_bytes_that_were_read(nano_dir, nano_model, tmp_path, monkeypatch):
    uploaded = tmp_path / "uploaded"

    class Hub:
        """Keeps what would be sent."""

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **_):
            uploaded.mkdir()
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, uploaded / operation.path_in_repo)

    monkeypatch.setattr(hub, "hf_api", Hub)
    # The card would be looked for on the hub.
    card = SimpleNamespace(save=lambda path: Path(path).touch())
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    nano_model().push_to_hub("somebody/nano")
    assert_same_tensors(read_tensors(uploaded), read_tensors(nano_dir))
    assert torch.equal(from_pretrained(uploaded)(IDS).logits, nano_model()(IDS).logits)


def test_a_layout_does_not_change_the_answer(nano_model):
    model = nano_model()
    expected = model(IDS).logits
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.set_layout("interleaved")
    assert torch.equal(model(IDS).logits, expected)


def test_what_was_saved_loads_again_in_a_fresh_process(nano_model, tmp_path):
    model = nano_model()
    model.save_pretrained(tmp_path / "saved")
    script = (
        "import sys, torch; from fp4pass.checkpoint.quantizer import register; register();"
        "from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(model.generate(torch.arange(5, 25)[None], max_new_tokens=6, do_sample=False).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "saved"], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == model.generate(IDS, max_new_tokens=6, do_sample=False).tolist()


class Dense(TorchDispatchMode):
    """Collects the shapes of all wide float tensors with memory, and of all packed ones."""

    def __init__(self):
        super().__init__()
        self.wide, self.codes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                kind = self.wide if tensor.is_floating_point() and tensor.element_size() > 1 else self.codes
                kind.add(tuple(tensor.shape))
        return result


def test_no_quantized_weight_is_ever_wide_while_loading_or_saving(nano_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # worker threads would escape the mode
    monkeypatch.setattr(packed, "layout_for", lambda device, shapes: "interleaved")
    with Dense() as seen:
        model = from_pretrained(nano_dir)
        model.save_pretrained(tmp_path / "saved")
    dense = set()
    for module in model.modules():
        for matrix in module.matrices if isinstance(module, PackedModule) else ():
            *outer, n, half = getattr(module, matrix).shape
            dense |= {(*outer, n, 2 * half), (n, 2 * half)}
    assert len(dense) >= 8 and (8, 48, 40) in seen.codes and (64, 80) in seen.wide
    assert not dense & seen.wide
    stored = sum(tensor.nbytes for tensor in read_tensors(nano_dir).values())
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert held == stored


def test_quantization_in_hf_quant_config_alone(tmp_path, tiny_sizes, nano_model):
    directory = synthesize(tmp_path / "nano", **tiny_sizes)
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    model = from_pretrained(directory)
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_base_model_loads_alone(nano_dir, nano_model):
    model, info = AutoModel.from_pretrained(nano_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(model(IDS).last_hidden_state, nano_model().model(IDS).last_hidden_state)


def test_remote_code_is_never_run(nano_dir, caplog):
    with caplog.at_level(logging.WARNING, "fp4pass.checkpoint"):
        model = from_pretrained(nano_dir, trust_remote_code=True)
    assert "trust_remote_code is ignored" in caplog.text
    assert type(model).__module__ == "transformers.models.nemotron_h.modeling_nemotron_h"


def test_kv_cache_scales_are_dropped_by_name_and_nothing_else(nano_dir, tmp_path, caplog):
    names = [f"backbone.layers.2.mixer.{name}" for name in ("k_proj.k_scale", "v_proj.v_scale")]
    directory = altered(nano_dir, tmp_path / "kv", lambda tensors: tensors.update({n: torch.ones(()) for n in names}))
    with caplog.at_level(logging.INFO, "fp4pass.checkpoint"):
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert sorted(model.hf_quantizer.dropped) == names
    assert "2 tensors are not loaded, scales of an FP8 KV cache" in caplog.text
    assert ", ".join(model.hf_quantizer.dropped) in caplog.text
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(nano_dir))
    assert not {r"k_scale"} & set(type(model)._keys_to_ignore_on_load_unexpected)


def test_weights_without_input_scale_and_listed_global_scales_load(nano_dir, tmp_path, nano_model):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("input_scale")]:
            del tensors[name]
        name = "backbone.layers.0.mixer.in_proj.weight_scale_2"
        tensors[name] = tensors[name].reshape(1)

    directory = altered(nano_dir, tmp_path / "w4a16", edit)
    model = from_pretrained(directory)
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(directory))


def test_a_quantized_head_loads(nano_dir, tmp_path, dense_twin):
    def edit(tensors):
        parts = nvfp4.quantize(tensors.pop("lm_head.weight"))
        names = ("weight", "weight_scale", "weight_scale_2")
        tensors |= {f"lm_head.{name}": part for name, part in zip(names, parts, strict=True)}

    directory = altered(
        nano_dir, tmp_path / "head", edit, lambda c: c["quantization_config"]["ignore"].remove("lm_head")
    )
    model = from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model.lm_head, NVFP4Linear)
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_experts_of_one_layer_may_be_dense(nano_dir, tmp_path, nano_model):
    """The weights are decoded without rounding, so that the answer is the packed model's."""
    layer = "backbone.layers.3.mixer.experts"

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(layer) and name.endswith("_proj.weight")]:
            parts = [tensors.pop(name + suffix) for suffix in ("", "_scale", "_scale_2")]
            del tensors[name.replace("weight", "input_scale")]
            tensors[name] = nvfp4.dequantize(*parts, torch.float32)

    def exclude(config):
        config["quantization_config"]["ignore"].append(f"{layer}.*")

    model = from_pretrained(altered(nano_dir, tmp_path / "mixed", edit, exclude), dtype=torch.float32)
    assert isinstance(model.model.layers[1].mixer.experts, NVFP4Experts)
    assert not isinstance(model.model.layers[3].mixer.experts, NVFP4Experts)
    expected = nano_model(dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_behind_a_latent_projection_load(tmp_path, tiny_sizes, dense_twin):
    model = from_pretrained(synthesize(tmp_path / "latent", latent=32, **tiny_sizes), dtype=torch.float32)
    assert model.model.layers[1].mixer.experts.up_proj.shape == (8, 48, 16)
    torch.testing.assert_close(model(IDS).logits, dense_twin(model)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_files", [True, False])
def test_the_skeleton_has_the_models_shapes_and_no_memory(with_files, nano_dir, nano_model, tmp_path):
    if not with_files:
        shutil.copy(nano_dir / "config.json", tmp_path)
    empty, model = skeleton(nano_dir if with_files else tmp_path), nano_model()
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    # What only the files tell: which scales are there that nothing is computed from, and a router's own dtype.
    skipped = ("gate.weight",) if with_files else ("gate.weight", "input_scale")
    found, shapes = (
        {name: (p.dtype, p.shape) for name, p in each.named_parameters() if not name.endswith(skipped)}
        for each in (empty, model)
    )
    assert found == shapes


def test_a_name_that_is_taken_is_left_alone(nano_dir, monkeypatch, caplog):
    class Stranger:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "modelopt", Stranger)
    assert not quantizer.register()
    assert auto.AUTO_QUANTIZER_MAPPING["modelopt"] is Stranger and "is taken by" in caplog.text
    with pytest.raises(VersionError, match="another package"):
        from_pretrained(nano_dir)


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError("the disk is gone")])
def test_what_goes_wrong_while_experts_are_read_ends_the_load_at_once(error, nano_dir, monkeypatch):
    calls = []

    def fail(headers, device):
        calls.append(headers)
        raise error

    monkeypatch.setattr(quantizer, "read_stack", fail)
    with pytest.raises(type(error)) as caught:
        from_pretrained(nano_dir)
    assert caught.value is error and len(calls) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", {"": 0}])
def test_a_gpu_that_is_not_there(nano_dir, device_map):
    pytest.importorskip("accelerate", reason="transformers asks for it before a device_map comes to us")
    with pytest.raises(DeviceError, match="sees no CUDA device"):
        from_pretrained(nano_dir, device_map=device_map)
