"""One direction of one GRU layer over a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import QuantRecipe
from ..structures import StructureConfig
from .recurrent import GRUBase


class GRULayer(GRUBase):
    """torch.nn.GRU of one layer and direction, with structured, quantizable weights.

    Args:
        input_size, hidden_size: features of the input and of the state.
        bias: whether to add the two biases.
        structure_input, structure_hidden: StructureConfig, its dict or a kind's name; dense by default.
        recipe: QuantRecipe, its dict or a preset's name; given one that quantizes, the layer starts in the qat state.
        batch_first: whether sequences are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        reverse: whether to walk from the last step to the first.
        device, dtype: of the float parameters.

    Raises:
        ValueError: a size below 1, or one that a structure or the recipe cannot have.

    Example:
        >>> layer = GRULayer(512, 512, recipe="int8_state16", structure_hidden={"kind": "monarch", "nblocks": 8})
        >>> out, h_T = layer(torch.randn(20, 4, 512))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        structure_input: StructureConfig | Mapping[str, Any] | str | None = None,
        structure_hidden: StructureConfig | Mapping[str, Any] | str | None = None,
        recipe: QuantRecipe | Mapping[str, Any] | str | None = None,
        batch_first: bool = False,
        reverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            structure_input=structure_input,
            structure_hidden=structure_hidden,
            recipe=recipe,
            device=device,
            dtype=dtype,
        )
        self.batch_first, self.reverse = batch_first, reverse

    def forward(self, x: Tensor, h0: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: ``[T, B, input_size]`` (``[B, T, input_size]`` with batch_first).
            h0: state before the first step, ``[B, hidden_size]``; zeros by default.
            mask: ``[T, B]`` (``[B, T]`` with batch_first) bool, False where a step is padding: its output is zero and the state
                is held. None for no padding.

        Returns:
            Outputs ``[T, B, hidden_size]`` (or ``[B, T, hidden_size]``) in the dtype of ``x``, and the last state
            ``[B, hidden_size]``: fp32 in the qat and frozen states, so that carrying it on loses nothing.

        Raises:
            ValueError: inputs of another shape, no step at all, x or h0 that is no float, x that in float is not of the weights'
                type.
        """
        layout = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"GRULayer takes x of shape {layout.format(self.input_size)}, got {list(x.shape)}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"GRULayer takes a mask of shape {list(x.shape[:2])} with this x, got {list(mask.shape)}")
        if self.batch_first:
            x = x.transpose(0, 1)
            mask = None if mask is None else mask.transpose(0, 1)
        if x.shape[0] == 0:
            raise ValueError("GRULayer needs at least one step, got x with T = 0")
        if h0 is not None and tuple(h0.shape) != (x.shape[1], self.hidden_size):
            raise ValueError(f"GRULayer takes h0 of shape {[x.shape[1], self.hidden_size]} with this x, got {list(h0.shape)}")
        mask = None if mask is None else mask.bool()
        out, last = self._run(x, h0, mask, self.reverse)
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        out = out if out.dtype == x.dtype else out.to(x.dtype)
        return (out.transpose(0, 1) if self.batch_first else out), last

    @classmethod
    def from_torch(cls, gru: nn.GRU, layer: int = 0, reverse: bool = False) -> GRULayer:
        """A float, dense layer with the weights of one layer and direction of ``gru``.

        Raises:
            ValueError: a layer or direction that ``gru`` does not have.
        """
        if not 0 <= layer < gru.num_layers:
            raise ValueError(f"from_torch(layer={layer}): the nn.GRU has layers 0 to {gru.num_layers - 1}")
        if reverse and not gru.bidirectional:
            raise ValueError("from_torch(reverse=True): the nn.GRU is not bidirectional")
        suffix = f"l{layer}_reverse" if reverse else f"l{layer}"
        weight_ih, weight_hh = getattr(gru, f"weight_ih_{suffix}"), getattr(gru, f"weight_hh_{suffix}")
        new = cls(
            weight_ih.shape[1],
            gru.hidden_size,
            bias=gru.bias,
            batch_first=gru.batch_first,
            reverse=reverse,
            device=weight_ih.device,
            dtype=weight_ih.dtype,
        )
        new._load_dense(weight_ih, weight_hh, getattr(gru, f"bias_ih_{suffix}", None), getattr(gru, f"bias_hh_{suffix}", None))
        return new.train(gru.training)

    @torch.no_grad()
    def to_torch(self) -> nn.GRU:
        """A torch.nn.GRU of one layer with these weights, of a forward layer in float; structures are written out as dense.

        Raises:
            ValueError: a reversed layer, or one that is not in float.
        """
        if self.reverse:
            raise ValueError("to_torch(): an nn.GRU has no reversed layer alone; convert a bidirectional GruQatModel instead")
        weight_ih, weight_hh, bias_ih, bias_hh = self.dense_parameters()
        gru = nn.GRU(
            self.input_size,
            self.hidden_size,
            bias=self.bias,
            batch_first=self.batch_first,
            device=weight_ih.device,
            dtype=weight_ih.dtype,
        )
        gru.weight_ih_l0.copy_(weight_ih)
        gru.weight_hh_l0.copy_(weight_hh)
        if bias_ih is not None and bias_hh is not None:
            gru.bias_ih_l0.copy_(bias_ih)
            gru.bias_hh_l0.copy_(bias_hh)
        return gru.train(self.training)

    def calibrate(self, loader: Iterable[Any], n_batches: int | None = None, progress: bool = True) -> GRULayer:
        """Observe up to ``n_batches`` batches: tensors ``x``, or tuples ``(x, h0)`` or ``(x, h0, mask)``.

        Raises:
            LifecycleError: not in qat.
            ValueError: no batch was given.
        """
        self._calibrate(loader, n_batches, progress)
        return self

    def extra_repr(self) -> str:
        return super().extra_repr() + (", reverse" if self.reverse else "")
