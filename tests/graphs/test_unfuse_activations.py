"""Where quantized activations come from: FP8, attention, fake quantization, plain operations; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fp4pass
from fp4pass.errors import ActivationError
from fp4pass.match.cone import value
from fp4pass.match.reasons import Reason

from . import fused
from .fused import FACTOR, K, Layer, N, ops, rows
from .running import activations, called, compiling, relative_error
from .standins import fake_codes
from .test_unfuse import ROUNDED, foreign

E4M3, E2M1 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2


def fp8_nodes(run):
    """What the graph still computes in FP8."""
    return [n for n in run.graphs[0].nodes if n.op == "call_function" and getattr(value(n), "dtype", None) == E4M3]


pytestmark = pytest.mark.usefixtures("libraries")


def linear(m: Layer, x: torch.Tensor) -> torch.Tensor:
    codes, scale = ops.trtllm.fp4_quantize(x, m.factor, 16)
    return m.gemm(codes, scale)


# --- FP8.


def static_by_trtllm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, ops.tensorrt_llm.static_quantize_e4m3_per_tensor(x, m.fp8_scale)[0])


def static_by_vllm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    eight = torch.empty_like(x, dtype=E4M3)
    ops._C.static_scaled_fp8_quant(eight, x, m.fp8_scale)
    return linear(m, eight)


def dynamic_by_vllm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    eight, scale = torch.empty_like(x, dtype=E4M3), x.new_empty(1, dtype=torch.float32)
    ops._C.dynamic_scaled_fp8_quant(eight, x, scale)
    return linear(m, eight)


def divided(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, (x / m.fp8_scale).clamp(-448, 448).to(E4M3))


def multiplied(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, (x.float() * m.fp8_inverse).to(E4M3).view(-1, K))


def multiplied_from_the_left(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, (m.fp8_inverse * x.float()).to(E4M3))


def layer_with_fp8(run) -> Layer:
    layer = Layer(run)
    layer.register_buffer("fp8_scale", torch.tensor(0.02))
    layer.register_buffer("fp8_inverse", torch.tensor(50.0))
    return layer


@pytest.mark.parametrize("activation", ["bf16", "emulate"])
@pytest.mark.parametrize(
    "run_layer",
    [static_by_trtllm, static_by_vllm, dynamic_by_vllm, divided, multiplied, multiplied_from_the_left],
)
@torch.no_grad()
def test_an_activation_in_fp8_is_undone(run_layer, activation):
    layer, x = layer_with_fp8(run_layer), rows()
    run = compiling(layer, {"check": True, "activations": activation})
    got = run(x)
    assert not run.report.refused and "fp4pass.linear.default" in called(run.graphs[0])
    exact = x.double() @ layer.exact_weight().T
    assert not fp8_nodes(run) or run_layer is dynamic_by_vllm
    if activation == "bf16":
        assert relative_error(got, exact) < ROUNDED
    else:
        assert 0.05 < relative_error(got, exact) < 0.12


def fp8_argument(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, x)


def fp8_of_changing_scale(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, (x / x.abs().amax()).to(E4M3))


def fp8_of_bytes(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return linear(m, (x * m.fp8_inverse).to(torch.uint8).view(E4M3))


@torch.no_grad()
def test_bytes_that_are_taken_for_fp8_are_no_cast():
    run = compiling(layer_with_fp8(fp8_of_bytes))
    run(rows())
    assert all(Reason.FP8_ACTIVATION.sentence in e.reason and e.lost for e in run.report.refused)
    assert not run.report.rewritten


@pytest.mark.parametrize("run_layer", [fp8_argument, fp8_of_changing_scale])
@torch.no_grad()
def test_an_activation_in_fp8_without_a_static_scale_is_an_error_that_names_the_layer(run_layer):
    x = rows().to(E4M3) if run_layer is fp8_argument else rows()
    layer = layer_with_fp8(run_layer)
    report = fp4pass.explain(layer, x)
    reasons = {entry.reason.partition(" (")[0] for entry in report.refused}
    assert reasons == {Reason.FP8_ACTIVATION.sentence} and all(entry.remedy for entry in report.refused)
    with pytest.raises(Exception, match=Reason.FP8_ACTIVATION.sentence) as caught:
        torch.compile(layer, backend="fp4pass")(x)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ActivationError)
    assert "codes (trtllm::nvfp4_gemm)" in str(caught.value)


# --- Attention.


def attention(m: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    codes, scale = fake_codes(query)
    ops.vllm.unified_attention_with_output(query, key, value, codes, "layer.0", m.factor, scale)
    return m.gemm(codes, scale)


def attention_in_fp8(m: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    eight = torch.empty_like(query, dtype=E4M3)
    ops.vllm.unified_attention_with_output(query, key, value, eight, "layer.0", m.fp8_scale)
    return linear(m, eight)


@pytest.mark.parametrize("run_layer", [attention, attention_in_fp8])
@torch.no_grad()
def test_quantized_attention_output_is_plain_again(run_layer):
    layer, given = layer_with_fp8(run_layer), [rows(seed=seed) for seed in (1, 2, 3)]
    run = compiling(layer, {"check": True})
    got = run(*given)
    query, key, value = (each.double() for each in given)
    exact = functional.softmax(query @ key.T, -1) @ value @ layer.exact_weight().T
    assert not run.report.refused and relative_error(got, exact) < ROUNDED
    assert [name for name in foreign(run) if "attention" not in name] == []
    assert sum("attention" in name for name in foreign(run)) == 1
    emulating = compiling(layer, {"activations": "emulate"})
    # The stand-in for quantizing FP8 leaves the FP8 scale to its caller.
    want = exact if run_layer is attention_in_fp8 else layer(*given).double()
    assert relative_error(emulating(*given), want) < (0.12 if run_layer is attention_in_fp8 else 0.02)


# --- ModelOpt's fake quantization.


def fake_quantized(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = ops.tensorrt.dynamic_block_quantize_op(x, 16, m.amax, 4, 2, 8, 4)
    weight = ops.tensorrt.dynamic_block_quantize_op(m.weight, 16, m.amax, 4, 2, 8, 4)
    return functional.linear(x, weight)


@torch.no_grad()
def test_a_fake_quantized_activation_is_plain_and_a_weight_is_reported():
    layer = Layer(fake_quantized)
    layer.register_buffer("amax", torch.tensor(6.0))
    layer.register_buffer("weight", torch.randn(N, K, dtype=torch.bfloat16))
    x = rows()
    run, emulating = compiling(layer, {"check": True}), None
    got = run(x)
    (entry,) = run.report.refused
    assert entry.reason == Reason.DENSE.sentence and "compress" in entry.remedy
    assert sum("dynamic_block" in name for name in called(run.graphs[0])) == 1
    weight = ops.tensorrt.dynamic_block_quantize_op(layer.weight, 16, layer.amax, 4, 2, 8, 4)
    assert torch.equal(got, functional.linear(x, weight))
    emulating = compiling(layer, {"check": True, "activations": "emulate"})
    assert relative_error(emulating(x), layer(x).double()) < 1e-6


# --- torch's own products, their quantizers written out.


def e2m1(x: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    return torch.bucketize(x.abs(), bounds).to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def e2m1_by_bits(x: torch.Tensor) -> torch.Tensor:
    """As torchao does it: float32 as integers, rounded by a carry, small values by adding a large one."""
    large = torch.tensor(149 << 23, dtype=torch.int32).view(torch.float32)
    bits = x.contiguous().view(torch.int32)
    sign = bits & -(1 << 31)
    bits = bits ^ sign
    size = bits.view(torch.float32)
    normal = (bits + (((1 - 127) << 23) + (1 << 21) - 1) + ((bits >> 22) & 1)) >> 22
    small = (size + large).view(torch.int32) - (149 << 23)
    codes = torch.full_like(bits, 7, dtype=torch.uint8)
    codes = torch.where(size < 1, small.to(torch.uint8), codes)
    codes = torch.where((size >= 1) & (size < 6), normal.to(torch.uint8), codes)
    return codes | ((sign >> 28).to(torch.uint8) & 8)


def tiles(scale: torch.Tensor) -> torch.Tensor:
    count, groups = scale.shape
    scale = functional.pad(scale.view(torch.uint8), (0, -groups % 4, 0, -count % 128)).view(E4M3)
    count, groups = scale.shape
    return scale.view(count // 128, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def written_out(m: Layer, x: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide by the unit, then by each block's scale; codes and block scales in tiles."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / m.limit / unit).clamp(2**-9, m.largest).to(E4M3)
    codes = m.rounded((blocks / (scale.float() * unit).unsqueeze(-1)).clamp(-6, 6)).flatten(-2)
    return codes[:, ::2] | codes[:, 1::2] << 4, tiles(scale)


def dynamic_unit(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return x.abs().max().float() / (448 * 6.0)


def static_unit(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return 1 / m.factor


def scaled_mm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    unit = m.unit(m, x)
    codes, scale = written_out(m, x, unit)
    out = torch._scaled_mm(
        codes.view(E2M1), m.codes.t().view(E2M1), scale, m.scale.view(E4M3), out_dtype=torch.bfloat16
    )
    return out * (unit * m.alpha * m.factor).bfloat16()


def scaled_mm_v2(m: Layer, x: torch.Tensor) -> torch.Tensor:
    unit = m.unit(m, x)
    codes, scale = written_out(m, x, unit)
    scales = [scale, unit], [m.scale.view(E4M3), m.alpha * m.factor]
    kinds = [2, 0], [1, 0]
    return ops.aten._scaled_mm_v2(
        codes.view(E2M1), m.codes.t().view(E2M1), scales[0], *kinds, scales[1], *kinds, None, torch.bfloat16
    )


def torch_layer(run, unit, limit=6.0, rounded=e2m1) -> Layer:
    layer = Layer(run, n=256, k=128)
    layer.unit, layer.limit, layer.rounded, layer.largest = unit, limit, rounded, 448.0
    return layer


@pytest.mark.parametrize("unit", [dynamic_unit, static_unit])
@pytest.mark.parametrize("run_layer, rounded", [(scaled_mm, e2m1), (scaled_mm_v2, e2m1), (scaled_mm, e2m1_by_bits)])
@torch.no_grad()
def test_a_scaled_product_of_torch_is_traced_through_a_quantizer_written_out(run_layer, rounded, unit):
    layer = torch_layer(run_layer, unit, rounded=rounded)
    x = activations(5, 128, dtype=torch.bfloat16)
    exact = x.double() @ layer.exact_weight().T
    run = compiling(layer, {"check": True})
    assert relative_error(run(x), exact) < ROUNDED
    assert run.report.rewritten[0].source.startswith("aten::_scaled_mm") and not run.report.refused
    assert not any("scaled" in name or "float8" in name for name in called(run.graphs[0]))
    emulating = compiling(layer, {"check": True, "activations": "emulate"})
    assert 0.03 < relative_error(emulating(x), exact) < 0.15


@pytest.mark.parametrize("limit, largest", [(5.0, 448.0), (6.0, 100.0)])
@torch.no_grad()
def test_a_scaled_product_is_not_traced_through_what_is_no_quantizer(limit, largest):
    """Block scales of another limit leave no value as it is; those with a bound of their own only small ones."""
    layer = torch_layer(scaled_mm, static_unit, limit=limit)
    layer.largest = largest
    run = compiling(layer, {"target_sm": 90})
    with pytest.raises((ValueError, RuntimeError), match="scaling"):  # torch's own op then runs, and needs another GPU
        run(activations(5, 128, dtype=torch.bfloat16))
    (entry,) = run.report.refused
    assert Reason.FP4_ACTIVATION.sentence in entry.reason


@torch.no_grad()
def test_fp8_products_of_torch_are_not_ours():
    def run_layer(m, x):
        return torch._scaled_mm(x.to(E4M3), m.eight.t(), m.alpha, m.alpha, out_dtype=torch.bfloat16)

    layer = Layer(run_layer)
    layer.register_buffer("eight", torch.randn(N, K).to(E4M3))
    run = compiling(layer)
    run(rows())
    assert not run.report and "aten._scaled_mm.default" in called(run.graphs[0])


# --- Rounded to FP4 and back, before a decoded weight.


def round_trip(m: Layer, x: torch.Tensor) -> torch.Tensor:
    """As compressed-tensors does it: a static factor, scales in E4M3, a ladder of comparisons."""
    blocks = x.unflatten(-1, (-1, 16))
    amax = torch.maximum(blocks.amin(-1).abs(), blocks.amax(-1).abs())
    scale = (m.factor * (amax.float() / 6.0)).clamp(-448, 448).to(E4M3).float()
    unit = (torch.where(scale == 0, 0.125, scale) / m.factor).unsqueeze(-1)
    value = (blocks / unit).clamp(-6.0, 6.0)
    size = value.abs()
    for low, high, to in ((0, 0.25, 0.0), (0.25, 0.75, 0.5), (0.75, 1.25, 1.0), (1.25, 1.75, 1.5), (1.75, 2.5, 2.0)):
        size[(size > low) & (size <= high) if to % 1 else (size >= low) & (size <= high)] = to
    for low, high, to in ((2.5, 3.5, 3.0), (3.5, 5.0, 4.0), (5.0, 7.0, 6.0)):
        size[(size > low) & (size < high) if to == 3 else (size >= low) & (size <= high)] = to
    return (size * value.sign() * unit).flatten(-2).to(x.dtype)


def decoded(m: Layer) -> torch.Tensor:
    numbers = torch.stack((m.codes & 15, m.codes >> 4), -1).flatten(-2)
    return (m.table[numbers.long()].unflatten(-1, (-1, 16)) * (m.rows.float() * m.unit).unsqueeze(-1)).flatten(-2)


def with_round_trip(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(round_trip(m, x), decoded(m).to(x.dtype))


def with_a_clamp(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(round_trip(m, x.clamp(-1, 1)) * 1.0, decoded(m).to(x.dtype))


def with_a_clamp_after_it(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(round_trip(m, x).clamp(-500, 500), decoded(m).to(x.dtype))


def with_fp8(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return functional.linear((x * 8).to(E4M3).to(x.dtype) / 8, decoded(m).to(x.dtype))


def layer_with_decode(run) -> Layer:
    layer = Layer(run)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    layer.register_buffer("table", torch.cat((values, -values)))
    layer.register_buffer("rows", torch.randint(0x30, 0x40, (N, K // 16), dtype=torch.uint8).view(E4M3))
    layer.register_buffer("unit", torch.tensor(0.015))
    return layer


@torch.no_grad()
def test_a_round_trip_through_fp4_before_a_decoded_weight_is_removed():
    layer, x = layer_with_decode(with_round_trip), rows()
    run = compiling(layer, {"check": True})
    got = run(x)
    assert relative_error(got, x.double() @ decoded(layer).double().T) < ROUNDED
    assert [e.op for e in run.report.rewritten] == ["fp4pass.linear"]
    assert not any("index_put" in name or "amax" in name for name in called(run.graphs[0]))
    emulating = compiling(layer, {"check": True, "activations": "emulate"})
    assert relative_error(emulating(x), layer(x).double()) < ROUNDED


@torch.no_grad()
def test_what_is_done_to_an_activation_before_its_round_trip_stays():
    layer, x = layer_with_decode(with_a_clamp), 2 * rows()
    run = compiling(layer)
    assert relative_error(run(x), x.double().clamp(-1, 1) @ decoded(layer).double().T) < ROUNDED


@torch.no_grad()
def test_what_is_done_to_an_activation_after_its_round_trip_stays():
    layer, x = layer_with_decode(with_a_clamp_after_it), 400 * rows()
    layer.factor /= 400
    assert float(x.abs().max()) > 600
    run = compiling(layer)
    assert relative_error(run(x), layer(x).double()) < ROUNDED


@torch.no_grad()
def test_a_round_trip_through_fp8_is_not_one_through_fp4():
    layer, x = layer_with_decode(with_fp8), rows()
    run = compiling(layer)
    assert relative_error(run(x), layer(x).double()) < ROUNDED
    assert any("float8" in str(node.args) for node in run.graphs[0].nodes)


def test_the_factor_of_these_layers_divides_out():
    layer = Layer(linear)
    assert float(layer.alpha) * FACTOR == pytest.approx(fused.GLOBAL)
