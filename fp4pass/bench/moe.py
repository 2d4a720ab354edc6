"""Blocks of routed experts, from ids and weights to the summed output: ours and transformers' grouped products."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from fp4pass import _torch, nvfp4
from fp4pass.bench.cases import Moe
from fp4pass.bench.clock import BYTES_IN_TURN, microseconds, relative_error, roofline, sample
from fp4pass.bench.compiled import Reading, at_once, chosen, compile_ours, compile_plain, floor
from fp4pass.bench.routed import EXPERTS_AT_ONCE, random_experts, routings
from fp4pass.bench.table import Row
from fp4pass.checkpoint.modules import NVFP4Experts
from fp4pass.lowering import reference
from fp4pass.lowering.arch import rows_of_expert
from fp4pass.report import last_report

# Errors are taken over so many rows of the products at most: tokens, each with its experts.
_MOST_SLOTS = 384


@torch.no_grad()
def measure(
    case: Moe,
    tokens: Sequence[int],
    device: torch.device,
    *,
    bytes_in_turn: int = BYTES_IN_TURN,
    plain_backend: str = "inductor",
) -> Iterator[Row]:
    """A row for each number of ``tokens``; random weights and routing, BF16 activations.

    plain_backend: what compiles transformers' BF16 experts. Makes torch's compiler forget what it has compiled.
    """
    torch.compiler.reset()
    block = _Block(case, device, bytes_in_turn, plain_backend)
    block.compile_kernels(tokens)
    for count in tokens:
        with _torch.many_recompiles():
            row = block.row(count)
        yield row


class _Block:
    """One case: its experts packed, and rounded to BF16."""

    def __init__(self, case: Moe, device: torch.device, bytes_in_turn: int, plain_backend: str) -> None:
        self.case, self.device, self.bytes_in_turn = case, device, bytes_in_turn
        up = random_experts(case.experts, case.inner, case.width, device)
        down = random_experts(case.experts, case.width, case.inner, device)
        self.packed = _packed_module(case, up, down)
        self.dense = _dense_module(case, up, down)
        self.compiled, self.plain = compile_ours(), compile_plain(plain_backend)

    def compile_kernels(self, tokens: Sequence[int]) -> None:
        """All of ours that rows for so many tokens launch."""
        x = torch.randn(max(tokens), self.case.width, device=self.device, dtype=torch.bfloat16)
        ids, weights = routings(self.case, max(tokens), self.device, self.bytes_in_turn)[0]
        at_once([functools.partial(self.packed, x[:count], ids[:count], weights[:count]) for count in tokens])

    def row(self, tokens: int) -> Row:
        """Everything about one number of tokens."""
        case, device = self.case, self.device
        x = torch.randn(tokens, case.width, device=device, dtype=torch.bfloat16)
        in_turn = routings(case, tokens, device, self.bytes_in_turn)
        ids, weights = in_turn[0]
        active = len(ids.unique())
        least = roofline(*case.cost(tokens, active))
        ours = [functools.partial(self.compiled, self.packed, x, *each) for each in in_turn]
        plain = [functools.partial(self.plain, self.dense, x, *each) for each in in_turn]
        readings = [list(self._readings(each)) for each, _ in in_turn]
        few = sample(tokens, max(1, _MOST_SLOTS // case.top_k))
        truth, found, rounded = self._exact(x[few], ids[few], weights[few]), ours[0](), plain[0]()
        return Row(
            kind="moe",
            name=case.name,
            shape=case.shape,
            tokens=tokens,
            fp4pass=microseconds(ours, device, least),
            bf16=microseconds(plain, device, least),
            triton=None,
            roofline=least,
            floor=floor(readings, device, roofline(active * case.expert_bytes(), 0)),
            error=relative_error(found[few], truth) if found.isfinite().all() else float("nan"),
            bf16_error=relative_error(rounded[few], truth),
            kernel=self._kernel(tokens),
        )

    def _kernel(self, tokens: int) -> str:
        """What the block that was compiled last runs with."""
        case = self.case
        rows = rows_of_expert(tokens * case.top_k, case.experts)
        name = chosen(self.device, rows, self.packed.layout, case.inner, case.width, experts=True)
        whole = any(entry.op == "fp4pass.experts" for entry in last_report().rewritten)
        return name if whole else f"{name}, product by product"

    def _readings(self, ids: torch.Tensor) -> Iterator[Reading]:
        for name in self.packed.matrices:
            codes, scale, _ = self.packed.operands(name)
            yield codes, scale, ids.unique()

    def _exact(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        operands = (*self.packed.operands("up_proj"), *self.packed.operands("down_proj"))
        return reference.experts(x.double(), ids, weights, *operands, "relu2", self.packed.layout, torch.float64)


def _packed_module(case: Moe, up: tuple[torch.Tensor, ...], down: tuple[torch.Tensor, ...]) -> NVFP4Experts:
    module = NVFP4Experts(_config(case), case.experts, case.width, case.inner)
    parts = ("", "_scale", "_scale_2")
    state = {f"up_proj{part}": tensor for part, tensor in zip(parts, up, strict=True)}
    state |= {f"down_proj{part}": tensor for part, tensor in zip(parts, down, strict=True)}
    module.load_state_dict(state, assign=True)
    return module


def _dense_module(case: Moe, up: tuple[torch.Tensor, ...], down: tuple[torch.Tensor, ...]) -> NemotronHExperts:
    with torch.device("meta"):
        module = NemotronHExperts(_config(case))
    module.up_proj, module.down_proj = (nn.Parameter(_rounded(*each), requires_grad=False) for each in (up, down))
    return module


def _rounded(codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The dense weight in BF16, a few experts at a time."""
    pieces = zip(*(part.split(EXPERTS_AT_ONCE) for part in (codes, scale, factor)), strict=True)
    return torch.cat([nvfp4.dequantize(*piece) for piece in pieces])


def _config(case: Moe) -> NemotronHConfig:
    config = NemotronHConfig(
        hidden_size=case.width,
        n_routed_experts=case.experts,
        num_experts_per_tok=case.top_k,
        moe_intermediate_size=case.inner,
        mlp_hidden_act="relu2",
    )
    config._experts_implementation = "grouped_mm"
    return config
