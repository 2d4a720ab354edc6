"""Executes the decoder's assembly one instruction at a time, and refuses a rounding where exactness is claimed."""

from __future__ import annotations

import re

import torch

WORD = 0xFFFFFFFF


class Machine:
    """A register file of int64 columns (32-bit values) and the few instructions that the decoder uses."""

    def __init__(self, **registers):
        self.registers = registers

    def read(self, name):
        return self.registers[name] if name in self.registers else int(name, 0)

    def run(self, assembly):
        for statement in filter(None, (s.strip() for s in assembly.strip("{} ").split(";"))):
            operation, _, operands = statement.partition(" ")
            if operation == ".reg":
                continue
            halves = re.match(r"(\w+), \{(\S+), (\S+)\}$", operands)
            if halves:
                self.registers[halves[1]] = self.read(halves[2]) | self.read(halves[3]) << 16
                continue
            pair = re.match(r"\{(\S+), (\S+)\}, (\S+)$", operands)
            if pair:
                value = self.read(pair[3])
                self.registers |= {pair[1]: value & 0xFFFF, pair[2]: value >> 16}
                continue
            destination, *sources = (operand.strip() for operand in operands.split(","))
            self.registers[destination] = self.execute(operation, *map(self.read, sources)) & WORD
        return self

    def execute(self, operation, *values):
        if operation.startswith("fma.rn."):
            dtype = torch.bfloat16 if operation.endswith("bf16x2") else torch.float16
            low = fused(dtype, *(v & 0xFFFF for v in values))
            return low | fused(dtype, *(v >> 16 for v in values)) << 16
        if operation == "prmt.b32":
            first, second, selector = values
            source = [(first >> 8 * i) & 0xFF for i in range(4)] + [(second >> 8 * i) & 0xFF for i in range(4)]
            return sum(source[(selector >> 4 * i) & 7] << 8 * i for i in range(4))
        if operation == "shfl.sync.idx.b32":
            value, lane, clamp, members = values
            assert (clamp, members) == (0x1C1F, WORD), "all lanes, four by four"
            return value.view(-1, 4)[:, lane].repeat_interleave(4)
        if operation == "shf.l.wrap.b32":
            low, high, by = values
            return high << by | low >> (32 - by)
        table = {
            "mov.b32": lambda a: a,
            "and.b32": lambda a, b: a & b,
            "or.b32": lambda a, b: a | b,
            "shl.b32": lambda a, b: a << b,
            "mul.lo.u32": lambda a, b: a * b,
            "shr.u32": lambda a, b: a >> b,
        }
        return table[operation](*values)


def number(dtype, bits):
    return torch.as_tensor(bits).to(torch.int16).view(dtype).double()


def fused(dtype, a, b, c):
    exact = number(dtype, a) * number(dtype, b) + number(dtype, c)
    rounded = exact.to(dtype)
    assert torch.equal(rounded.double(), exact), "the decoder relies on every step being exact"
    return rounded.view(torch.int16).to(torch.int64) & 0xFFFF
