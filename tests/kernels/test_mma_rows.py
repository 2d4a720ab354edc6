"""The kernels for many rows before Hopper, compiled for every generation, and what must hold of their machine code."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.errors import ArgumentError
from fp4pass.lowering import arch, heuristics_sm80, mma_rows
from fp4pass.lowering.launches import MmaRows
from fp4pass.lowering.layout import FRAGMENTS
from fp4pass.lowering.operands import Weight

from . import gluon_compiling as compiling
from .operands import weight

BEFORE_HOPPER = [generation for generation in arch.ARCHS.values() if not generation.wgmma]


def every_case():
    """Each launch and what it multiplies; for further generations the long run has those of fewer rows."""
    for generation in BEFORE_HOPPER:
        found = [(launch, experts) for experts, launch in generation.launches() if isinstance(launch, MmaRows)]
        cases = [
            (launch, product) for launch, experts in found for product in (("up", "down") if experts else ("dense",))
        ]
        for launch, product in (*cases, *((launch, "fp8") for launch in dict(heuristics_sm80._TILES_OF_BYTES))):
            again = generation.sm > 80 and launch.block_m < 128
            name = f"sm{generation.sm}-{product}-{launch}".replace(" ", "-")
            marks = (pytest.mark.fuzz,) if again else ()
            yield pytest.param(generation, launch, product, marks=marks, id=name)


EACH = pytest.mark.parametrize(("generation", "launch", "product"), list(every_case()), scope="module")
# Where 128 rows of x leave few registers, addresses of x are put aside, and most taken back once in a turn of the loop:
# the most loads and stores that Triton 3.6 and 3.9 leave, of a kernel with 384 products.
MOST_SPILLS = 80
# And where registers are fewer than the kernel would take, so that there is room for one program more; outside of the
# loop, where experts' second product has float32 sums and 64-bit addresses of scattered rows.
MOST_SPILLS_OF_FEWER = {"dense": 14, "up": 14, "down": 46}
# Of a multiprocessor, in bytes, and what each program takes beside its own.
SHARED, RESERVED, REGISTERS = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10}, 1024, 65536


def compiled(generation, launch, product):
    if product == "dense":
        return compiling.compile_linear(generation, launch, torch.bfloat16)
    if product == "fp8":
        return compiling.compile_fp8(generation, launch, torch.bfloat16)
    return compiling.compile_experts(generation, launch, torch.bfloat16, product)


def test_only_generations_before_hopper_have_launches():
    for generation in arch.ARCHS.values():
        found = any(isinstance(launch, MmaRows) for _, launch in generation.launches())
        assert found == (generation in BEFORE_HOPPER)


@EACH
def test_launch_compiles_within_shared_memory_and_registers(generation, launch, product):
    kernel = compiled(generation, launch, product)
    many, fewer = MOST_SPILLS if launch.block_m >= 128 else 0, MOST_SPILLS_OF_FEWER[product] if launch.registers else 0
    compiling.assert_fits(generation, kernel, spills=many + fewer)


@EACH
def test_eight_warps_have_a_place_on_a_multiprocessor(generation, launch, product):
    """Twelve, where registers are fewer. With less its tensor cores would wait for one warp's decoding, or barriers."""
    programs = (12 if launch.registers else 8) // launch.warps
    assert programs * (compiled(generation, launch, product).metadata.shared + RESERVED) <= SHARED[generation.sm]
    assert programs * launch.warps * 32 * (launch.registers or 255) <= REGISTERS


@EACH
def test_each_weight_is_decoded_once_for_all_rows_of_the_tile(generation, launch, product):
    """A unit's decoding has two multiplications for its scales and sixteen for its codes, whatever the rows of x.

    So have 16 rows of 64 bytes, without scales.
    """
    code = compiling.operations(compiled(generation, launch, product))
    products = len(compiling.places(code, "HMMA"))
    steps, rest = divmod(products, launch.high * 4 * launch.block_m // 8)
    assert rest == 0 and steps >= launch.slots
    assert len(compiling.places(code, "HFMA2")) == (16 if product == "fp8" else 18) * launch.high * steps
    # x comes out of shared memory in matrices of the tensor core, four at once.
    assert len(compiling.places(code, "LDSM.16.M88.4")) == steps * launch.block_m // 4


@EACH
def test_a_step_has_one_barrier_and_few_instructions_beside_its_products(generation, launch, product):
    """13 for a word of eight codes, 20 for as many bytes, and what reads x and the weight, and moves pointers."""
    code = compiling.operations(compiled(generation, launch, product))
    begin = compiling.places(code, "HMMA")[0]
    turn = code[begin : min(place for place in compiling.places(code, "BRA") if place > begin)]
    products = len(compiling.places(turn, "HMMA"))
    assert products == launch.slots * launch.high * 4 * launch.block_m // 8
    assert len(compiling.places(turn, "BAR")) < launch.slots
    assert launch.block_m >= 128 or not [line for line in turn if line.startswith(("LDL", "STL"))]
    assert (len(turn) - products) / (launch.slots * launch.high * 16) < (21 if product == "fp8" else 13)


def test_rows_of_x_that_lie_too_far_apart_are_refused():
    launch, out = MmaRows(64), torch.empty(2, 64, device="meta")
    operands = Weight(*weight(64, 128, order=FRAGMENTS), FRAGMENTS), None, out, "none", launch
    x = torch.empty((1 << 33) + 144, device="meta").as_strided((2, 128), ((1 << 33) + 16, 1))
    with pytest.raises(ArgumentError, match="17179869216 numbers"):
        mma_rows.linear(x, *operands)


def test_of_bytes_the_last_step_may_have_fewer_columns():
    """It is multiplied like the others: its loads are masked."""
    launch = MmaRows(64, high=1)
    for k, steps in ((48, 1), (80, 2), (208, 4)):
        code = compiling.operations(compiling.compile_fp8(arch.ARCHS[80], launch, torch.bfloat16, k=k))
        assert len(compiling.places(code, "HMMA")) == steps * 4 * launch.block_m // 8
        assert any(line.startswith("LDG.E.128") for line in code)
