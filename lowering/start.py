"""Launches of kernels without Triton's search for the compiled one, which takes the host longer than many of them run.

``kernel[grid](...)`` describes its arguments in strings to find what it compiled for such, and compares every global
that the kernel uses. A compiled kernel itself, ``compiled[grid](...)``, does neither. So the first launch of a kind is
Triton's, and the others are launches of what that one found.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

_found: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``.

    arguments: all that is no ``constexpr``, in the kernel's order: tensors, integers, None, and tensor descriptors
    whose boxes and layouts follow from the constants. constants: each ``constexpr``, and options such as num_warps.
    """
    if not isinstance(kernel, JITFunction):  # as the interpreter's
        kernel[grid](*arguments, **constants)
        return
    kind = kernel.fn, torch.cuda.current_device(), *map(_kind, arguments), *constants, *constants.values()
    if found := _found.get(kind):
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:  # a hook of Triton's can skip compiling
        _found[kind] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Hashable:
    """What Triton compiles an argument's kernels apart for, or more."""
    if argument is None:
        return None
    if type(argument) is int:
        return (argument == 1) | (argument % 16 == 0) << 1 | (argument >= 1 << 31) << 2
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument.base.dtype
