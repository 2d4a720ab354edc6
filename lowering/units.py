# ruff: noqa: ANN001, ANN201, SIM300  (kernels: Triton types the parameters)

"""What few_rows.py and many_rows.py share: units of the layout ``fragments`` in registers, and kernels that overlap.

Written in Gluon, because the point is which thread holds what; every conversion between layouts is asserted to move
nothing.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode import fragments_assembly, scales_of_lanes_assembly

# Of a unit: codes as 32-bit words, scales as pairs of bytes (a lane's two rows).
UNIT_WORDS, UNIT_SCALES = gl.constexpr(128), gl.constexpr(32)
UNIT_COLUMNS, UNIT_BYTES = gl.constexpr(64), gl.constexpr(576)


@gluon.jit
def decode_units(words, scale, held, DTYPE: gl.constexpr):
    """words int32 ``[W, R, 128]``, scale int16 ``[W, R, 32]`` as memory has them -> ``DTYPE``, times 1 / undo_factor.

    The result is ``[W, R, 2, 8, 2, 2, 2, 4, 2]``: rows of a unit in two dimensions, its columns in five. ``held`` is a
    zero that the result waits for.
    """
    WARPS: gl.constexpr = words.shape[0]
    ROWS: gl.constexpr = words.shape[1]
    HALF: gl.constexpr = DTYPE == gl.float16
    SCALES_ASSEMBLY: gl.constexpr = scales_of_lanes_assembly(HALF)
    CODES_ASSEMBLY: gl.constexpr = fragments_assembly(HALF, 2)
    # Lane (g, t) owns two words (q) of the rows g and g + 8, and the scales of block t of both.
    word = words.reshape([WARPS, ROWS, 8, 4, 2, 2]).permute([0, 1, 2, 3, 5, 4])
    upper, lower = gl.split(word)  # W, R, g, t, q
    pair = (scale.to(gl.int32) | held).reshape([WARPS, ROWS, 8, 4])
    a0, a1, a2, a3 = gl.inline_asm_elementwise(
        SCALES_ASSEMBLY, "=r,=r,=r,=r,r", [pair], dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )
    left = gl.convert_layout(gl.join(a0, a2), upper.type.layout, assert_trivial=True)
    right = gl.convert_layout(gl.join(a1, a3), upper.type.layout, assert_trivial=True)
    p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(
        CODES_ASSEMBLY,
        "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
        [upper, lower, left, right],
        dtype=(gl.int16,) * 16,
        is_pure=True,
        pack=1,
    )
    above = joined(p0, p1, p2, p3, p4, p5, p6, p7)
    below = joined(q0, q1, q2, q3, q4, q5, q6, q7)
    # W, R, g, t, q, s, h, j, half of the rows
    return gl.join(above, below).permute([0, 1, 8, 2, 4, 5, 6, 3, 7]).to(DTYPE, bitcast=True)


@gluon.jit
def joined(p0, p1, p2, p3, p4, p5, p6, p7):
    """Three dimensions more, of two each."""
    even = gl.join(gl.join(p0, p4), gl.join(p2, p6))
    odd = gl.join(gl.join(p1, p5), gl.join(p3, p7))
    return gl.join(even, odd)


@gluon.jit
def activate(acc, ACTIVATION: gl.constexpr):
    """The activation of a sum; not homogeneous, so it comes after the global scale."""
    if ACTIVATION == "relu2":
        acc = gl.where(acc < 0.0, 0.0, acc)  # which keeps NaN
        acc = acc * acc
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + gl.exp(-acc))
    else:
        gl.static_assert(ACTIVATION == "none", "unknown activation")
    return acc


@gluon.jit
def let_next_begin():
    """Programmatic dependent launch: the next kernel may begin, as far as its ``wait_for_last``."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_last():
    """Until the kernel before has ended and what it wrote is there."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
