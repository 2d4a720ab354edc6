"""What is installed, what fp4pass does on this machine, and whether its arithmetic is exact here."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from fp4pass.errors import DeviceError, Fp4passError
from fp4pass.lowering import arch, layout, ops  # noqa: F401  # registers torch.ops.fp4pass

NAN_BYTES = (0x7F, 0xFF)
"""The two E4M3 bytes that stand for no number."""

FINITE_PRODUCTS = 16 * (256 - len(NAN_BYTES))
"""Sixteen codes times every finite scale byte: 4,064."""

# Written out rather than decoded: the self-test must not rest on what it tests. Code 8 is minus zero.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``fault`` says what to do where something is wrong."""

    name: str
    value: str
    fault: str = ""


def examine() -> Iterator[Finding]:
    """Every finding about this machine, in the order in which it is printed. Changes nothing."""
    yield Finding("fp4pass", _version("fp4pass"))
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    yield Finding("transformers", _version("transformers"))
    yield Finding("safetensors", _version("safetensors"))
    yield _triton()
    yield _cpp_compiler()
    yield _backend()
    yield _loader()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        yield Finding(str(device), describe_gpu(torch.cuda.get_device_name(device), _sm(device)))
    if not devices:
        yield Finding("GPU", "none; everything runs on the CPU, by the reference kernels")
    yield _tested(torch.device("cpu"))
    yield from (_tested(device) for device in devices if _refusal(_sm(device)) is None)


def diagnosis() -> tuple[str, bool]:
    """The findings as text to paste into an issue, and whether all is well."""
    findings = list(examine())
    width = max(len(each.name) for each in findings)
    lines = ["Paste this in an issue:", "", "```"]
    lines += [f"{each.name.ljust(width)}  {each.value}" for each in findings]
    lines.append("```")
    faults = [f"{each.name}: {each.fault}" for each in findings if each.fault]
    lines += ["", *(faults or ["All is well."])]
    return "\n".join(lines), not faults


def describe_gpu(name: str, sm: int) -> str:
    """What fp4pass does on a GPU called ``name`` of generation ``sm`` (90 for compute capability 9.0)."""
    refusal = _refusal(sm)
    return f"{name}, SM{sm}: " + ("fused Triton kernels" if refusal is None else f"not used, {refusal.what}")


def self_test(device: torch.device, dtype: torch.dtype) -> int:
    """How many of the 4,064 finite code x scale products come out wrong of ``fp4pass::linear``; 0 is right.

    The weight holds all sixteen codes, four times, in each of 256 rows, one row a scale byte; activations of ``dtype``
    are the identity, so that the result is the decoded weight. Rows whose scale is NaN do not count: loading refuses
    them.
    """
    codes = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8).repeat(256, 4)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 4)
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float64)
    # E4M3 to float64 is torch's own conversion, not ours.
    factors = scale.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
    expected = torch.cat((magnitudes, -magnitudes)).repeat(4) * factors
    order = layout.layout_for(device, [expected.shape])
    identity = torch.eye(64, dtype=dtype, device=device)
    packed = layout.from_plain(codes, order).to(device), layout.scale_from_plain(scale, order).to(device)
    found = torch.ops.fp4pass.linear(identity, *packed, None, None, order).mT.cpu().double()
    wrong = (found != expected) & expected.isfinite()
    return int(wrong.view(256, 4, 16).any(1).sum())


def _tested(device: torch.device) -> Finding:
    wrong = {dtype: self_test(device, dtype) for dtype in arch.DTYPES}
    name = f"self-test {device}"
    if not any(wrong.values()):
        names = ", ".join(_short(dtype) for dtype in wrong)
        return Finding(name, f"all {FINITE_PRODUCTS:,} code x scale products exact in {names}")
    counts = ", ".join(f"{count} in {_short(dtype)}" for dtype, count in wrong.items() if count)
    return Finding(name, f"wrong products: {counts}", "results on this device cannot be trusted; please open an issue")


def _triton() -> Finding:
    found = _version("triton")
    if found == _MISSING:
        fault = "GPU kernels need it: pip install triton" if torch.cuda.is_available() else ""
        return Finding("triton", _MISSING, fault)
    from triton import knobs

    try:
        return Finding("triton", f"{found}, ptxas {knobs.nvidia.ptxas.version}")
    except RuntimeError:
        return Finding("triton", f"{found}, ptxas {_MISSING}", "reinstall triton, or set TRITON_PTXAS_PATH")


def _cpp_compiler() -> Finding:
    found = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), None)
    # Only a fault where the CPU is all there is: on a GPU Inductor writes Triton.
    fault = "Inductor compiles for the CPU with it: install g++" if not torch.cuda.is_available() else ""
    return Finding("C++ compiler", found or _MISSING, "" if found else fault)


def _backend() -> Finding:
    names = {entry.name for entry in entry_points(group="torch_dynamo_backends")}
    if "fp4pass" in names:
        return Finding("backend", 'torch.compile(model, backend="fp4pass") finds it')
    return Finding("backend", "not registered", "install the package (in a checkout: pip install -e .)")


def _loader() -> Finding:
    from fp4pass.checkpoint.quantizer import register

    if register():
        return Finding("from_pretrained", "ModelOpt checkpoints are loaded by fp4pass")
    fault = "import fp4pass before the package that loads ModelOpt checkpoints too"
    return Finding("from_pretrained", "ModelOpt checkpoints are loaded by another package", fault)


_MISSING = "missing"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING


def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _refusal(sm: int) -> Fp4passError | None:
    """Why the kernels do not run on generation ``sm``; None where they do."""
    try:
        arch.target(sm)
    except DeviceError as error:
        return error
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
