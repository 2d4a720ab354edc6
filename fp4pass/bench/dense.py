"""Linear layers: ours compiled, cuBLAS, Inductor's own Triton, decoding then cuBLAS, a kernel that only reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import linear

from fp4pass import _torch, nvfp4
from fp4pass.bench.cases import Dense
from fp4pass.bench.clock import BYTES_IN_TURN, copies, microseconds, relative_error, roofline, sample
from fp4pass.bench.compiled import INDUCTORS_TRITON, at_once, chosen, compile_ours, compile_plain, floor
from fp4pass.bench.table import Row
from fp4pass.checkpoint.modules import NVFP4Linear

# Errors are taken over so many tokens and rows of the weight at most, spread over the whole result.
_MOST_TOKENS, _MOST_WEIGHT_ROWS = 512, 4096

DECODED_FROM = 256
"""With fewer tokens decoding the whole weight first takes several times what the product does."""


@torch.no_grad()
def measure(
    case: Dense,
    tokens: Sequence[int],
    device: torch.device,
    *,
    triton_tokens: Sequence[int] = (),
    bytes_in_turn: int = BYTES_IN_TURN,
    plain_backend: str = "inductor",
) -> Iterator[Row]:
    """A row for each number of ``tokens``; random weights, BF16 activations.

    triton_tokens: where to have Inductor tune its Triton for BF16 as well, which takes many seconds each.
    plain_backend: what compiles decoding, then multiplying. Makes torch's compiler forget what it has compiled.
    """
    torch.compiler.reset()
    layer = _Layer(case, device, bytes_in_turn, plain_backend)
    layer.compile_kernels(tokens)
    for count in tokens:
        with _torch.many_recompiles():
            row = layer.row(count, count in triton_tokens)
        yield row


class _Layer:
    """One case, its weights in as many different copies as fill ``bytes_in_turn``: packed, and rounded to BF16."""

    def __init__(self, case: Dense, device: torch.device, bytes_in_turn: int, plain_backend: str) -> None:
        self.case, self.device = case, device
        count = copies(case.weight_bytes(), bytes_in_turn)
        self.packed = packed = [nvfp4.quantize(torch.randn(case.n, case.k, device=device)) for _ in range(count)]
        self.modules = [_module(case, *each) for each in packed]
        self.dense = [nvfp4.dequantize(*each) for each in packed[: copies(2 * case.n * case.k, bytes_in_turn)]]
        self.rows = sample(case.n, _MOST_WEIGHT_ROWS)
        codes, scale, factor = packed[0]
        self.exact = nvfp4.dequantize(codes[self.rows], scale[self.rows], factor, torch.float64)
        only = torch.zeros(1, dtype=torch.int64, device=device)
        turns = [[(codes[None], scale[None], only)] for codes, scale, _ in packed]
        self.floor = floor(turns, device, roofline(case.weight_bytes(), 0))
        self.compiled = compile_ours()
        self.decode_then_multiply = compile_plain(plain_backend)

    def compile_kernels(self, tokens: Sequence[int]) -> None:
        """All of ours that rows for so many tokens launch."""
        x = torch.randn(max(tokens), self.case.k, device=self.device, dtype=torch.bfloat16)
        at_once([functools.partial(self.modules[0], x[:count]) for count in tokens])

    def row(self, tokens: int, with_triton: bool) -> Row:
        """Everything about one number of tokens."""
        case, x = self.case, torch.randn(tokens, self.case.k, device=self.device, dtype=torch.bfloat16)
        few, least = sample(tokens, _MOST_TOKENS), roofline(*case.cost(tokens))
        ours = [functools.partial(self.compiled, module, x) for module in self.modules]
        cublas = [functools.partial(linear, x, weight) for weight in self.dense]
        truth, found, rounded = x[few].double() @ self.exact.mT, ours[0](), cublas[0]()
        return Row(
            kind="dense",
            name=case.name,
            shape=case.shape,
            tokens=tokens,
            fp4pass=microseconds(ours, self.device, least),
            bf16=microseconds(cublas, self.device, least),
            triton=self._inductors_triton(x, least) if with_triton else None,
            roofline=least,
            floor=self.floor,
            error=relative_error(found[few, self.rows], truth) if found.isfinite().all() else float("nan"),
            bf16_error=relative_error(rounded[few, self.rows], truth),
            kernel=chosen(self.device, tokens, self.modules[0].layout, case.n, case.k),
            decoded=self._decoded(x, least) if tokens >= DECODED_FROM else None,
        )

    def _decoded(self, x: torch.Tensor, least: float) -> float:
        calls = [functools.partial(self.decode_then_multiply, _decoded_product, x, *each) for each in self.packed]
        return microseconds(calls, self.device, least)

    def _inductors_triton(self, x: torch.Tensor, least: float) -> float:
        """Compiled for this number of tokens alone, as its tuning wants it."""
        tuned = torch.compile(lambda x, weight: linear(x, weight), dynamic=False, options=INDUCTORS_TRITON)
        return microseconds([functools.partial(tuned, x, weight) for weight in self.dense], self.device, least)


def _decoded_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return linear(x, nvfp4.dequantize(codes, scale, factor))


def _module(case: Dense, codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> NVFP4Linear:
    module = NVFP4Linear(case.k, case.n)
    module.load_state_dict({"weight": codes, "weight_scale": scale, "weight_scale_2": factor}, assign=True)
    return module
