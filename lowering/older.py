# ruff: noqa: ANN001  (a kernel's parameters are pointers and constants, which Triton types itself)

"""Kernels of an older GPU generation, run on a newer GPU, and a BF16 product of that generation beside them.

Machine code of SM80 does not run on SM90, but its PTX may be assembled for SM90: the same instructions, for matrix
products ``mma.sync`` and for copies ``cp.async``, by the same threads. So what they compute is tested, and what they
take can be compared with other kernels of that generation. How fast a real one is, this does not tell.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.testing import do_bench

from . import arch


class _OlderDriver(CudaDriver):
    """Triton's, of a GPU that says that it is of SM ``sm``."""

    def __init__(self, sm: int) -> None:
        super().__init__()
        self._sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._sm, 32)


def act_as(sm: int) -> None:
    """Compile and launch all Triton kernels of this process, from its start on, as on a GPU of SM ``sm``.

    For a process of its own: it changes Triton's driver, its pipeline and the folder of its cache for good.
    """
    actual = driver.active.get_current_target().arch

    def assemble_for_actual(*args: Any) -> tuple[str, str] | None:
        if not args:  # Triton wants to know what to tell apart in its cache
            return str(actual), str(actual)
        backend, stages, options, *_ = args
        stages["cubin"] = lambda ptx, metadata: backend.make_cubin(ptx, metadata, options, actual)
        return None

    # Triton 3.6 does not ask, so that what it stored as of SM80 would fail on a GPU that is of SM80.
    knobs.cache.dir = str(Path(knobs.cache.dir) / f"sm{sm}-on-sm{actual}")
    knobs.runtime.add_stages_inspection_hook = assemble_for_actual
    driver.set_active(_OlderDriver(sm))
    arch._sm_of_index = lambda index: sm
    arch._of_index.cache_clear()


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


_TILES = [
    _tile(16, 64, 128, 4, 4),
    _tile(32, 64, 128, 4, 4),
    _tile(64, 64, 64, 4, 4),
    _tile(64, 128, 64, 4, 3),
    _tile(128, 64, 64, 4, 3),
    _tile(128, 128, 32, 8, 4),
    _tile(128, 256, 32, 8, 3),
    _tile(256, 128, 32, 8, 3),
]


@triton.autotune(_TILES, key=["M", "N", "K"], do_bench=functools.partial(do_bench, warmup=2, rep=10))
@triton.jit(do_not_specialize=["M"])
def _bf16_kernel(x, weight, out, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # noqa: ANN202
    """A tile of ``out [M, N]`` = x ``[M, K]`` @ weight.T; K is a multiple of BLOCK_K."""
    # Eight rows of tiles are walked together, to meet in the L2 cache.
    width = 8 * tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // width * 8
    high = min(tl.cdiv(M, BLOCK_M) - first, 8)
    m = (first + tl.program_id(0) % width % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % width // high * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows, columns = x + (m % M)[:, None] * K + k[None, :], weight + (n % N)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(rows), tl.load(columns), acc)
        rows += BLOCK_K
        columns += BLOCK_K
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


def bf16_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x ``[M, K]`` @ weight ``[N, K]``.T by the fastest of eight tiles of a plain Triton kernel; K a multiple of 128.

    For comparison: cuBLAS would use what the older generation does not have.
    """
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty((m, n))
    _bf16_kernel[lambda tile: (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),)](
        x, weight, out, m, n, k
    )
    return out
