"""Experts lie on disk one by one, and in memory as one stack: how the loader of transformers comes to read them so.

Of each stack the loader sees the first expert's tensor alone. Its conversion makes the stack where that tensor was put,
and reads all of it there at once: tens of thousands of tensors cost what their bytes cost, and none is there twice.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers.core_model_loading import MergeModulelist, SkipParameters, SplitModulelist, WeightConverter

from fp4pass.errors import CheckpointError

from .validate import TORCH_DTYPES, Header

READ_WITH_FIRST = "(read with the first expert's)"
"""What the loader is told to call the tensors of the other experts, which it is then told to ignore."""

# Large enough that threads and copies cost nothing beside the bytes, and little beside a shard: 128 MB of host memory.
_PIECE_BYTES, _READERS = 16 << 20, min(8, os.cpu_count() or 1)

ReadStack = Callable[[Any, str, torch.device], torch.Tensor]
"""``(model, parameter's name, device) -> all of the parameter``"""


def read_stack(headers: Sequence[Header], device: torch.device) -> torch.Tensor:
    """The tensors of ``headers``, of one shape, stacked [len(headers), *shape] on ``device``, in their dtype on disk.

    Where dtypes differ the stack has the one that holds them all. Raises CheckpointError if a file has become shorter.
    """
    if len({header.dtype for header in headers}) > 1:
        return torch.cat([read_stack([header], device) for header in headers])
    first, count = headers[0], len(headers)
    stack = torch.empty((count, *first.shape), dtype=TORCH_DTYPES[first.dtype], device=device)
    data, size = stack.view(-1).view(torch.uint8), stack[0].nbytes
    at_once = max(1, _PIECE_BYTES // max(1, size))

    def read(begin: int) -> None:
        end = min(count, begin + at_once)
        piece = data[begin * size : end * size]
        # From pinned memory a copy to the GPU is one transfer; from pageable memory the driver would copy it first.
        on_host = piece.device.type == "cpu"
        buffer = piece if on_host else torch.empty_like(piece, device="cpu", pin_memory=piece.is_cuda)
        _read_into(memoryview(buffer.numpy()), headers[begin:end], size)
        if not on_host:
            piece.copy_(buffer)

    pieces = range(0, count, at_once)
    if len(pieces) == 1:
        read(0)
        return stack
    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read, pieces):
            pass
    return stack


def _read_into(buffer: memoryview, headers: Sequence[Header], size: int) -> None:
    """Fill ``buffer`` with the tensors' bytes, ``size`` of each."""
    rest = buffer
    for path, tensors in itertools.groupby(headers, key=lambda header: header.path):
        with path.open("rb", buffering=0) as file:
            for header in tensors:
                file.seek(header.offset)
                tensor, rest = rest[:size], rest[size:]
                while tensor:
                    got = file.readinto(tensor)
                    if not got:
                        _refuse_short(path.name)
                    tensor = tensor[got:]


def _refuse_short(file: str) -> None:
    raise CheckpointError(
        f"{file} has become shorter while it was read",
        seen="the end of the file within a tensor",
        expected="the file that the header was read from",
        do="load the checkpoint when nothing writes to it",
    )


class _Stack(MergeModulelist):
    """The first expert's tensor -> the stack, as ``read`` gives it; undone by ``_Unstack``."""

    def __init__(self, read: ReadStack) -> None:
        super().__init__(dim=0)
        self.read = read

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """``{pattern: [first expert's tensor]}`` -> ``{name of the stack: stack}`` on its device and in its dtype."""
        ((first,),) = input_dict.values()
        return {target_patterns[0]: self.read(model, full_layer_name, first.device).to(first.dtype)}

    @property
    def reverse_op(self) -> SplitModulelist:
        return _Unstack(self.read)


class _Unstack(SplitModulelist):
    """Takes away the stacked dimension alone; its base, in some versions, drops every other of size 1 as well."""

    def __init__(self, read: ReadStack) -> None:
        super().__init__(dim=0)
        self.read = read

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, torch.Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """``{name of the stack: tensor}`` -> ``{name of each expert's tensor: that}``."""
        found: dict[str, torch.Tensor] = {}
        for name, tensors in input_dict.items():
            stack = tensors[0] if isinstance(tensors, list) else tensors
            targets = self.get_target_patterns(input_dict, name, target_patterns, stack.size(self.dim))
            found |= dict(zip(targets, stack.unbind(self.dim), strict=True))
        return found

    @property
    def reverse_op(self) -> MergeModulelist:
        return _Stack(self.read)


class _Stacking(WeightConverter):
    """Converts the first expert's tensor to the stack of all, and takes the others' out of the loader's sight."""

    def __init__(self, source_patterns: Any, target_patterns: Any, *args: Any, **kwargs: Any) -> None:
        source = source_patterns if isinstance(source_patterns, str) else source_patterns[0]
        super().__init__(source_patterns, target_patterns, *args, **kwargs)
        # Undoing a stack is a converter of this class, too, whose source has no number.
        self._place, self._number, self._tail = source.removesuffix(_NOT_LONGER).rpartition("*")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """``(new name, the pattern that matched)``; asked for every tensor, and quick for those of no concern."""
        if not source_key.endswith(self._tail):
            return source_key, None
        if self._number and self._place in source_key and not source_key.endswith(f"{self._place}0{self._tail}"):
            return READ_WITH_FIRST, None
        return super().rename_source_key(source_key)

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As its base, but the first error ends the load: the loader would note it, go on and name no cause."""
        try:
            return super().convert(*args, **kwargs)
        except SkipParameters as noted:
            failure = noted.__context__
        raise failure

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stacking:
        fresh = copy.copy(self)
        fresh.collected_tensors, fresh.layer_targets = defaultdict(list), defaultdict(set)
        return fresh


# One name is the beginning of another; the lookahead holds them apart and is dropped where a pattern is a target.
_NOT_LONGER = "(?!_)"


def stacking(projection: str, part: str, parameter: str, read: ReadStack) -> WeightConverter:
    """The converter of ``mixer.experts.#.{projection}.{part}`` in files to ``mixer.experts.{parameter}``, and back."""
    source, target = f"mixer.experts.*.{projection}.{part}", f"mixer.experts.{parameter}"
    return _Stacking(source + _NOT_LONGER, target + _NOT_LONGER, operations=[_Stack(read)])
