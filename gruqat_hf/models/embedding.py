"""The embedding, quantizable."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.execution import with_idle_scales
from ..layers.plain_weight import PlainWeight
from ..operands import Factor


class QuantizableEmbedding(PlainWeight, nn.Embedding):
    """torch.nn.Embedding that can be quantized: ``codes[id] * scale[id]``, fp32, the same on every device."""

    point = "embedding"

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @classmethod
    def of(cls, embedding: nn.Embedding) -> QuantizableEmbedding:
        """An embedding with the Parameter of ``embedding``, not a copy of it."""
        new = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        new.weight = embedding.weight
        return new.train(embedding.training)

    def forward(self, input: Tensor, table: Factor | None = None) -> Tensor:
        """Ids ``[...]`` → ``[..., embedding_dim]``.

        Args:
            table: what :meth:`table` gave, where the caller has it already: an observer is to see the weight once a pass.

        Raises:
            IndexError: an id out of range.
        """
        if self._frozen is not None:
            rows = self._frozen.unpack(nn.functional.embedding(input, self.weight_codes))
            return Factor(rows, self._scale_of(self.weight_scale, input)).dequantize()
        if self.quantizer is None:
            return nn.Embedding.forward(self, input)
        table = self.table() if table is None else table
        rows = nn.functional.embedding(input, table.values, self.padding_idx)
        if table.scale is not None:
            rows = Factor(rows, self._scale_of(table.scale, input)).dequantize()
        return with_idle_scales(self, rows)

    def _scale_of(self, scale: Tensor, input: Tensor) -> Tensor:
        return scale if scale.shape[0] == 1 else nn.functional.embedding(input, scale, self.padding_idx)
