"""The command line: ``python -m fp4pass synthesize | generate | explain | doctor | bench``."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from fp4pass import _torch, doctor
from fp4pass.bench import command as bench
from fp4pass.checkpoint.load import from_pretrained, skeleton
from fp4pass.checkpoint.releases import RELEASES, Sizes
from fp4pass.errors import CheckpointError, DeviceError, Fp4passError
from fp4pass.explain import explain
from fp4pass.report import last_report
from fp4pass.synthesize import FORMATS, synthesize

OK, FOUND_FAULTS, ERROR = 0, 1, 2
"""Exit codes: done; done, and the answer is a bad one (doctor, explain); not done, and stderr says why."""

DIMENSIONS = tuple(field.name for field in fields(Sizes) if str(field.type) in ("int", "int | None"))
"""The whole-number dimensions of a model, each an option of ``synthesize``."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` are those after the program's name. Returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except (Fp4passError, OSError) as error:
        return _complain(error)
    except _torch.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Fp4passError):
            raise
        return _complain(error.inner_exception)


def _complain(error: Exception) -> int:
    print(f"fp4pass: {error}", file=sys.stderr)
    return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fp4pass", description="NVFP4 checkpoints on GPUs without FP4.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    make = commands.add_parser("synthesize", help="write a checkpoint with random weights, at any size")
    make.set_defaults(run=_synthesize)
    make.add_argument("directory", metavar="DIR", type=Path)
    make.add_argument("--like", default="nano", choices=RELEASES, help="the release to imitate (%(default)s)")
    make.add_argument("--format", default="modelopt", choices=FORMATS, help="of the files (%(default)s)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that write, 1 GB each (%(default)s)")
    make.add_argument(
        "--quantization-in-config",
        action=argparse.BooleanOptionalAction,
        help="put the quantization into config.json too, where from_pretrained of transformers looks for it",
    )
    sizes = make.add_argument_group("dimensions, the release's own where left out")
    for name in ("layers", *DIMENSIONS):
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")

    run = commands.add_parser("generate", help="load a checkpoint, compile it and write text")
    run.set_defaults(run=_generate)
    _add_checkpoint(run)
    run.add_argument("--prompt", required=True)
    run.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="(%(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", type=_device, default=default, help="cpu, cuda or cuda:N (%(default)s)")
    run.add_argument("--eager", action="store_true", help="call the kernels without compiling the model")

    show = commands.add_parser("explain", help="what a compile would rewrite and what not, from the config files alone")
    show.set_defaults(run=_explain)
    _add_checkpoint(show)
    show.add_argument("--target-sm", type=int, metavar="SM", help="as on this GPU generation: 80, 86, 89, 90, 100")
    show.add_argument("--tokens", type=int, default=16, metavar="N", help="length of the prompt (%(default)s)")
    show.add_argument("--json", action="store_true", help="print the report as JSON")

    commands.add_parser("doctor", help="versions, devices and a self-test").set_defaults(run=_doctor)

    time = commands.add_parser("bench", help="time and error of products beside BF16 ones, on a GPU")
    time.set_defaults(run=_bench)
    bench.add_arguments(time)
    return parser


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="DIR", help="a folder, or owner/name of a hub repository")
    command.add_argument("--dtype", choices=DTYPES, help="of the activations (the checkpoint's)")


def _synthesize(given: argparse.Namespace) -> int:
    dimensions = {name: getattr(given, name) for name in DIMENSIONS}
    folder = synthesize(
        given.directory,
        given.like,
        layers=given.layers,
        seed=given.seed,
        format=given.format,
        quantization_in_config=given.quantization_in_config,
        jobs=given.jobs,
        **dimensions,
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: like {RELEASES[given.like].name}, {size / 1e6:,.1f} MB of weights")
    return OK


def _generate(given: argparse.Namespace) -> int:
    from transformers import AutoTokenizer, CompileConfig
    from transformers.utils import is_accelerate_available

    _check_present(given.device)
    path = _located(given.checkpoint)
    straight = {"device_map": given.device} if is_accelerate_available() else {}  # else by way of host memory
    model = from_pretrained(path, dtype=DTYPES.get(given.dtype, "auto"), **straight).to(given.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(given.prompt, return_tensors="pt").to(given.device)
    compiled = {}
    if not given.eager:
        config = CompileConfig(backend="fp4pass")
        # Without it generate() compiles on accelerators alone.
        config._compile_all_devices = True
        compiled = {"cache_implementation": "static", "compile_config": config}
    with warnings.catch_warnings():
        # Of caches inside transformers that dynamo traces through; nothing that the caller could change.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        tokens = model.generate(**inputs, max_new_tokens=given.max_new_tokens, do_sample=False, **compiled)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    if compiled:
        print(last_report(), file=sys.stderr)
    return OK


def _explain(given: argparse.Namespace) -> int:
    model = skeleton(_located(given.checkpoint), target_sm=given.target_sm, dtype=DTYPES.get(given.dtype))
    tokens = torch.zeros(1, given.tokens, dtype=torch.long, device="meta")
    options = {} if given.target_sm is None else {"target_sm": given.target_sm}
    report = explain(model, tokens, use_cache=False, options=options)
    print(report.to_json() if given.json else report)
    return FOUND_FAULTS if report.refused else OK


def _doctor(given: argparse.Namespace) -> int:
    text, well = doctor.diagnosis()
    print(text)
    return OK if well else FOUND_FAULTS


def _bench(given: argparse.Namespace) -> int:
    return OK if bench.run(given) else FOUND_FAULTS


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device") from error


def _check_present(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(
            "this machine does not have the device that was asked for",
            seen=f"{device} asked for, {count} GPUs (torch {torch.__version__})",
            expected=f"a GPU below number {count}" if count else "a GPU",
            do="use a machine that has it, or install a CUDA build of torch if this one does",
        )


def _located(checkpoint: str) -> str:
    """The checkpoint as it was given, if it is a folder or could be a repository's name."""
    if Path(checkpoint).is_dir() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", checkpoint):
        return checkpoint
    raise CheckpointError(
        "there is no such checkpoint",
        seen=checkpoint,
        expected="a folder with config.json and safetensors files, or owner/name of a hub repository",
        do="check the path, or write one: python -m fp4pass synthesize DIR --like nano --layers 4",
    )
