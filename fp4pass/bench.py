"""Time of a release's quantized linear layers at their true widths, beside the same layers in BF16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from fp4pass import nvfp4
from fp4pass.checkpoint.config import NVFP4_ALGOS
from fp4pass.checkpoint.releases import Sizes
from fp4pass.checkpoint.tensors import PRECISION, products
from fp4pass.lowering import layout, ops  # noqa: F401  # registers torch.ops.fp4pass

_COLUMNS = "{:12} {:>14} {:>6} {:>11} {:>11} {:>12} {:>9} {:>9}"
HEADING = _COLUMNS.format("layer", "weight", "tokens", "fp4pass", "bf16", "bf16/fp4pass", "error", "bf16")
"""The names of the columns of a `Row`."""

# In a model every call finds other weights in the GPU's cache than its own: go round more of them than fit into it.
_BYTES_IN_TURN = 256 << 20


@dataclass(frozen=True)
class Row:
    """One layer at one number of tokens: microseconds a call (medians), and relative errors against float64."""

    layer: str
    n: int
    k: int
    tokens: int
    fp4pass: float
    bf16: float
    error: float
    bf16_error: float

    @property
    def right(self) -> bool:
        """Whether fp4pass's error is no larger than that of dequantized BF16 weights. A wrong time is no time."""
        return self.error <= self.bf16_error

    def __str__(self) -> str:
        return _COLUMNS.format(
            self.layer,
            f"{self.n} x {self.k}",
            self.tokens,
            f"{self.fp4pass:.1f} us",
            f"{self.bf16:.1f} us",
            f"{self.bf16 / self.fp4pass:.2f}" if self.right else "wrong",
            f"{self.error:.1e}",
            f"{self.bf16_error:.1e}",
        )


def layers(like: str, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """The kinds of NVFP4 linear layers (not experts) of release ``like``: name -> (N, K)."""
    quantized = (each for each in products(sizes) if PRECISION[like](sizes, each) in NVFP4_ALGOS)
    return {each.kind: (each.n, each.k) for each in quantized if each.kind != "expert"}


def measure(
    like: str, sizes: Sizes, tokens: Sequence[int], device: torch.device, bytes_in_turn: int = _BYTES_IN_TURN
) -> Iterator[Row]:
    """A row for every kind of layer and number of ``tokens``, BF16 activations, random weights.

    Each measurement goes round as many copies of the weight as fill ``bytes_in_turn``. On a GPU the calls are captured
    in a CUDA graph, so that launches do not count.
    """
    order = layout.layout_for(device)

    def fused(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return torch.ops.fp4pass.linear(x, codes, scale, factor, None, order)

    for layer, (n, k) in layers(like, sizes).items():
        codes, scale, factor = nvfp4.quantize(torch.randn(n, k, device=device))
        exact = nvfp4.dequantize(codes, scale, factor, torch.float64)
        packed = layout.from_plain(codes, order), scale.view(torch.uint8), factor
        dense = (nvfp4.dequantize(codes, scale, factor),)
        for rows in tokens:
            x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
            truth = x.double() @ exact.mT
            times = [_microseconds(call, x, w, bytes_in_turn) for call, w in ((fused, packed), (linear, dense))]
            errors = [_relative(found, truth) for found in (fused(x, *packed), linear(x, *dense))]
            yield Row(layer, n, k, rows, *times, *errors)


def _microseconds(call: Callable[..., Any], x: torch.Tensor, weight: tuple[torch.Tensor, ...], in_turn: int) -> float:
    """The median time of ``call(x, *weight)``."""
    copies = max(1, in_turn // sum(tensor.nbytes for tensor in weight))
    weights = [tuple(tensor.clone() for tensor in weight) for _ in range(copies)]

    def once_around() -> None:
        for each in weights:
            call(x, *each)

    if x.is_cuda:
        from triton.testing import do_bench_cudagraph

        return 1e3 * do_bench_cudagraph(once_around, return_mode="median") / copies
    return 1e6 * Timer("once_around()", globals={"once_around": once_around}).blocked_autorange().median / copies


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())
