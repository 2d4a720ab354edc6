"""The report: what it says, how it is kept, and what a user hears of it."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from fp4pass import backend
from fp4pass.backend import Fp4passWarning
from fp4pass.errors import UnmatchedError
from fp4pass.inputs import module_path
from fp4pass.report import Entry, Report, Store, common_module, last_report, remember

from . import decodes
from .running import activations, compiling
from .spellings import LINEARS, K, Packed

PLAIN = LINEARS["table_of_16"]
UNCACHED = {"force_disable_caches": True}

LINEAR = Entry("", "fp4pass.linear", 48, 80, 0, "plain codes", "plain torch on the CPU", inputs=(1,))
EXPERTS = Entry("", "fp4pass.grouped_linear", 48, 80, 8, "plain codes", "plain torch on the CPU", inputs=(2,))
LEFT = Entry("", "aten.mm.default", 32, 16, reason="a clamp takes part", remedy="take it out", inputs=(3,))


def layers(*names):
    return tuple(replace(LINEAR, module=name) for name in names)


def test_the_table():
    left = (replace(LEFT, module="lm_head"),)
    done = (*layers("layers.0.mixer", "layers.2.mixer", "layers.10.mixer"), replace(EXPERTS, module="layers.1.up"))
    assert_expected_inline(
        str(Report(done, left, "cpu")),
        """\
fp4pass: 4 of 5 quantized products rewritten (cpu)
lowering: plain torch on the CPU
source: plain codes
module                 layers  now                     weight
layers.{0,2,10}.mixer  3       fp4pass.linear          48 x 80
layers.1.up            1       fp4pass.grouped_linear  8 x 48 x 80
left: a clamp takes part
  do: take it out
  in: lm_head (aten.mm.default, 32 x 16)""",
    )


def test_an_empty_report_says_so():
    assert not Report() and str(Report()) == "fp4pass: no quantized product in this graph"
    assert Report(rewritten=(LINEAR,)) and Report(refused=(LEFT,))


@pytest.mark.parametrize(
    "source, path",
    [
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self']._modules['up'].__dict__['_modules']['quantizer']._buffers['scale']", "up.quantizer.scale"),
        (
            "dict.__getitem__(L['self']._modules['up'].__dict__['_parameters'], "
            "list(dict.keys(L['self']._modules['up'].__dict__['_parameters']))[0])",
            "up",
        ),
        ("L['x']", "x"),
    ],
)
def test_names_of_inputs(source, path):
    assert module_path(source) == path


def test_json_there_and_back():
    report = Report((LINEAR, EXPERTS), (LEFT,), "sm_90")
    found = json.loads(report.to_json())
    assert found["target"] == "sm_90" and [len(found["rewritten"]), len(found["refused"])] == [2, 1]
    assert found["refused"][0]["remedy"] == "take it out"
    assert Report.from_json(report.to_json()) == report


def test_reports_of_several_graphs_add_up():
    both = Report((LINEAR,), (), "cpu") + Report((EXPERTS,), (LEFT,), "cpu")
    assert both == Report((LINEAR, EXPERTS), (LEFT,), "cpu")
    assert (Report() + both).target == "cpu"


def test_names_come_from_the_inputs_of_the_call():
    report = Report((LINEAR, replace(EXPERTS, inputs=(2, 3))), (replace(LEFT, inputs=(9,)),))
    named = report.named(["x", "proj.weight", "block.experts.up", "block.experts.down"])
    assert [e.module for e in (*named.rewritten, *named.refused)] == ["proj", "block.experts", ""]


@pytest.mark.parametrize(
    "names, module",
    [
        ([], ""),
        ([""], ""),
        (["layer.weight"], "layer"),
        (["layer.weight_packed"], "layer"),
        (["experts.up_proj"], "experts.up_proj"),
        (["weight"], "weight"),
        (["a.b.up", "a.b.down"], "a.b"),
        (["a.up", "b.up"], ""),
    ],
)
def test_the_module_that_owns_all_of_some_tensors(names, module):
    assert common_module(names) == module


def test_a_store_gives_back_what_was_saved_and_nothing_else(tmp_path):
    store, report = Store(tmp_path / "reports"), Report((LINEAR,), (LEFT,), "cpu")
    assert store.load("key") is None
    store.save("key", report)
    assert store.load("key") == report and store.load("other") is None
    (file,) = (tmp_path / "reports").iterdir()
    for broken in ("", "{", "[]", '{"rewritten": []}', '{"rewritten": [{"a": 1}], "refused": [], "target": ""}'):
        file.write_text(broken)
        assert store.load("key") is None
    store.save("key", report)
    assert store.load("key") == report


def test_only_a_report_that_says_something_is_remembered():
    report = Report((LINEAR,))
    remember(report)
    remember(Report())
    assert last_report() is report


# --- Through the backend.


@pytest.fixture
def near_miss():
    return Packed(replace(PLAIN, decode=lambda m, dtype: 2 * decodes.table_of_16(m, dtype)))


def run(module, **options):
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(module, backend="fp4pass", options={**UNCACHED, **options})(activations(3, K))


def test_a_product_that_is_left_is_warned_of_once(near_miss):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(nn.Sequential(Packed(PLAIN), nn.Linear(48, K), near_miss, nn.Linear(48, K), near_miss))
    (warning,) = [w for w in caught if issubclass(w.category, Fp4passWarning)]
    assert "2 quantized products were left as they were, the first in 2" in str(warning.message)
    assert "an extra factor of 2" in str(warning.message)
    assert len(last_report().rewritten) == 1 and len(last_report().refused) == 2


def test_nothing_is_said_where_nothing_is_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Fp4passWarning)
        run(Packed(PLAIN), require_match=True)
        run(nn.Linear(K, 16), require_match=True)
    assert len(last_report().rewritten) == 1


def test_require_match_raises_with_reason_and_remedy(near_miss):
    with pytest.raises(Exception, match="1 quantized products were not rewritten") as caught:
        run(near_miss, require_match=True)
    error = caught.value if isinstance(caught.value, UnmatchedError) else caught.value.inner_exception
    assert isinstance(error, UnmatchedError) and "an extra factor of 2" in error.seen and "clamp" in error.do
    assert len(last_report().refused) == 1


def test_the_report_is_logged_and_traced(monkeypatch, caplog):
    traced = []
    monkeypatch.setattr(backend._torch, "emit_trace", lambda name, payload: traced.append((name, payload())))
    with caplog.at_level(logging.INFO, logger="fp4pass"):
        run(Packed(PLAIN))
    assert [(name, Report.from_json(text)) for name, text in traced] == [("fp4pass_report", last_report())]
    assert str(last_report()) in caplog.text


@torch.no_grad()
def test_modules_are_named_as_in_the_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Packed(PLAIN), Packed(PLAIN)])

        def forward(self, x):
            return self.layers[0](x) + self.layers[1](x)

    found = compiling(Block())
    found(activations(3, K))
    assert [entry.module for entry in found.report.rewritten] == ["layers.0", "layers.1"]
