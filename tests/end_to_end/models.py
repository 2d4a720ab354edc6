"""What the tests of whole models share: texts, and what a whole rewrite of the tiny model looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import transformers
from torch import fx

from fp4pass.report import Report

TORCH, TRANSFORMERS = (
    tuple(int(part) for part in package.__version__.split(".")[:2]) for package in (torch, transformers)
)

WHOLE = {"fp4pass.linear": 6, "fp4pass.experts": 2}
"""In the tiny model: in and out of a mamba layer, up and down of two shared experts; two blocks of routed experts."""


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Ids of two texts of ``count`` random tokens each, int64 [2, count]."""
    return torch.randint(5, 300, (2, count), generator=torch.Generator().manual_seed(seed))


def assert_whole(report: Report, graphs: Iterable[fx.Graph] = (), ops: Mapping[str, int] = WHOLE) -> None:
    """Everything quantized is rewritten: the report says so, and each graph calls these ops and no others of ours."""
    assert report.refused == ()
    assert Counter(entry.op for entry in report.rewritten) == ops
    for graph in graphs:
        called = Counter(str(node.target).removesuffix(".default") for node in graph.nodes)
        assert {op: count for op, count in called.items() if op.startswith("fp4pass")} == ops
