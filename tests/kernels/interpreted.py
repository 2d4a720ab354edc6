"""The kernels in Triton's interpreter, on the CPU. Run by test_interpreter.py in a process that has TRITON_INTERPRET=1.

The interpreter has no bfloat16 ``tl.dot``: kernels run here in float32 and float16, and for bfloat16 the decoder alone.
Inline assembly, which it does not have either, is executed by assembly.py.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from fp4pass.lowering import arch, decode, layout, linear, moe, reference

from .assembly import WORD, Machine
from .interpreting import bounds_of_loops_are_numbers  # noqa: F401
from .operands import activations, every_product, relative_error, stored, weight

PLAIN_FORM = {"arch": arch.target(80), "asm": False}
ASSEMBLY = {"arch": arch.target(80), "asm": True}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4}


def execute(asm, constraints, args, dtype, is_pure, pack):
    """Stands in for ``tl.inline_asm_elementwise``."""
    if not asm:
        return args[0]
    assert is_pure and pack == 1
    results = dtype if isinstance(dtype, tuple) else (dtype,)
    assert constraints == ",".join(["=h" if kind == tl.int16 else "=r" for kind in results] + ["r"] * len(args))
    inputs = [torch.from_numpy(argument.handle.data.astype("int64")) & WORD for argument in args]
    registers = Machine(**{f"${len(results) + i}": value for i, value in enumerate(inputs)}).run(asm).registers
    tensors = []
    for index, kind in enumerate(results):
        data = registers[f"${index}"].numpy().astype("int16" if kind == tl.int16 else "int32")
        tensors.append(tl.tensor(TensorHandle(data, kind), tl.block_type(kind, list(data.shape))))
    return tuple(tensors) if isinstance(dtype, tuple) else tensors[0]


@pytest.fixture(autouse=True)
def _assembly(monkeypatch):
    monkeypatch.setattr(tl, "inline_asm_elementwise", execute)


@pytest.fixture(params=(PLAIN_FORM, ASSEMBLY), ids=("plain", "assembly"))
def form(request):
    return request.param


# The dtypes of whole kernels; float32 has no assembly form.
EACH_FORM = pytest.mark.parametrize(
    ("dtype", "form"),
    [
        pytest.param(torch.float32, PLAIN_FORM, id="float32"),
        pytest.param(torch.float16, PLAIN_FORM, id="float16"),
        pytest.param(torch.float16, ASSEMBLY, id="float16-assembly"),
    ],
)
# The decoder's own tests take every layout; for the products' row strides and splits these will do.
FEW_AND_MANY_ROWS = pytest.mark.parametrize(
    ("rows", "order"),
    [
        (16, layout.PLAIN_HIGH_FIRST),
        (16, layout.INTERLEAVED),
        (16, layout.FRAGMENTS),
        (256, layout.PLAIN),
        (256, layout.FRAGMENTS),
    ],
)


@triton.jit
def position_kernel(out, SIZE: tl.constexpr):
    position = tl.arange(0, SIZE)
    tl.store(out + position, decode.natural_position(position))


def dot_order(size):
    """The natural column at each of ``size`` (a power of two) positions, by the kernels' function."""
    columns = torch.empty(size, dtype=torch.int32)
    position_kernel[(1,)](columns, size)
    return columns


def test_the_dot_order_gives_each_thread_the_columns_of_one_block():
    columns = dot_order(256)
    assert torch.equal(columns.sort().values, torch.arange(256, dtype=torch.int32))
    # Of each 16 positions, a step of the tensor core, thread t of four holds 2t, 2t+1, 2t+8 and 2t+9.
    held = [2 * t + offset for t in range(4) for offset in (0, 1, 8, 9)]
    by_thread = columns.view(4, 4, 16)[:, :, held].view(4, 4, 4, 4).transpose(1, 2)
    expected = torch.arange(256, dtype=torch.int32).view(4, 4, 4, 4)
    assert torch.equal(by_thread, expected)


@pytest.mark.parametrize("k", (16, 64, 80, 256))
def test_rows_in_the_dot_order_are_padded_with_zeros(k):
    x = activations(3, k)
    width = -(-k // 64) * 64
    columns = dot_order(256)[:width]
    assert torch.equal(decode.to_dot_order(x), torch.nn.functional.pad(x, (0, width - k))[:, columns])


@triton.jit
def decode_kernel(
    words, scale, out, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr, ASM: tl.constexpr, DOT_ORDER: tl.constexpr
):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    word_tile = tl.load(words + decode.word_offset(rows, tl.arange(0, COLUMNS // 8)[None, :], COLUMNS, LAYOUT))
    scale_tile = tl.load(scale + decode.scale_offset(rows, tl.arange(0, COLUMNS // 16)[None, :], COLUMNS, LAYOUT))
    tile = decode.decode_tile(word_tile, scale_tile, LAYOUT, out.dtype.element_ty, ASM, DOT_ORDER)
    tl.store(out + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("order", layout.LAYOUTS)
def test_the_decoder_is_exact_for_every_product(order, dtype, form):
    asm = form["asm"] and dtype != torch.float32
    codes, scale, expected = every_product()
    out = torch.empty(256, 256, dtype=dtype)
    codes, scale = stored(codes, scale, order)
    words = codes.view(torch.int32)
    decode_kernel[(16,)](words, scale, out, 256, order, asm, False)
    assert torch.equal(out.double() * decode.undo_factor(asm), expected)
    if asm and order != layout.FRAGMENTS:
        decode_kernel[(16,)](words, scale, out, 256, order, asm, True)
        assert torch.equal(out.double() * decode.undo_factor(asm), expected[:, dot_order(256)])


@EACH_FORM
@FEW_AND_MANY_ROWS
def test_all_finite_products_come_out_of_linear(order, dtype, rows, form):
    codes, scale, expected = every_product()
    operands = *stored(codes, scale, order), None
    eye = torch.eye(256, dtype=dtype)[:rows]
    assert torch.equal(linear.linear(eye, *operands, None, order, **form).double(), expected.mT[:rows])
    back = linear.linear_backward(eye, *operands, order, **form)
    assert torch.equal(back.double(), expected[:rows])


@FEW_AND_MANY_ROWS
def test_all_finite_products_come_out_of_expert_products(order, rows, form):
    codes, scale, expected = every_product()
    codes, scale = stored(codes, scale, order)
    codes = torch.stack([torch.zeros_like(codes)] + 15 * [codes])
    ids, eye = torch.ones(rows, dtype=torch.int32), torch.eye(256, dtype=torch.float16)[:rows]
    result = moe.gathered_linear(eye, codes, scale.expand(16, -1, -1).contiguous(), None, ids, order, **form)
    assert torch.equal(result.double(), expected.mT[:rows])


@EACH_FORM
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 48, 80), (1, 48, 80), (3, 80, 1040), (16, 48, 64), (17, 208, 48), (33, 80, 336), (130, 144, 208)],
)
def test_linear_meets_the_oracle_on_ragged_shapes(m, n, k, dtype, form):
    operands = weight(n, k)
    x, bias = activations(m, k, dtype=dtype), activations(n, dtype=dtype, seed=5)
    result = linear.linear(x, *operands, bias, layout.PLAIN, **form)
    exact = reference.linear(x, *operands, bias, layout.PLAIN, accumulate=torch.float64)
    assert result.shape == (m, n) and relative_error(result, exact) < TOLERANCE[dtype]
    grad = activations(m, n, dtype=dtype, seed=6)
    back = linear.linear_backward(grad, *operands, layout.PLAIN, **form)
    exact = reference.linear_backward(grad, *operands, layout.PLAIN, torch.float64)
    assert back.shape == (m, k) and relative_error(back, exact) < TOLERANCE[dtype]


@EACH_FORM
@pytest.mark.parametrize("activation", tuple(reference.ACTIVATIONS))
@pytest.mark.parametrize(("m", "n", "k"), [(3, 80, 1040), (33, 80, 336)], ids=("in-parts", "at-once"))
def test_activation_and_cast_follow_the_bias(m, n, k, activation, dtype, form):
    operands, x, bias = weight(n, k), activations(m, k, dtype=dtype), activations(n, dtype=dtype, seed=5)
    x[0, 0] = torch.nan
    result = linear.linear(x, *operands, bias, layout.PLAIN, activation, torch.float32, **form)
    exact = reference.linear(x.double(), *operands, bias, layout.PLAIN, activation, accumulate=torch.float64)
    assert result.dtype == torch.float32 and result[0].isnan().all()
    # What is not rounded to 16 bits is as near as sums in float32 are, or products in float16 times 2^7.
    assert relative_error(result[1:], exact[1:]) < 2e-6
    rounded = linear.linear(x, *operands, bias, layout.PLAIN, activation, **form)
    assert torch.equal(rounded[1:], result[1:].to(dtype))


def test_strides_and_ranks_of_x():
    operands = weight(48, 80)
    x = activations(80, 6).mT
    result = linear.linear(x, *operands, None, layout.PLAIN, **PLAIN_FORM)
    contiguous = linear.linear(x.contiguous(), *operands, None, layout.PLAIN, **PLAIN_FORM)
    assert torch.equal(result, contiguous)
    folded = linear.linear(x.reshape(2, 3, 80), *operands, None, layout.PLAIN, **PLAIN_FORM)
    assert torch.equal(folded.view(6, 48), contiguous)


@pytest.mark.parametrize("k", (80, 128))
@pytest.mark.parametrize("rows", (3, 20))
def test_x_put_in_the_dot_order_gives_the_bits_of_x_picked_in_it(rows, k, monkeypatch):
    operands, x = weight(48, k), activations(rows, k, dtype=torch.float16)
    results = []
    for threshold in (0, 1 << 30):
        monkeypatch.setattr(linear, "REORDER_FROM", threshold)
        results.append(linear.linear(x, *operands, None, layout.PLAIN, **ASSEMBLY))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rows", (16, 40))
def test_an_expert_product_leaves_its_columns_in_the_dot_order_and_zeros_after_them(rows):
    codes, scale, expected = (t[:80] for t in every_product())
    codes, scale = (t.expand(16, -1, -1).contiguous() for t in (codes, scale))
    x = torch.eye(256, dtype=torch.float16)[:rows]
    x[0] = torch.inf
    ids, tile = torch.arange(rows) % 16, PLAIN_FORM["arch"].tile(1, x.dtype, experts=True)
    plan = moe.schedule(ids, 16, tile.block_m)
    out = moe.Rows(torch.full((rows, 128), torch.nan, dtype=x.dtype), in_dot_order=True)
    moe._product(plan, tile, moe.Rows(x), moe.Weight(codes, scale, None, layout.PLAIN), None, out, "none", True)
    assert torch.equal(out.tensor[1:], decode.to_dot_order(expected.mT[1:rows]).half())
    natural = out.tensor[0][dot_order(128).argsort()]
    assert not natural[:80].isfinite().any() and not natural[80:].any()


@EACH_FORM
@pytest.mark.parametrize("tokens", (1, 3, 40, 100))
@pytest.mark.parametrize("activation", tuple(reference.ACTIVATIONS))
def test_experts_meet_the_oracle_with_sentinels_and_empty_experts(tokens, activation, dtype, form):
    up, down = weight(7, 48, 80, seed=2), weight(7, 112, 48, seed=3)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 6, (tokens, 2), generator=generator)
    ids[ids == 3] = 7
    weights = torch.rand(tokens, 2, generator=generator)
    weights[(ids < 0) | (ids >= 7)] = torch.nan
    x = activations(tokens, 80, dtype=dtype)
    result = moe.experts(x, ids, weights, *up, *down, activation, layout.PLAIN, **form)
    exact = reference.experts(x, ids, weights, *up, *down, activation, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "choices"), [(5, 1), (1, 2), (40, 1), (3, 2)])
def test_ids_and_weights_of_experts_have_any_strides(tokens, choices):
    up, down = weight(7, 48, 80, seed=2), weight(7, 112, 48, seed=3)
    ids, weights = torch.randint(0, 7, (2 * tokens, 4)), torch.rand(2 * tokens, 4)
    x, some = activations(tokens, 80), (slice(None, None, 2), slice(0, 2 * choices, 2))
    others = (*up, *down, "relu2", layout.PLAIN)
    result = moe.experts(x, ids[some], weights[some], *others, **PLAIN_FORM)
    exact = reference.experts(x, ids[some], weights[some], *others, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[x.dtype]


@EACH_FORM
@pytest.mark.parametrize("rows", (5, 150))
def test_gathered_and_grouped_meet_the_oracle(rows, dtype, form):
    operands = weight(5, 48, 80)
    x = activations(rows, 80, dtype=dtype)
    ids = torch.arange(rows) % 7 - 1
    result = moe.gathered_linear(x, *operands, ids, layout.PLAIN, **form)
    exact = reference.gathered_linear(x, *operands, ids, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[dtype]
    ends = torch.tensor([1, 1, rows // 2, rows // 2 + 1, rows - 1], dtype=torch.int32)
    result = moe.grouped_linear(x, *operands, ends, layout.PLAIN, **form)
    exact = reference.grouped_linear(x, *operands, ends, layout.PLAIN, torch.float64)
    assert relative_error(result, exact) < TOLERANCE[dtype]
    assert torch.equal(result[-1], torch.zeros(48, dtype=dtype))


def test_experts_in_parts_equal_experts_at_once(monkeypatch):
    up, down = weight(7, 48, 80, seed=2), weight(7, 112, 48, seed=3)
    ids, weights = torch.randint(0, 7, (40, 2)), torch.rand(40, 2)
    operands = (activations(40, 80), ids, weights, *up, *down, "relu2", layout.PLAIN)
    whole = moe.experts(*operands, **PLAIN_FORM)
    monkeypatch.setattr(moe, "_WORKSPACE_BYTES", 2 * 112 * 4 * 17)
    assert relative_error(moe.experts(*operands, **PLAIN_FORM), whole) < 1e-6
