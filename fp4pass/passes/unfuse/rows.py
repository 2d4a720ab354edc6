"""What a row of the tables of operations says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace as Arguments
from typing import Any

import torch
from torch import fx

from fp4pass.match.cone import CODE_DTYPES, value

CODES, SCALES, VALUE, SUM, UNCHANGED = "codes", "scales", "value", "sum", "unchanged"
"""Results: packed codes, their block scales, the values before they are quantized, the residual sum, an argument that
the schema lets the op write to but that it leaves as it was."""

LINEAR, GROUPED = "linear", "grouped"


@dataclass(frozen=True)
class Row:
    """One op.

    schema: for the reader and for the tests' stand-ins; a graph's call is read by argument names, and by position where
    a version of the op names one otherwise. read: where schema and meaning were read. wanted: arguments that must have
    these values, where they are given; ``name.1`` is an element of a list. no_twin: why no call of the op can be
    replaced, and what to do; "" if it can.
    """

    schema: str
    read: str
    wanted: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    no_twin: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """``namespace::op``."""
        return self.schema.partition("(")[0].partition(".")[0]

    @property
    def argument_names(self) -> list[str]:
        """In the schema's order."""
        arguments = self.schema.partition("(")[2].rpartition(") ->")[0]
        return [each.partition("=")[0].split()[-1] for each in arguments.split(", ")]

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is what the row describes, and not another use of the op."""
        return True

    def variant(self, arguments: Mapping[str, Any]) -> str:
        """What keeps a call with these arguments from being replaced; "" for nothing."""
        if self.no_twin:
            return self.no_twin
        for name, want in self.wanted.items():
            given = pick(arguments, name)
            if given is not None and given != want:
                return f"{name}={given}"
        return ""


def pick(arguments: Mapping[str, Any], name: str) -> Any:
    """The argument ``name``, or with ``name.1`` an element of one; None where there is none."""
    name, _, index = name.partition(".")
    found = arguments.get(name)
    if not index or found is None:
        return found
    return found[int(index)] if len(found) > int(index) else None


def _holds_fp4(node: fx.Node) -> bool:
    return value(node).dtype in CODE_DTYPES


@dataclass(frozen=True)
class Quantizer(Row):
    """An op that gives an activation in FP4.

    twin: arguments -> (the values that are quantized, the residual sum or None). outputs: what each result is, by
    position or, for an argument that the op writes to, by name; it may depend on the arguments, and names no codes
    where these say that nothing is quantized. factor: the argument that values are multiplied by before they are
    quantized; "" for none.
    """

    twin: Callable[[Arguments], tuple[torch.Tensor, torch.Tensor | None]]
    outputs: Mapping[int | str, str] | Callable[[Arguments], Mapping[int | str, str]]
    factor: str
    activations: tuple[str, ...] = ("input",)

    def results(self, arguments: Mapping[str, Any]) -> Mapping[int | str, str]:
        """What each result is in a call with these arguments."""
        return self.outputs(Arguments(**arguments)) if callable(self.outputs) else self.outputs

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        return CODES in self.results(arguments).values()


@dataclass(frozen=True)
class Product(Row):
    """An op that multiplies by NVFP4 weights.

    The fields name its arguments. x: the activation, with its block scales ``x_scale`` if it comes in FP4, else
    ``factor`` is what the op itself quantizes it by. alpha multiplies the sums: 1 / (the activation's factor x the
    weight's), so alpha x the activation's factor is the weight's global scale. transposed: codes come as ``[K/2, N]``.
    ends: where each expert's rows end, computed from the arguments.
    """

    x: str
    codes: str
    scale: str
    alpha: str
    kind: str = LINEAR
    x_scale: str = ""
    factor: str = ""
    bias: str = ""
    output: int | str = 0
    transposed: bool = False
    ends: Callable[[Arguments], torch.Tensor] | None = None

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """torch's scaled products take FP8 as well, which is not ours."""
        return _holds_fp4(arguments[self.codes])


@dataclass(frozen=True)
class Experts(Row):
    """An op that computes a whole block of experts from unquantized activations.

    weights and activation: from the arguments, what `fp4pass.passes.unfuse.twins.experts` takes; no activation means
    that it has no twin. codes: the argument that a report names and measures.
    """

    weights: Callable[[Arguments], list[Any]] | None
    activation: Callable[[Arguments], str | None] | None
    codes: str
    x: str = "x"
    ids: str = "selected_experts"
    routing: str = "routing_weights"

    def variant(self, arguments: Mapping[str, Any]) -> str:
        found = super().variant(arguments)
        if not found and self.activation(Arguments(**arguments)) is None:
            found = f"act_fn={arguments.get('act_fn')}"
        return found


@dataclass(frozen=True)
class Fp8Quantizer(Row):
    """An op that gives an activation in FP8: ``x`` is what it quantizes, ``scale`` what its values are to be multiplied
    by again, "" where the op finds that itself."""

    x: str = "input"
    scale: str = "scale"


@dataclass(frozen=True)
class Attention(Row):
    """An attention that quantizes its output: the same call without its scales gives the plain one."""

    output: str = "output"
    scale: str = "output_scale"
    block_scale: str = "output_block_scale"
    like: str = "query"

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        return arguments.get(self.scale) is not None or _holds_fp4(arguments[self.output])


@dataclass(frozen=True)
class RoundTrip(Row):
    """An op that rounds to NVFP4 and back, by a largest value ``amax`` that it is given."""

    x: str = "input"
    amax: str = "amax"

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """Rounding to another format needs no SM100, and is not ours."""
        return not self.variant(arguments)
