"""How much is held while loading, what the arguments of from_pretrained do, and what stays on disk and in silence."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp4pass.checkpoint import packed
from fp4pass.checkpoint.load import from_pretrained
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.checkpoint.quantizer import METHOD, ModelOptConfig, ModelOptQuantizer
from fp4pass.checkpoint.releases import RELEASES
from fp4pass.checkpoint.tensors import tensors
from fp4pass.errors import DeviceError
from fp4pass.synthesize import synthesize

from .files import read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that ops have made and that are still there; ``peak`` is the most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_real(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_real, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and not any(storage._cdata == each._cdata for each in self.seen):
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size):
        self.now -= size


def is_real(value):
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def test_loading_holds_little_beside_the_weights(tmp_path, tiny_sizes, monkeypatch):
    """At most one stack of experts' matrices is there twice: as it was read and as it is kept."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # worker threads would escape the mode
    sizes = tiny_sizes | {"layers": 8, "experts": 32, "intermediate": 96}
    directory = synthesize(tmp_path / "large", quantization_in_config=True, **sizes)
    monkeypatch.setattr(packed, "layout_for", lambda device, shapes: "interleaved")
    with Alive() as alive:
        model = from_pretrained(directory)
    held = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert held > 8 * largest
    # Reordering the codes takes up to six times a piece of them, and a piece here is a whole stack.
    assert alive.peak < held + 7 * largest


@pytest.mark.parametrize("like", ["nano", "lightning", "super", "ultra"])
def test_one_stack_is_less_than_3_percent_of_a_full_release(like):
    """What the bound on device memory rests on: the most that is there twice, beside all that is kept."""
    sizes, bytes_of = RELEASES[like].sizes, {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
    total = stack = 0
    for spec in tensors(like, sizes):
        size = torch.Size(spec.shape).numel() * bytes_of[spec.dtype]
        total += 0 if spec.name.startswith("mtp.") else size
        stack += size if spec.name.startswith("backbone.layers.1.") and spec.name.endswith("up_proj.weight") else 0
    assert stack < 0.03 * total


def test_attention_and_experts_implementation_are_honoured(nano_dir):
    model = from_pretrained(nano_dir, attn_implementation="eager", experts_implementation="batched_mm")
    assert model.config._attn_implementation == "eager" and model.config._experts_implementation == "batched_mm"
    expected = from_pretrained(nano_dir, attn_implementation="sdpa")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0.05, atol=0.05)


def test_the_progress_bar_is_transformers_own_and_can_be_silenced(nano_dir, capfd):
    from_pretrained(nano_dir)
    assert "Loading weights" in capfd.readouterr().err
    transformers.logging.disable_progress_bar()
    try:
        from_pretrained(nano_dir)
    finally:
        transformers.logging.enable_progress_bar()
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_a_compiled_model_saves_what_was_read(nano_dir, nano_model, tmp_path):
    model = nano_model()
    torch.compiler.reset()
    torch.compile(model, backend="eager")(IDS)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.set_layout("interleaved")
    model.save_pretrained(tmp_path / "saved")
    got, wanted = read_tensors(tmp_path / "saved"), read_tensors(nano_dir)
    assert set(got) == set(wanted) and all(same_bytes(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "device_map", [{"model": 0, "lm_head": "cpu"}, {"model": "cuda:1", "lm_head": "disk"}, {"": "disk"}]
)
def test_offload_is_refused(device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    quantizer = ModelOptQuantizer(ModelOptConfig(quant_algo="NVFP4"))
    with pytest.raises(DeviceError, match="not offloaded"):
        quantizer.validate_environment(device_map=device_map)
    for accepted in ({"": "cpu"}, {"model": 0, "lm_head": 1}, "auto", None, torch.device("cpu"), 0):
        quantizer.validate_environment(device_map=accepted)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto means the GPU there")
def test_a_device_map_without_a_gpu_loads_on_the_cpu(device_map, nano_dir, nano_model):
    pytest.importorskip("accelerate", reason="transformers asks for it where there is a device_map")
    model = from_pretrained(nano_dir, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto means the GPU there")
def test_what_auto_would_offload_is_refused_before_anything_is_read(nano_dir, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers asks for it where there is a device_map")
    monkeypatch.setattr(ModelOptQuantizer, "_read_stack", None)
    with pytest.raises(DeviceError, match="not offloaded") as caught:
        from_pretrained(nano_dir, device_map="auto", max_memory={"cpu": 60_000})
    assert "disk" in caught.value.seen and "max_memory" in caught.value.do


def test_a_quantization_config_as_an_argument_serves_files_without_one(tmp_path, tiny_sizes, nano_dir, nano_model):
    """As plain transformers can be told what hf_quant_config.json says."""
    config = transformers.AutoConfig.from_pretrained(nano_dir)
    facts = SimpleNamespace(**config.quantization_config)
    assert facts.quant_method == METHOD
    directory = synthesize(tmp_path / "bare", **tiny_sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=ModelOptConfig(**config.quantization_config)
    )
    assert torch.equal(model(IDS).logits, nano_model()(IDS).logits)
