"""Every kernel and launch once, on tensors that end where their last element does: for ``make memcheck``.

Under compute-sanitizer kernels take ten to fifty times as long, so shapes are small; all have ragged edges. What the
kernels read or write beyond a tensor it reports only if each has an allocation of its own, as the target sees to.
"""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import arch, layout, reference

from .operands import activations, assert_within, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

fp4pass = torch.ops.fp4pass
HALF, CUDA = torch.bfloat16, "cuda"
WITHIN = 0.0025
# Between the launches' bounds, and one row more than a tile.
ROWS = (1, 5, 12, 14, 17, 33, 65, 129, 257, 449)
ROWS_OF_EXPERT = (0, *ROWS)
# Their heights choose between the launches of dense products, and their depths; none is a multiple of a tile's.
DENSE = [(n, k) for n in (208, 1040, 3088, 4240, 8208) for k in (192, 4160)] + [(8208, 8256), (65552, 192)]
# Before Hopper also how many multiprocessors the GPU has.
DENSE += [(n, 192) for n in (12304, 16400, 24592)]
EXPERTS, WIDTHS = 3, (208, 192)


def launch(rows, n, k, experts):
    generation = arch.target(torch.device(CUDA))
    return generation.launch(rows, HALF, layout.FRAGMENTS, columns=n, depth=k, experts=experts)


def one_for_each_launch(shapes, experts=False):
    """The first number of rows (an expert's) and shape that meets each launch."""
    found = {}
    for n, k in shapes:
        for rows in ROWS_OF_EXPERT if experts else ROWS:
            found.setdefault(launch(rows, n, k, experts), (rows, n, k))
    return found


def test_every_launch_is_among_them():
    met = {(False, each) for each in one_for_each_launch(DENSE)}
    met |= {(True, each) for each in one_for_each_launch([WIDTHS], experts=True)}
    assert set(arch.target(torch.device(CUDA)).launches()) <= met


def test_dense_products_of_every_launch():
    for rows, n, k in one_for_each_launch(DENSE).values():
        operands, bias = weight(n, k, order=layout.FRAGMENTS, device=CUDA), activations(n, dtype=HALF, device=CUDA)
        x = activations(rows, k, dtype=HALF, device=CUDA)
        result = fp4pass.linear(x, *operands, bias, layout.FRAGMENTS, "relu2")
        some = slice(-16, None)
        codes, scale = (layout_part(t, some) for t in operands[:2])
        exact = reference.linear(
            x.double(), codes, scale, operands[2], bias[some], layout.FRAGMENTS, "relu2", accumulate=torch.float64
        )
        assert_within(result[:, some], exact, WITHIN, (rows, n, k))


def layout_part(tensor, rows):
    """Whole units of a weight's rows."""
    return tensor[rows].contiguous()


@pytest.mark.parametrize("order", layout.LAYOUTS)
@pytest.mark.parametrize("rows", (1, 17, 129))
def test_products_in_tiles_and_their_backward(order, rows):
    n, k = (208, 192) if order == layout.FRAGMENTS else (208, 208)
    operands = weight(n, k, order=order, device=CUDA)
    for dtype in (torch.float32,) if order == layout.FRAGMENTS else (HALF, torch.float32):
        x, grad = (activations(rows, size, dtype=dtype, device=CUDA) for size in (k, n))
        result = fp4pass.linear(x, *operands, None, order)
        exact = reference.linear(x.double(), *operands, None, order, accumulate=torch.float64)
        assert_within(result, exact, WITHIN)
        back = fp4pass.linear_backward(grad, *operands, order)
        exact = reference.linear_backward(grad.double(), *operands, order, accumulate=torch.float64)
        assert_within(back, exact, WITHIN)


@pytest.mark.parametrize(
    ("order", "width", "inner"), [(layout.FRAGMENTS, 192, 192), (layout.INTERLEAVED, 208, 112)], ids=str
)
@pytest.mark.parametrize("rows", ROWS_OF_EXPERT)
def test_experts_of_every_launch_with_ids_of_none(order, width, inner, rows):
    up = weight(EXPERTS, inner, width, order=order, device=CUDA)
    down = weight(EXPERTS, width, inner, seed=1, order=order, device=CUDA)
    tokens = max(1, -(-rows * EXPERTS // 2))
    x = activations(tokens, width, dtype=HALF, device=CUDA)
    ids = torch.stack([torch.arange(tokens) % EXPERTS, torch.arange(tokens) % (EXPERTS + 1)], 1).to(CUDA)
    weights = activations(tokens, 2, device=CUDA, seed=2)
    result = fp4pass.experts(x, ids, weights, *up, *down, "relu2", order)
    exact = reference.experts(x.double(), ids, weights, *up, *down, "relu2", order, torch.float64)
    assert_within(result, exact, 2 * WITHIN)
    ends = torch.tensor([1, 1, tokens - 1], device=CUDA).clamp(0, tokens).int()
    grouped = fp4pass.grouped_linear(x, *up, ends, order)
    exact = reference.grouped_linear(x.double(), *up, ends, order, torch.float64)
    assert_within(grouped, exact, WITHIN)


def test_the_kernel_that_only_reads():
    from fp4pass.lowering.stream import WORDS_A_PROGRAM, stream

    codes, scale, _ = weight(EXPERTS, 208, 208, device=CUDA)
    for share in WORDS_A_PROGRAM:
        found = stream(codes, scale, torch.tensor([2, 0], device=CUDA), share)
        total = sum(each.flatten(1).view(torch.int32).sum(1) for each in (codes, scale))
        assert torch.equal(found.sum(1, dtype=torch.int32), total[[2, 0]].int())
