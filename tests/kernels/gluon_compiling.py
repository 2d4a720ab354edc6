"""Compiles the kernels of few_rows.py, many_rows.py, mma_rows.py and gather.py for any GPU, on a machine without."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from fp4pass.lowering import few_rows, gather, many_rows, mma_rows, sharing
from fp4pass.lowering.arch import Arch, Tile
from fp4pass.lowering.launches import FewRows, Launch, ManyRows, MmaRows

from .compiling import compile_kernel, machine_code

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Nano's widths: hidden and inner size of its experts.
HIDDEN, INNER = 2688, 1856
# What the launch functions pass is a multiple of 16, wherever it starts and however many experts there are.
_MULTIPLES_OF_16 = ("N", "EXPERTS", "stride_xm")
_DIVISIBLE = [["tt.divisibility", 16]]


def compile_gluon(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: Arch, launch: Launch) -> Any:
    """The kernel for ``arch``; parameters without a type in ``types`` are constants, None where none is given."""
    names = kernel.arg_names
    constants = constants | {name: value for name, value in launch.constants.items() if name in names}
    source = GluonASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): constants.get(name) for name in names if name not in types},
        attrs={
            (names.index(name),): _DIVISIBLE
            for name, kind in types.items()
            if kind[0] == "*" or name in _MULTIPLES_OF_16
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch.sm, 32),
        options={name: launch.constants.get(name) for name in ("num_warps", "maxnreg")},
    )


@cache
def compile_linear(arch: Arch, launch: Launch, dtype: torch.dtype, *, k: int = HIDDEN, plain: bool = False) -> Any:
    """The dense product over ``k`` columns, with global scale, bias and relu2 unless ``plain``."""
    types = {"out": POINTER[dtype], "M": "i32", "N": "i32"}
    activation = "none" if plain else "relu2"
    if not plain:
        types |= {"global_scale": "*fp32", "bias": POINTER[dtype]}
    if isinstance(launch, FewRows):
        constants = {"K": k, "EARLY": launch.early, "HIGH": launch.high, "ACTIVATION": activation}
        return compile_gluon(few_rows.linear_kernel, types | _few_operands(dtype), constants, arch, launch)
    constants = {"K": k, "EXPERTS": 1, "global_stride": 0, "ACTIVATION": activation}
    if isinstance(launch, MmaRows):
        types |= _few_operands(dtype)
        return compile_gluon(mma_rows.product_kernel, types, constants | {"slots_of_x": 1}, arch, launch)
    return compile_gluon(many_rows.product_kernel, types | _many_operands(dtype, launch), constants, arch, launch)


@cache
def compile_fp8(arch: Arch, launch: MmaRows, dtype: torch.dtype, *, k: int = HIDDEN) -> Any:
    """The dense product with an 8-bit weight of ``k`` columns, with its scale and a bias."""
    types = {"x": POINTER[dtype], "words": "*i32", "global_scale": "*fp32", "bias": POINTER[dtype]}
    types |= {"out": POINTER[dtype], "M": "i32", "N": "i32", "stride_xm": "i32"}
    constants = {"K": k, "ACTIVATION": "none", "EXPERTS": 1, "slots_of_x": 1, "global_stride": 0}
    return compile_gluon(mma_rows.product_kernel, types, constants, arch, launch)


@cache
def compile_experts(arch: Arch, launch: Launch, dtype: torch.dtype, product: str) -> Any:
    """A product of experts by a schedule: ``up`` (relu2), ``down`` (routing weights), ``direct`` (a slot a block)."""
    down = product == "down"
    constants = {"K": INNER if down else HIDDEN, "ACTIVATION": "relu2" if product == "up" else "none"}
    constants["global_stride"] = 1
    types = {"out": "*fp32" if down else POINTER[dtype], "global_scale": "*fp32", "N": "i32", "EXPERTS": "i32"}
    if down:
        types["weights"] = "*fp32"
    if product == "direct":
        types["experts"] = "*i64"  # The ids themselves.
    else:
        types |= dict.fromkeys(("experts", "order", "ends", "block_ends"), "*i32")
    if isinstance(launch, FewRows):
        types |= _few_operands(dtype) | {"slots_of_x": "i32"}
        constants["CHAINED"] = (2 if down else 1) if arch.wgmma else 0
        return compile_gluon(few_rows.experts_kernel, types, constants, arch, launch)
    types |= {"M": "i32"}
    if isinstance(launch, MmaRows):
        types |= _few_operands(dtype) | {"slots_of_x": "i32"}
        return compile_gluon(mma_rows.product_kernel, types, constants, arch, launch)
    types |= _many_operands(dtype, launch)
    return compile_gluon(many_rows.product_kernel, types, constants, arch, launch)


@cache
def compile_gather(arch: Arch) -> Any:
    """Rows gathered by expert."""
    types = {"x": "*bf16", "out": "*bf16", "order": "*i32", "count": "*i32", "choices": "i32", "stride_xm": "i32"}
    constants = {"K": HIDDEN, "ROWS": 8, "BLOCK": 512}
    return compile_kernel(gather.rows_kernel, types, constants, arch, Tile(8, 0, 512, warps=8, stages=1))


@cache
def operations(kernel: Any) -> tuple[str, ...]:
    """The SASS instructions of a compiled kernel, without the predicates that guard them."""
    return tuple(line.partition(" ")[2] if line.startswith("@") else line for line in machine_code(kernel))


def places(code: tuple[str, ...], operation: str) -> list[int]:
    """Where in ``code`` an instruction begins with ``operation``."""
    return [index for index, line in enumerate(code) if line.startswith(operation)]


def assert_fits(arch: Arch, kernel: Any, *, spills: int = 0) -> None:
    """Within shared memory and, but for so many loads and stores of what was put aside, within registers."""
    assert kernel.metadata.shared <= arch.shared_memory
    code = operations(kernel)
    found = [code[place] for name in ("LDL", "STL") for place in places(code, name)]
    assert len(found) <= spills, found


def _few_operands(dtype: torch.dtype) -> dict[str, str]:
    return {"x": POINTER[dtype], "words": "*i32", "scale": "*i16", "stride_xm": "i32"}


def _many_operands(dtype: torch.dtype, launch: ManyRows) -> dict[str, str]:
    units = launch.block_n // 16
    return {
        "x_desc": _descriptor(
            POINTER[dtype][1:], sharing.rows_of_box(launch.block_m, launch.band), 64, many_rows._swizzled()
        ),
        "codes_desc": _descriptor("i32", units, 128 * launch.deep, many_rows._straight(32)),
        "scale_desc": _descriptor("i16", units, 32 * launch.deep, many_rows._straight(16)),
        "parts": "*fp32",
        "flags": "*i64",
        **dict.fromkeys(("shared", "each", "apart", "longest"), "i32"),
    }


def _descriptor(element: str, rows: int, columns: int, layout: Any) -> str:
    """How Triton writes the type of a TMA descriptor of such tiles."""
    return f"tensordesc<{element}[{rows}, {columns}],{layout!r}>"
