"""The kernels of the layout ``fragments`` on a GPU, for few rows and for many: `python -m pytest tests/kernels -m gpu`.

What holds for every layout is tested in test_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import arch, layout, ops, reference
from fp4pass.lowering.arch import rows_of_expert

from .operands import activations, assert_within, every_product, stored, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

fp4pass = torch.ops.fp4pass
ORDER = layout.FRAGMENTS
HALVES = (torch.bfloat16, torch.float16)
DENSE = {torch.bfloat16: 0.0018, torch.float16: 0.00025}
# Narrow blocks average over few roundings.
MOE, NARROW = {torch.bfloat16: 0.0025, torch.float16: 0.0004}, 1.3
# Around the edges of all tiles, and more rows than the widest has, by a few and by many.
ROWS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 513, 576, 1030)
# One number of rows for each tile of a dense product.
EACH_TILE = (3, 12, 20, 50, 65, 180, 200, 300)


def dense(n, k, seed=0):
    """A random weight in units."""
    return weight(n, k, seed=seed, order=ORDER, device="cuda")


def block(experts, hidden, inner):
    """The weights of a block of experts."""
    up = weight(experts, inner, hidden, seed=2, order=ORDER, device="cuda")
    return up, weight(experts, hidden, inner, seed=3, order=ORDER, device="cuda")


def normal(*shape, dtype=torch.bfloat16, seed=1):
    return activations(*shape, dtype=dtype, seed=seed, device="cuda")


def routed(tokens, choices, experts, seed=0):
    """Distinct experts for each token, and routing weights."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device="cuda")
    weights, ids = scores.topk(choices, -1)
    return ids, weights


def exact_linear(x, codes, scale, global_scale, bias=None):
    """The oracle, unrounded."""
    exact = x.double() @ reference.dequantize(codes, scale, global_scale, torch.float64, ORDER).mT
    return exact if bias is None else exact + bias.double()


def exact_experts(x, ids, weights, up, down, activation="relu2"):
    return reference.experts(x.double(), ids, weights, *up, *down, activation, ORDER, torch.float64)


def launch(rows, n, k, *, experts=False):
    """What a product runs with; ``rows``: an expert's, for experts."""
    generation = arch.target(torch.device("cuda"))
    return generation.launch(rows, torch.bfloat16, ORDER, columns=n, depth=k, experts=experts)


def every_product_in(n, k):
    """All 4,064 finite products ``n / 256`` times over and ``k / 256`` times side by side.

    As a weight ``[n, k]``, 256 columns each of which has all of them, at random places along K, and the rows of the
    result that one-hot activations at these columns give.
    """
    codes, scale, expected = every_product()
    codes, scale = (t.repeat(n // 256, k // 256).cuda() for t in (codes, scale))
    offsets = torch.randint(0, k // 256, (256,), generator=torch.Generator().manual_seed(k))
    columns = (torch.arange(256) + 256 * offsets).cuda()
    return stored(codes, scale, ORDER), columns, expected.mT.repeat(1, n // 256).cuda()


def one_hot(columns, k, dtype):
    return torch.nn.functional.one_hot(columns, k).to(dtype)


# Their widths and depths choose between the launches; with the deeper one every warp has many steps.
SHAPES = [
    *((n, k) for n in (256, 1024, 3072, 4352, 8192) for k in (256, 8448)),
    (8192, 4352),
    (8704, 256),
    (65536, 256),
]
# Before Hopper also how many multiprocessors the GPU has.
SHAPES += [(21760, 256)]
ROWS_AT_ONCE = (1, 8, 16, 32, 64, 128, 192, 256)


def test_the_shapes_of_exact_products_meet_every_launch():
    generation = arch.target(torch.device("cuda"))
    met = {(False, launch(rows, n, k)) for n, k in SHAPES for rows in ROWS_AT_ONCE}
    at_once = [rows_of_expert(slots, 2) for slots in SLOTS_AT_ONCE]
    met |= {(True, launch(rows, 256, k, experts=True)) for k in (256, 8448) for rows in at_once}
    # More than 256 rows have tiles of their own.
    met |= {(False, launch(1030, n, k)) for n, k in SHAPES} | {(False, launch(512, *SHAPES[0]))}
    assert set(generation.launches()) <= met


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_all_finite_products_come_out_of_linear(n, k, dtype):
    operands, columns, expected = every_product_in(n, k)
    x = one_hot(columns, k, dtype)
    for rows in ROWS_AT_ONCE:
        for first in range(0, 256, rows):
            result = fp4pass.linear(x[first : first + rows], *operands, None, None, ORDER)
            assert torch.equal(result.double(), expected[first : first + rows]), rows
    result = fp4pass.linear(x.repeat(5, 1)[:1030], *operands, None, None, ORDER)
    assert torch.equal(result.double(), expected.repeat(5, 1)[:1030])


# With two experts: directly; then about 8, 12, 14, 32, 48, 100 and 300 rows an expert.
SLOTS_AT_ONCE = (1, 2, 16, 24, 28, 64, 96, 200, 600)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", (256, 8448))
def test_all_finite_products_come_out_of_expert_products(k, dtype):
    (codes, scale), columns, expected = every_product_in(256, k)
    operands = torch.stack([torch.zeros_like(codes), codes]), torch.stack([scale, scale]), None
    for slots in SLOTS_AT_ONCE:
        ids = torch.ones(slots, dtype=torch.int32, device="cuda")
        # Some go to the other expert, whose weight is zero.
        ids[5::7] = 0
        for first in range(0, 256, slots):
            chosen = (torch.arange(slots, device="cuda") + first) % 256
            result = fp4pass.gathered_linear(one_hot(columns[chosen], k, dtype), *operands, ids, ORDER)
            assert torch.equal(result.double(), expected[chosen] * ids[:, None]), slots


@pytest.mark.parametrize("k", (64, 128, 192, 1856, 2688))
def test_linear_meets_the_oracle_at_ragged_sizes_and_every_number_of_rows(k):
    for n in (16, 48, 208, 1856):
        operands, bias = dense(n, k), normal(n, seed=9)
        x = normal(max(ROWS), k)
        exact = exact_linear(x, *operands, bias)
        for rows in ROWS:
            result = fp4pass.linear(x[:rows], *operands, bias, ORDER)
            assert_within(result, exact[:rows], DENSE[torch.bfloat16], (n, rows))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), [(1040, 2112), (3088, 4160), (4240, 1088), (10304, 2688), (8208, 4160)])
def test_linear_meets_the_oracle_at_the_other_launches_widths(n, k, dtype):
    codes, scale, global_scale = dense(n, k)
    x = normal(300, k, dtype=dtype)
    for operands in ((codes, scale, global_scale), (codes, scale, None)):
        exact = exact_linear(x * 2**-6, *operands)
        for rows in EACH_TILE:
            assert_within(fp4pass.linear(x[:rows] * 2**-6, *operands, None, ORDER), exact[:rows], DENSE[dtype], rows)


@pytest.mark.parametrize("dtype", HALVES)
def test_launches_for_gpus_without_wgmma_meet_the_oracle(dtype):
    """They run on any; what they are compiled to there is tested without a GPU."""
    ampere = arch.ARCHS[80]
    kernels = {name: ops.kernels(name) for name in ("linear", "experts")}
    for n, k in ((1040, 2112), (4112, 1088)):
        operands, x = dense(n, k), normal(70, k, dtype=dtype)
        exact = exact_linear(x, *operands)
        for rows in (1, 2, 8, 9, 16, 20, 32, 33, 64, 70):
            result = kernels["linear"].linear(x[:rows], *operands, None, ORDER, arch=ampere)
            assert_within(result, exact[:rows], DENSE[dtype], (n, rows))
    up, down = block(8, 832, 320)
    for tokens in (1, 20, 40, 80, 200):
        ids, weights = routed(tokens, 2, 8)
        x = normal(tokens, 832, dtype=dtype)
        result = kernels["experts"].experts(x, ids, weights, *up, *down, "relu2", ORDER, arch=ampere)
        assert_within(result, exact_experts(x, ids, weights, up, down), NARROW * MOE[dtype], tokens)


@pytest.mark.parametrize("rows", EACH_TILE)
@pytest.mark.parametrize("activation", tuple(reference.ACTIVATIONS))
def test_activation_and_cast_come_after_the_bias(activation, rows):
    operands, bias = dense(208, 1856), normal(208, seed=9)
    x = normal(rows, 1856)
    for added in (None, bias):
        exact = reference.ACTIVATIONS[activation](exact_linear(x, *operands, added))
        result = fp4pass.linear(x, *operands, added, ORDER, activation)
        assert result.dtype == x.dtype
        assert_within(result, exact, DENSE[torch.bfloat16], added is None)
        unrounded = fp4pass.linear(x, *operands, added, ORDER, activation, torch.float32)
        assert unrounded.dtype == torch.float32
        assert_within(unrounded, exact, 1e-5, added is None)
        assert torch.equal(unrounded.to(x.dtype), result)


@pytest.mark.parametrize("rows", EACH_TILE)
def test_activations_keep_nan(rows):
    operands, x = dense(208, 1856), normal(rows, 1856)
    x[rows // 2, 7] = torch.nan
    for activation in reference.ACTIVATIONS:
        result = fp4pass.linear(x, *operands, None, ORDER, activation)
        assert result[rows // 2].isnan().all() and result.isnan().sum() == 208


@pytest.mark.parametrize("rows", EACH_TILE)
def test_strides_of_x_and_where_it_starts_change_nothing(rows):
    k = 1856
    operands, bias = dense(208, k), normal(208, seed=9)
    x = normal(rows, k)
    expected = fp4pass.linear(x, *operands, bias, ORDER)
    assert_within(expected, exact_linear(x, *operands, bias), DENSE[torch.bfloat16])
    spaced, padded, odd = (x.new_full(shape, torch.nan) for shape in ((2 * rows, k), (rows, k + 8), (rows, k + 3)))
    shifted = x.new_full((rows * k + 1,), torch.nan)[1:].view(rows, k)
    transposed = x.mT.contiguous().mT
    assert shifted.data_ptr() % 4 == 2
    for other in (spaced[::2], padded[:, 8:], padded[:, :k], odd[:, 3:], odd[:, 1 : k + 1], shifted, transposed):
        other.copy_(x)
        assert torch.equal(fp4pass.linear(other, *operands, bias, ORDER), expected), other.stride()
    folded = fp4pass.linear(x.view(1, rows, 1, k), *operands, bias, ORDER)
    assert torch.equal(folded.view(rows, 208), expected)


@pytest.mark.parametrize("rows", EACH_TILE)
def test_one_row_stands_for_all(rows):
    operands, row = dense(208, 1856), normal(1, 1856)
    expected = fp4pass.linear(row.expand(rows, -1).contiguous(), *operands, None, ORDER)
    assert torch.equal(fp4pass.linear(row.expand(rows, -1), *operands, None, ORDER), expected)


@pytest.mark.parametrize("rows", EACH_TILE)
def test_weights_that_start_anywhere_in_their_storage(rows):
    codes, scale, global_scale = dense(208, 1856)
    x = normal(rows, 1856)
    expected = exact_linear(x, codes, scale, global_scale)
    for before in (4, 16):
        moved = [torch.cat([t.new_zeros(before), t.flatten()])[before:].view(t.shape) for t in (codes, scale)]
        result = fp4pass.linear(x, *moved, global_scale, None, ORDER)
        assert_within(result, expected, DENSE[torch.bfloat16], before)


def test_weights_and_results_of_more_than_two_to_the_31_elements():
    n, k = (1 << 21) + 32, 8192
    # Any bytes are a weight in any order.
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0x28, 0x48, (n, k // 16), dtype=torch.uint8, device="cuda")
    assert codes.numel() // 4 > 2**31 and 1030 * n > 2**31
    x = normal(1030, k)
    for rows in (1, 20, 60, 1030):
        result = fp4pass.linear(x[:rows], codes, scale, None, None, ORDER)
        for first in (0, n // 2, n - 48):
            part = slice(first, first + 48)
            exact = exact_linear(x[:rows], codes[part], scale[part], None)
            assert_within(result[:, part], exact, DENSE[torch.bfloat16], (rows, first))


def test_experts_of_more_than_two_to_the_31_words():
    count, n, k = 130, 16384, 8192
    codes = torch.randint(0, 256, (count, n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0x28, 0x48, (count, n, k // 16), dtype=torch.uint8, device="cuda")
    assert codes[:-1].numel() // 4 > 2**31
    for rows in (4, 200, 5000):
        x, ids = normal(rows, k), torch.arange(rows, device="cuda") % 2 * (count - 1)
        result = fp4pass.gathered_linear(x, codes, scale, None, ids, ORDER)
        for expert in (0, count - 1):
            exact = exact_linear(x[ids == expert], codes[expert, -48:], scale[expert, -48:], None)
            assert_within(result[ids == expert, -48:], exact, DENSE[torch.bfloat16], (rows, expert))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("hidden", "inner"), [(64, 64), (192, 64), (64, 192), (128, 128), (1856, 832)])
def test_experts_meet_the_oracle_from_one_token_to_many(hidden, inner, dtype):
    up, down = block(16, hidden, inner)
    for tokens in (1, 2, 4, 5, 30, 90, 130, 200, 700, 3000):
        ids, weights = routed(tokens, 4, 16, seed=tokens)
        x = normal(tokens, hidden, dtype=dtype)
        for activation in ("relu2", "silu"):
            result = fp4pass.experts(x, ids.int(), weights.to(dtype), *up, *down, activation, ORDER)
            exact = exact_experts(x, ids, weights.to(dtype), up, down, activation)
            assert_within(result, exact, NARROW * MOE[dtype], (tokens, activation))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", (64, 128, 256))
@pytest.mark.parametrize(("hidden", "inner"), [(192, 256), (2112, 1024)])
def test_experts_whose_last_tiles_have_rows_in_half_in_some_bands_or_in_all(hidden, inner, tile, dtype):
    """What an expert has decides which products run; those who share a tile leave sums of the others undone, too."""
    q = tile // 4
    counts = (0, 1, q, q + 1, 2 * q, 2 * q + 1, 3 * q, 3 * q + 1, 4 * q - 1, 4 * q, 4 * q + 1, 5 * q, 6 * q, 6 * q + 1)
    counts += (7 * q + 1, 8 * q)
    up, down = block(16, hidden, inner)
    ids = torch.repeat_interleave(torch.arange(16), torch.tensor(counts)).cuda()
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).cuda()][:, None]
    assert tile // 2 < rows_of_expert(len(ids), 16) <= tile
    x, weights = normal(len(ids), hidden, dtype=dtype), normal(len(ids), 1, seed=5)
    result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER)
    assert_within(result, exact_experts(x, ids, weights, up, down), NARROW * MOE[dtype])
    # What no product has written may be anything, but no row may show it.
    x[ids[:, 0] % 2 == 0] = torch.nan
    result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER)
    assert torch.equal(result.isnan().any(1), ids[:, 0] % 2 == 0)


def test_experts_meet_the_oracle_with_one_global_scale_and_with_none():
    up, down = block(16, 192, 128)
    for tokens in (3, 100, 700):
        ids, weights = routed(tokens, 4, 16, seed=tokens)
        x = normal(tokens, 192)
        for scales in ((up[2][:1], down[2][:1]), (up[2][3], down[2][3]), (None, None)):
            first, second = (*up[:2], scales[0]), (*down[:2], scales[1])
            result = fp4pass.experts(x, ids, weights, *first, *second, "relu2", ORDER)
            exact = exact_experts(x, ids, weights, first, second)
            assert_within(result, exact, NARROW * MOE[torch.bfloat16], tokens)


@pytest.mark.parametrize("tokens", (1, 3, 60, 700))
def test_sentinels_empty_experts_and_one_that_takes_everything(tokens):
    up, down = block(16, 192, 128)
    x = normal(tokens, 192)
    ids, weights = routed(tokens, 4, 5)
    ids[ids == 2], ids[ids == 3] = 16, -1
    ids[0] = 99
    weights[(ids < 0) | (ids > 15)] = torch.nan
    result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER)
    assert_within(result, exact_experts(x, ids, weights, up, down), NARROW * MOE[torch.bfloat16])
    assert not result[0].any()
    for expert in (0, 7, 15):
        alone = torch.full_like(ids[:, :1], expert)
        result = fp4pass.experts(x, alone, weights[:, :1].nan_to_num(1), *up, *down, "relu2", ORDER)
        exact = exact_experts(x, alone, weights[:, :1].nan_to_num(1), up, down)
        assert_within(result, exact, NARROW * MOE[torch.bfloat16], expert)
    for nowhere in (-1, 16, 2**31 - 1):
        result = fp4pass.experts(x, torch.full_like(ids, nowhere), weights, *up, *down, "relu2", ORDER)
        assert result.shape == x.shape and not result.any()


@pytest.mark.parametrize("choices", (0, 4))
def test_without_tokens_or_choices_there_is_nothing_to_do(choices):
    up, down = block(16, 192, 128)
    for tokens in (0, 5) if choices == 0 else (0,):
        ids, weights = routed(tokens, choices, 16)
        result = fp4pass.experts(normal(tokens, 192), ids, weights, *up, *down, "relu2", ORDER)
        assert result.shape == (tokens, 192) and not result.any()
    empty = torch.empty(0, dtype=torch.int64, device="cuda")
    assert fp4pass.gathered_linear(normal(0, 192), *up, empty, ORDER).shape == (0, 128)
    ends = torch.zeros(16, dtype=torch.int32, device="cuda")
    for rows in (0, 9, 900):
        result = fp4pass.grouped_linear(normal(rows, 192), *up, ends, ORDER)
        assert result.shape == (rows, 128) and not result.any()


@pytest.mark.parametrize("rows", (1, 5, 60, 150, 2000))
def test_gathered_and_grouped_meet_the_oracle_for_rows_of_any_stride(rows):
    operands = weight(16, 208, 320, order=ORDER, device="cuda")
    x = normal(rows, 323)[:, 3:]
    ids = torch.randint(-1, 17, (rows,), generator=torch.Generator("cuda").manual_seed(rows), device="cuda")
    exact = reference.gathered_linear(x.double(), *operands, ids, ORDER, torch.float64)
    assert_within(fp4pass.gathered_linear(x, *operands, ids, ORDER), exact, DENSE[torch.bfloat16])
    ends = (torch.arange(1, 17, device="cuda") * rows // 18).int()
    exact = reference.grouped_linear(x.double(), *operands, ends, ORDER, torch.float64)
    result = fp4pass.grouped_linear(x, *operands, ends, ORDER)
    assert_within(result, exact, DENSE[torch.bfloat16])
    assert not result[ends[-1] :].any()
