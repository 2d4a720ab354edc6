"""Every configuration that a call can pick compiles for its GPU generation, within that generation's limits."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.lowering import arch, layout

from . import compiling

# One GPU of each kind of tensor core; the others differ from SM80 in their shared memory and in what ptxas makes of it.
REPRESENTATIVES = (80, 90)
EVERY = [
    pytest.param(generation, regime, dtype, tile, id=f"sm{generation.sm}-{index}-{regime}")
    for generation in arch.ARCHS.values()
    for index, (regime, dtype, tile) in enumerate(arch.configurations(generation))
    # float16 differs in the decoder's instructions alone, float32 uses no tensor core.
    if dtype == torch.bfloat16 or generation.sm == 90 or (generation.sm == 80 and dtype == torch.float32)
]
SPILLS = ("LDL", "STL")
TENSOR_CORE = ("HMMA", "HGMMA", "QGMMA")
FORM = {"layout": layout.INTERLEAVED}


def compiled(generation, regime, dtype, tile):
    """The kernels of one configuration."""
    if regime == "backward":
        yield compiling.compile_backward(generation, dtype, tile, **FORM)
    elif regime == "product":
        yield compiling.compile_linear(generation, dtype, tile, **FORM)
    else:
        for product in ("up", "down") if dtype == torch.bfloat16 else ("up",):
            yield compiling.compile_experts(generation, dtype, tile, **FORM, product=product, direct=False)


def assert_fits(generation, kernel):
    """Within shared memory and registers.

    Before Hopper ptxas may put a few addresses aside although registers are left, with some 90 in use. A sum that does
    not fit would be spilled by the dozen.
    """
    assert kernel.metadata.shared <= generation.shared_memory
    spills = [line for line in compiling.machine_code(kernel) if any(name in line for name in SPILLS)]
    assert len(spills) <= (0 if generation.wgmma else 16), spills


@pytest.mark.parametrize(("generation", "regime", "dtype", "tile"), EVERY)
def test_configuration_compiles_within_shared_memory_and_registers(generation, regime, dtype, tile):
    for kernel in compiled(generation, regime, dtype, tile):
        assert_fits(generation, kernel)


@pytest.mark.parametrize("sm", REPRESENTATIVES)
def test_variants_compile_within_shared_memory_and_registers(sm):
    generation, dtype = arch.ARCHS[sm], torch.bfloat16
    dense, grouped = (generation.tiles(dtype, experts=experts) for experts in (False, True))
    few, widest = grouped[0][1], grouped[-1][1]
    for tile in (dense[0][1], dense[-1][1]):
        assert_fits(generation, compiling.compile_linear(generation, dtype, tile, **FORM, splits=3))
    for product in ("up", "down", "gathered"):
        kernel = compiling.compile_experts(generation, dtype, few, **FORM, product=product, direct=True)
        assert_fits(generation, kernel)
    kernel = compiling.compile_experts(generation, dtype, widest, **FORM, product="gathered", direct=False)
    assert_fits(generation, kernel)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_every_layout_has_its_assembly(order, dtype):
    generation = arch.ARCHS[80]
    kernel = compiling.compile_linear(generation, dtype, generation.tile(1, dtype), layout=order)
    packed = "fma.rn.bf16x2" if dtype == torch.bfloat16 else "fma.rn.f16x2"
    assert packed in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("regime", "tile"),
    [
        (regime, tile)
        for regime, dtype, tile in arch.configurations(arch.ARCHS[90])
        if dtype == torch.bfloat16 and regime != "backward"  # That one has its weight in shared memory.
    ],
)
def test_hopper_products_end_within_their_step_and_their_weights_stay_where_they_are(regime, tile):
    """Two things that went wrong once.

    A warpgroup product that runs on into the next step passes the barrier there, and another warp's copy of tokens
    then overwrites the tile that it still reads: wrong sums, now and then. So every wait is for all products.

    A decoded weight in another order than the tensor core's must move between threads through shared memory, which
    took a third of the time. So it goes into the product as it is: no change of layout, and no copy but of tokens.
    """
    for kernel in compiled(arch.ARCHS[90], regime, torch.bfloat16, tile):
        loop = compiling.main_loop(kernel)
        products = [line for line in loop if "ttng.warp_group_dot " in line]
        waits = [line for line in loop if "ttng.warp_group_dot_wait" in line]
        assert products and all(re.search(r": tensor<\w+, #ttg.dot_op<.*> \* !ttg.memdesc<", line) for line in products)
        assert waits and all("pendings = 0 " in line for line in waits)
        assert not [line for line in loop if "ttg.convert_layout" in line]
        assert not [line for line in loop if re.search(r"ttg.local_(alloc|store)", line) and "token_tile" not in line]


def test_ampere_products_use_the_tensor_core():
    generation = arch.ARCHS[80]
    kernel = compiling.compile_linear(generation, torch.bfloat16, generation.tile(1, torch.bfloat16), **FORM)
    assert any("HMMA" in line for line in compiling.machine_code(kernel))


def test_float32_products_are_not_rounded_to_tf32():
    generation = arch.ARCHS[90]
    kernel = compiling.compile_linear(generation, torch.float32, generation.tile(1, torch.float32), **FORM)
    code = compiling.machine_code(kernel)
    assert any("FFMA" in line for line in code)
    assert not any(name in line for line in code for name in TENSOR_CORE)
