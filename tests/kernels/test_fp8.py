"""``fp8_linear``: the op on the CPU, its kernel in the interpreter, and its compilation for every GPU generation."""

from __future__ import annotations

import pytest
import torch

from fp4pass.errors import ArgumentError, GradientError
from fp4pass.lowering import arch, fp8, reference

from .operands import NAN_BYTES, activations, assert_within, e4m3, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.0018, torch.float16: 0.0003}
DTYPES = tuple(TOLERANCE)


def fp8_weight(n, k, seed=0):
    """Random finite bytes ``[n, k]`` near 1, and their scale."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0x28, 0x48, (n, k), dtype=torch.uint8, generator=random)
    rare = torch.randint(0, 8, (n, k), generator=random) == 0
    codes = torch.where(rare, codes & 0x07, codes)  # zero and subnormals
    return codes | torch.randint(0, 2, (n, k), dtype=torch.uint8, generator=random) << 7, torch.tensor(0.037)


def product(*args):
    return torch.ops.fp4pass.fp8_linear(*args)


def test_every_finite_byte_comes_out_of_the_product():
    codes = torch.tensor([0 if byte in NAN_BYTES else byte for byte in range(256)], dtype=torch.uint8)
    exact = torch.tensor([e4m3(int(byte)) for byte in codes], dtype=torch.float64)
    for dtype in DTYPES:
        result = product(torch.ones(1, 1, dtype=dtype), codes[:, None], torch.tensor(1.0), None, None)
        assert torch.equal(result[0].double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(80,), (0, 80), (1, 80), (3, 5, 80), (2, 0, 80)])
def test_weight_only_product_of_any_rank_meets_the_oracle(shape, dtype):
    codes, scale = fp8_weight(48, 80)
    x, bias = activations(*shape, dtype=dtype), activations(48, dtype=dtype, seed=9)
    result = product(x, codes, scale, None, bias)
    exact = x.double() @ (reference.decode_scale(codes, torch.float64) * scale.double()).mT + bias.double()
    assert result.dtype == dtype and result.shape == (*shape[:-1], 48)
    assert relative_error(result, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_scale_rounds_activations_and_saturates(dtype):
    codes, scale = fp8_weight(48, 80)
    x, input_scale = activations(7, 80, dtype=dtype), torch.tensor([0.005])
    x[0, 0] = 100.0
    result = product(x, codes, scale, input_scale, None)
    values = (x.float() / 0.005).clamp(-448, 448).to(torch.float8_e4m3fn).double() * input_scale.double()
    assert values[0, 0] == 448 * input_scale.double().item()
    exact = values @ (reference.decode_scale(codes, torch.float64) * scale.double()).mT
    assert_within(result, exact, TOLERANCE[dtype])
    assert relative_error(result, product(x, codes, scale, None, None)) > 0.01


def test_large_weights_are_decoded_in_pieces(monkeypatch):
    codes, scale = fp8_weight(48, 80)
    x = activations(3, 80)
    whole = product(x, codes, scale, None, None)
    sizes = []
    monkeypatch.setattr(fp8, "_PIECE_BYTES", 80 * 4 * 4 * 7)
    monkeypatch.setattr(fp8, "decode_scale", lambda t, *rest: sizes.append(len(t)) or reference.decode_scale(t, *rest))
    assert relative_error(product(x, codes, scale, None, None), whole) < 1e-6
    assert sizes == [7] * 6 + [6]


def test_the_op_is_registered_as_torch_wants_it():
    codes, scale = fp8_weight(48, 80)
    x = activations(3, 80, dtype=torch.bfloat16)
    for input_scale in (None, torch.tensor(0.01)):
        args = (x, codes, scale, input_scale, activations(48))
        assert set(torch.library.opcheck(torch.ops.fp4pass.fp8_linear.default, args).values()) == {"SUCCESS"}


def test_gradients_go_to_x_and_bias_and_no_dense_weight_is_saved():
    codes, scale = fp8_weight(48, 80)
    x, bias = activations(3, 5, 80).requires_grad_(), activations(48, seed=9).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = product(x, codes, scale, None, bias)
    assert {t.dtype for t in saved if t.numel() > 1} == {torch.uint8}
    grad = activations(3, 5, 48, seed=5)
    result.backward(grad)
    dense = reference.decode_scale(codes, torch.float64) * scale.double()
    assert relative_error(x.grad, grad.double() @ dense) < 1e-6
    assert relative_error(bias.grad, grad.double().sum((0, 1))) < 1e-6


def test_rounded_activations_have_no_gradient():
    codes, scale = fp8_weight(48, 80)
    with pytest.raises(GradientError, match="have no gradient"):
        product(activations(3, 80).requires_grad_(), codes, scale, torch.tensor(0.01), None)


BAD = {
    "x has the wrong size": {"x": torch.zeros(3, 64)},
    "x has the wrong dtype": {"x": torch.zeros(3, 80, dtype=torch.int32)},
    "weight has the wrong dtype": {"weight": torch.zeros(48, 80)},
    "weight has the wrong number of dimensions": {"weight": torch.zeros(1, 48, 80, dtype=torch.uint8)},
    "weight_scale is not one number": {"weight_scale": torch.ones(48)},
    "weight_scale has the wrong dtype": {"weight_scale": torch.ones((), dtype=torch.bfloat16)},
    "input_scale is not one number": {"input_scale": torch.ones(1, 1)},
    "bias has the wrong size": {"bias": torch.zeros(47)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operands_that_do_not_fit_are_named(message, device):
    codes, scale = fp8_weight(48, 80)
    given = {"x": activations(3, 80), "weight": codes, "weight_scale": scale, "input_scale": None, "bias": None}
    given |= BAD[message]
    with pytest.raises(ArgumentError, match=f"fp4pass::fp8_linear: {message}"):
        product(*(None if each is None else each.to(device) for each in given.values()))


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_the_kernel_compiles_within_shared_memory_and_registers(sm, turned):
    pytest.importorskip("triton")
    from fp4pass.lowering import fp8_linear

    from . import compiling
    from .test_compile import assert_fits

    generation = arch.ARCHS[sm]
    dtypes = DTYPES if sm == 80 and not turned else (torch.bfloat16,)
    for dtype in dtypes:
        tiles = list(dict.fromkeys(generation.tile(rows, dtype) for rows in (1, 17, 64, fp8_linear.WIDEST)))
        for tile in (tiles[0], tiles[-1]) if turned else tiles:
            kind = compiling.POINTER[dtype]
            types = {"x": kind, "weight": "*u8", "weight_scale": "*fp32", "bias": kind, "out": kind}
            types |= dict.fromkeys(("M", "N", "stride_xm", "stride_wk" if turned else "stride_wn"), "i32")
            blocks = {name: block for name, block in tile.constants.items() if name.startswith("BLOCK")}
            constants = {"stride_wn" if turned else "stride_wk": 1, "K": 2688, "SPLITS": 1} | blocks
            kernel = compiling.compile_kernel(fp8_linear.fp8_linear_kernel, types, constants, generation, tile)
            assert_fits(generation, kernel)
            if sm == 90 and dtype != torch.float32:
                waits = [line for line in compiling.main_loop(kernel) if "ttng.warp_group_dot_wait" in line]
                assert waits and all("pendings = 0 " in line for line in waits)


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    from .interpreting import run

    run("interpreted_fp8")
