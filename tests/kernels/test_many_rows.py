"""The kernel for many rows, compiled for Hopper, and what must hold of its machine code."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.lowering import arch
from fp4pass.lowering.arch import ManyRows

from . import gluon_compiling as compiling

HOPPER = arch.ARCHS[90]
# In the highest tile the sums fill the multipliers' registers. Behind the last product of a tile, addresses of what is
# stored are put aside: so many loads and stores of them Triton 3.9 makes (3.6 makes 2, 4, 18 and 88).
MOST_SPILLS = {(256, "dense"): 50, (256, "plain"): 64, (256, "up"): 60, (256, "down"): 133}
CASES = [
    (launch, product)
    for experts, launch in arch.launches(HOPPER)
    if isinstance(launch, ManyRows)
    for product in (("up", "down") if experts else ("dense", "plain"))
]
EACH = pytest.mark.parametrize(("launch", "product"), CASES, ids=lambda value: str(value).replace(" ", "-"))


def compiled(launch, product):
    if product in ("up", "down"):
        return compiling.compile_experts(HOPPER, launch, torch.bfloat16, product)
    return compiling.compile_linear(HOPPER, launch, torch.bfloat16, plain=product == "plain")


def test_only_hopper_has_launches():
    assert CASES
    for generation in arch.ARCHS.values():
        found = any(isinstance(launch, ManyRows) for _, launch in arch.launches(generation))
        assert found == generation.wgmma


@EACH
def test_launch_compiles_within_shared_memory_and_registers(launch, product):
    compiling.assert_fits(HOPPER, compiled(launch, product), spills=MOST_SPILLS.get((launch.block_m, product), 0))


def test_float16_with_the_fewest_steps_compiles_within_registers():
    kernel = compiling.compile_linear(HOPPER, CASES[0][0], torch.float16, k=128)
    compiling.assert_fits(HOPPER, kernel)
    assert "fma.rn.f16x2" in kernel.asm["ptx"] and "bf16" not in kernel.asm["ptx"]


@EACH
def test_products_of_a_step_follow_each_other_and_run_on_into_the_next(launch, product):
    """The compiler serialises products whose sums it cannot keep in place: it then waits behind each.

    Here a step is one group of products, of 16 columns each and one or two halves of the rows of a warpgroup. In the
    loop all groups but the last are waited for; what they read is given back only when every warp has got so far.
    """
    code = compiling.operations(compiled(launch, product))
    products = compiling.places(code, "HGMMA")
    warps_along_m = min(launch.warps, launch.block_m // 16)
    assert len(products) == 4 * (launch.block_m // (16 * warps_along_m))
    step = code[products[0] : products[-1] + 1]
    assert not [line for line in step if line.startswith(("WARPGROUP", "BAR", "LDL", "STL"))]
    assert [line.rstrip().endswith("gsb0") for line in step if line.startswith("HGMMA")] == [
        place == products[-1] for place in products
    ]
    waits = compiling.places(code, "WARPGROUP.DEPBAR")
    assert [code[place].split()[-1] for place in waits] == ["0x1", "0x0"]
    assert waits[0] > products[-1]
    for wait in waits:
        barrier, given_back = (
            next(place for place in compiling.places(code, name) if place > wait)
            for name in ("BAR.SYNC", "SYNCS.ARRIVE")
        )
        assert barrier < given_back


def of_the_decoders(code):
    """The part of the machine code that the decoders run. Parts begin where their warps ask for their registers."""
    begins = [0, *compiling.places(code, "USETMAXREG"), len(code)]
    parts = [code[begin:end] for begin, end in pairwise(begins)]
    return max(parts, key=lambda part: len(compiling.places(part, "HMUL2.BF16")))


@EACH
def test_the_decoded_tile_is_stored_16_bytes_at_a_time_and_announced_when_all_of_it_is_there(launch, product):
    """``wgmma`` reads shared memory beside the ordinary order of loads and stores.

    So behind each thread's own stores stands a fence, behind all fences a barrier, and only then are the multipliers
    told.
    """
    code = of_the_decoders(compiling.operations(compiled(launch, product)))
    stores = compiling.places(code, "STS")
    assert {code[place].split()[0] for place in stores} == {"STS.128"}
    assert len(stores) * launch.decoders * 32 * 16 == launch.block_n * 64 * 2
    (fence,), (announced,) = (compiling.places(code, name) for name in ("FENCE.VIEW.ASYNC", "SYNCS.ARRIVE"))
    assert stores[-1] < fence
    assert any(fence < place < announced for place in compiling.places(code, "BAR.SYNC"))


@EACH
def test_tiles_come_by_the_copy_engine(launch, product):
    code = compiling.operations(compiled(launch, product))
    assert compiling.places(code, "UTMALDG.2D")
    assert not compiling.places(code, "LDGSTS")
