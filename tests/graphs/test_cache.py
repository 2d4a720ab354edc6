"""Compiled graphs that come from a cache: the right ones, with their report, whatever has changed in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import fp4pass
from fp4pass import _torch, pipeline
from fp4pass.options import Options
from fp4pass.pipeline import Fp4Pass
from fp4pass.report import last_report
from fp4pass.target import Target

from . import decodes
from .running import activations, relative_error
from .spellings import LINEARS, K, Packed
from .test_near_misses import NF4

PLAIN = LINEARS["table_of_16"]
TABLE = decodes.E2M1.clone()

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture
def passes(tmp_path, monkeypatch):
    """An empty cache of its own; the list grows by one whenever the passes run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs, original = [], Fp4Pass.__call__

    def counted(self, graph):
        runs.append(graph)
        original(self, graph)

    monkeypatch.setattr(Fp4Pass, "__call__", counted)
    torch.compiler.reset()
    return runs


def compiled(module, **options):
    """A new compile, as in a new process but for the interpreter."""
    torch.compiler.reset()
    return torch.compile(module, backend="fp4pass", options=options or None)


@torch.no_grad()
def assert_right(call, module, x):
    assert relative_error(call(x), module(x).double()) < 1e-6


def test_a_second_compile_comes_from_the_cache_with_its_report(passes):
    module, x = Packed(PLAIN), activations(3, K)
    assert_right(compiled(module), module, x)
    first = last_report()
    assert_right(compiled(module), module, x)
    assert len(passes) == 1
    assert last_report() == first and last_report() is not first and len(first.rewritten) == 1


def test_other_weights_under_a_cached_graph(passes):
    x = activations(3, K)
    for seed in range(3):
        module = Packed(PLAIN, seed=seed)
        assert_right(compiled(module), module, x)
    assert len(passes) == 1


def test_weights_changed_in_place_under_a_live_graph(passes):
    module, other, x = Packed(PLAIN), Packed(PLAIN, seed=1), activations(3, K)
    call = compiled(module)
    assert_right(call, module, x)
    module.load_state_dict(other.state_dict())
    assert_right(call, other, x)
    assert len(passes) == 1


def test_a_report_that_was_deleted_is_made_again(passes, tmp_path):
    module, x = Packed(PLAIN), activations(3, K)
    assert_right(compiled(module), module, x)
    first = last_report()
    (stored,) = (tmp_path / "fp4pass").iterdir()
    stored.unlink()
    assert_right(compiled(module), module, x)
    assert len(passes) == 2 and last_report() == first and stored.exists()


def test_models_alike_but_for_names_have_their_own_names(passes):
    x = activations(3, K)
    for name in ("query", "key"):
        module = nn.Sequential(OrderedDict({name: Packed(PLAIN)}))
        assert_right(compiled(module), module, x)
        assert last_report().rewritten[0].module == name


def by_buffer(table):
    return Packed(replace(PLAIN, table=table))


def by_literal(table):
    numbers = table.tolist()

    def decode(m, dtype):
        return decodes.scaled(m, torch.tensor(numbers)[decodes.nibbles(m.codes).long()], dtype)

    return Packed(replace(PLAIN, decode=decode))


def by_global(table):
    def decode(m, dtype):
        return decodes.scaled(m, TABLE[decodes.nibbles(m.codes).long()], dtype)

    TABLE.copy_(table)
    return Packed(replace(PLAIN, decode=decode))


def by_closure(table):
    table = table.clone()

    def decode(m, dtype):
        return decodes.scaled(m, table[decodes.nibbles(m.codes).long()], dtype)

    return Packed(replace(PLAIN, decode=decode))


@pytest.mark.parametrize("build", [by_buffer, by_literal, by_global, by_closure])
@pytest.mark.filterwarnings("ignore::fp4pass.backend.Fp4passWarning")
def test_another_table_under_a_warm_cache(passes, build):
    x = activations(3, K)
    module = build(decodes.E2M1)
    assert_right(compiled(module), module, x)
    warm = len(passes)
    module = build(NF4)
    assert_right(compiled(module), module, x)
    assert len(passes) > warm and not last_report().rewritten and len(last_report().refused) == 1


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.filterwarnings("ignore::fp4pass.backend.Fp4passWarning")
def test_a_table_changed_in_place_under_a_live_graph(passes, inference):
    with torch.inference_mode(inference):
        module, x = Packed(PLAIN), activations(3, K)
        call = compiled(module)
        assert_right(call, module, x)
        for table in (NF4, decodes.E2M1, NF4):
            module.table.copy_(table)
            assert_right(call, module, x)


def test_a_table_put_in_the_place_of_another_under_a_live_graph(passes):
    module, x = Packed(PLAIN), activations(3, K)
    call = compiled(module)
    assert_right(call, module, x)
    module.table = NF4.clone()
    assert_right(call, module, x)


def test_training_and_inference_keep_reports_of_their_own(passes):
    module, x = Packed(PLAIN), activations(3, K)
    for training in (False, True, False):
        with torch.set_grad_enabled(training):
            compiled(module)(x.requires_grad_(training))
        ops = [entry.op for entry in last_report().rewritten]
        assert ops == ["fp4pass.linear"] + ["fp4pass.linear_backward"] * training


CHILD = """
import json, sys
import torch
from torch import nn
from fp4pass import last_report
from fp4pass.lowering.reference import dequantize
from fp4pass.pipeline import Fp4Pass

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((48, 40), 0x21, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.full((48, 5), 0x38, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, dequantize(self.weight, self.scale))

runs, original = [], Fp4Pass.__call__
Fp4Pass.__call__ = lambda self, graph: (runs.append(graph), original(self, graph))[1]
model = nn.Sequential(Layer(), nn.Linear(48, 80), Layer())
with torch.no_grad():
    out = torch.compile(model, backend="fp4pass")(torch.ones(3, 80))
json.dump([len(runs), [[e.module, e.op] for e in last_report().rewritten]], sys.stdout)
"""


def test_a_second_process_has_the_report_of_the_first(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def child():
        run = subprocess.run(
            [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    rewritten = [["0", "fp4pass.linear"], ["2", "fp4pass.linear"]]
    assert child() == [1, rewritten]
    assert child() == [0, rewritten]


# --- What goes into the key.


class Call:
    """A call without tables."""

    def digest(self):
        return ""


def uuid(options=None, target=None):
    return Fp4Pass(options or Options(), target or Target(None), Call()).uuid()


OTHER_VALUES = {
    "mode": "max-autotune",
    "target_sm": 80,
    "require_match": True,
    "disable": ("linear",),
    "check": True,
    "activations": "emulate",
    "inductor": (("max_autotune", True),),
}


@pytest.mark.parametrize("field", [field.name for field in fields(Options)])
def test_every_option_is_part_of_the_key(field):
    assert uuid(Options(**{field: OTHER_VALUES[field]})) != uuid()


def test_the_target_is_part_of_the_key():
    assert len({uuid(target=Target(sm)) for sm in (None, 80, 90)}) == 3


@pytest.mark.parametrize("package", ["fp4pass", "lowering"])
def test_every_source_file_is_part_of_the_key(package, tmp_path, monkeypatch):
    digest = pipeline.sources_digest.__wrapped__
    shutil.copytree(Path(pipeline.__file__).parent, tmp_path / "fp4pass")
    shutil.copytree(Path(fp4pass.lowering.__file__).parent, tmp_path / "lowering")
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "fp4pass" / "pipeline.py"))
    monkeypatch.setattr(fp4pass.lowering, "__file__", str(tmp_path / "lowering" / "__init__.py"))
    known = {digest()}
    for path in sorted((tmp_path / package).rglob("*.py")):
        path.write_text(path.read_text() + "\n# another state\n")
        assert digest() not in known
        known.add(digest())


def test_the_sources_are_part_of_the_key(monkeypatch):
    before = uuid()
    monkeypatch.setattr(pipeline, "sources_digest", lambda: "another state")
    assert uuid() != before


class Other:
    """A pass of somebody else that changes nothing and counts its runs."""

    def __init__(self, name):
        self.name, self.runs = name, 0

    def __call__(self, graph):
        self.runs += 1

    def uuid(self):
        return self.name


def test_a_pass_of_somebody_else_runs_first_and_is_part_of_the_key(passes):
    keys = {uuid()}
    for name in ("one", "two"):
        with _torch.inductor_config.patch(joint_custom_pre_pass=Other(name)):
            keys.add(uuid())
    assert len(keys) == 3
    other, module, x = Other("one"), Packed(PLAIN), activations(3, K)
    with _torch.inductor_config.patch(joint_custom_pre_pass=other):
        assert_right(compiled(module), module, x)
    assert other.runs == len(passes) == 1 and len(last_report().rewritten) == 1


def test_compiled_code_calls_ops_that_check_nothing_any_more(passes):
    """Not where a pass of somebody else comes last: that stays alone."""

    def code_of(**options):
        with torch.no_grad():
            _, (code,) = run_and_get_code(compiled(module, **options), x)
        return code

    module, x = Packed(PLAIN), activations(3, K)
    code = code_of()
    assert "fp4pass_traced.linear.default(" in code and "fp4pass.linear.default(" not in code
    assert [entry.op for entry in last_report().rewritten] == ["fp4pass.linear"]
    other, given = Other("other"), Other("given")
    with _torch.inductor_config.patch(post_grad_custom_post_pass=other):
        assert "fp4pass.linear.default(" in code_of()
    assert "fp4pass.linear.default(" in code_of(post_grad_custom_post_pass=given)
    assert other.runs == given.runs == 1


def test_without_a_key_of_another_pass_nothing_is_cached(passes):
    module, x = Packed(PLAIN), activations(3, K)
    with _torch.inductor_config.patch(joint_custom_pre_pass=lambda graph: None):
        assert uuid() is None
        for _ in range(2):
            assert_right(compiled(module), module, x)
    assert len(passes) == 2
