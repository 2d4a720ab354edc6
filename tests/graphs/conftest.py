"""Fixtures that several modules share: the graphs around the passes, and stand-ins for other libraries' operations."""

from __future__ import annotations

import pytest
import torch

from fp4pass.passes.unfuse.graph import ROWS
from fp4pass.pipeline import Fp4Pass

from .running import listing
from .standins import StandIns
from .vendors import IMPLEMENTATIONS, OTHERS, scaled_grouped_mm, scaled_grouped_mm_fake


@pytest.fixture
def passes(monkeypatch):
    """The graphs that the passes are given and that they leave, one after the other."""
    listings, original = [], Fp4Pass.__call__

    def noted(self, graph):
        listings.append(listing(graph))
        original(self, graph)
        listings.append(listing(graph))

    monkeypatch.setattr(Fp4Pass, "__call__", noted)
    return listings


@pytest.fixture(scope="module")
def libraries():
    """Every operation of the tables under its own name, until the module's tests have run."""
    stand_ins = StandIns()
    for name, stand_in in IMPLEMENTATIONS.items():
        stand_ins.define(ROWS[name].schema, *stand_in)
    for schema, stand_in in OTHERS.items():
        stand_ins.define(schema, *stand_in)
    stand_ins.implement("aten", "_scaled_grouped_mm_v2", scaled_grouped_mm, scaled_grouped_mm_fake)
    yield stand_ins
    stand_ins.close()
    # What was compiled with them.
    torch.compiler.reset()
