"""The compiled model in two processes that share Inductor's cache."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fp4pass.checkpoint.packed import PackedModule
from fp4pass.report import Report

from ..graphs.running import relative_error
from .models import assert_whole, tokens

CHILD = """
import sys
from collections import OrderedDict
import torch
from torch import nn
assert "fp4pass" in torch.compiler.list_backends() and "fp4pass" not in sys.modules

import fp4pass
from fp4pass.pipeline import Fp4Pass

class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(ids, use_cache=False).logits

folder, ids, found, *names = sys.argv[1:]
runs, original = [], Fp4Pass.__call__
Fp4Pass.__call__ = lambda self, graph: (runs.append(graph), original(self, graph))[1]
inner = Logits(fp4pass.from_pretrained(folder, dtype=torch.float32))
outcomes = []
for name in names:
    model = nn.Sequential(OrderedDict({name: inner}))
    with torch.no_grad():
        logits = torch.compile(model, backend="fp4pass", fullgraph=True)(torch.load(ids))
    outcomes.append({"logits": logits, "report": fp4pass.last_report().to_json(), "passes": len(runs)})
torch.save(outcomes, found)
"""


@pytest.fixture
def process(nano_dir, cache_directory, tmp_path):
    """``process(*names)``: what a process of its own finds that calls the model by each of these names."""
    ids, found = tmp_path / "ids", tmp_path / "found"
    torch.save(tokens(7), ids)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_directory), "OMP_NUM_THREADS": "1"}

    def run(*names):
        command = [sys.executable, "-c", CHILD, str(nano_dir), str(ids), str(found), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(found)

    return run


@torch.no_grad()
def test_a_second_process_takes_the_graph_from_the_cache_with_its_report(process, nano_model, dense_twin):
    (cold,) = process("first")
    warm, renamed = process("first", "second")
    model = nano_model(dtype=torch.float32)
    assert relative_error(cold["logits"], dense_twin(model, torch.float64)(tokens(7)).logits) < 1e-5
    assert (cold["passes"], warm["passes"]) == (1, 0)
    assert warm["report"] == cold["report"]
    packed = sorted(name for name, module in model.named_modules() if isinstance(module, PackedModule))
    for name, found in (("first", warm), ("second", renamed)):
        assert torch.equal(found["logits"], cold["logits"])
        report = Report.from_json(found["report"])
        assert_whole(report)
        assert sorted(entry.module for entry in report.rewritten) == [f"{name}.inner.{module}" for module in packed]
