"""What fp4pass makes of a decode that somebody else has written, and why it leaves one that is not NVFP4 alone.

    python examples/explain.py

Nothing is compiled: `fp4pass.explain` traces the model, runs the proofs and reports, here for a GPU that need not be
present.
"""

from __future__ import annotations

import torch
from torch import nn

import fp4pass

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class OwnLinear(nn.Module):
    """A linear layer with NVFP4 weights and a decode of its own: a table, a stack, a reshape."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        codes, scale, global_scale = fp4pass.nvfp4.quantize(torch.randn(outputs, inputs))
        self.codes, self.scale, self.global_scale = (
            nn.Parameter(tensor, requires_grad=False) for tensor in (codes, scale, global_scale)
        )
        self.table = nn.Buffer(torch.tensor(E2M1 + tuple(-value for value in E2M1)))

    def weight(self) -> torch.Tensor:
        """The decoded weight, float32 [N, K]."""
        nibbles = torch.stack((self.codes & 15, (self.codes >> 4) & 15), -1).flatten(-2)
        blocks = self.table[nibbles.long()].view(*self.scale.shape, 16)
        return (blocks * self.scale.float()[..., None] * self.global_scale).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], in x's dtype."""
        return x @ self.weight().to(x.dtype).T


class ClampedLinear(OwnLinear):
    """The same with a clamp in the decode, which no kernel for NVFP4 computes."""

    def weight(self) -> torch.Tensor:
        """The decoded weight without its outliers, float32 [N, K]."""
        return super().weight().clamp(-1, 1)


def main() -> None:
    """Explain two layers, of which one can be rewritten."""
    model = nn.Sequential(OwnLinear(48, 80), nn.ReLU(), ClampedLinear(80, 48))
    print(fp4pass.explain(model, torch.randn(4, 48, dtype=torch.bfloat16), options={"target_sm": 80}))


if __name__ == "__main__":
    main()
