# ruff: noqa: ANN001, ANN201, RUF005, SIM300  (kernels: Triton types the parameters, and compiles no starred tuple)

"""8-bit (E4M3) weights for mma_rows.py: rows of bytes as checkpoints have them, decoded in registers.

A lane reads the 16 bytes that a thread of the tensor core owns in the dot order of decode.py, in which x then is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .units import UNIT_COLUMNS


@gluon.constexpr_function
def bytes_assembly(half):
    """A word of four bytes ``$4`` -> the E4M3 values ``$0 .. $3``, exactly; NaN comes out as 480.

    Their bits in place read as the value times 2^-120 in bfloat16, or 2^-8 in float16.
    """
    kind, factor, down = ("f16x2", "0x5C005C00", 1) if half else ("bf16x2", "0x7B807B80", 4)
    lines = [f"{{ .reg .b32 a, b, f, z; mov.b32 z, 0x80008000; mov.b32 f, {factor};"]
    for first, picked in ((0, "0x1404"), (2, "0x3424")):
        lines.append(f"prmt.b32 a, $4, 0, {picked};")
        lines.append(f"and.b32 b, a, 0x7f007f00; shr.u32 b, b, {down}; and.b32 a, a, 0x80008000; or.b32 a, a, b;")
        lines.append(f"fma.rn.{kind} a, a, f, z; mov.b32 {{${first}, ${first + 1}}}, a;")
    return "".join(lines) + "}"


@gluon.constexpr_function
def words_layout(across):
    """Words of 64 columns ``[16 * across, 16]``: lane ``4 g + t`` has four neighbours of the rows g and g + 8."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps = [[16 << bit, 0] for bit in range(across.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, warps, [], [16 * across, 16])


@gluon.jit
def fetch_bytes(words, unit, N, step, K: gl.constexpr, HIGH: gl.constexpr):
    """HIGH times 64 columns of 16 rows a warp, from row ``16 * unit`` on: zero past K, the last row past N."""
    ACROSS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = words_layout(ACROSS)
    word = step * (UNIT_COLUMNS // 4) + gl.arange(0, UNIT_COLUMNS // 4, layout=gl.SliceLayout(0, LAYOUT))
    fetched = ()
    for high in gl.static_range(HIGH):
        row = (unit + high * ACROSS) * 16 + gl.arange(0, 16 * ACROSS, layout=gl.SliceLayout(1, LAYOUT))
        where = words + gl.minimum(row, N - 1).to(gl.int64)[:, None] * (K // 4) + word[None, :]
        if K % UNIT_COLUMNS == 0:
            fetched = fetched + ((gl.load(where),),)
        else:
            fetched = fetched + ((gl.load(where, mask=(word < K // 4)[None, :], other=0),),)
    return fetched


@gluon.jit
def decode_bytes(words, DTYPE: gl.constexpr):
    """int32 words ``[R, 16]`` -> ``DTYPE [R, 64]``, columns in the dot order."""
    ASSEMBLY: gl.constexpr = bytes_assembly(DTYPE == gl.float16)
    p0, p1, p2, p3 = gl.inline_asm_elementwise(
        ASSEMBLY, "=h,=h,=h,=h,r", [words], dtype=(gl.int16,) * 4, is_pure=True, pack=1
    )
    values = gl.join(gl.join(p0, p2), gl.join(p1, p3)).reshape([words.shape[0], 4, 4, 2, 2])
    return values.permute([0, 2, 3, 1, 4]).reshape([words.shape[0], 64]).to(DTYPE, bitcast=True)
