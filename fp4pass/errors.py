"""The catalogue of errors. Each says what was seen, what was expected and what to do."""

from __future__ import annotations


class Fp4passError(Exception):
    """Base of every error that fp4pass raises for something the user can change."""

    def __init__(self, what: str, *, seen: str, expected: str, do: str) -> None:
        self.what, self.seen, self.expected, self.do = what, seen, expected, do
        super().__init__(f"{what}\n  seen:     {seen}\n  expected: {expected}\n  do:       {do}")

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.what, self.seen, self.expected, self.do)


def _rebuild(cls: type[Fp4passError], what: str, seen: str, expected: str, do: str) -> Fp4passError:
    return cls(what, seen=seen, expected=expected, do=do)


class OptionError(Fp4passError, ValueError):
    """An option of the backend has an unknown name or a value out of its range."""


class VersionError(Fp4passError, ImportError):
    """A library is missing or its version lies outside the supported range."""


class DeviceError(Fp4passError, RuntimeError):
    """The GPU, or its absence, does not allow what was asked."""


class CheckpointError(Fp4passError, ValueError):
    """A checkpoint's files, config or tensors are not what they should be."""


class UnmatchedError(Fp4passError, RuntimeError):
    """``require_match`` was asked for and a quantized product was left as it was."""


class ActivationError(Fp4passError, RuntimeError):
    """An activation arrives in FP4 or FP8 and cannot be turned back without inventing a scale."""


class GradientError(Fp4passError, RuntimeError):
    """Gradients were asked for where none are given."""


class WrapError(Fp4passError, TypeError):
    """``fp4pass.compile`` was put on something that it cannot wrap."""


class ArgumentError(Fp4passError, ValueError):
    """An op of fp4pass got a tensor of the wrong shape, dtype or device."""
