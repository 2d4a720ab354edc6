"""The kernel that only reads: it reads everything once, in wide loads, on every GPU generation."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fp4pass.lowering import arch, stream

from . import compiling

READ_IN_THE_INTERPRETER = """
import torch
from fp4pass.lowering.stream import WORDS_A_PROGRAM, stream

# Small words: some interpreters cannot add int32 beyond its range.
words = [torch.randint(0, 256, (5, 48, k // 4), dtype=torch.int32) for k in (5376 // 2, 5376 // 16)]
codes, scale = (part.view(torch.uint8) for part in words)
total = sum(part[[3, 0]].sum((1, 2)) for part in words)
for share in WORDS_A_PROGRAM:
    read = stream(codes, scale, torch.tensor([3, 0]), share)
    assert read.shape == (2, -(-48 * 5376 // 8 // share)), read.shape
    assert torch.equal(read.sum(1), total), (read.sum(1), total)
print("all read")
"""


def test_every_word_of_the_chosen_matrices_is_read_once():
    done = subprocess.run(
        [sys.executable, "-c", READ_IN_THE_INTERPRETER],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "all read\n", done.stderr


@pytest.mark.parametrize("generation", arch.ARCHS.values(), ids=lambda arch: f"sm{arch.sm}")
def test_reads_are_sixteen_bytes_wide(generation, monkeypatch):
    sizes = ("WORDS", "SCALE_WORDS")
    monkeypatch.setattr(compiling, "_SIZES", sizes)  # multiples of 16, as those of real layers are
    types = {"words": "*i32", "scales": "*i32", "matrices": "*i64", "out": "*i32"} | dict.fromkeys(sizes, "i32")
    tile = arch.Tile(0, 0, 0, warps=4, stages=1)
    kernel = compiling.compile_kernel(stream.stream_kernel, types, {"BLOCK": 4096}, generation, tile)
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    assert sum(".v4.b32" in load for load in loads) == 8 + 1  # 4,096 words and a share of the scales by 128 threads
