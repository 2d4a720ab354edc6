"""Compile a module through the passes without code generation, and keep what they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

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


def listing(graph: fx.Graph) -> str:
    """The graph, a line an operation: ``name = op(arguments)  # dtype[shape]``. Names are given anew, in order."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        names[node] = f"{'in' if node.op == 'placeholder' else 't'}{len(names)}"
        if node.op == "placeholder":
            continue
        arguments = ", ".join(_shown(argument, names) for argument in node.args)
        if node.op == "output":
            lines.append(f"return {arguments}")
        else:
            lines.append(f"{names[node]} = {node.target}({arguments}){_kind(node.meta.get('val'))}")
    return "\n".join(lines)


def _kind(result: Any) -> str:
    if not isinstance(result, torch.Tensor):
        return ""
    return f"  # {str(result.dtype).removeprefix('torch.')}[{'x'.join(str(int(size)) for size in result.shape)}]"


def _shown(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_shown(each, names) for each in argument)}]"
    return names.get(argument, str(argument)) if isinstance(argument, fx.Node) else str(argument)


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``, in float64."""
    return ((result.double() - exact).norm() / exact.norm()).item()


@dataclass(frozen=True)
class Known:
    """`fp4pass.match.roles.Inputs` for a graph of `traced`: what is not of the call belongs to the model."""

    tables: Mapping[str, torch.Tensor]
    of_the_call: frozenset[str]

    def is_constant(self, node: fx.Node) -> bool:
        return node.name not in self.of_the_call

    def table(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            return getattr(node.graph.owning_module, node.target)
        return self.tables.get(node.name)


def traced(function: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """The graph that the passes see of ``function(**inputs)``, its placeholders named as the inputs. Without dynamo,
    and so in a tenth of the time that `compiling` takes."""
    names = list(inputs)
    plain = torch.func.functionalize(lambda *given: function(**dict(zip(names, given, strict=True))))
    trace = make_fx(plain, decomposition_table=_torch.decompositions_keeping_products(), tracing_mode="fake")
    with torch.no_grad():
        graph_module = trace(*inputs.values())
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), names, strict=True):
        node.name = name
    return graph_module
