"""Fixtures of the end-to-end tests: compiles with and without generated code; the routing of one model in another."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fp4pass import _torch, backend
from fp4pass.checkpoint.load import from_pretrained
from fp4pass.synthesize import synthesize


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What an earlier test has compiled would make the sizes of the next one dynamic, and its compiles slow."""
    torch.compiler.reset()


@pytest.fixture(scope="session")
def cache_directory(tmp_path_factory):
    """For what these tests compile to code, empty at first: nothing rests on what an earlier run has left."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture
def generated(cache_directory, monkeypatch):
    """Code is generated for this test, by whatever Inductor has at hand."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache_directory))


@pytest.fixture
def graphs(monkeypatch):
    """``backend="fp4pass"`` as for a user but for Inductor's code generation, by far the slowest part.

    A rewritten graph is run node by node, and kept in this list.
    """
    kept = []

    def as_is(graph_module, *_, **__):
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default  # as Inductor does: real strides may differ from fake ones
        graph_module.recompile()
        kept.append(graph_module.graph)
        return _torch.boxed(graph_module)

    monkeypatch.setattr(backend, "compile_graph", functools.partial(backend.compile_graph, inner_compile=as_is))
    return kept


@pytest.fixture
def another(tmp_path, tiny_sizes):
    """``another(seed, dtype, **sizes)``: a model like the tiny one, but for its values and these sizes."""

    def make(seed, dtype, **sizes):
        folder = tmp_path / f"seed-{seed}"
        return from_pretrained(synthesize(folder, "nano", seed=seed, **(tiny_sizes | sizes)), dtype=dtype)

    return make


class Replay(nn.Module):
    """In the place of a router: gives what another model's router chose last."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.ids = None

    def take(self, router: nn.Module, inputs: tuple, chosen: tuple[torch.Tensor, ...]) -> None:
        """The forward hook of the router that is followed."""
        _, self.weights, self.ids = chosen

    def forward(self, hidden: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        """(logits, which no one uses; weights float32 [T, top_k]; expert ids int64 [T, top_k])."""
        return None, self.weights, self.ids


@pytest.fixture
def follow():
    """``follow(leader, *others)``: from now on each router of the others repeats what the leader's last chose.

    Where a token is nearly indifferent between two experts, the choice would say nothing of arithmetic.
    """

    def install(leader, *others):
        for name, router in leader.named_modules():
            for other in others if name.endswith("mixer.gate") else ():
                replay = Replay()
                router.register_forward_hook(replay.take)
                other.set_submodule(name, replay)

    return install
