"""``fp4pass.compile``: torch.compile with this backend, options as keywords, and early words on what cannot work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import nn

from fp4pass.backend import fp4pass as backend
from fp4pass.errors import WrapError
from fp4pass.options import Options

Target = TypeVar("Target", bound=Callable[..., Any])


@overload
def compile(target: Target, /) -> Target: ...


@overload
def compile(
    target: None = None,
    /,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Callable[[Target], Target]: ...


def compile(
    target: Any = None,
    /,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Any:
    """Compile a function, a method in a class body, or a model; ``torch.compile(..., backend="fp4pass")``.

    Bare, ``@fp4pass.compile``, or with arguments, ``@fp4pass.compile(dynamic=True, require_match=True)``. A function
    keeps its signature, name and docstring, and stays a method where it was one; a model comes back as torch.compile
    gives it, sharing its weights. mode, dynamic, fullgraph: those of torch.compile. options: a mapping of the backend's
    options, and ``named`` the same as keywords (see `fp4pass.options.Options`); mode and options may stand together.

    Raises, when the decorator runs and not at the first call:
        WrapError: a class, a staticmethod or classmethod object, a generator or coroutine function, something that is
            compiled already, or nothing that can be called.
        OptionError: an unknown option, or one with a wrong value.
    """
    settings = {**(options or {}), **named} | ({} if mode is None else {"mode": mode})
    Options.parse(options=settings)
    wrap = functools.partial(_wrap, dynamic=dynamic, fullgraph=fullgraph, options=settings)
    return wrap if target is None else wrap(target)


def _wrap(target: Any, *, dynamic: bool | None, fullgraph: bool, options: Mapping[str, Any]) -> Any:
    for cannot, what, do in _CANNOT:
        if cannot(target):
            raise WrapError(
                f"fp4pass.compile cannot wrap {what}",
                seen=_describe(target),
                expected="a function, a method of a class body, or an nn.Module instance",
                do=do,
            )
    # torch takes no empty options beside a mode, and an empty mapping says nothing.
    given = {"options": dict(options)} if options else {}
    return torch.compile(target, backend=backend, dynamic=dynamic, fullgraph=fullgraph, **given)


def _is_generator(target: Any) -> bool:
    return inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target)


def _is_compiled(target: Any) -> bool:
    # The mark that torch.compile leaves on whatever it returns.
    return "_torchdynamo_orig_callable" in getattr(target, "__dict__", {})


_CANNOT: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (inspect.isclass, "a class", "decorate its forward, or compile an instance: model = fp4pass.compile(model)"),
    (
        lambda target: isinstance(target, (staticmethod, classmethod)),
        "a staticmethod or classmethod object",
        "put @staticmethod or @classmethod above @fp4pass.compile, so that it is applied last",
    ),
    (_is_generator, "a generator function", "compile the function that computes one item, and loop outside of it"),
    (inspect.iscoroutinefunction, "a coroutine function", "compile the function that it awaits the result of"),
    (_is_compiled, "what torch.compile has made", "compile the original function or model instead"),
    (
        lambda target: isinstance(target, (torch.jit.ScriptModule, torch.jit.ScriptFunction)),
        "what TorchScript has made",
        "compile the Python function or model that was scripted",
    ),
    (lambda target: not callable(target), "something that cannot be called", "pass the function or model itself"),
)
"""What is refused: the test for it, its name, and what to do instead. The first that holds is named."""


def _describe(target: Any) -> str:
    kind = type(target).__name__
    name = getattr(target, "__qualname__", None)
    if name is not None:
        return f"{kind} {name}"
    return kind if isinstance(target, nn.Module) else f"{kind}: {target!r:.80}"
