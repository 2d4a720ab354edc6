"""Compiles kernels for any GPU generation on a machine without one, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4pass.lowering import linear, moe
from fp4pass.lowering.arch import Arch, Tile

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_WEIGHT = {"words": "*i32", "scale": "*u8", "global_scale": "*fp32"}
# Triton specialises a kernel for pointers and sizes that are multiples of 16, as those of contiguous operands are.
_SIZES = ("N", "stride_xm", "columns", "stride_gm")
_DIVISIBLE = [["tt.divisibility", 16]]


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: Arch, tile: Tile) -> Any:
    """The kernel for ``arch``; parameters without a type in ``types`` are constants, None where none is given."""
    names = kernel.arg_names
    constants = {name: constants.get(name) for name in names if name not in types}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): _DIVISIBLE for name, kind in types.items() if kind[0] == "*" or name in _SIZES},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch.sm, 32), options=options)


def compile_linear(arch: Arch, dtype: torch.dtype, tile: Tile, *, layout: str, splits: int = 1) -> Any:
    """``linear_kernel`` with bias and relu2, or one part of a split sum; x in the order that it has for ``tile``."""
    types = _WEIGHT | {"x": POINTER[dtype], "M": "i32", "N": "i32", "stride_xm": "i32"}
    types["out"] = POINTER[dtype] if splits == 1 else "*fp32"
    if splits == 1:
        types["bias"] = POINTER[dtype]
    constants = {"K": 2688, "SPLITS": splits} | _form(dtype, layout, tile)
    constants["ACTIVATION"] = "relu2" if splits == 1 else "none"
    constants["X_IN_DOT_ORDER"] = constants["ASM"] and tile.block_m >= linear.REORDER_FROM
    return compile_kernel(linear.linear_kernel, types, constants, arch, tile)


def compile_backward(arch: Arch, dtype: torch.dtype, tile: Tile, *, layout: str) -> Any:
    """``linear_backward_kernel``."""
    types = _WEIGHT | {"grad": POINTER[dtype], "out": POINTER[dtype], "M": "i32", "stride_gm": "i32"}
    constants = {"N": 1856, "K": 2688} | _form(dtype, layout, tile)
    return compile_kernel(linear.linear_backward_kernel, types, constants, arch, tile)


def compile_experts(arch: Arch, dtype: torch.dtype, tile: Tile, *, layout: str, product: str, direct: bool) -> Any:
    """``expert_product_kernel``; ``product``: ``up`` (relu2), ``down`` (routing weights) or ``gathered`` (neither)."""
    types = _WEIGHT | {"x": POINTER[dtype], "out": "*fp32" if product == "down" else POINTER[dtype], "experts": "*i64"}
    types |= dict.fromkeys(("N", "columns", "EXPERTS", "slots_of_x", "stride_xm"), "i32")
    if not direct:
        types |= dict.fromkeys(("order", "ends", "block_ends"), "*i64")
    if product == "down":
        types["weights"] = POINTER[dtype]
    constants = {"global_stride": 1, "K": 1856 if product == "down" else 2688} | _form(dtype, layout, tile)
    ordered = constants["ASM"]
    constants["ACTIVATION"] = "relu2" if product == "up" else "none"
    constants["X_IN_DOT_ORDER"] = ordered and (product == "down" or not direct)
    constants["OUT_IN_DOT_ORDER"] = ordered and product == "up"
    return compile_kernel(moe.expert_product_kernel, types, constants, arch, tile)


def _form(dtype: torch.dtype, layout: str, tile: Tile) -> dict[str, Any]:
    blocks = {name: value for name, value in tile.constants.items() if name.startswith("BLOCK")}
    return {"LAYOUT": layout, "ASM": dtype != torch.float32} | blocks


def machine_code(kernel: Any) -> list[str]:
    """The SASS instructions of a compiled kernel, by the disassembler that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


def main_loop(kernel: Any) -> list[str]:
    """The lines of a compiled kernel's loop over K, in Triton's own representation (TTGIR)."""
    text = kernel.asm["ttgir"]
    begin = text.index("scf.for")
    return text[begin : text.index("scf.yield", begin)].splitlines()
