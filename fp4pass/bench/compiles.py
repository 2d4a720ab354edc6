"""How long a model takes to compile, with empty and with filled caches, and how often it does for several sizes.

Run as a module, it does the measuring of one process: the caches' places are that process's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fp4pass.backend import fp4pass
from fp4pass.checkpoint import releases
from fp4pass.checkpoint.config import config_json_form
from fp4pass.checkpoint.load import skeleton
from fp4pass.checkpoint.tensors import quantization

TOKENS = (1, 7, 300, 3000)
"""The sizes that one compiled model is called with: a decoding step, and prompts short, middling and long."""

# Without a GPU the widths say nothing of compiling; these are quickly computed.
_NARROW = {"hidden": 128, "experts": 8, "top_k": 2, "intermediate": 64, "shared": 128, "heads": 4, "vocab": 512}
_NARROW_MAMBA = {"mamba_heads": 16, "mamba_head_dim": 8, "groups": 1, "state": 16, "head_dim": 32}

_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


@dataclass(frozen=True)
class Call:
    """One first call with so many tokens: its seconds, and how many graphs had been compiled after it."""

    tokens: int
    seconds: float
    compiles: int


class Counted:
    """``torch.compile(model, backend="fp4pass", fullgraph=True)``, and how often the backend was asked to compile."""

    def __init__(self, model: Callable[..., Any], **settings: Any) -> None:
        self.compiles = 0
        self.compiled = torch.compile(model, backend=self._compile, fullgraph=True, **settings)

    def _compile(self, gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.compiles += 1
        return fp4pass(gm, examples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled model."""
        return self.compiled(*args, **kwargs)


def cold_and_warm(layers: int, tokens: Sequence[int]) -> dict[str, list[Call]]:
    """``{"cold": calls, "warm": calls}`` of a Nano-shaped model, each measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "fp4pass.bench.compiles", json.dumps([layers, *tokens])]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {name: str(Path(folder, part)) for name, part in _CACHES.items()}
        return {caches: _calls_of(command, environment) for caches in ("cold", "warm")}


def table(found: dict[str, list[Call]]) -> str:
    """What `cold_and_warm` found, a line a number of tokens."""
    column = "{:>6} {:>12} {:>9} {:>12} {:>9}"
    lines = [column.format("tokens", "cold, s", "compiles", "warm, s", "compiles")]
    for cold, warm in zip(found["cold"], found["warm"], strict=True):
        times = (f"{cold.seconds:.1f}", cold.compiles, f"{warm.seconds:.1f}", warm.compiles)
        lines.append(column.format(cold.tokens, *times))
    totals = {caches: sum(call.seconds for call in calls) for caches, calls in found.items()}
    lines.append(column.format("all", f"{totals['cold']:.1f}", "", f"{totals['warm']:.1f}", ""))
    return "\n".join(lines)


@torch.no_grad()
def first_calls(layers: int, tokens: Sequence[int], device: torch.device) -> Iterator[Call]:
    """Compile a Nano-shaped model of ``layers`` layers and call it with each number of ``tokens`` once."""
    model = Counted(random_model(layers, device, {} if device.type == "cuda" else _NARROW | _NARROW_MAMBA))
    for count in tokens:
        ids = torch.zeros(1, count, dtype=torch.long, device=device)
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1).logits.cpu()
        yield Call(count, time.perf_counter() - start, model.compiles)


def random_model(layers: int, device: torch.device, dimensions: dict[str, int]) -> nn.Module:
    """A model like Nano with numbers that mean nothing, made where it shall live, without a checkpoint."""
    made = releases.RELEASES["nano"]
    sizes = releases.resize(made.sizes, layers, **dimensions)
    config = releases.config(made, sizes)
    config["quantization_config"] = config_json_form(quantization("nano", made, sizes))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = skeleton(folder)
    model = model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        # Bytes are codes, or scales of about one: no NaN among them.
        tensor.data.normal_(0, 0.02) if tensor.element_size() > 1 else tensor.data.view(torch.uint8).fill_(0x38)
    return model


def _calls_of(command: Sequence[str], environment: dict[str, str]) -> list[Call]:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Call(**call) for call in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Measure in this process and print the calls as JSON; each one to stderr when it is done."""
    layers, *tokens = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = []
    for call in first_calls(layers, tokens, device):
        print(f"{call.tokens} tokens: {call.seconds:.1f} s, {call.compiles} compiles", file=sys.stderr, flush=True)
        calls.append(asdict(call))
    print(json.dumps(calls))


if __name__ == "__main__":
    main()
