"""The backend: ``torch.compile(model, backend="fp4pass")``."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fp4pass import _torch
from fp4pass.errors import ActivationError, UnmatchedError
from fp4pass.inputs import CallInputs
from fp4pass.lowering import ops  # noqa: F401  # registers what a cached graph calls
from fp4pass.options import Options
from fp4pass.pipeline import Fp4Pass, TracedCalls, experts_without_backward
from fp4pass.report import Report, Store, remember
from fp4pass.target import choose_target

log = logging.getLogger("fp4pass.backend")

Compiled = Callable[..., Any]


class Fp4passWarning(UserWarning):
    """A quantized product was left as it was."""


def fp4pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a captured graph with Inductor, its quantized products rewritten.

    gm, example_inputs: what dynamo hands a backend. mode, options: those of torch.compile (see `Options`).

    Raises:
        OptionError: an option is unknown or has a wrong value.
        UnmatchedError: a product was left and ``require_match`` is set.
        ActivationError: an activation in FP4 or FP8 cannot be turned back without inventing a scale.
        GradientError: a backward would have to save a dequantized weight.
    """
    parsed = Options.parse(mode, options)
    call = CallInputs(gm, example_inputs)
    compiled, report = compile_graph(gm, example_inputs, parsed, call)
    _announce(report, parsed)
    if not call.tables:
        return compiled

    def guarded(*inputs: Any) -> Any:
        """A table with other values voids the proof: the graph then runs as it was captured."""
        if not call.tables_changed(inputs):
            return compiled(*inputs)
        warnings.warn(
            "a decode table has other values than when this graph was compiled; the graph runs uncompiled. "
            "Call torch.compiler.reset() to compile with the new values.",
            Fp4passWarning,
            stacklevel=2,
        )
        return gm(*inputs)

    return guarded


fp4pass.reset = _torch.reset_cudagraphs


def compile_graph(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    options: Options,
    call: CallInputs,
    inner_compile: Compiled | None = None,
) -> tuple[Compiled, Report]:
    """The compiled call and its report, from the pass or, where a cache had the graph, from the report's own store.

    inner_compile: what turns the rewritten graph into a callable instead of Inductor's code generation; nothing is
    cached then.
    """
    ours = Fp4Pass(options, choose_target(options.target_sm, examples), call)

    def run(**more: Any) -> Compiled:
        patches = {**_last_pass(), **options.patches(), "joint_custom_pre_pass": ours, **more}
        inner = {} if inner_compile is None else {"inner_compile": inner_compile}
        decompositions = _torch.decompositions_keeping_products()
        try:
            return _torch.compile_fx(gm, examples, config_patches=patches, decompositions=decompositions, **inner)
        except _torch.DataDependentError as error:
            if torch.is_grad_enabled():
                _blame_gradients(error, gm, examples, options, call)
            raise

    if inner_compile is not None:  # folding serves code generation, and leaves some graphs out of order
        compiled = run(force_disable_caches=True, joint_graph_constant_folding=False)
        return compiled, (ours.report or Report()).named(call.names)
    store, key = Store(_torch.report_directory()), _key(gm, examples, ours)
    compiled = run()
    report = ours.report
    if report is not None:
        store.save(key, report)
    elif (report := store.load(key)) is None:  # the graph was in the cache, its report is gone
        compiled = run(force_disable_caches=True)
        report = ours.report or Report()
        store.save(key, report)
    return compiled, report.named(call.names)


def _last_pass() -> dict[str, Any]:
    """Where somebody else's pass comes last it stays alone, and calls of our ops are checked as any."""
    setting = "post_grad_custom_post_pass"
    return {} if _torch.user_passes(setting) else {setting: TracedCalls()}


def _blame_gradients(
    error: _torch.DataDependentError, gm: fx.GraphModule, examples: Sequence[Any], options: Options, call: CallInputs
) -> None:
    """Raise GradientError if without gradients the same graph compiles, with NVFP4 experts in it.

    Some versions of transformers have experts whose backward reads sizes from a tensor: torch then gives up tracing it
    before any pass can say that experts have none.
    """
    try:
        with torch.no_grad():
            _, report = compile_graph(gm, examples, options, call, inner_compile=lambda g, *_, **__: _torch.boxed(g))
    except _torch.DataDependentError:
        return
    experts = [entry for entry in report.rewritten if entry.experts]
    if experts:
        where = experts[0].module or "an unnamed module"
        raise experts_without_backward(
            f"gradients enabled, experts in {where} (first of {len(experts)}), a backward that torch cannot trace"
        ) from error


def _announce(report: Report, options: Options) -> None:
    """Keep the report, log it, trace it; complain of what was left."""
    remember(report)
    if not report:
        return
    log.info("%s", report)
    _torch.emit_trace("fp4pass_report", report.to_json)
    if not report.refused:
        return
    _refuse_lost_activations(report)
    first = report.refused[0]
    if options.require_match:
        raise UnmatchedError(
            f"{len(report.refused)} quantized products were not rewritten",
            seen=f"{first.module or 'a product'} ({first.op}): {first.reason}",
            expected="every quantized product rewritten, as require_match asks",
            do=f"{first.remedy}; fp4pass.last_report() lists all",
        )
    warnings.warn(
        f"{len(report.refused)} quantized products were left as they were, the first in "
        f"{first.module or 'an unnamed module'}: {first.reason}. {first.remedy}. See fp4pass.last_report().",
        Fp4passWarning,
        stacklevel=2,
    )


def _refuse_lost_activations(report: Report) -> None:
    """Raise ActivationError for an FP4 or FP8 activation that is left: below SM100 it would fail, or come out wrong."""
    lost = [entry for entry in report.refused if entry.lost]
    if lost:
        first = lost[0]
        raise ActivationError(
            f"{first.module or 'an unnamed module'} ({first.op}): {first.reason}",
            seen=f"{len(lost)} operations with a quantized activation that cannot be turned back",
            expected="every quantized activation traced to what was quantized, so that no scale is invented",
            do=f"{first.remedy}; fp4pass.last_report() lists all",
        )


def _key(gm: fx.GraphModule, examples: Sequence[Any], ours: Fp4Pass) -> str:
    """A hash of the graph without its inputs' names, so that equal models with other module names share a report."""
    index: dict[fx.Node, int] = {}
    found = hashlib.sha256(repr((ours.uuid(), torch.is_grad_enabled(), torch.is_autocast_enabled())).encode())
    for node in gm.graph.nodes:
        index[node] = len(index)
        flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda leaf: isinstance(leaf, fx.Node))
        arguments = [f"%{index[leaf]}" if isinstance(leaf, fx.Node) else repr(leaf) for leaf in flat]
        target = "" if node.op == "placeholder" else _target_name(node.target)
        found.update(f"{node.op} {target} {arguments} {spec}\n".encode())
    for example in examples:
        is_tensor = isinstance(example, torch.Tensor)
        facts = (example.dtype, example.shape, example.device, example.requires_grad) if is_tensor else type(example)
        found.update(str(facts).encode())
    return found.hexdigest()[:40]


def _target_name(target: Any) -> str:
    """The same in every process, unlike ``str`` of a built-in function."""
    if isinstance(target, str) or not hasattr(target, "__qualname__"):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"
