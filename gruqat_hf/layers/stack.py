"""Layers and directions stacked into a whole GRU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import QuantRecipe
from ..structures import StructureConfig
from .layer import GRULayer
from .lifecycle import LifecycleError, QuantState, require_calibrated, require_state, run_calibration


class GRUStack(nn.Module):
    """torch.nn.GRU with structured, quantizable weights, time first.

    Args:
        input_size, hidden_size: features of the input and of each direction's state.
        num_layers: layers above each other; each reads all directions of the one below.
        bidirectional: whether each layer also has a direction that walks from the last step to the first.
        bias: whether to add the two biases.
        dropout: share of values dropped between layers in training, in [0, 1).
        structure_input, structure_hidden: of every layer.
        recipe: given one that quantizes, the stack starts in the qat state.
        device, dtype: of the float parameters.

    Raises:
        ValueError: a size, share or structure that is out of range, naming it.

    Attributes:
        layers: ``layers[i][d]`` is layer i in direction d (0 forward, 1 reversed).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        structure_input: StructureConfig | Mapping[str, Any] | str | None = None,
        structure_hidden: StructureConfig | Mapping[str, Any] | str | None = None,
        recipe: QuantRecipe | Mapping[str, Any] | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers must be an integer of at least 1, got {num_layers!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional, self.dropout = bidirectional, dropout
        self.directions = 2 if bidirectional else 1

        def layer(index: int, direction: int) -> GRULayer:
            return GRULayer(
                input_size if index == 0 else hidden_size * self.directions,
                hidden_size,
                bias=bias,
                structure_input=structure_input,
                structure_hidden=structure_hidden,
                recipe=recipe,
                reverse=direction == 1,
                device=device,
                dtype=dtype,
            )

        self.layers = nn.ModuleList(
            nn.ModuleList(layer(index, direction) for direction in range(self.directions)) for index in range(num_layers)
        )

    def flat_layers(self) -> Iterator[GRULayer]:
        """Every layer and direction, in the order of ``h0``'s first dimension."""
        for directions in self.layers:
            yield from directions  # type: ignore[misc]

    def forward(self, x: Tensor, h0: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run over a sequence.

        Args:
            x: ``[T, B, input_size]``.
            h0: ``[num_layers * directions, B, hidden_size]``; zeros by default.
            mask: ``[T, B]`` bool, False where a step is padding (output zero, state held), or None.

        Returns:
            Outputs of the last layer ``[T, B, directions * hidden_size]``, the last states
            ``[num_layers * directions, B, hidden_size]`` (fp32 where quantized), and the input and the outputs of every layer.

        Raises:
            ValueError: inputs of another shape.
        """
        expected = (self.num_layers * self.directions, x.shape[1] if x.dim() > 1 else -1, self.hidden_size)
        if h0 is not None and tuple(h0.shape) != expected:
            raise ValueError(f"GRUStack takes h0 of shape {list(expected)} with this x, got {list(h0.shape)}")
        hidden, last = [x], []
        for index, directions in enumerate(self.layers):
            if index > 0 and self.dropout > 0.0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outs = []
            for direction, layer in enumerate(directions):  # type: ignore[arg-type]
                out, h_last = layer(x, None if h0 is None else h0[index * self.directions + direction], mask)
                outs.append(out)
                last.append(h_last)
            x = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
            hidden.append(x)
        return x, torch.stack(last), hidden

    @property
    def quant_state(self) -> QuantState:
        """The state of all layers.

        Raises:
            LifecycleError: they are in different ones.
        """
        return self._agreed("quant_state")

    @property
    def recipe(self) -> QuantRecipe | None:
        """The recipe of all layers; None in float.

        Raises:
            LifecycleError: they have different ones.
        """
        return self._agreed("recipe")

    def _agreed(self, attribute: str) -> Any:
        values = {
            f"layers.{index}.{direction}": getattr(layer, attribute)
            for index, directions in enumerate(self.layers)
            for direction, layer in enumerate(directions)  # type: ignore[arg-type]
        }
        first = next(iter(values.values()))
        if any(value != first for value in values.values()):
            named = {name: value.name or value if isinstance(value, QuantRecipe) else value for name, value in values.items()}
            told = "; ".join(f"{name}: {value}" for name, value in named.items())
            raise LifecycleError(
                f"the layers of a stack share one {attribute}, but these differ ({told}); a checkpoint could not say so. Bring "
                "all to the same one by calls on the stack or the model instead of single layers"
            )
        return first

    def prepare_qat(self, recipe: QuantRecipe | Mapping[str, Any] | str) -> GRUStack:
        """float → qat in every layer.

        Raises:
            LifecycleError: not in float.
            ValueError: a recipe that quantizes nothing, or that some layer cannot have; no layer is changed.
        """
        require_state("prepare_qat", self.quant_state, QuantState.FLOAT)
        done: list[GRULayer] = []
        for layer in self.flat_layers():
            try:
                layer.prepare_qat(recipe)
            except ValueError:
                for earlier in done:
                    earlier.abandon_qat()
                raise
            done.append(layer)
        return self

    def calibrate(self, loader: Iterable[Any], n_batches: int | None = None, progress: bool = True) -> GRUStack:
        """Observe up to ``n_batches`` batches: tensors ``x``, or tuples ``(x, h0)`` or ``(x, h0, mask)``.

        Raises:
            LifecycleError: not in qat.
            ValueError: no batch was given.
        """
        require_state("calibrate", self.quant_state, QuantState.QAT)
        run_calibration(
            self, loader, lambda batch: self(*batch) if isinstance(batch, (tuple, list)) else self(batch), n_batches, progress
        )
        return self

    def uncalibrated(self) -> list[str]:
        """Names of the quantizers that have no scale yet, by layer and direction."""
        return [
            f"layers.{index}.{direction}.{name}"
            for index, directions in enumerate(self.layers)
            for direction, layer in enumerate(directions)  # type: ignore[arg-type]
            for name in layer.uncalibrated()
        ]

    def freeze(self) -> GRUStack:
        """qat → frozen in every layer.

        Raises:
            LifecycleError: not in qat, or a quantizer has observed nothing yet; no layer is changed.
            ValueError: a weight with NaN or infinity in it; no layer is changed.
        """
        require_state("freeze", self.quant_state, QuantState.QAT)
        require_calibrated(self.uncalibrated())
        for layer in self.flat_layers():
            layer.require_finite()
        for layer in self.flat_layers():
            layer.freeze()
        return self

    def dequantize(self) -> GRUStack:
        """frozen → float in every layer.

        Raises:
            LifecycleError: not in frozen.
        """
        require_state("dequantize", self.quant_state, QuantState.FROZEN)
        for layer in self.flat_layers():
            layer.dequantize()
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"]
        if self.bidirectional:
            parts.append("bidirectional")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join([*parts, str(self.quant_state)])
