"""What is measured: layers of the releases at their true widths, and numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from fp4pass.errors import OptionError

# 180 and 700 fill no tile, as most prompts do not.
_DECODE_TO_PREFILL = (1, 8, 16, 32, 64, 128, 180, 256, 512, 700, 1024, 2048, 4096)
_MOE_DECODE_TO_PREFILL = (1, 4, 8, 16, 64, 256, 1024, 2048, 4096, 8192)
_MOE_FEW = (1, 8, 64, 512, 4096)

BLOCK = 16


@dataclass(frozen=True)
class Dense:
    """A linear layer: ``[M, k] -> [M, n]``, measured at each M of ``tokens`` unless others are asked for."""

    name: str
    n: int
    k: int
    tokens: tuple[int, ...] = _DECODE_TO_PREFILL

    @property
    def shape(self) -> str:
        """The weight's size, for people."""
        return f"{self.n} x {self.k}"

    def weight_bytes(self) -> int:
        """Bytes of codes and scales."""
        return packed_bytes(self.n * self.k)

    def cost(self, tokens: int) -> tuple[int, int]:
        """(bytes that must move, floating-point operations) of one call with BF16 activations."""
        return self.weight_bytes() + 2 * tokens * (self.n + self.k), 2 * tokens * self.n * self.k


@dataclass(frozen=True)
class Moe:
    """A block of routed experts: ``width -> inner -> width``, relu2 between, ``top_k`` of ``experts`` a token."""

    name: str
    experts: int
    top_k: int
    width: int
    inner: int
    tokens: tuple[int, ...] = _MOE_FEW

    @property
    def shape(self) -> str:
        """The weights' sizes, for people."""
        return f"{self.experts} x {self.inner} x {self.width}, top {self.top_k}"

    def expert_bytes(self) -> int:
        """Bytes of one expert's codes and scales, both products."""
        return packed_bytes(2 * self.width * self.inner)

    def cost(self, tokens: int, active: int) -> tuple[int, int]:
        """(bytes that must move, floating-point operations) of one call in which ``active`` experts are chosen."""
        read = active * self.expert_bytes() + 2 * 2 * tokens * self.width
        return read, 2 * tokens * self.top_k * 2 * self.width * self.inner


def packed_bytes(weights: int) -> int:
    """Bytes of so many NVFP4 weights: half a byte each, and one scale for sixteen."""
    return weights // 2 + weights // BLOCK


DENSE = (
    Dense("nano.in_proj", 10304, 2688),
    Dense("nano.out_proj", 2688, 4096),
    Dense("nano.q_proj", 4096, 2688),
    Dense("nano.shared_up", 3712, 2688),
    Dense("nano.shared_down", 2688, 3712),
    Dense("super.in_proj", 18560, 4096),
    Dense("square", 8192, 8192),
    Dense("nano.lm_head", 131072, 2688),
)

MOE = (
    Moe("nano.experts", 128, 6, 2688, 1856, _MOE_DECODE_TO_PREFILL),
    Moe("super.experts", 512, 22, 1024, 2688),
    Moe("ultra.experts", 512, 22, 2048, 5120),
)

KINDS: dict[str, tuple[Dense, ...] | tuple[Moe, ...]] = {"dense": DENSE, "moe": MOE}
"""All cases by the word that the command line has for their kind."""


def choose(kinds: Iterable[str], names: Iterable[str] | None) -> list[Dense | Moe]:
    """The cases of these kinds, or those of them that are named; in the order of the tables.

    Raises OptionError for a name that none has.
    """
    cases = [case for kind in kinds for case in KINDS[kind]]
    if names is None:
        return cases
    known = [case.name for case in cases]
    for name in (wanted := list(names)):
        if name not in known:
            raise OptionError(
                "unknown shape to measure",
                seen=name,
                expected=f"one of {', '.join(known)}",
                do=f"did you mean {get_close_matches(name, known, 1, 0)[0]!r}?",
            )
    return [case for case in cases if case.name in wanted]
