"""The command ``bench``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from fp4pass.bench import compiles, host
from fp4pass.bench.cases import KINDS, Dense, Moe, choose
from fp4pass.bench.plot import check_plotting, plot
from fp4pass.bench.table import HEADING, Row, Run, all_right, header, load
from fp4pass.errors import DeviceError, OptionError
from fp4pass.lowering import arch

TRITON_TOKENS = {"nano.in_proj": (16,), "square": (1024,)}
"""Where Inductor tunes its own Triton for BF16 unless it is asked to do so everywhere: 8 to 25 seconds a row."""

_DEFAULTS = {"shapes": None, "tokens": None, "triton": "some", "json": None, "plot": None, "layers": 52, "from": None}
_USED = {"host": (), "compile": ("tokens", "layers"), "from": ("from", "plot")}
_USED_TO_MEASURE = ("shapes", "tokens", "triton", "json", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench``."""
    parser.add_argument(
        "kind",
        nargs="?",
        choices=(*KINDS, "host", "compile"),
        help="linear layers or blocks of experts (both); host: how long a call keeps the host; compile: how long that "
        "takes for a model, without a GPU too",
    )
    names = [case.name for cases in KINDS.values() for case in cases]
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="numbers of tokens (each shape's own)")
    parser.add_argument(
        "--triton",
        choices=("none", "some", "all"),
        default=_DEFAULTS["triton"],
        help="where to tune Inductor's own Triton in BF16 too, some seconds a row (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratio over tokens; needs matplotlib")
    parser.add_argument(
        "--layers", type=int, default=_DEFAULTS["layers"], metavar="N", help="of the model to compile (%(default)s)"
    )
    parser.add_argument("--from", type=Path, metavar="FILE", help="show a run stored by --json instead")


def run(given: argparse.Namespace) -> bool:
    """Measure, or take a stored run; print, store, plot. Whether all results were right.

    Raises OptionError for arguments that would be passed over.
    """
    stored: Path | None = vars(given)["from"]
    _check_used(given, given.kind or ("from" if stored else None))
    if given.kind == "compile":
        _compile(given.layers, given.tokens or compiles.TOKENS)
        return True
    if given.kind == "host":
        _host(gpu())
        return True
    if given.plot:
        check_plotting()
    found = load(stored) if stored else _measure(given)
    if stored:
        print("\n".join([_heading(found.machine), *map(str, found.rows)]))
    print(f"\nTime of BF16 over time of fp4pass\n\n{found.markdown()}")
    if given.plot:
        plot(found, given.plot)
    return all_right(found.rows)


def _check_used(given: argparse.Namespace, kind: str | None) -> None:
    used = _USED.get(kind, _USED_TO_MEASURE)
    if over := [name for name, default in _DEFAULTS.items() if name not in used and vars(given)[name] != default]:
        command = f"bench {'--from FILE' if kind == 'from' else kind or ''}".rstrip()
        raise OptionError(
            f"{command} has no use for some of its arguments",
            seen=", ".join(f"--{name}" for name in over),
            expected=", ".join(f"--{name}" for name in used) or "none",
            do="leave them out, or see bench --help",
        )


def gpu() -> torch.device:
    """The GPU to measure on. Raises DeviceError where there is none that fp4pass has kernels for."""
    if not torch.cuda.is_available():
        raise DeviceError(
            "the benchmark needs a GPU",
            seen=f"none (torch {torch.__version__})",
            expected=f"a GPU of SM{arch.FIRST_SM} to SM{arch.FIRST_NATIVE_SM - 1}",
            do="run it on such a machine with a CUDA build of torch, or show a stored run: bench --from FILE",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    arch.target(device)
    return device


def machine(device: torch.device) -> dict[str, str]:
    """What a run's header says: the GPU, the driver and the versions."""
    is_gpu = device.type == "cuda"
    names = {"": torch.cuda.get_device_name(device) if is_gpu else platform.machine()}
    if is_gpu:
        names |= {"driver": _driver(), "CUDA": torch.version.cuda, "triton": version("triton")}
    names |= {name: version(name) for name in ("torch", "transformers", "fp4pass")}
    return names | {"date": date.today().isoformat()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _measure(given: argparse.Namespace) -> Run:
    """Print each row when it is there; what is asked to be stored is stored then, too."""
    cases = choose([given.kind] if given.kind else KINDS, given.shapes)
    device = gpu()
    found = Run(machine(device), ())
    print(_heading(found.machine), flush=True)
    for row in _rows(cases, given.tokens, given.triton, device):
        found = Run(found.machine, (*found.rows, row))
        print(row, flush=True)
        if given.json:
            given.json.write_text(found.to_json(), encoding="utf-8")
    return found


def _heading(names: dict[str, str]) -> str:
    return f"{header(names)}\nmicroseconds a call, medians; errors relative to float64\n{HEADING}"


def _compile(layers: int, tokens: Sequence[int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = "Nano's widths" if device.type == "cuda" else "narrow, as there is no GPU"
    print(f"{header(machine(device))}\na model like Nano, {layers} layers, {widths}; first calls with each size")
    print(compiles.table(compiles.cold_and_warm(layers, tokens)))


def _host(device: torch.device) -> None:
    print(f"{header(machine(device))}\nmicroseconds that a call keeps the host")
    print(host.table(list(host.measure(device))))


def _rows(
    cases: Sequence[Dense | Moe], tokens: Sequence[int] | None, triton: str, device: torch.device
) -> Iterator[Row]:
    """The rows of every case; how long each case took goes to stderr."""
    from fp4pass.bench import dense, moe  # these load models of transformers, which no other command needs

    for case in cases:
        start, counts = time.perf_counter(), tokens or case.tokens
        if isinstance(case, Dense):
            tuned = {"none": (), "some": TRITON_TOKENS.get(case.name, ()), "all": counts}[triton]
            yield from dense.measure(case, counts, device, triton_tokens=tuned)
        else:
            yield from moe.measure(case, counts, device)
        torch.cuda.empty_cache()
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
