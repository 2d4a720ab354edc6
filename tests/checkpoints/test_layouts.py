"""A whole checkpoint in the layouts that a GPU's kernels want: same answers, same bytes when it is saved."""

import pytest
import torch

import fp4pass
from fp4pass import nvfp4
from fp4pass.checkpoint import packed
from fp4pass.checkpoint.embedding import NVFP4Embedding
from fp4pass.checkpoint.load import from_pretrained
from fp4pass.checkpoint.modules import NVFP4Linear
from fp4pass.checkpoint.packed import PackedModule
from fp4pass.lowering.layout import FRAGMENTS, INTERLEAVED, PLAIN, layout_for
from fp4pass.synthesize import synthesize

from .files import altered, read_tensors, same_bytes

IDS = torch.arange(5, 25)[None]
# Every N is a multiple of 16, not always of 64, and every K one of 64; in_proj has N = 336.
IN_UNITS = {"hidden": 128, "intermediate": 64, "shared": 192, "head_dim": 32, "mamba_head_dim": 8}
TABLES = ("backbone.embeddings", "lm_head")


def quantized(tensors):
    for name in TABLES:
        if f"{name}.weight" in tensors:
            parts = nvfp4.quantize(tensors.pop(f"{name}.weight"))
            names = ("weight", "weight_scale", "weight_scale_2")
            tensors |= {f"{name}.{part}": tensor for part, tensor in zip(names, parts, strict=True)}


def named(config):
    content = config["quantization_config"]
    content["quantized_layers"] = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in TABLES}
    content["ignore"] = [name for name in content["ignore"] if name not in TABLES]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_sizes):
    """A tiny checkpoint of whole units, its embedding and its head quantized too."""
    folder = tmp_path_factory.mktemp("units")
    plain = synthesize(folder / "tiny", quantization_in_config=True, **tiny_sizes | IN_UNITS)
    return altered(plain, folder / "tables", quantized, named)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Weights take the layouts of a GPU wherever they arrive."""
    monkeypatch.setattr(packed, "layout_for", lambda device, shapes: layout_for(torch.device("cuda"), shapes))


def layouts(model):
    return {module.layout for module in model.modules() if isinstance(module, PackedModule)}


@torch.no_grad()
def test_a_checkpoint_of_whole_units_answers_and_saves_as_ever(directory, as_on_a_gpu, tmp_path, monkeypatch):
    model = from_pretrained(directory)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, NVFP4Embedding) and isinstance(head, NVFP4Linear)
    assert layouts(model) == {FRAGMENTS, PLAIN} and table.layout == PLAIN
    model.save_pretrained(tmp_path / "saved")
    wanted, got = read_tensors(directory), read_tensors(tmp_path / "saved")
    assert set(got) == set(wanted)
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []
    monkeypatch.undo()
    plain = from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert layouts(plain) == {PLAIN}
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_a_state_dict_goes_between_the_layouts(directory, as_on_a_gpu, monkeypatch):
    model = from_pretrained(directory, dtype=torch.float32)
    monkeypatch.undo()
    plain = from_pretrained(directory, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(same_bytes(tensor, state[name]) for name, tensor in plain.state_dict().items())
    expected = plain(IDS).logits
    for assign in (False, True):
        for module in model.modules():
            for parameter in module.parameters(recurse=False) if isinstance(module, PackedModule) else ():
                parameter.zero_()
        model.load_state_dict(state, assign=assign)
        assert FRAGMENTS in layouts(model)
        assert torch.equal(model(IDS).logits, expected)


def test_every_layer_of_whole_units_is_proven(directory, as_on_a_gpu):
    report = fp4pass.explain(from_pretrained(directory, dtype=torch.float32), IDS, use_cache=False)
    assert len(report.rewritten) == 9 and not report.refused
    assert all(entry.source.startswith(FRAGMENTS) for entry in report.rewritten)


def test_a_table_that_is_assigned_stays_in_rows(directory, as_on_a_gpu):
    model = from_pretrained(directory, dtype=torch.float32)
    state, table = model.get_input_embeddings().state_dict(), model.get_input_embeddings()
    expected = table(IDS)
    table.to("meta").load_state_dict(state, assign=True)
    assert table.layout == PLAIN and torch.equal(table(IDS), expected)


def test_ragged_shapes_are_interleaved(nano_dir, as_on_a_gpu):
    assert layouts(from_pretrained(nano_dir)) == {INTERLEAVED}
