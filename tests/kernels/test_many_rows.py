"""The kernels for many rows, compiled for Hopper, and what must hold of their machine code."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.lowering import arch
from fp4pass.lowering.arch import ManyRows

from . import gluon_compiling as compiling

HOPPER = arch.ARCHS[90]
# In the highest tile the sums fill the registers of a group, and two programs share what one has otherwise. Before the
# loops and behind the last product of a tile, addresses are put aside: so many loads and stores of them Triton 3.9
# makes at most (3.6: five).
MOST_SPILLS = {(256, "dense"): 7, (256, "plain"): 3, (256, "down"): 36, (32, "down"): 37}
MOST_SPILLS |= {(64, "dense"): 28, (64, "plain"): 22, (64, "up"): 25, (64, "down"): 20}
# Instructions of the loop for a word of eight codes, everything included; the decoding takes 15 of them.
MOST_FOR_A_WORD = 26
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


def loops(code):
    """The two groups' loops over K, each from its first wait for a stage to the jump back behind its products."""
    products = compiling.places(code, "HGMMA")
    assert len(products) == 8
    for group in (products[:4], products[4:]):
        begin = max(place for place in compiling.places(code, "SYNCS.PHASECHK") if place < group[0])
        end = min(place for place in compiling.places(code, "BRA") if place > group[-1])
        yield code[begin : end + 1]


def test_only_hopper_has_launches():
    assert CASES
    for generation in arch.ARCHS.values():
        found = any(isinstance(launch, ManyRows) for _, launch in arch.launches(generation))
        assert found == generation.wgmma


@EACH
def test_launch_compiles_within_shared_memory_and_registers(launch, product):
    kernel = compiled(launch, product)
    compiling.assert_fits(HOPPER, kernel, spills=MOST_SPILLS.get((launch.block_m, product), 0))
    assert kernel.metadata.shared * launch.resident <= HOPPER.shared_memory


def test_float16_with_the_fewest_steps_compiles_within_registers():
    kernel = compiling.compile_linear(HOPPER, CASES[0][0], torch.float16, k=128)
    compiling.assert_fits(HOPPER, kernel)
    assert "fma.rn.f16x2" in kernel.asm["ptx"] and "bf16" not in kernel.asm["ptx"]


@EACH
def test_products_of_a_step_follow_each_other(launch, product):
    """The compiler serialises products whose operands it cannot keep in place: it then waits behind each.

    Here a step is one group of four products, of 16 columns each. They are waited for once, and what they read is given
    back only when every warp of the group has got so far.
    """
    for loop in loops(compiling.operations(compiled(launch, product))):
        products = compiling.places(loop, "HGMMA")
        step = loop[products[0] : products[-1] + 1]
        assert not [line for line in step if line.startswith(("WARPGROUP", "BAR", "LDL", "STL"))]
        assert [loop[place].rstrip().endswith("gsb0") for place in products] == [False, False, False, True]
        (wait,) = compiling.places(loop, "WARPGROUP.DEPBAR")
        (given_back,) = compiling.places(loop, "SYNCS.ARRIVE")
        assert loop[wait].rstrip().endswith("gsb0, 0x0")
        assert any(wait < place < given_back for place in compiling.places(loop, "BAR.SYNC"))


@EACH
def test_decoded_weights_stay_in_registers_and_cost_few_instructions(launch, product):
    for loop in loops(compiling.operations(compiled(launch, product))):
        assert not [line for line in loop if line.startswith(("STS", "SHFL", "LDL", "STL"))]
        # The scales of a lane's two rows, and its codes.
        reads = [loop[place].split()[0] for place in compiling.places(loop, "LDS")]
        assert reads in (["LDS.S16", "LDS.128"], ["LDS.U16", "LDS.128"])
        assert len(loop) <= 4 * MOST_FOR_A_WORD


@EACH
def test_tiles_come_by_the_copy_engine(launch, product):
    code = compiling.operations(compiled(launch, product))
    assert compiling.places(code, "UTMALDG.2D")
    assert not compiling.places(code, "LDGSTS")


@pytest.mark.parametrize("by_expert", (False, True))
def test_rows_are_put_into_order_16_bytes_at_a_time(by_expert):
    kernel = compiling.compile_gather(HOPPER, by_expert=by_expert)
    compiling.assert_fits(HOPPER, kernel)
    code = compiling.operations(kernel)
    assert compiling.places(code, "LDG.E.128") and compiling.places(code, "STG.E.128")
    assert bool(compiling.places(code, "ACQBULK")) != by_expert
