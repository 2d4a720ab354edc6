"""Rows of quantized tables: only those that are asked for are decoded, and what follows is an activation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fp4pass.lowering.layout import FRAGMENTS, INTERLEAVED
from fp4pass.match.reasons import Reason

from . import decodes
from .running import called, compiling, relative_error
from .spellings import LINEARS, Packed

V, D = 64, 48
LOOK_UPS = {
    "embedding": lambda table, ids: functional.embedding(ids, table),
    "index": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids.flatten()).view(*ids.shape, D),
}
IDS = torch.tensor([[0, 63, 5], [5, 17, 40]])


class Table(nn.Module):
    """``look_up(decoded [V, D], ids)``."""

    def __init__(self, look_up, decode=decodes.table_of_16):
        super().__init__()
        self.table = Packed(replace(LINEARS["table_of_16"], decode=decode, shape=(V, D)))
        self.look_up = look_up

    def forward(self, ids):
        return self.look_up(self.table.weight(torch.float32), ids)


@pytest.mark.parametrize("name", LOOK_UPS)
@torch.no_grad()
def test_rows_are_picked_before_they_are_decoded(name):
    module = Table(LOOK_UPS[name])
    run = compiling(module, {"check": True})
    result = run(IDS)
    (entry,) = run.report.rewritten
    assert not run.report.refused
    assert (entry.op, entry.n, entry.k, entry.module) == ("gather, then decode", V, D, "table")
    assert relative_error(result, module.table.exact[IDS]) < 1e-6
    sizes = {tuple(n.meta["val"].shape) for n in run.graphs[0].nodes if n.op == "call_function"}
    assert (V, D) not in sizes


@torch.no_grad()
def test_a_table_that_is_no_nvfp4_is_left():
    run = compiling(Table(LOOK_UPS["embedding"], lambda m, dtype: decodes.table_of_16(m, dtype) * 2), {"check": True})
    run(IDS)
    (entry,) = run.report.refused
    assert not run.report.rewritten and entry.reason.startswith(Reason.WRONG_VALUES.sentence)


@torch.no_grad()
def test_columns_that_are_looked_up_are_left():
    run = compiling(Table(lambda table, ids: table.t()[ids % D]), {"check": True})
    run(IDS)
    (entry,) = run.report.refused
    assert entry.reason == f"{Reason.WRONG_AXIS.sentence} (columns of the table are looked up)"


class Tied(nn.Module):
    """A small model whose head is its table of embeddings, with a quantized layer between them."""

    def __init__(self, gathers_first):
        super().__init__()
        self.table = Packed(replace(LINEARS["table_of_16"], shape=(V, D)))
        self.layer = Packed(replace(LINEARS["table_of_16"], shape=(D, D)), seed=1)
        self.gathers_first = gathers_first

    def forward(self, ids):
        m = self.table
        if self.gathers_first:
            values = decodes.E2M1[decodes.nibbles(m.codes[ids]).long()]
            x = (decodes.blocks(values) * (m.scale[ids].float() * m.factor).unsqueeze(-1)).flatten(-2)
        else:
            x = functional.embedding(ids, m.weight(torch.float32))
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        return functional.linear(x + self.layer(x), m.weight(x.dtype))


@pytest.mark.parametrize("gathers_first", [False, True])
@torch.no_grad()
def test_a_tied_head_and_the_layers_between_are_products(gathers_first):
    module = Tied(gathers_first)
    run = compiling(module, {"check": True})
    result = run(IDS)
    assert not run.report.refused
    assert called(run.graphs[0]).count("fp4pass.linear.default") == 2
    assert len(run.report.rewritten) == (2 if gathers_first else 3)
    assert relative_error(result, module(IDS).double()) < 1e-5


@torch.no_grad()
def test_rows_that_are_looked_up_for_a_product():
    class Sampled(Table):
        def forward(self, ids, x):
            return x @ super().forward(ids).t()

    module, inputs = Sampled(LOOK_UPS["embedding"]), (IDS[0], torch.randn(3, D))
    run = compiling(module, {"check": True})
    assert relative_error(run(*inputs), inputs[1].double() @ module.table.exact[IDS[0]].T) < 1e-6
    assert [entry.op for entry in run.report.rewritten] == ["gather, then decode"] and not run.report.refused


@pytest.mark.parametrize("layout", [INTERLEAVED, FRAGMENTS])
@torch.no_grad()
def test_a_table_in_an_order_of_our_kernels_is_left(layout):
    module = Table(LOOK_UPS["embedding"])
    module.table = Packed(replace(LINEARS[f"our_modules_{layout}"], shape=(V, 64)))
    run = compiling(module, {"check": True})
    run(IDS)
    (entry,) = run.report.refused
    assert entry.reason.startswith(Reason.MIXED_ROWS.sentence)
