"""The kernels of the layout ``fragments`` on a GPU, again and again: graphs, streams, and what kernels leave behind."""

from __future__ import annotations

import pytest
import torch

from fp4pass.lowering import arch, layout

from .test_gpu import captured
from .test_gpu_products import EACH_TILE, block, dense, fp4pass, normal, routed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ORDER = layout.FRAGMENTS
REPLAYS = 1000


def assert_replays_equal_eager(call, change):
    """``call()`` in a graph gives eager's bits for each of REPLAYS inputs that ``change`` writes in place."""
    graph, result = captured(call)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPLAYS):
        change()
        graph.replay()
        # Counted on the device: to look each time would let every kernel end before the next begins.
        wrong += (result != call()).any()
    assert wrong.item() == 0


# In 24 tiles of 128 x 128 K is shared out between programs.
@pytest.mark.parametrize("rows", EACH_TILE)
def test_a_thousand_replays_of_linear_equal_eager(rows):
    operands, bias = dense(1536, 2688), normal(1536, seed=9)
    x = normal(rows, 2688)
    assert_replays_equal_eager(lambda: fp4pass.linear(x, *operands, bias, ORDER), x.normal_)


@pytest.mark.parametrize("tokens", (2, 40, 200, 700))
def test_a_thousand_replays_of_experts_equal_eager(tokens):
    up, down = block(32, 320, 192)
    x, scores = normal(tokens, 320), torch.rand(tokens, 32, device="cuda")
    ids, weights = routed(tokens, 6, 32)

    def change():
        x.normal_()
        chosen = scores.uniform_().topk(6, -1)
        ids.copy_(chosen.indices)
        weights.copy_(chosen.values)

    assert_replays_equal_eager(lambda: fp4pass.experts(x, ids, weights, *up, *down, "relu2", ORDER), change)


def test_a_thousand_replays_of_products_that_read_each_other_s_results_equal_eager():
    wide, narrow = dense(8192, 2688), dense(2688, 8192, seed=1)
    x = normal(3, 2688)

    def chain():
        return fp4pass.linear(fp4pass.linear(x, *wide, None, ORDER), *narrow, None, ORDER)

    assert_replays_equal_eager(chain, x.normal_)


@pytest.mark.parametrize("rows", (1, 12, 50))
def test_a_product_waits_for_the_one_whose_result_it_reads(rows):
    """The second one begins while the first runs, which takes long. Waiting for the GPU between them is the measure."""
    long, short = dense(65536, 8192), dense(256, 65536, seed=1)
    x = normal(rows, 8192)

    def chain(between):
        middle = fp4pass.linear(x, *long, None, ORDER)
        between()
        result = fp4pass.linear(middle, *short, None, ORDER)
        # Its place is the next one's to take: whoever still reads it reads something else.
        middle.fill_(torch.nan)
        return result

    for _ in range(50):
        x.normal_()
        torch.cuda.synchronize()
        at_once = chain(lambda: None)
        assert torch.equal(at_once, chain(torch.cuda.synchronize))


def test_weights_changed_just_before_a_product_are_the_ones_it_reads():
    operands, other = dense(2048, 2688), dense(2048, 2688, seed=1)
    x = normal(3, 2688)
    expected = [fp4pass.linear(x, *each, None, ORDER) for each in (operands, other)]
    changing = [part.clone() for part in operands]
    for turn in range(200):
        # A product goes before, which tells the next kernel to begin.
        fp4pass.linear(x, *operands, None, ORDER)
        for part, new in zip(changing, (other, operands)[turn % 2], strict=True):
            part.copy_(new)
        assert torch.equal(fp4pass.linear(x, *changing, None, ORDER), expected[1 - turn % 2])


class Recorder:
    """Stands in for a kernel: launches it, and keeps the arguments."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.arguments.append(dict(zip(self.kernel.arg_names, args, strict=False)))
            return self.kernel[grid](*args, **kwargs)

        return run


@pytest.mark.parametrize(("n", "k"), [(128, 8192), (1536, 2688), (16896, 1088), (17024, 1088)])
def test_marks_of_shared_tiles_are_cleared_at_the_end(n, k, monkeypatch):
    """As many tiles as there are multiprocessors, fewer, and a few more."""
    from fp4pass.lowering import exchange, many_rows  # Which need Triton.

    if not arch.target(torch.device("cuda")).wgmma:
        pytest.skip("only kernels with wgmma share tiles")
    recorder = Recorder(many_rows.product_kernel)
    monkeypatch.setattr(many_rows, "product_kernel", recorder)
    operands = dense(n, k)
    for rows in EACH_TILE:
        fp4pass.linear(normal(rows, k), *operands, None, ORDER)
    assert recorder.arguments
    for arguments in recorder.arguments:
        for marks in (arguments["flags"], arguments["parts"].view(torch.int64)):
            assert not (marks == exchange.PRESENT.value).any()


def results(x, wide, operands, up, down, ids, weights):
    """One result of each kind of launch."""
    linear = [fp4pass.linear(wide[:rows], *operands, None, ORDER) for rows in EACH_TILE]
    tokens = (2, 40, 200, 700)
    routed_products = [fp4pass.gathered_linear(x[:rows], *up, ids[:rows, 0], ORDER) for rows in tokens]
    blocks = [fp4pass.experts(x[:rows], ids[:rows], weights[:rows], *up, *down, "relu2", ORDER) for rows in tokens]
    return linear + routed_products + blocks


def inputs(seed):
    up, down = block(32, 320, 192)
    return normal(700, 320, seed=seed), normal(300, 2688, seed=seed), dense(1536, 2688), up, down, *routed(700, 6, 32)


def test_results_repeat_bit_for_bit():
    operands = inputs(1)
    first = results(*operands)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(*operands), strict=True))


def test_no_call_waits_for_the_gpu():
    operands = inputs(1)
    results(*operands)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(*operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_once_do_not_disturb_each_other():
    each = [inputs(seed) for seed in (1, 2)]
    alone = [results(*operands) for operands in each]
    streams = [torch.cuda.Stream() for _ in each]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, operands in zip(streams, each, strict=True):
            with torch.cuda.stream(stream):
                together.append(results(*operands))
        torch.cuda.synchronize()
        for expected, found in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
