"""What matching costs: how many proofs are run for how many products, and how much memory a proof holds."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp4pass.lowering.layout import FRAGMENTS, PLAIN
from fp4pass.lowering.reference import dequantize
from fp4pass.match import products, proof
from fp4pass.match.products import find_products
from fp4pass.match.proof import FULL_RUN_BYTES, Weight
from fp4pass.match.structure import Memo

from .decodes import nibbles
from .running import Known, traced


@pytest.fixture
def proofs(monkeypatch):
    """What was asked to be proven, in turn: "structure" for each structure met, "run" for each that was run."""
    asked = []

    def noted(module, name, what):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: asked.append(what) or original(*given))

    noted(products, "prove", "structure")
    noted(proof, "_explain", "run")
    monkeypatch.setattr(products, "_VERDICTS", Memo())
    monkeypatch.setattr(proof, "_PROOFS", Memo())
    return asked


PARTS = ("codes", "scale", "factor")


class Held(TorchDispatchMode):
    """The most bytes held at once by tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        self._known.add(identity)
        self._now += size
        self.peak = max(self.peak, self._now)

        def gone():
            self._known.discard(identity)
            self._now -= size

        weakref.finalize(storage, gone)


def weights(*shapes):
    """Inputs of `traced`: x, the parts of a weight for each shape, on no device, and ends of rows for four experts."""
    parts = {"x": torch.empty(4, 1, device="meta"), "ends": torch.empty(shapes[0][0], dtype=torch.int32, device="meta")}
    for i, (*lead, n, k) in enumerate(shapes):
        parts[f"codes{i}"] = torch.empty(*lead, n, k // 2, dtype=torch.uint8, device="meta")
        parts[f"scale{i}"] = torch.empty(*lead, n, k // 16, dtype=torch.uint8, device="meta")
        parts[f"factor{i}"] = torch.empty(lead, device="meta")
    return parts


def model(count, decode):
    """The sum over ``count`` products with weights of one or of many experts."""

    def compute(x, ends, **parts):
        total = 0
        for i in range(count):
            weight = decode(i, *(parts[f"{name}{i}"] for name in PARTS)).to(torch.bfloat16)
            rows = x.to(torch.bfloat16).expand(4, weight.shape[-1]).contiguous()
            out = rows @ weight.T if weight.dim() == 2 else torch.ops.aten._grouped_mm(rows, weight.mT, ends)
            total = total + out.sum()
        return total

    return compute


def by_module(layout):
    return lambda i, *parts: dequantize(*parts, torch.float32, layout)


plain = by_module(PLAIN)


def found(shapes, decode=plain, held=None):
    graph = traced(model(len(shapes), decode), weights(*shapes)).graph
    with held or nullcontext():
        return find_products(graph, Known({}, frozenset({"x", "ends"})))


def rewritable(products_):
    return [isinstance(p.weight, Weight) for p in products_]


@pytest.mark.parametrize("layout", [PLAIN, FRAGMENTS])
def test_equal_layers_are_proven_once(layout, proofs):
    assert all(rewritable(found([(64, 128)] * 20, by_module(layout))))
    assert proofs == ["structure", "run"]


@pytest.mark.parametrize("layout", [PLAIN, FRAGMENTS])
def test_layers_that_differ_in_rows_are_run_once(layout, proofs):
    shapes = [(32 * (2 + i), 64 * (2 + i % 3)) for i in range(30)]
    assert all(rewritable(found(shapes, by_module(layout))))
    assert (proofs.count("structure"), proofs.count("run")) == (30, 3)


def test_experts_that_differ_in_number_are_run_once(proofs):
    assert all(rewritable(found([(4, 32, 64), (4, 48, 64), (4, 48, 64)])))
    assert (proofs.count("structure"), proofs.count("run")) == (2, 1)


def test_a_model_of_six_thousand_products_in_130(proofs):
    """46 products of 128 experts, 84 of one matrix, in nine shapes."""
    experts = [(128, 1856, 2688), (128, 2688, 1856)] * 23
    singles = [(2688, 4096), (10304, 2688), (512, 2688), (3712, 2688), (2688, 3712), (4096, 2688), (256, 2688)] * 12
    held = Held()
    asked = found(experts + singles, held=held)
    assert all(rewritable(asked)) and sum((p.sizes[0] or 1) for p in asked) > 5900
    assert (proofs.count("structure"), proofs.count("run")) == (9, 5)
    assert held.peak < 8 << 20


def test_a_late_flaw_among_layers_that_differ_in_rows(proofs):
    """What is run once for many must hold for each of them."""

    def decode(i, codes, scale, factor):
        weight = dequantize(codes, scale, factor)
        return {7: weight * 1.5, 8: weight.clamp(max=400.0)}.get(i, weight)

    verdicts = rewritable(found([(32 * (2 + i), 128) for i in range(10)], decode))
    assert [i for i, good in enumerate(verdicts) if not good] == [7, 8]


def test_rows_told_apart_are_run_for_each_number_of_rows(proofs):
    """Full runs hold for the size that they were run at, and for no other."""

    def decode(i, codes, scale, factor):
        weight = dequantize(codes, scale, factor)
        return torch.cat((weight[:80], weight[80:] * (2 if i == 1 else 1)))

    assert rewritable(found([(96, 128), (112, 128), (128, 128)], decode)) == [True, False, True]
    assert proofs.count("run") == 3


TABLE = {"arithmetic": plain, "fragments": by_module(FRAGMENTS)}


@pytest.mark.parametrize("name", [*TABLE, "wide_indices"])
def test_a_run_at_full_size_stays_within_its_bound(name, proofs, monkeypatch):
    def by_powers(i, codes, scale, factor):
        """The widest of the usual ones: numbers in int64."""
        n = nibbles(codes).long()
        m = n & 7
        value = torch.where(m < 2, m * 0.5, torch.exp2((m >> 1).float() - 1) * (1 + (m & 1) * 0.5))
        wide = value * (1 - (n >> 3) * 2) * factor
        return (wide.unflatten(-1, (-1, 16)) * scale.view(torch.float8_e4m3fn).float().unsqueeze(-1)).flatten(-2)

    def decode(*given):
        weight = TABLE.get(name, by_powers)(*given)
        return torch.cat((weight[:16], weight[16:]))

    monkeypatch.setattr(proof, "FULL_RUN_BYTES", FULL_RUN_BYTES >> 5)
    rows = proof.FULL_RUN_BYTES // proof.BYTES_A_WEIGHT // 512 // 16 * 16
    held = Held()
    assert rewritable(found([(rows, 512), (rows + 16, 512)], decode, held)) == [True, False]
    assert proof.FULL_RUN_BYTES // 3 < held.peak <= proof.FULL_RUN_BYTES
