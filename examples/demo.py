"""The whole path on a machine without GPU, in under three minutes: write, load, compile, generate, compare.

make demo
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accuracy import PARTS, measure, quantized
from quickstart import load, make_checkpoint, quiet, write_text
from torch import nn

import fp4pass

PROMPT = "Four bits are"


def show_memory(model: nn.Module) -> None:
    """Print the bytes of the model's quantized layers and of all of it, packed and as they would be in BF16."""
    held = dict(model.named_parameters())
    names = quantized(held)
    packed = _bytes(held[f"{name}{part}"] for name in names for part in PARTS)
    # One byte holds two weights, each of which would take two.
    dense = 4 * _bytes(held[name] for name in names)
    whole = _bytes(held.values())
    print(f"{'':18}{'packed':>10}{'BF16':>10}{'ratio':>8}")
    for name, now, then in (("quantized layers", packed, dense), ("whole model", whole, whole - packed + dense)):
        print(f"{name:18}{now / 1e6:>7.2f} MB{then / 1e6:>7.2f} MB{now / then:>8.2f}")


def main() -> int:
    """Run all parts; 1 if a quantized product was left, or if our error is the larger one."""
    quiet()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(temporary) / "nano-like")
        model = load(folder)
        _title(f"Memory of a checkpoint like Nemotron 3 Nano's ({model.device}, random weights)")
        show_memory(model)

        _title(f"Text, generated with backend='fp4pass' (from random weights: {PROMPT!r} and then noise)")
        print(repr(write_text(model, folder, PROMPT)))

        _title("Report: what became of each quantized product")
        report = fp4pass.last_report()
        print(report)

        _title("Relative error of the logits, against float64: median of the seeds (smallest to largest)")
        errors = measure(Path(temporary))
        print(errors)

    ours, theirs = errors.medians
    faults = ["a quantized product was left"] * bool(report.refused or not report.rewritten)
    faults += ["the error is larger than that of the model in BF16"] * (ours > theirs)
    _title("; ".join(faults) if faults else f"All is well, in {time.monotonic() - started:.0f} s")
    return len(faults) and 1


def _title(text: str) -> None:
    print(f"\n── {text}", flush=True)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    sys.exit(main())
