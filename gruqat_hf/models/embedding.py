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

    def forward(self, input: Tensor | None) -> Tensor | Factor:
        """Ids ``[...]`` → ``[..., embedding_dim]``; None gives the whole weight, for an output layer that is tied to it.

        Raises:
            IndexError: an id out of range.
        """
        if input is None:
            return self.factor()  # by a call of the module, on which hooks bring offloaded parameters to the device
        if self._frozen is not None:
            scale = self.weight_scale
            rows = self._frozen.unpack(nn.functional.embedding(input, self.weight_codes))
            return Factor(rows, scale if scale.shape[0] == 1 else nn.functional.embedding(input, scale)).dequantize()
        if self.quantizer is None:
            return nn.Embedding.forward(self, input)
        table = with_idle_scales(self, self.factor().dequantize())
        return nn.functional.embedding(input, table, self.padding_idx)
