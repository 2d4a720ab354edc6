"""The passes in their order, and the one graph pass that Inductor is handed."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

import fp4pass.lowering
from fp4pass import _torch
from fp4pass.errors import GradientError
from fp4pass.inputs import CallInputs, GraphInputs
from fp4pass.lowering.registry import traced_forms
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.options import Options
from fp4pass.passes.epilogue import rewrite_epilogue
from fp4pass.passes.experts import rewrite_experts
from fp4pass.passes.fp8 import rewrite_fp8
from fp4pass.passes.linear import rewrite_linear
from fp4pass.passes.lookup import rewrite_lookup
from fp4pass.passes.moe import rewrite_moe
from fp4pass.passes.rewriter import Rewriter, alike
from fp4pass.passes.undo import undone_if_it_raises
from fp4pass.passes.unfuse import refuse_products, unfuse
from fp4pass.report import Report
from fp4pass.target import Target

log = logging.getLogger("fp4pass.pipeline")


@dataclass(frozen=True)
class Pass:
    """One rewrite, its name for ``options={"disable": [...]}``, and why it stands where it does."""

    name: str
    run: Callable[[Rewriter], None]
    why_here: str


PASSES: tuple[Pass, ...] = (
    Pass("unfuse", unfuse, "first: the others look at plain products only"),
    Pass("linear", rewrite_linear, "single matrices, which no later pass looks at"),
    Pass("epilogue", rewrite_epilogue, "right after the products that it adds to"),
    Pass("lookup", rewrite_lookup, "anywhere: rows of tables, which no other pass looks at"),
    Pass("fp8", rewrite_fp8, "anywhere: 8-bit weights, which no other pass looks at"),
    Pass("moe", rewrite_moe, "before their products are taken one by one: a block is only seen whole"),
    Pass("experts", rewrite_experts, "last: what no whole block took"),
)


class Fp4Pass(_torch.CustomGraphPass):
    """Runs on the graph that autograd traced, joint or inference, before Inductor's own passes.

    That early the weights' decode is still as written, whatever Inductor folds or freezes later, and a joint graph can
    be rewritten before the choice of what is saved for its backward.
    """

    def __init__(self, options: Options, target: Target, call: CallInputs) -> None:
        self._options, self._target, self._call = options, target, call
        self._before = _torch.user_passes("joint_custom_pre_pass")
        self.report: Report | None = None

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place and leave the outcome in ``report``."""
        for other in self._before:
            other(graph)
        check = check_metadata if self._options.check else lambda graph: None
        inputs = GraphInputs(self._call)
        rewriter = Rewriter(graph, inputs, self._target.lowering, self._options.activations, check)
        served = self._target.refusal is None
        failures = {each.name: why for each in PASSES if served and (why := self._run(each, rewriter))}
        if not served:
            left = Refusal(self._target.refusal, self._target.name)
        else:
            left = Refusal(Reason.FAILED, "; ".join(failures.values())) if failures else Refusal(Reason.DISABLED)
        if not served or "unfuse" in (*failures, *self._options.disable):
            refuse_products(rewriter, left)
        for product in [*rewriter.products, *rewriter.take_eight_bit()]:
            rewriter.refuse(product, left)
        graph.eliminate_dead_code()
        graph.lint()
        self.report = Report(tuple(rewriter.rewritten), tuple(rewriter.refused), self._target.name)
        if _torch.is_training(graph):
            _refuse_saved_weights(self.report)

    def uuid(self) -> Any:
        """Everything that the outcome depends on beside the graph; None (no caching) if another pass has none."""
        others = [getattr(other, "uuid", lambda: None)() for other in self._before]
        if any(other is None for other in others):
            return None
        return ("fp4pass", sources_digest(), repr(self._options), repr(self._target), self._call.digest(), *others)

    def _run(self, each: Pass, rewriter: Rewriter) -> str:
        """Run one pass; what went wrong if it failed, and then the graph is as it was before the pass."""
        if each.name in self._options.disable:
            return ""
        try:
            with undone_if_it_raises(rewriter):
                each.run(rewriter)
        except MetadataError:
            raise
        except Exception as error:  # a failure of ours must not take the user's model down
            log.exception("pass %s failed", each.name)
            return f"pass {each.name}: {type(error).__name__}: {error}"
        rewriter.check(rewriter.graph)
        return ""


class TracedCalls(_torch.CustomGraphPass):
    """Runs on what is about to become code: calls of our ops become calls of their traced forms (lowering/registry.py).

    Nothing looks at them any more, and the report names what they were.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        forms = traced_forms()
        for node in graph.nodes:
            node.target = forms.get(node.target, node.target)

    def uuid(self) -> Any:
        """Nothing but the sources."""
        return "fp4pass_traced", sources_digest()


def _refuse_saved_weights(report: Report) -> None:
    """The backward of experts would have their dequantized weights saved. Weights that are no NVFP4 are not ours."""
    backward = [entry for entry in report.refused if entry.reason.startswith(Reason.BACKWARD.sentence)]
    if backward:
        first = backward[0]
        raise experts_without_backward(
            f"{len(backward)} products of their backward; the first is {first.op} ({first.n} x {first.k})"
        )


def experts_without_backward(seen: str) -> GradientError:
    """The error for a compile with gradients through NVFP4 experts."""
    return GradientError(
        "gradients flow through experts with NVFP4 weights",
        seen=seen,
        expected="no backward, so that no dequantized weight is saved for it",
        do="call the model under torch.no_grad() or torch.inference_mode()",
    )


class MetadataError(AssertionError):
    """A rule has left a node whose metadata does not hold."""


def check_metadata(graph: fx.Graph) -> None:
    """Compute every node's fake result again and compare it with the recorded one (shape, dtype).

    Raises:
        MetadataError: they differ.
    """
    for node in graph.nodes:
        recorded = node.meta.get("val")
        if node.op != "call_function" or not isinstance(recorded, torch.Tensor):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        found = node.target(*args, **kwargs)
        if not alike(found, recorded):
            raise MetadataError(f"{node} gives {found.dtype} {found.shape}, recorded {recorded.dtype} {recorded.shape}")


@functools.cache
def sources_digest() -> str:
    """A hash of fp4pass's own sources, so that no graph compiled by another state of them is taken from a cache."""
    found = hashlib.sha256()
    for package in (Path(__file__).parent, Path(fp4pass.lowering.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
