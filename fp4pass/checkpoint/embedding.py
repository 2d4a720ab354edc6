"""A table of embeddings in NVFP4: the rows that a text needs are decoded, the table never."""

from __future__ import annotations

import torch
from torch.nn import functional

from fp4pass.lowering import reference
from fp4pass.lowering.layout import PLAIN, check_layout

from .modules import MODELOPT
from .packed import BLOCK, PackedModule, Parts, Scalar, recast

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class NVFP4Embedding(PackedModule):
    """``ids [...] integer -> rows [..., D]`` of an NVFP4 table, in the model's dtype, rounded once.

    Parameters as ``parts`` names them: ``weight`` uint8 [V, D/2], ``weight_scale`` float8_e4m3fn [V, D/16],
    ``weight_scale_2`` [] or [1], ``input_scale`` if the checkpoint has one (kept for saving, never used); all are held
    as integers of the same bits. The table keeps the checkpoint's order on every device, since rows are read and no
    product is taken. Raises CheckpointError if V or D is no multiple of 16.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        parts: Parts = MODELOPT,
        global_scale: Scalar = Scalar(),  # noqa: B008  (immutable)
        input_scale: Scalar | None = None,
        group: int = BLOCK,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._weight = parts.codes
        shape = (num_embeddings, embedding_dim)
        self._add_matrix(parts, shape, global_scale=global_scale, input_scale=input_scale, device=device, group=group)
        # As integers: a model says that its dtype is that of its first floats, and embeddings come first.
        for name, tensor in self._parameters.items():
            self._held[name] = _INTEGERS[tensor.element_size()]
        # Words, so that nobody who looks for a product's weight takes the table for one.
        self._held[parts.codes] = torch.int64
        # Follows the model through .to(dtype), as the weight of a dense table would.
        self.register_buffer("_follower", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ``ids``."""
        codes, scale, factor = self.operands(self._weight)
        codes = functional.embedding(ids, codes.view(torch.int64)).view(torch.uint8)
        rows = reference.dequantize(codes, functional.embedding(ids, scale), factor)
        return rows.to(self._follower.dtype)

    def operands(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(codes, scale bytes, global scale)``, the codes as words."""
        codes, scale_name, factor_name = self._matrices[name]
        factor = recast(self._parameters[factor_name], self._stored[factor_name]).float()
        factor = factor.reciprocal() if self.divides else factor
        return self._parameters[codes], self._parameters[scale_name].view(torch.uint8), factor

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole table [V, D] in ``dtype``, rounded once from float32 (float64 for float64)."""
        codes, scale, factor = self.operands(name)
        return torch.ops.fp4pass.dequantize(codes.view(torch.uint8), scale, factor, PLAIN, dtype)

    def set_layout(self, layout: str) -> None:
        """The table stays as it is, whatever ``layout`` the weights of products take."""
        check_layout(layout, "NVFP4Embedding.set_layout")

    def _layout_on(self, device: torch.device) -> str:
        return PLAIN

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
