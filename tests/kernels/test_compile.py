"""Every configuration that a call can pick compiles for its GPU generation, within that generation's limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.lowering import arch, layout

from . import compiling

EVERY = [
    pytest.param(generation, *configuration, id=f"sm{generation.sm}-{index}-{configuration[0]}")
    for generation in arch.ARCHS.values()
    for index, configuration in enumerate(arch.configurations(generation))
]
SPILLS = ("LDL", "STL")
TENSOR_CORE = ("HMMA", "HGMMA", "QGMMA")


def compiled(generation, regime, dtype, tile):
    if regime == "backward":
        yield compiling.compile_backward(generation, dtype, tile, layout=layout.INTERLEAVED)
        return
    yield compiling.compile_linear(generation, dtype, tile, layout=layout.INTERLEAVED)
    if dtype == torch.float16:  # The same instructions as for bfloat16 but for the decoder's, which linear has too.
        return
    yield compiling.compile_experts(generation, dtype, tile, layout=layout.INTERLEAVED, up=True, direct=False)
    if tile == generation.tile(1, dtype):
        yield compiling.compile_linear(generation, dtype, tile, layout=layout.INTERLEAVED, splits=3)
        yield compiling.compile_experts(generation, dtype, tile, layout=layout.INTERLEAVED, up=False, direct=True)


@pytest.mark.parametrize(("generation", "regime", "dtype", "tile"), EVERY)
def test_configuration_compiles_within_shared_memory_and_without_spills(generation, regime, dtype, tile):
    for kernel in compiled(generation, regime, dtype, tile):
        assert kernel.metadata.shared <= generation.shared_memory
        spills = [line for line in compiling.machine_code(kernel) if any(name in line for name in SPILLS)]
        assert spills == []


@pytest.mark.parametrize("order", layout.LAYOUTS)
@pytest.mark.parametrize("sm", (80, 90))
def test_every_layout_has_its_assembly(sm, order):
    generation = arch.ARCHS[sm]
    for dtype in (torch.bfloat16, torch.float16):
        kernel = compiling.compile_linear(generation, dtype, generation.tile(1, dtype), layout=order)
        packed = "fma.rn.bf16x2" if dtype == torch.bfloat16 else "fma.rn.f16x2"
        assert packed in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rows", (1, 64, 1 << 20))
def test_hopper_products_use_wgmma_and_do_not_wait_for_each(dtype, rows):
    generation = arch.ARCHS[90]
    kernel = compiling.compile_linear(generation, dtype, generation.tile(rows, dtype), layout=layout.INTERLEAVED)
    code = compiling.machine_code(kernel)
    products = [line for line in code if "HGMMA" in line]
    full_waits = [line for line in code if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line]
    assert products and len(full_waits) <= 1


def test_ampere_products_use_the_tensor_core():
    generation = arch.ARCHS[80]
    kernel = compiling.compile_linear(
        generation, torch.bfloat16, generation.tile(1, torch.bfloat16), layout=layout.INTERLEAVED
    )
    assert any("HMMA" in line for line in compiling.machine_code(kernel))


def test_float32_products_are_not_rounded_to_tf32():
    generation = arch.ARCHS[90]
    kernel = compiling.compile_linear(
        generation, torch.float32, generation.tile(1, torch.float32), layout=layout.INTERLEAVED
    )
    code = compiling.machine_code(kernel)
    assert any("FFMA" in line for line in code)
    assert not any(name in line for line in code for name in TENSOR_CORE)
