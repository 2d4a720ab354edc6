"""The kernels for few rows, compiled for every GPU generation, and what must hold of their machine code."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError

from fp4pass.lowering import arch, few_rows
from fp4pass.lowering.launches import FewRows
from fp4pass.lowering.layout import FRAGMENTS
from fp4pass.lowering.operands import Weight

from . import gluon_compiling as compiling

HOPPER = arch.ARCHS[90]
# Of slots that run by themselves.
DIRECT = HOPPER.launch(0, torch.bfloat16, FRAGMENTS, columns=64, depth=64, experts=True)
# A few addresses are put aside with long loops and, before Hopper, with much x: the most that Triton 3.6 and 3.9 leave,
# by rows of x.
MOST_SPILLS = {("dense", 8): 4, ("up", 16): 8, ("down", 32): 14}
# A unit's codes are one load of 16 bytes a lane, past the L1 cache, its scales one of two. Tokens are copied into
# shared memory.
CODES, SCALES, TOKENS = "LDG.E.128.STRONG.GPU", "LDG.E.U16", "LDGSTS.E.BYPASS.128"


def products(experts, launch):
    """What a launch is compiled as."""
    if not experts:
        return ("dense",)
    return ("direct",) if launch == DIRECT else ("up", "down")


def every_launch():
    """All of them; those that differ from one already listed by their generation alone are left to the long run.

    But for the widest, so that every generation is among them.
    """
    listed = set()
    for generation in sorted(arch.ARCHS.values(), key=lambda each: -each.sm):
        for experts, launch in generation.launches():
            if not isinstance(launch, FewRows):
                continue
            again = (experts, launch) in listed and launch.block_m < 64
            listed.add((experts, launch))
            for product in products(experts, launch):
                size = f"{launch.block_m}x16x{launch.across}x{launch.high}"
                name = f"sm{generation.sm}-{product}-{size}-{launch.warps}warps-{launch.depth}steps-{launch.room}room"
                yield pytest.param(
                    generation,
                    launch,
                    product,
                    marks=(pytest.mark.fuzz,) if again else (),
                    id=name + ("-early" if launch.early else ""),
                )


def deep(generation, launch):
    """As many columns as make a loop, if a launch is taken for weights of so many."""
    return 8192 if (generation.sm, launch) in TAKEN_FOR_DEEP_ONES else LESS_THAN_USUAL


def compiled(generation, launch, product):
    """The fewest rows over many columns; the others over as many as nano has."""
    if product == "dense":
        k = deep(generation, launch) if launch.block_m <= 16 else compiling.HIDDEN
        return compiling.compile_linear(generation, launch, torch.bfloat16, k=k)
    return compiling.compile_experts(generation, launch, torch.bfloat16, product)


LESS_THAN_USUAL = 4032  # see heuristics_sm90.py
TAKEN_FOR_DEEP_ONES = {
    (generation.sm, generation.launch(rows, torch.bfloat16, FRAGMENTS, columns=columns, depth=8192))
    for generation in arch.ARCHS.values()
    for rows in range(1, 257)
    for columns in (256, 1024, 3072, 4352, 8192, 65536)
}
DENSE = [each for experts, each in HOPPER.launches() if isinstance(each, FewRows) and not experts]


@pytest.mark.parametrize(("generation", "launch", "product"), every_launch())
def test_launch_compiles_within_shared_memory_and_registers(generation, launch, product):
    kernel = compiled(generation, launch, product)
    compiling.assert_fits(generation, kernel, spills=MOST_SPILLS.get((product, launch.block_m), 0))
    assert compiling.places(compiling.operations(kernel), "HMMA")


def test_float16_without_bias_and_global_scale_compiles_within_registers():
    kernel = compiling.compile_linear(HOPPER, DENSE[0], torch.float16, plain=True)
    compiling.assert_fits(HOPPER, kernel)
    assert "fma.rn.f16x2" in kernel.asm["ptx"] and "bf16" not in kernel.asm["ptx"]


# All tests of a launch follow each other: it is compiled and taken apart once.
EACH_DENSE = pytest.mark.parametrize(
    "launch", DENSE, ids=lambda launch: f"{launch}, {launch.depth} steps, {launch.room}", scope="module"
)


@pytest.mark.parametrize("looping", (False, True))
@EACH_DENSE
def test_weight_is_on_its_way_before_the_first_product(launch, looping):
    """Left alone, ptxas moves loads next to their uses: over nano's columns, where there is no loop, it did.

    A warp then waits for memory at every step. So before the first product stand all loads of the first DEPTH steps,
    and behind them the barrier that they may not pass.
    """
    k = deep(HOPPER, launch) if looping else compiling.HIDDEN
    code = compiling.operations(compiling.compile_linear(HOPPER, launch, torch.bfloat16, k=k))
    product, barrier = (compiling.places(code, name)[0] for name in ("HMMA", "BAR.SYNC"))
    steps = -(-k // (64 * launch.warps // launch.across))
    for load in (CODES, SCALES):
        early = [place for place in compiling.places(code, load) if place < barrier]
        assert len(early) == min(steps, launch.depth) * launch.high, load
    assert barrier < product


@EACH_DENSE
def test_decoding_and_multiplying_a_weight_takes_few_instructions(launch):
    """A lane takes eight weights into each product of the tensor core.

    Per weight the whole kernel, beginning and end included, has 3.1 to 3.3 (Triton 3.9) or 3.2 to 3.35 (3.6).
    """
    code = compiling.operations(compiled(HOPPER, launch, "dense"))
    assert len(code) / (8 * len(compiling.places(code, "HMMA"))) < 3.4


@EACH_DENSE
def test_an_early_launch_reads_its_weight_before_it_waits_and_its_tokens_after(launch):
    """Tokens may be what the kernel before still writes: none may be read, nor a result stored, ahead of the wait."""
    code = compiling.operations(compiled(HOPPER, launch, "dense"))
    begins, waits = compiling.places(code, "PREEXIT"), compiling.places(code, "ACQBULK")
    assert (len(begins), len(waits)) == ((1, 1) if launch.early else (0, 0))
    if launch.early:
        codes = [place for place in compiling.places(code, CODES) if place < waits[0]]
        assert begins[0] < codes[0] and len(codes) == launch.depth * launch.high
        assert waits[0] < min(compiling.places(code, TOKENS) + compiling.places(code, "STG"))


@EACH_DENSE
def test_x_passes_through_shared_memory_once_for_all_warps(launch):
    """16 bytes a lane at a time, four matrices of the tensor core at once.

    With several rows there is a barrier for each step, with one that is there as a whole none.
    """
    k = compiling.HIDDEN  # No step is in a loop.
    code = compiling.operations(compiling.compile_linear(HOPPER, launch, torch.bfloat16, k=k))
    split = launch.warps // launch.across
    steps = -(-k // (64 * split))
    units = 1 << (k // 64 - 1).bit_length() if launch.block_m == 1 else steps * split
    copies = [line for line in code if line.startswith("LDGSTS")]
    assert len(copies) == launch.block_m * units * 64 // (8 * 32 * launch.warps)
    assert all(line.startswith(TOKENS) for line in copies)
    assert len(compiling.places(code, "LDSM.16.M88.4")) == 2 * steps * max(1, launch.block_m // 8)
    assert (len(compiling.places(code, "BAR.SYNC")) > steps) == (launch.block_m > 1)


def test_a_launch_with_room_for_some_programs_has_none_for_one_more():
    limited = [each for each in DENSE if each.room]
    assert limited
    for launch, k in itertools.product(limited, (1024, 8192)):
        taken = compiling.compile_linear(HOPPER, launch, torch.bfloat16, k=k).metadata.shared
        assert launch.room * (taken + 1024) <= 228 << 10 < (launch.room + 1) * (taken + 1024)


def test_a_launch_with_a_single_slot_is_refused():
    """It gave wrong numbers."""
    with pytest.raises(CompilationError) as caught:
        compiling.compile_linear(HOPPER, FewRows(8, 8, 8, slots=1), torch.bfloat16)
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert "another is on its way" in str(error)


@pytest.mark.parametrize(
    ("n", "count", "high", "tiles", "limited"),
    [
        (4096, 132, 2, 128, True),
        (4096, 114, 2, 128, False),
        (4112, 132, 2, 129, True),
        (16, 132, 1, 1, True),
    ],
)
def test_programs_keep_each_other_away_only_where_all_have_a_place(monkeypatch, n, count, high, tiles, limited):
    """And a weight that is lower than a program's rows is not read past its end."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: started.append((grid, constants))

    started = []
    monkeypatch.setattr(few_rows, "linear_kernel", Kernel())
    monkeypatch.setattr(few_rows, "multiprocessors", lambda device: count)
    x, codes, scale = torch.zeros(8, 64).bfloat16(), *(torch.zeros(n, k, dtype=torch.uint8) for k in (32, 4))
    launch = FewRows(8, 8, 8, slots=8, room=1, high=2)
    few_rows.linear(x, Weight(codes, scale, None, FRAGMENTS), None, x.new_empty(8, n), "none", launch)
    ((grid, constants),) = started
    assert (grid, constants["HIGH"]) == ((tiles, 1), high)
    assert (constants["LEAST_KIB"] > 0) == limited
