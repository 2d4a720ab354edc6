"""The kernels for many rows, compiled for Hopper, and what must hold of their machine code."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.lowering import arch, bands, exchange, many_rows
from fp4pass.lowering.launches import ManyRows

from . import gluon_compiling as compiling

HOPPER = arch.ARCHS[90]
# What Triton at most puts aside before the loops and takes again once, parts of the thread's number and of how tiles
# are shared out, which all groups need: so many loads and stores, by rows of x, product and groups.
OLD_TRITON = version("triton").startswith("3.6")
MOST_SPILLS = {(16, "dense", 4): 3, (64, "dense", 2): 2}
if not OLD_TRITON:
    MOST_SPILLS = {(8, "dense", 4): 6, (16, "dense", 2): 10, (16, "dense", 4): 37, (32, "dense", 2): 3}
    MOST_SPILLS |= {(64, "dense", 2): 34, (64, "dense", 4): 10, (64, "up", 2): 6, (64, "down", 2): 7}
# Instructions of the loop for a word of eight codes, everything included; the decoding takes 13 of them.
MOST_FOR_A_WORD = 24
# And for each band after the first, whose products are four.
MOST_FOR_A_BAND = 24
CASES = [
    (launch, product)
    for experts, launch in HOPPER.launches()
    if isinstance(launch, ManyRows)
    # Without bias and scale there is only less to hold: that is tried where registers are fewest.
    for product in (("up", "down") if experts else ("dense", "plain") if launch.block_m >= 256 else ("dense",))
]


def each_of(cases):
    """The mark of a test of such cases; all of a launch follow each other: it is compiled and taken apart once."""
    return pytest.mark.parametrize(
        ("launch", "product"), cases, ids=lambda value: str(value).replace(" ", "-"), scope="module"
    )


EACH = each_of(CASES)


def compiled(launch, product):
    if product in ("up", "down"):
        return compiling.compile_experts(HOPPER, launch, torch.bfloat16, product)
    return compiling.compile_linear(HOPPER, launch, torch.bfloat16, plain=product == "plain")


def loops(launch, product):
    """The groups' loops over K, from a wait for a stage to the jump back behind the products, and of how many bands.

    Of experts each group has one for every number of bands that hold rows, or one for half of a single band, too.
    """
    code = compiling.operations(compiled(launch, product))
    products = compiling.places(code, "HGMMA")
    all_bands = bands.number_of_bands(launch.block_m, launch.band)
    found = []
    for wait in compiling.places(code, "WARPGROUP.DEPBAR"):
        group = [place for place in products if place < wait]
        products = products[len(group) :]
        begin = max(place for place in compiling.places(code, "SYNCS.PHASECHK") if place < group[0])
        end = min(place for place in compiling.places(code, "BRA") if place > group[-1])
        found.append((code[begin : end + 1], len(group) // (4 * launch.deep)))
    assert not products
    of_group = range(1, all_bands + 1) if product in ("up", "down") else (all_bands,)
    if product in ("up", "down") and bands.in_two_boxes(launch.block_m, launch.band):
        of_group = (1, 1)
    assert sorted(number for _, number in found) == sorted([*of_group] * launch.across * launch.split)
    return found


def test_only_hopper_has_launches():
    assert CASES
    for generation in arch.ARCHS.values():
        found = any(isinstance(launch, ManyRows) for _, launch in generation.launches())
        assert found == generation.wgmma


@EACH
def test_launch_compiles_within_shared_memory_and_registers(launch, product):
    kernel = compiled(launch, product)
    size = (launch.block_m, product, launch.across * launch.split)
    compiling.assert_fits(HOPPER, kernel, spills=MOST_SPILLS.get(size, 0))
    # A multiprocessor has 228 KiB and keeps one of them for each program.
    assert (kernel.metadata.shared + 1024) * max(launch.resident, launch.room) <= 228 << 10


def test_float16_with_the_fewest_steps_compiles_within_registers():
    kernel = compiling.compile_linear(HOPPER, CASES[0][0], torch.float16, k=192)
    compiling.assert_fits(HOPPER, kernel)
    assert "fma.rn.f16x2" in kernel.asm["ptx"] and "bf16" not in kernel.asm["ptx"]


@EACH
def test_products_of_a_step_follow_each_other(launch, product):
    """The compiler serialises products whose operands it cannot keep in place: it then waits behind each.

    Here a unit is four products, of 16 columns each. Those of a step are waited for once, and what they read is given
    back only when every warp of the group has got so far.
    """
    for loop, number in loops(launch, product):
        products = compiling.places(loop, "HGMMA")
        step = loop[products[0] : products[-1] + 1]
        assert not [line for line in step if line.startswith(("BAR", "LDL", "STL"))]
        between = [line.rstrip() for line in step if line.startswith("WARPGROUP")]
        assert between == ["WARPGROUP.ARRIVE"] * (launch.deep * number - 1)
        ends = [loop[place].rstrip().endswith("gsb0") for place in products]
        assert ends == [False, False, False, True] * launch.deep * number
        (wait,) = compiling.places(loop, "WARPGROUP.DEPBAR")
        (given_back,) = compiling.places(loop, "SYNCS.ARRIVE")
        assert loop[wait].rstrip().endswith("gsb0, 0x0")
        assert any(wait < place < given_back for place in compiling.places(loop, "BAR.SYNC"))


@EACH
def test_decoded_weights_stay_in_registers_and_cost_few_instructions(launch, product):
    for loop, number in loops(launch, product):
        assert not [line for line in loop if line.startswith(("STS", "STL", "LDL"))]
        # A lane's scales, which it shares with its neighbours, and its codes.
        reads = sorted(loop[place].split()[0] for place in compiling.places(loop, "LDS"))
        assert reads in (["LDS.128"] * launch.deep + [f"LDS.{kind}16"] * launch.deep for kind in "SU")
        assert len(compiling.places(loop, "SHFL.IDX")) == 4 * launch.deep == len(compiling.places(loop, "SHFL"))
        assert len(loop) <= (4 * MOST_FOR_A_WORD + MOST_FOR_A_BAND * (number - 1)) * launch.deep


@EACH
def test_tiles_come_by_the_copy_engine(launch, product):
    code = compiling.operations(compiled(launch, product))
    assert compiling.places(code, "UTMALDG.2D")
    assert not compiling.places(code, "LDGSTS")


# Those of ``down`` have 32 bits, which the instruction that is looked for does not store.
@each_of([case for case in CASES if case[1] != "down"])
def test_results_are_turned_in_memory_of_each_groups_own_behind_barriers(launch, product):
    """Triton places that memory and the barriers: no group may write where another reads, nor a warp too soon."""
    code = compiling.operations(compiled(launch, product))
    stores = compiling.places(code, "STSM")
    each = len(stores) // launch.across
    of_group = [stores[group * each : (group + 1) * each] for group in range(launch.across)]
    where = [{re.search(r"0x[0-9a-f]+", code[place])[0] for place in places} for places in of_group]
    assert sum(map(len, where)) == len(set().union(*where)) > 0
    for places in of_group:
        end = next(place for place in compiling.places(code, "LDS.128") if place > places[-1])
        before = "BAR"
        for line in code[places[0] : end + 1]:
            kind = next((kind for kind in ("STSM", "LDS.128", "BAR") if line.startswith(kind)), None)
            assert {before, kind} != {"STSM", "LDS.128"}
            before = kind or before


@EACH
def test_packets_of_sums_are_written_and_read_as_a_whole(launch, product):
    """A packet is there when its mark is: a load or store in two parts could tear it. Sums with a flag need none."""
    code = compiling.operations(compiled(launch, product))
    packets = exchange.packets_of_thread(launch.block_m) if exchange.in_packets(launch.block_m, launch.split) else 0
    collectors, leavers = launch.across * launch.split, launch.across
    if packets:
        assert len(compiling.places(code, "LDG.E.128.STRONG.GPU")) == packets * collectors
    assert len(compiling.places(code, "STG.E.128.STRONG.GPU")) == packets * leavers
    # Marks alone are cleared.
    assert len(compiling.places(code, "STG.E.64.STRONG.GPU")) == packets * collectors


def test_rows_are_gathered_16_bytes_at_a_time():
    kernel = compiling.compile_gather(HOPPER)
    compiling.assert_fits(HOPPER, kernel)
    code = compiling.operations(kernel)
    assert compiling.places(code, "LDG.E.128") and compiling.places(code, "STG.E.128")


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.bfloat16, many_rows._swizzled()), (torch.int32, many_rows._straight(32))], ids=str
)
def test_boxes_are_described_as_triton_describes_them(dtype, layout):
    tensor, box = torch.zeros(24, 128, dtype=dtype)[:, :64], [8, 64]
    ours = many_rows._Boxes(tensor, 24, 64, 128, box, layout)
    theirs = many_rows.TensorDescriptor.from_tensor(tensor, box, layout)
    assert vars(ours).pop("base") is vars(theirs).pop("base")
    theirs.shape, theirs.strides = list(theirs.shape), list(theirs.strides)
    assert vars(ours) == vars(theirs)
