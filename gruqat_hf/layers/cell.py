"""One step of a GRU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .recurrent import GRUBase


class GRUCell(GRUBase):
    """torch.nn.GRUCell with structured, quantizable weights; the same bits as one step of :class:`GRULayer`.

    Args:
        input_size, hidden_size: features of the input and of the state.
        bias: whether to add the two biases.
        structure_input, structure_hidden: StructureConfig, its dict or a kind's name; dense by default.
        recipe: QuantRecipe, its dict or a preset's name; given one that quantizes, the cell starts in the qat state.
        device, dtype: of the float parameters.

    Raises:
        ValueError: a size below 1, or one that a structure or the recipe cannot have.
    """

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """``x`` ``[B, input_size]`` or ``[input_size]``, ``h`` ``[B, hidden_size]`` (zeros by default) → the next state.

        Raises:
            ValueError: inputs of another shape, x or h0 that is no float, x that in float is not of the weights' type.
        """
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(f"GRUCell takes x of shape [B, {self.input_size}] or [{self.input_size}], got {list(x.shape)}")
        expected = (*x.shape[:-1], self.hidden_size)
        if h is not None and tuple(h.shape) != expected:
            raise ValueError(f"GRUCell takes h of shape {list(expected)} with this x, got {list(h.shape)}")
        batched = x.view(1, -1, self.input_size)
        _, last = self._run(batched, None if h is None else h.view(-1, self.hidden_size), None, reverse=False)
        return last.view(expected)

    def calibrate(self, loader: Iterable[Any], n_batches: int | None = None, progress: bool = True) -> GRUCell:
        """Observe up to ``n_batches`` batches: tensors ``x``, or tuples ``(x, h)``.

        Raises:
            LifecycleError: not in qat.
            ValueError: no batch was given.
        """
        self._calibrate(loader, n_batches, progress)
        return self
