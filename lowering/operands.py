"""What the launch functions share: a weight, a schedule of experts' rows, and the choice of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4pass.errors import ArgumentError

from .arch import Arch, Tile
from .launches import InParts, Launch, ManyRows
from .layout import FRAGMENTS


@dataclass(frozen=True)
class Weight:
    """A weight ``[N, K]``, or the weights ``[E, N, K]`` of all experts, as the ops have them, in ``layout``."""

    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    layout: str

    def __post_init__(self) -> None:
        if self.global_scale is not None:
            object.__setattr__(self, "global_scale", self.global_scale.contiguous())

    @property
    def words(self) -> torch.Tensor:
        """The codes as 32-bit words, int32 ``[..., K/8]``."""
        return words_of(self.codes)

    @property
    def scale_pairs(self) -> torch.Tensor:
        """The scales of ``fragments`` two by two, those of a lane's two rows: int16 ``[..., K/32]``."""
        return self.scale.view(torch.int16)

    @property
    def aligned(self) -> bool:
        """Whether the copy engine can read codes and scales: they begin at multiples of 16 bytes."""
        return self.codes.data_ptr() % 16 == 0 and self.scale.data_ptr() % 16 == 0

    @property
    def count(self) -> int:
        """How many experts; 1 for a dense weight."""
        return self.codes.shape[0] if self.codes.dim() == 3 else 1

    @property
    def global_stride(self) -> int:
        """How far apart the experts' global scales are: 0 where all share one."""
        return 0 if self.global_scale is None or self.global_scale.numel() == 1 else 1


@dataclass(frozen=True)
class Schedule:
    """Which slots each block works on, ``experts [blocks]`` being the blocks' experts.

    With ``order`` None block b is slot b alone. Otherwise ``order`` lists the slots sorted by expert, ``ends [E]`` the
    cumulative number of slots and ``block_ends [E]`` of blocks. Blocks that are not needed have no valid expert.
    """

    blocks: int
    experts: torch.Tensor
    order: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    block_ends: torch.Tensor | None = None


def tensors_of(plan: Schedule | None) -> tuple[torch.Tensor | None, ...]:
    """The experts, order, ends and block ends of a schedule, as kernels take them; none for a dense product."""
    return (None,) * 4 if plan is None else (plan.experts, plan.order, plan.ends, plan.block_ends)


# A tuple: a union would be made anew at each call.
_BY_THE_COPY_ENGINE = (ManyRows, InParts)


def launch_for(
    arch: Arch, rows: int, x: torch.Tensor, weight: Weight, *, asm: bool, experts: bool = False
) -> Launch | InParts | Tile:
    """What a product of ``rows`` rows (an expert's) of x's dtype and device runs with."""
    n, k = weight.codes.shape[-2], weight.codes.shape[-1] * 2
    if asm and x.is_cuda:
        launch = arch.launch(rows, x.dtype, weight.layout, columns=n, depth=k, experts=experts)
        if not isinstance(launch, _BY_THE_COPY_ENGINE) or weight.aligned:
            return launch
    return arch.tile(rows, x.dtype, experts=experts, columns=n)


def has_dot_order(x: torch.Tensor, weight: Weight, *, asm: bool) -> bool:
    """Whether a product in tiles takes columns in the dot order of decode.py; of ``fragments`` the natural one does."""
    return asm and x.dtype != torch.float32 and weight.layout != FRAGMENTS


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x [..., K]`` as a matrix ``[M, K]`` with contiguous rows at any distance; a copy only where they are not."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def in_shape_of(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out [M, N]``, what becomes of `rows_of` x ``[..., K]``, as ``[..., N]``."""
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])


def readable(rows: torch.Tensor) -> torch.Tensor:
    """``rows``, or a copy where Triton could not tell that each begins at a multiple of 16 bytes, as copies need."""
    if rows.stride(0) % 16 or rows.data_ptr() % 16:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[..., K/2]`` seen as 32-bit words int32 ``[..., K/8]``; ArgumentError if they start off a word."""
    if codes.storage_offset() % 4:
        raise ArgumentError(
            "codes do not start at a multiple of 4 bytes",
            seen=f"storage offset {codes.storage_offset()}",
            expected="codes that begin on a 32-bit word of their storage",
            do="call .clone() on the codes once, at load",
        )
    return codes.view(torch.int32)
