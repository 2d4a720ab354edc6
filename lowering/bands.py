# ruff: noqa: ANN001, ANN201, RUF005, RUF059  (kernels: Triton types the parameters, and compiles no starred tuple)

"""The products of a group of many_rows.py: its 64 rows of the weight times a tile's rows of x, which come in *bands*.

Most tiles have one band. Several make a tile of 192 rows, as sizes of tensors are powers of two; or one of 256 for
experts, of which only the bands that hold rows are multiplied: how many there are, an expert's last tile alone knows.
Of experts' tiles with one band it may be half of that.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .epilogue import GROUP_ROWS, joined, sums_layout
from .sharing import rows_of_box
from .units import UNIT_COLUMNS, UNIT_SCALES, UNIT_WORDS, decode_units


@gluon.constexpr_function
def bands_of(bm, band):
    """Their sizes: powers of two, of which the last is ``band`` and each other as large as can be.

    Of 256 and 64 they are 128, 64 and 64; of 192 and 64, 128 and 64; of 256 and 256, 256.
    """
    sizes = []
    while bm > band:
        sizes.append(1 << (bm - 1).bit_length() - 1)
        bm -= sizes[-1]
    return [*sizes, bm]


@gluon.constexpr_function
def number_of_bands(bm, band):
    """How many there are."""
    return len(bands_of(bm, band))


@gluon.constexpr_function
def size_of(nth, bm, band):
    """How many rows of x one has."""
    return bands_of(bm, band)[nth]


@gluon.constexpr_function
def begin_of(nth, bm, band):
    """Which row of the tile is its first."""
    return sum(bands_of(bm, band)[:nth])


@gluon.constexpr_function
def in_two_boxes(bm, band):
    """Whether rows of x come as two halves of a single band, of which one may be enough."""
    return band == bm == 2 * rows_of_box(bm, band)


@gluon.jit
def bands_with(rows, BM: gl.constexpr, BAND: gl.constexpr):
    """How many bands of a tile hold some of ``rows`` rows; one at least."""
    bands = 1
    for nth in gl.static_range(1, number_of_bands(BM, BAND)):
        bands += gl.where(rows > begin_of(nth, BM, BAND), 1, 0)
    return bands


@gluon.constexpr_function
def unit_layout(width):
    """Four units ``[4, width * 32]``: one for each warp, each lane ``width`` neighbours."""
    return gl.BlockedLayout([1, width], [1, 32], [4, 1], [1, 0])


@gluon.jit
def decode(ring, stage, half, GROUP: gl.constexpr):
    """The group's 64 rows of one unit of a stage, as ``decode_units`` has them."""
    tokens, codes, scales, full, empty = ring
    WORDS: gl.constexpr = unit_layout(4)
    SCALES: gl.constexpr = unit_layout(1)
    words = codes.index(stage).slice(GROUP * 4, 4).slice(half * UNIT_WORDS, UNIT_WORDS, dim=1).load(WORDS)
    scale = scales.index(stage).slice(GROUP * 4, 4).slice(half * UNIT_SCALES, UNIT_SCALES, dim=1).load(SCALES)
    weight = decode_units(words.reshape([4, 1, UNIT_WORDS]), scale.reshape([4, 1, UNIT_SCALES]), 0, tokens.dtype)
    return weight.reshape([GROUP_ROWS, UNIT_COLUMNS])


@gluon.jit
def plus_product(acc, weight, rows):
    """``acc`` plus, later, the product of decoded weights ``[64, 64]`` and rows of x ``[rows, 64]``, of which it is."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, sums_layout(rows.shape[0]), 2)
    left = gl.convert_layout(weight, LEFT, assert_trivial=True)
    return warpgroup_mma(left, rows.permute((1, 0)), acc, is_async=True)


@gluon.jit
def products(
    ring,
    steps,
    GROUP: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
    BANDS: gl.constexpr,
):
    """The sums ``[64, size]`` of each band over every SPLIT-th of the steps; beyond the first BANDS they are zero.

    The product of a unit runs while the next one is decoded, but it waits for all of a step before the next step: the
    compiler would serialise products if registers of one on its way from one round of the loop to the next were
    written. The other groups fill the gap.
    """
    tokens, codes, scales, full, empty = ring
    begin, end = steps
    STAGES: gl.constexpr = codes.shape[0]
    DEEP: gl.constexpr = tokens.shape[0] // STAGES
    accs = ()
    for nth in gl.static_range(number_of_bands(BM, BAND)):
        accs = accs + (nothing(size_of(nth, BM, BAND)),)
    for at in range(begin, end, SPLIT):
        stage = at % STAGES
        mbarrier.wait(full.index(stage), at // STAGES & 1)
        for half in gl.static_range(DEEP):
            weight = decode(ring, stage, half, GROUP)
            running = ()
            for nth in gl.static_range(BANDS):
                rows = tokens.index(stage * DEEP + half).slice(begin_of(nth, BM, BAND), size_of(nth, BM, BAND))
                running = running + (plus_product(accs[nth], weight, rows),)
            accs = running + accs[BANDS:]
        done = warpgroup_mma_wait(0, deps=accs[:BANDS])
        accs = (done if BANDS > 1 else (done,)) + accs[BANDS:]
        mbarrier.arrive(empty.index(stage), count=1)
    return accs


@gluon.jit
def nothing(ROWS: gl.constexpr):
    """Sums of no steps."""
    return gl.zeros([GROUP_ROWS, ROWS], gl.float32, layout=sums_layout(ROWS))


@gluon.jit
def product_of(ring, steps, rows, GROUP: gl.constexpr, SPLIT: gl.constexpr, BM: gl.constexpr):
    """``products`` of a single band; of its first half alone, where that has all ``rows`` of the tile.

    The other half of the sums is zero then. It has no registers of its own before they are all there: two loops that
    write the same ones, or only some of them, the compiler would serialise.
    """
    if rows <= BM // 2:
        half = products(ring, steps, GROUP, SPLIT, BM // 2, BM // 2, 1)[0]
        acc = joined(half, nothing(BM // 2))
    else:
        acc = products(ring, steps, GROUP, SPLIT, BM, BM, 1)[0]
    return acc


@gluon.jit
def products_with(
    ring,
    steps,
    bands,
    GROUP: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BAND: gl.constexpr,
    BANDS: gl.constexpr,
):
    """``products`` with so many bands, BANDS at most."""
    if BANDS == 1:
        return products(ring, steps, GROUP, SPLIT, BM, BAND, 1)
    else:
        if bands == BANDS:
            accs = products(ring, steps, GROUP, SPLIT, BM, BAND, BANDS)
        else:
            accs = products_with(ring, steps, bands, GROUP, SPLIT, BM, BAND, BANDS - 1)
        return accs
