"""How long a call of an op keeps the host, on operands so small that the GPU never does.

Without a CUDA graph nothing runs sooner than the host has asked for it, so this is what a decoding step costs at least.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fp4pass import nvfp4
from fp4pass.bench.cases import Dense, Moe
from fp4pass.bench.clock import Call
from fp4pass.bench.routed import in_fragments, random_block, routings
from fp4pass.lowering.layout import FRAGMENTS
from fp4pass.lowering.registry import CALLED, TRACED

LAYER, BLOCK = Dense("linear", 1024, 512), Moe("experts", 16, 6, 512, 256)
TOKENS = {LAYER.name: (1, 32, 256), BLOCK.name: (1, 64)}
"""One for each way in which kernels are launched."""

_BATCHES = 15


@dataclass(frozen=True)
class Row:
    """Microseconds of the host for a call: ``traced`` as compiled code calls it, ``called`` as anybody else does.

    bf16: PyTorch's own linear, None for experts.
    """

    op: str
    tokens: int
    traced: float
    called: float
    bf16: float | None

    def __str__(self) -> str:
        bf16 = "" if self.bf16 is None else f"{self.bf16:.1f}"
        return f"| `{self.op}` | {self.tokens} | {self.traced:.1f} | {self.called:.1f} | {bf16} |"


HEADING = "| op | tokens | in compiled code | called | PyTorch's linear |\n| --- | --- | --- | --- | --- |"


@torch.no_grad()
def measure(device: torch.device, calls: int = 300) -> Iterator[Row]:
    """A row for each op and number of tokens; medians of batches of so many ``calls``."""
    dense = _dense(LAYER.n, LAYER.k, device)
    weight, (up, down) = in_fragments(*nvfp4.quantize(dense)), random_block(BLOCK, device)
    for tokens in TOKENS[LAYER.name]:
        x = _dense(tokens, LAYER.k, device)
        plain = functools.partial(torch.nn.functional.linear, x, dense)
        yield _row(LAYER.name, tokens, (x, *weight, None, FRAGMENTS), device, calls, plain)
    for tokens in TOKENS[BLOCK.name]:
        routing = routings(BLOCK, tokens, device)[0]
        operands = (_dense(tokens, BLOCK.width, device), *routing, *up, *down, "relu2", FRAGMENTS)
        yield _row(BLOCK.name, tokens, operands, device, calls, None)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join([HEADING, *map(str, rows)])


def _row(
    op: str, tokens: int, operands: tuple[object, ...], device: torch.device, calls: int, plain: Call | None
) -> Row:
    forms = (getattr(getattr(torch.ops, namespace), op).default for namespace in (TRACED, CALLED))
    traced, called = (_microseconds(functools.partial(form, *operands), device, calls) for form in forms)
    return Row(op, tokens, traced, called, plain and _microseconds(plain, device, calls))


def _microseconds(call: Call, device: torch.device, calls: int) -> float:
    batches = []
    for _ in range(_BATCHES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        batches.append((time.perf_counter() - begin) / calls)
    return 1e6 * statistics.median(batches)


def _dense(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
