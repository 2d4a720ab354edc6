"""Weights whose bytes lie in another order than in a checkpoint, or in tensors of another shape or dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from fp4pass.lowering.layout import PLAIN
from fp4pass.match.convention import LINEAR, MULTIPLY, SWIZZLED, TRANSPOSED, Arrangement, Convention
from fp4pass.match.reasons import Reason

from .decodes import blocks, nibbles, per_expert
from .recipes import from_tiles, to_tiles
from .running import activations, called, compiling, listing, relative_error
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, K, N, Packed, Spelling

IDS = torch.tensor([0, 2, 2, 1, 0])


def stored(
    codes: Callable = lambda m: m.codes.data,
    scale: Callable = lambda m: m.scale.data,
    read_codes: Callable = lambda m: m.codes,
    read_scale: Callable = lambda m: m.scale,
    of: Spelling = LINEARS["table_of_16"],
    shape: tuple[int, int] = (N, K),
) -> Packed:
    """A module whose codes and scales are ``codes(m)`` and ``scale(m)``; the others undo that in its decode."""

    def decode(m, dtype):
        values = m.table[nibbles(read_codes(m)).long()]
        wide = (read_scale(m).float() * per_expert(m)).unsqueeze(-1)
        return (values.unflatten(-1, (wide.shape[-2], -1)) * wide).flatten(-2).to(dtype)

    module = Packed(replace(of, decode=decode, shape=shape))
    changed = codes(module), scale(module)
    for name, tensor in zip(("codes", "scale"), changed, strict=True):
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous()


def words(m: Packed) -> torch.Tensor:
    return m.codes.data.view(torch.int32)


def bytes_of_words(m: Packed) -> torch.Tensor:
    nibbles_ = (m.codes.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return (nibbles_[..., 0::2] | nibbles_[..., 1::2] << 4).flatten(-2)


GATHERED = PRODUCTS_OF_EXPERTS["gathered_after_decode"]
MODULES: dict[str, tuple[Arrangement, Callable[[], Packed]]] = {
    "codes transposed": (
        Arrangement(codes=TRANSPOSED),
        lambda: stored(codes=lambda m: turned(m.codes.data), read_codes=lambda m: m.codes.t()),
    ),
    "scales transposed": (
        Arrangement(scales=TRANSPOSED),
        lambda: stored(scale=lambda m: turned(m.scale.data), read_scale=lambda m: m.scale.t()),
    ),
    "scales transposed, as many rows as blocks": (
        Arrangement(scales=TRANSPOSED),
        lambda: stored(scale=lambda m: turned(m.scale.data), read_scale=lambda m: m.scale.t(), shape=(16, 256)),
    ),
    "both transposed": (
        Arrangement(TRANSPOSED, TRANSPOSED),
        lambda: stored(
            lambda m: turned(m.codes.data), lambda m: turned(m.scale.data), lambda m: m.codes.t(), lambda m: m.scale.t()
        ),
    ),
    "codes of experts transposed": (
        Arrangement(codes=TRANSPOSED),
        lambda: stored(codes=lambda m: turned(m.codes.data), read_codes=lambda m: m.codes.mT, of=GATHERED),
    ),
    "both transposed, as many rows as bytes a row": (
        Arrangement(TRANSPOSED, TRANSPOSED),
        lambda: stored(
            lambda m: turned(m.codes.data),
            lambda m: turned(m.scale.data),
            lambda m: m.codes.t(),
            lambda m: m.scale.t(),
            shape=(48, 96),
        ),
    ),
    "words of eight codes": (Arrangement(), lambda: stored(codes=words, read_codes=bytes_of_words)),
    "words of eight codes of experts": (
        Arrangement(),
        lambda: stored(codes=words, read_codes=bytes_of_words, of=GATHERED),
    ),
    "one row of bytes": (
        Arrangement(),
        lambda: stored(codes=lambda m: m.codes.data.flatten(), read_codes=lambda m: m.codes.view(N, -1)),
    ),
    "one column of bytes": (
        Arrangement(),
        lambda: stored(codes=lambda m: m.codes.data.view(-1, 1), read_codes=lambda m: m.codes.view(N, -1)),
    ),
    "codes block by block": (
        Arrangement(),
        lambda: stored(codes=lambda m: m.codes.data.unflatten(-1, (-1, 8)), read_codes=lambda m: m.codes.flatten(-2)),
    ),
    "one column of scales": (
        Arrangement(),
        lambda: stored(scale=lambda m: m.scale.data.view(-1, 1), read_scale=lambda m: m.scale.view(N, -1)),
    ),
    "scales with a dimension of one": (
        Arrangement(),
        lambda: stored(scale=lambda m: m.scale.data.unsqueeze(-1), read_scale=lambda m: m.scale.squeeze(-1)),
    ),
    "scales in padded tiles": (
        Arrangement(scales=SWIZZLED),
        lambda: stored(scale=lambda m: to_tiles(m.scale.data), read_scale=lambda m: from_tiles(m.scale, N, K // 16)),
    ),
    "scales in padded tiles, flat": (
        Arrangement(scales=SWIZZLED),
        lambda: stored(
            scale=lambda m: to_tiles(m.scale.data).flatten(), read_scale=lambda m: from_tiles(m.scale, N, K // 16)
        ),
    ),
    "scales in padded tiles of more rows": (
        Arrangement(scales=SWIZZLED),
        lambda: stored(
            scale=lambda m: to_tiles(m.scale.data), read_scale=lambda m: from_tiles(m.scale, 200, 4), shape=(200, 64)
        ),
    ),
}


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_an_arrangement_is_found(name):
    arrangement, make = MODULES[name]
    module = make()
    inputs = (activations(5, module.exact.shape[-1]), *([IDS] if module.spelling.experts else []))
    run = compiling(module, {"check": True})
    result = run(*inputs)
    (entry,) = run.report.rewritten
    assert not run.report.refused
    assert entry.source == str(Convention(PLAIN, arrangement, MULTIPLY))
    assert (entry.n, entry.k, entry.experts) == (*module.exact.shape[-2:], module.spelling.experts)
    assert relative_error(result, module.exact_product(*inputs)) < 1e-6


@pytest.mark.parametrize("group, scales", [(32, LINEAR), (32, TRANSPOSED), (48, LINEAR), (96, LINEAR)])
@torch.no_grad()
def test_scales_of_larger_groups_are_repeated(group, scales):
    flip = turned if scales == TRANSPOSED else lambda scale: scale
    module = stored(
        scale=lambda m: flip(m.scale.data[:, : 96 // group].contiguous()),
        read_scale=lambda m: flip(m.scale),
        shape=(N, 96),
    )
    run, x = compiling(module, {"check": True}), activations(5, 96)
    result = run(x)
    (entry,) = run.report.rewritten
    assert entry.source == str(Convention(PLAIN, Arrangement(scales=scales, group=group), MULTIPLY))
    assert relative_error(result, x.double() @ module.weight(torch.float64).T) < 1e-6


@torch.no_grad()
def test_the_graph_for_groups_of_32_and_transposed_codes():
    module = stored(
        lambda m: turned(m.codes.data), lambda m: m.scale.data[:, :3].clone(), lambda m: m.codes.t(), shape=(N, 96)
    )
    run = compiling(module)
    run(activations(5, 96))
    assert_expected_inline(
        listing(run.graphs[0]),
        """\
t5 = aten.permute.default(in2, [1, 0])  # uint8[48x48]
t6 = aten.clone.default(t5)  # uint8[48x48]
t7 = aten.view.dtype(in3, torch.uint8)  # uint8[48x3]
t8 = aten.reshape.default(t7, [48, 3, 1])  # uint8[48x3x1]
t9 = aten.expand.default(t8, [48, 3, 2])  # uint8[48x3x2]
t10 = aten.clone.default(t9)  # uint8[48x3x2]
t11 = aten.reshape.default(t10, [48, 6])  # uint8[48x6]
t12 = fp4pass.linear.default(in0, t6, t11, in4, None, plain)  # float32[5x48]
return [t12]""",
    )


@pytest.mark.parametrize("columns", [12, 5])
def test_scales_of_groups_that_are_no_multiple_of_16(columns):
    def decode(m, dtype):
        wide = m.scale.float().repeat_interleave(-(-96 // columns), 1)[:, :96]
        return (m.table[nibbles(m.codes).long()] * wide * m.factor).to(dtype)

    module = Packed(replace(LINEARS["table_of_16"], decode=decode, shape=(N, 96)))
    module.scale = nn.Parameter(module.scale[:, :1].repeat(1, columns), requires_grad=False)
    run = compiling(module)
    run(activations(5, 96))
    (entry,) = run.report.refused
    assert (
        entry.reason == f"{Reason.GROUPS.sentence} (block scales [48, {columns}], expected [48, 6] for codes [48, 48])"
    )


def test_groups_of_32_that_begin_in_the_middle():
    def decode(m, dtype):
        wide = m.scale.float().repeat_interleave(32, 1).roll(16, 1)
        return (m.table[nibbles(m.codes).long()] * wide * m.factor).to(dtype)

    module = Packed(replace(LINEARS["table_of_16"], decode=decode, shape=(N, 96)))
    module.scale = nn.Parameter(module.scale[:, :3].clone(), requires_grad=False)
    run = compiling(module)
    run(activations(5, 96))
    assert [entry.reason.startswith(Reason.GROUPS.sentence) for entry in run.report.refused] == [True]


def test_words_that_the_caller_passes_are_ids_to_us():
    module = Packed(LINEARS["table_of_16"])

    def forward(x, words):
        numbers = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
        return (
            x @ (blocks(module.table[numbers.flatten(-2).long()]) * module.scale.float().unsqueeze(-1)).flatten(-2).t()
        )

    run = compiling(forward)
    run(activations(5, K), module.codes.data.view(torch.int32))
    assert not run.report and "fp4pass.linear.default" not in called(run.graphs[0])


def test_integer_tables_of_the_model_are_no_codes():
    """Positions, masks and maps of experts are integers too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("positions", torch.arange(80, dtype=torch.int32).view(5, 16))
            self.register_buffer("frequencies", torch.rand(16, 3))

        def forward(self, x):
            return x @ (self.positions.float() @ self.frequencies)

    run = compiling(Model())
    run(activations(2, 5))
    assert not run.report
