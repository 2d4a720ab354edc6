"""The one tile decoder that every kernel uses: words of codes and scale bytes in, exact code x scale out.

Two forms of the same function. The plain form is ordinary Triton and also runs in Triton's interpreter; the assembly
form is for bfloat16 and float16 and takes about a third of the instructions.

Why it is exact. Shifted into place, the bits of a code or of a scale read as a 16-bit float are its value times a power
of two, because the exponent fields line up and so do the subnormals; multiplying by powers of two loses nothing; and
code x scale has at most 6 significant bits (8 fit bfloat16). A scale byte 0x7F or 0xFF, E4M3's NaN, comes out as 480 or
-480: look for those when loading.

=========  =====================  ====================  ==========================
form       code's bits            scale's bits          result
=========  =====================  ====================  ==========================
plain      fp16: code * 2^-14     fp16: scale * 2^-8    code * scale
asm bf16   bf16: code * 2^-126    bf16: scale * 2^-120  code * scale * 2^-7
asm fp16   fp16: code * 2^-14     fp16: scale * 2^-8    code * scale * 2^-7
=========  =====================  ====================  ==========================

The factor 2^7 that the assembly form leaves out (``code * scale * 2^119`` would overflow otherwise) goes into the
global scale: see :func:`undo_factor`.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's parameters are pointers and constants, which Triton types itself)

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.constexpr_function
def undo_factor(asm):
    """What the sum of products must be multiplied with, beside the global scale."""
    return 128.0 if asm else 1.0


@triton.constexpr_function
def raised(half):
    """Assembly that turns ``a``, two scales' bits in place, into scale * 2^119 (bfloat16) or scale * 2^7 (float16).

    ``fma`` with -0 is a multiplication that SM80 has too (``mul.bf16x2`` came with SM90), and keeps the sign of zero.
    """
    kind, factors = ("f16x2", (0x78007800,)) if half else ("bf16x2", (0x7B807B80, 0x7B007B00))
    return "".join(f"mov.b32 f, {factor:#x}; fma.rn.{kind} a, a, f, z;" for factor in factors)


@triton.constexpr_function
def scale_assembly(half):
    """A scale byte ``$1`` -> ``$0``, two copies of scale * 2^119 (bfloat16) or of scale * 2^7 (float16: ``half``)."""
    return (
        "{ .reg .b32 a, b, f, z; mov.b32 z, 0x80008000;"
        "shl.b32 a, $1, 8; and.b32 a, a, 0x8000;"
        f"and.b32 b, $1, 0x7f; shl.b32 b, b, {7 if half else 4}; or.b32 a, a, b;"
        "prmt.b32 a, a, a, 0x1010;"
        f"{raised(half)} mov.b32 $0, a; }}"
    )


@triton.constexpr_function
def scales_of_lanes_assembly(half):
    """Two scale bytes, the lower half of ``$4``, of each of four neighbouring lanes -> the pairs of all four lanes."""
    shuffles = "".join(f"shfl.sync.idx.b32 ${lane}, a, {lane}, 0x1c1f, 0xffffffff;" for lane in range(4))
    return (
        "{ .reg .b32 a, b, f, z; mov.b32 z, 0x80008000;"
        "prmt.b32 a, $4, 0, 0x1404;"
        f"and.b32 b, a, 0x7f007f00; shr.u32 b, b, {1 if half else 4}; and.b32 a, a, 0x80008000; or.b32 a, a, b;"
        f"{raised(half)} {shuffles} }}"
    )


@triton.constexpr_function
def codes_assembly(layout, half):
    """A word ``$8`` and a pair of equal scales ``$9`` -> eight products ``$0 .. $7`` in natural order."""
    # The slot of the word that holds each k; see layout.py.
    slots = {"plain": "01234567", "plain_high_first": "10325476", "interleaved": "37261504"}[layout]
    down, kind = (3, "f16x2") if half else (6, "bf16x2")
    lines = ["{ .reg .b32 t, u, m, z; mov.b32 z, 0x80008000;"]
    for k in range(0, 8, 2):
        # Bring the codes k and k+1 to the top of the lower and of the upper half.
        to_low, to_high = 12 - 4 * int(slots[k]), 28 - 4 * int(slots[k + 1])
        lines.append(f"shl.b32 t, $8, {to_low};" if to_low >= 0 else f"shr.u32 t, $8, {-to_low};")
        if to_low != to_high:
            lines.append(f"shl.b32 u, $8, {to_high};")
            lines.append("and.b32 t, t, 0xf000; and.b32 u, u, 0xf0000000; or.b32 t, t, u;")
        lines.append(f"and.b32 m, t, 0x70007000; shr.u32 m, m, {down}; and.b32 t, t, 0x80008000; or.b32 t, t, m;")
        lines.append(f"fma.rn.{kind} t, t, $9, z; mov.b32 {{${k}, ${k + 1}}}, t;")
    return "".join(lines) + "}"


@triton.constexpr_function
def fragments_assembly(half, words):
    """Words of the layout ``fragments`` -> eight products each, a word's four pairs in order.

    Of one word ``$8`` with the scales ``$9`` of its first two pairs and ``$10`` of the others, each scale twice: ``$0``
    to ``$7``. Of two words ``$16``, ``$17`` with such ``$18``, ``$19``, in which the lower half is for the first word
    and the upper half for the second: ``$0`` to ``$15``. To pick a half costs nothing, the multiplication does it.

    Most codes come out by one shift and one mask. Left shifts are written as multiplications: they then run beside the
    masks, on another pipe of the machine.
    """
    where, kind = "0x81C081C0", "f16x2" if half else "bf16x2"
    lines = ["{ .reg .b32 t, u, z, f; .reg .b16 l, h; mov.b32 z, 0x80008000;"]
    for word in range(words):
        codes = f"${8 * words + word}"
        for pair in range(4):
            if pair == 0:
                lines.append(f"and.b32 t, {codes}, {where};")
            elif pair == 1:
                lines.append(f"mul.lo.u32 t, {codes}, 64; and.b32 t, t, {where};")
            elif pair == 2:
                lines.append(f"shf.l.wrap.b32 t, {codes}, {codes}, 12; and.b32 t, t, {where};")
            else:
                lines.append(f"mul.lo.u32 t, {codes}, 4; and.b32 t, t, 0x80C080C0;")
                lines.append(f"shr.u32 u, {codes}, 6; and.b32 u, u, 0x01000100; or.b32 t, t, u;")
            if half:
                lines.append("and.b32 u, t, 0x01C001C0; shl.b32 u, u, 3; and.b32 t, t, 0x80008000; or.b32 t, t, u;")
            factor = f"${9 * words + pair // 2}"
            if words == 2:
                lines.append(f"mov.b32 {{l, h}}, {factor}; mov.b32 f, {{{'lh'[word]}, {'lh'[word]}}};")
                factor = "f"
            first = 8 * word + 2 * pair
            lines.append(f"fma.rn.{kind} t, t, {factor}, z; mov.b32 {{${first}, ${first + 1}}}, t;")
    return "".join(lines) + "}"


@triton.jit
def word_offset(n, word, K: tl.constexpr, LAYOUT: tl.constexpr):
    """Where word ``word`` of row ``n`` (int64) lies in a weight ``[N, K/8]`` of 32-bit words."""
    if LAYOUT == "fragments":
        unit = n // 16 * (K // 64) + word // 8
        return unit * 128 + n % 8 * 16 + word % 8 // 2 * 4 + n // 8 % 2 * 2 + word % 2
    return n * (K // 8) + word


@triton.jit
def scale_offset(n, group, K: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the scale of block ``group`` of row ``n`` (int64) lies in scales ``[N, K/16]``."""
    if LAYOUT == "fragments":
        unit = n // 16 * (K // 64) + group // 4
        return unit * 64 + n % 8 * 8 + group % 4 * 2 + n // 8 % 2
    return n * (K // 16) + group


@triton.jit
def natural_position(position):
    """The column at ``position`` of the dot order: the order in which a thread's codes are its own operands.

    A product over K may take K in any order, as long as both operands have the same. In a step of 16 the tensor core
    wants of thread t of four the columns 2t, 2t+1, 2t+8, 2t+9. In the dot order of 64 columns these are, over four
    steps, the 16 columns of block t: two whole words and one scale, so that decoding moves nothing between threads.
    Position bits (s1, s0, h, t1, t0, j) stand for column bits (t1, t0, s1, s0, h, j). For layouts other than
    ``fragments``, whose words hold what a thread wants as it is.
    """
    inside = position % 64
    return (position - inside) + ((inside // 2) % 4) * 16 + (inside // 8) * 2 + inside % 2


def to_dot_order(x: torch.Tensor) -> torch.Tensor:
    """``x [M, K]`` with its columns in the dot order: ``[M, K rounded up to 64]``, zero where x has no column."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 64))
    return padded.view(x.shape[0], -1, 4, 8, 2).transpose(2, 3).reshape(padded.shape)


@triton.jit
def decode_tile(
    words, scale, LAYOUT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr, DOT_ORDER: tl.constexpr = False
):
    """words int32 ``[R, C/8]``, scale uint8 ``[R, C/16]`` -> ``DTYPE [R, C]``, / undo_factor(ASM).

    The columns come in natural order, or with DOT_ORDER (assembly only, C a multiple of 64) in the dot order. Of
    ``fragments`` C is a multiple of 64, or 32 with one word of each lane, and the order the natural one.
    """
    tl.static_assert(words.dtype == tl.int32, "codes are loaded as 32-bit words")
    tl.static_assert(scale.dtype == tl.uint8, "scales are loaded as bytes")
    tl.static_assert(words.shape[1] == 2 * scale.shape[1], "one scale byte for each two words")
    if ASM:
        return _decode_by_assembly(words, scale, LAYOUT, DTYPE, DOT_ORDER)
    return _decode_plainly(words, scale, LAYOUT).to(DTYPE)


@triton.jit
def columns_of_units(values):
    """Values ``[R, W, 8]`` of words -> ``[R, 8 W]`` as the tensor core takes them: bits (t, s, h, j) -> (s, h, t, j).

    For words of whole units, or of half a one, these are their columns; for other words the dot order.
    """
    ROWS: tl.constexpr = values.shape[0]
    WORDS: tl.constexpr = values.shape[1]
    PAIRS: tl.constexpr = 4 if WORDS == 4 else 8
    tl.static_assert(WORDS == 4 or WORDS % 8 == 0, "a unit has 64 columns")
    values = tl.reshape(values, (ROWS, WORDS // PAIRS, 4, PAIRS, 2))
    return tl.reshape(tl.permute(values, (0, 1, 3, 2, 4)), (ROWS, WORDS * 8))


@triton.jit
def _decode_plainly(words, scale, LAYOUT: tl.constexpr):
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    k = tl.arange(0, 8)
    if LAYOUT == "fragments":
        odd = (k % 2)[None, None, :]
        pair = (k // 2)[None, None, :]
        half = words[:, :, None] >> 16 * odd
        other = words[:, :, None] >> 16 * (1 - odd)
        sign = half >> tl.where(pair == 3, 13, 15 - 6 * pair)
        field = tl.where(pair == 2, other >> 10, half >> tl.where(pair == 0, 6, 0))
        scattered = (half >> 12) & 4 | (half >> 4) & 3
        nibbles = sign << 3 & 8 | tl.where(pair == 3, scattered, field & 7)
    else:
        if LAYOUT == "interleaved":
            slots = 3 - k // 2 + 4 * (k % 2)
        elif LAYOUT == "plain_high_first":
            slots = k ^ 1
        else:
            tl.static_assert(LAYOUT == "plain", "unknown layout")
            slots = k
        nibbles = words[:, :, None] >> (4 * slots)[None, None, :]
    bits = ((nibbles & 8) << 12) | ((nibbles & 7) << 9)
    codes = bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0
    byte = scale.to(tl.int32)
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    factors = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    if LAYOUT == "fragments":
        codes = columns_of_units(codes)
    products = tl.reshape(codes, (ROWS, GROUPS, 16)) * factors[:, :, None]
    return tl.reshape(products, (ROWS, GROUPS * 16))


@triton.jit
def _decode_by_assembly(words, scale, LAYOUT: tl.constexpr, DTYPE: tl.constexpr, DOT_ORDER: tl.constexpr):
    tl.static_assert(DTYPE.is_bf16() or DTYPE.is_fp16(), "the assembly makes packed 16-bit products")
    HALF: tl.constexpr = DTYPE.is_fp16()
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    SCALE_ASSEMBLY: tl.constexpr = scale_assembly(HALF)
    factors = tl.inline_asm_elementwise(
        SCALE_ASSEMBLY, "=r,r", [scale.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1
    )
    # One word in, eight 16-bit results out: with several elements an asm call the compiler may hand over registers
    # that are no neighbours.
    OUT: tl.constexpr = "=h,=h,=h,=h,=h,=h,=h,=h,"
    if LAYOUT == "fragments":
        # A word has pairs of two blocks; the same word of all four lanes has them.
        left, right = tl.split(tl.reshape(factors, (ROWS, WORDS // 8, 1, 2, 2)))
        left = tl.reshape(tl.broadcast_to(left, (ROWS, WORDS // 8, 4, 2)), (ROWS, WORDS))
        right = tl.reshape(tl.broadcast_to(right, (ROWS, WORDS // 8, 4, 2)), (ROWS, WORDS))
        UNITS_ASSEMBLY: tl.constexpr = fragments_assembly(HALF, 1)
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            UNITS_ASSEMBLY, OUT + "r,r,r", [words, left, right], dtype=(tl.int16,) * 8, is_pure=True, pack=1
        )
    else:
        # Two words share a block.
        factors = tl.broadcast_to(factors[:, :, None], (ROWS, WORDS // 2, 2))
        factors = tl.reshape(factors, (ROWS, WORDS))
        CODES_ASSEMBLY: tl.constexpr = codes_assembly(LAYOUT, HALF)
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            CODES_ASSEMBLY, OUT + "r,r", [words, factors], dtype=(tl.int16,) * 8, is_pure=True, pack=1
        )
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    products = tl.reshape(tl.join(even, odd), (ROWS, WORDS, 8))
    if DOT_ORDER or LAYOUT == "fragments":
        products = columns_of_units(products)
    return tl.reshape(products, (ROWS, WORDS * 8)).to(DTYPE, bitcast=True)
