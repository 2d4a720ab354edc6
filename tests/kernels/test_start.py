"""Launches of what Triton found before: start.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from fp4pass.lowering.start import start


class Compiled:
    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel(JITFunction):
    """One of ``kernel(x, count, bias, K, PARTS)`` that compiles at every call."""

    def __init__(self):
        self.fn, self.found = object(), []

    arg_names = ("x", "count", "bias", "K", "PARTS")

    def __getitem__(self, grid):
        def search(*arguments, K, PARTS, num_warps):
            self.found.append(Compiled())
            return self.found[-1]

        return search


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def launch(kernel, x, count=3, bias=None, grid=(5,), **constants):
    start(kernel, grid, x, count, bias, **{"PARTS": 2, "K": 64, "num_warps": 4} | constants)


def test_only_the_first_launch_of_a_kind_is_triton_s(kernel):
    x, y = torch.zeros(8), torch.ones(16)
    launch(kernel, x)
    launch(kernel, y, count=7)
    launch(kernel, x, grid=(2, 3))
    (compiled,) = kernel.found
    (first, arguments), (second, _) = compiled.launched
    assert first == (5, 1, 1) and second == (2, 3, 1)
    assert arguments[0] is y and arguments[1:] == (7, None, 64, 2)


KINDS = [
    {"x": torch.zeros(8, dtype=torch.bfloat16)},
    {"x": torch.zeros(9)[1:]},
    {"bias": torch.zeros(8)},
    {"count": 1},
    {"count": 16},
    {"count": 1 << 31},
    {"K": 128},
    {"PARTS": 3},
    {"num_warps": 8},
]


@pytest.mark.parametrize("other", KINDS, ids=str)
def test_whatever_is_compiled_apart_is_not_taken_for_the_same(kernel, other):
    launch(kernel, **{"x": torch.zeros(8)})
    launch(kernel, **{"x": torch.zeros(8)} | other)
    assert len(kernel.found) == 2 and not kernel.found[0].launched


def test_another_device_has_its_own(kernel, monkeypatch):
    launch(kernel, torch.zeros(8))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernel, torch.zeros(8))
    assert len(kernel.found) == 2


def test_what_is_not_compiled_is_called_as_it_is():
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    for _ in range(2):
        start(Interpreted(), (4,), 1, None, K=2)
    assert calls == [((4,), (1, None), {"K": 2})] * 2
