"""Compile a module through the passes without code generation, and keep what they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fp4pass import _torch
from fp4pass.backend import compile_graph
from fp4pass.inputs import CallInputs
from fp4pass.options import Options
from fp4pass.report import Report


@dataclass
class Run:
    """A compiled module: a report for each compile, and the graphs that Inductor would have been given."""

    compiled: Callable[..., Any]
    reports: list[Report] = field(default_factory=list)
    graphs: list[fx.Graph] = field(default_factory=list)

    @property
    def report(self) -> Report:
        """The report of the only compile."""
        (report,) = self.reports
        return report

    def __call__(self, *inputs: Any) -> Any:
        return self.compiled(*inputs)


def compiling(
    module: nn.Module | Callable[..., Any], options: Mapping[str, Any] | None = None, dynamic: bool | None = None
) -> Run:
    """``module`` compiled as one graph; the rewritten graph is interpreted, no code is generated from it."""
    torch.compiler.reset()
    parsed = Options.parse(options=options)

    def keep(graph_module: fx.GraphModule, examples: Any, **settings: Any) -> Callable[..., Any]:
        run.graphs.append(graph_module.graph)
        return _torch.boxed(graph_module)

    def backend(graph_module: fx.GraphModule, examples: Any) -> Callable[..., Any]:
        call = CallInputs(graph_module, examples)
        compiled, report = compile_graph(graph_module, examples, parsed, call, inner_compile=keep)
        run.reports.append(report)
        return compiled

    run = Run(torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic))
    return run


def called(graph: fx.Graph) -> list[str]:
    """The names of the ops called, in graph order."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``, in float64."""
    return ((result.double() - exact).norm() / exact.norm()).item()
