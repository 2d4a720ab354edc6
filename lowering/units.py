# ruff: noqa: ANN001, ANN201, SIM300  (kernels: Triton types the parameters)

"""What few_rows.py and many_rows.py share: units of the layout ``fragments`` in registers, and kernels that overlap.

Written in Gluon, because the point is which thread holds what; every conversion between layouts is asserted to move
nothing.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .decode import fragments_assembly, scale_pair_assembly

# Of a unit: codes as 32-bit words, scales as pairs of bytes (a lane's two rows).
UNIT_WORDS, UNIT_SCALES = gl.constexpr(128), gl.constexpr(32)


@gluon.jit
def decode_units(words, scale, held, DTYPE: gl.constexpr):
    """words int32 ``[W, R, 128]``, scale int16 ``[W, R, 32]`` as memory has them -> ``DTYPE``, times 1 / undo_factor.

    The result is ``[W, R, 2, 8, 4, 2, 2, 2, 2]``: rows of a unit in two dimensions, its columns in five. ``held`` is a
    zero that the result waits for.
    """
    WARPS: gl.constexpr = words.shape[0]
    ROWS: gl.constexpr = words.shape[1]
    HALF: gl.constexpr = DTYPE == gl.float16
    SCALE_ASSEMBLY: gl.constexpr = scale_pair_assembly(HALF)
    CODES_ASSEMBLY: gl.constexpr = fragments_assembly(HALF)
    # Lane (g, t) owns block t of the rows g and g + 8 (half h): two words (q) and one scale for each.
    word = words.reshape([WARPS, ROWS, 8, 4, 2, 2]).permute([0, 1, 4, 2, 3, 5])  # W, R, h, g, t, q
    pair = (scale.to(gl.int32) | held).reshape([WARPS, ROWS, 8, 4])
    low, high = gl.inline_asm_elementwise(
        SCALE_ASSEMBLY, "=r,=r,r", [pair], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    factor = gl.join(low, high).permute([0, 1, 4, 2, 3])  # W, R, h, g, t
    factor = gl.convert_layout(gl.join(factor, factor), word.type.layout, assert_trivial=True)
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        CODES_ASSEMBLY,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [word, factor],
        dtype=(gl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    even = gl.join(gl.join(p0, p4), gl.join(p2, p6))
    odd = gl.join(gl.join(p1, p5), gl.join(p3, p7))
    # W, R, h, g, t, q, k bit 2, k bit 1, k bit 0
    return gl.join(even, odd).to(DTYPE, bitcast=True)


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
