"""What a compile would do, without doing it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.backend import compile_graph
from fp4pass.checkpoint.compressed import is_unpacked
from fp4pass.inputs import CallInputs
from fp4pass.options import Options
from fp4pass.report import Entry, Report

_CALLS = itertools.count()
_UNPACKED = Report(
    refused=(
        Entry(
            module="",
            op="compressed-tensors",
            reason="transformers' own quantizer for compressed-tensors has unpacked the NVFP4 weights while loading",
            remedy="load the checkpoint by fp4pass.from_pretrained, which keeps them in 4 bits",
        ),
    )
)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Trace ``model(*args, **kwargs)``, run the passes and their proofs, and tell what became of each product.

    The same tracing and the same proofs as a compile, but no code is generated. Nothing needs values: model and
    arguments may lie on the meta device, where ``fp4pass.checkpoint.load.skeleton(path)`` builds a checkpoint's model
    (give it ``use_cache=False`` or a static cache: a growing one does not trace on meta), and
    ``options={"target_sm": 90}`` asks for a GPU that is not at hand. Gradients are off. All graphs of the call are in
    one report. The call itself is run, with the rewritten graphs. A model whose NVFP4 weights transformers has unpacked
    while loading has an entry that says so.

    Raises what a compile with the same options raises, but for ``require_match``.
    """
    parsed = Options.parse(options=options)
    reports: list[Report] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        call = CallInputs(gm, example_inputs)
        compiled, report = compile_graph(gm, example_inputs, parsed, call, inner_compile=_as_is)
        reports.append(report)
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo counts compiles by code object and remembers sizes by its name: those of the model must not be used up, and
    # no call leaves its mark on the next.
    call.__code__ = call.__code__.replace(co_name=f"explained_{next(_CALLS)}")
    with torch.no_grad(), _torch.many_recompiles():
        torch.compile(call, backend=record, dynamic=dynamic)(*args, **kwargs)
    return sum(reports, _UNPACKED if is_unpacked(model) else Report())


def _as_is(gm: fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
    """In the place of Inductor's code generation: run the rewritten graph node by node."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # strides may differ from the traced ones, as Inductor knows
    gm.recompile()
    return _torch.boxed(gm)
