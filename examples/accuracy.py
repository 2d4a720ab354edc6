"""How far the compiled model's logits are from exact ones, beside those of the same model dequantized to BF16.

    python examples/accuracy.py

Exact means: the NVFP4 weights dequantized to float64 and every product taken in float64. The two others run in BF16,
both compiled, one by fp4pass and one by Inductor alone, and send each token to the experts that the exact model chose:
where a token is nearly indifferent between two experts, the choice says nothing of arithmetic.
"""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quickstart import SIZES, load, make_checkpoint, quiet
from torch import nn
from transformers import PreTrainedModel

import fp4pass

SEEDS = 5
TOKENS = 48

PARTS = ("", "_scale", "_scale_2")
"""What an NVFP4 weight's name is followed by: codes, block scales, global scale."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of the logits over all tokens, |found - exact| / |exact|, one for each seed."""

    fp4pass: list[float]
    bf16: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        """Over the seeds: fp4pass's, then that of the model dequantized to BF16."""
        return statistics.median(self.fp4pass), statistics.median(self.bf16)

    def __str__(self) -> str:
        ours, theirs = self.medians
        rows = ("compiled by fp4pass", ours, self.fp4pass), ("dequantized to BF16", theirs, self.bf16)
        return "\n".join(f"{name}  {middle:.5f}  ({min(all_):.5f} to {max(all_):.5f})" for name, middle, all_ in rows)


def dense_twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model of transformers alone, its NVFP4 weights dequantized to ``dtype``."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    twin = type(model)(config).to(model.device, dtype).eval().requires_grad_(False)
    fill_twin(twin, model)
    return twin


def fill_twin(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give ``twin`` the weights of ``model``, dequantized to its own dtype."""
    state = model.state_dict()
    for name in quantized(state):
        packed = [state.pop(f"{name}{part}") for part in PARTS]
        state[name] = fp4pass.nvfp4.dequantize(*packed, twin.dtype)
    twin.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("input_scale")})


def quantized(names: Iterable[str]) -> list[str]:
    """The NVFP4 weights among a model's tensors: those whose name with the last part is there too."""
    return [name.removesuffix(PARTS[-1]) for name in names if name.endswith(PARTS[-1])]


def measure(folder: Path, seeds: int = SEEDS) -> Errors:
    """The errors for checkpoints like the quickstart's, which are written into ``folder``, one for each seed."""
    packed = load(make_checkpoint(folder / "seed-0", 0))
    exact, bf16 = dense_twin(packed, torch.float64), dense_twin(packed, torch.bfloat16)
    exact.config._experts_implementation = "eager"  # the form that computes in any dtype
    for model in (packed, bf16):
        _follow(exact, model, TOKENS)
    options = {"require_match": True}
    compiled = torch.compile(packed, backend="fp4pass", options=options), torch.compile(bf16)
    errors = Errors([], [])
    for seed in range(seeds):
        if seed:  # other weights under the graphs that are compiled already
            packed.load_state_dict(load(make_checkpoint(folder / f"seed-{seed}", seed)).state_dict())
            fill_twin(exact, packed)
            fill_twin(bf16, packed)
        drawn = torch.randint(SIZES["vocab"], (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        truth = _logits(exact, drawn)
        for model, found in zip(compiled, (errors.fp4pass, errors.bf16), strict=True):
            found.append(float((_logits(model, drawn) - truth).norm() / truth.norm()))
    return errors


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(model.device), use_cache=False).logits.double()


def _follow(leader: nn.Module, model: nn.Module, tokens: int) -> None:
    """Let every router of ``model`` choose, for inputs of ``tokens`` tokens, what ``leader``'s last chose."""

    def hand_over(_: nn.Module, __: Any, routed: tuple[torch.Tensor, ...], into: torch.Tensor) -> None:
        into.copy_(routed[2])

    for router, follower in zip(_routers(leader), _routers(model), strict=True):
        chosen = torch.zeros(tokens, follower.top_k, dtype=torch.long, device=follower.weight.device)
        follower.register_buffer("chosen", chosen, persistent=False)
        router.register_forward_hook(functools.partial(hand_over, into=chosen))
        follower.register_forward_hook(_choose)


def _choose(router: nn.Module, _: Any, routed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The router's outcome (logits, weights, experts) with the experts in ``router.chosen``."""
    weights = routed[0].sigmoid().gather(1, router.chosen)
    return routed[0], router.routed_scaling_factor * weights / weights.sum(-1, keepdim=True), router.chosen


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if name.endswith("mixer.gate"))


def main() -> None:
    """Measure and print."""
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        print(measure(Path(temporary)))


if __name__ == "__main__":
    main()
