"""Weights, quantizers and lifecycle that the cell and the layer share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..operands import BlockDiagonalOperand, Factor
from ..quantization import POINTS, FakeQuantize, FrozenGrid, QuantRecipe, ScaleLayout, scheme_class
from ..structures import StructureConfig
from .execution import GRUExecution
from .lifecycle import QuantState, require_calibrated, require_state, run_calibration
from .weight import StructuredWeight

Self = TypeVar("Self", bound="GRUBase")

#: Magnitudes beyond which a gate's sigmoid or tanh moves by less than 4e-4; the first range of gate pre-activations.
_GATE_RANGE = 8.0


class GRUBase(GRUExecution):
    """One direction of one GRU layer: weights, biases, quantizers and the way from float to frozen.

    Attributes:
        weight_input, weight_hidden: :class:`StructuredWeight`.
        bias_input, bias_hidden: ``[3 * hidden_size]`` Parameters, gates in the order r, z, n, or None.
        x, h, state, gates: quantizers of the points of :class:`QuantRecipe`, or None.
        recipe: what is quantized; None in float.
        backend: name of the scan backend to force, or None.
        last_path: which backend ran the last scan, and why.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_input = StructuredWeight(
            input_size, hidden_size, StructureConfig.of(structure_input), name="weight_input", **kwargs
        )
        self.weight_hidden = StructuredWeight(
            hidden_size, hidden_size, StructureConfig.of(structure_hidden), name="weight_hidden", **kwargs
        )
        if bias:
            self.bias_input = nn.Parameter(torch.empty(3 * hidden_size, **kwargs))
            self.bias_hidden = nn.Parameter(torch.empty(3 * hidden_size, **kwargs))
        else:
            self.register_parameter("bias_input", None)
            self.register_parameter("bias_hidden", None)
        self.x = self.h = self.state = self.gates = None
        self.recipe: QuantRecipe | None = None
        self._reset_biases()
        if recipe is not None and (wanted := QuantRecipe.of(recipe)).quantizes:
            self.prepare_qat(wanted)

    def _reset_biases(self) -> None:
        bound = self.hidden_size**-0.5
        for bias in (self.bias_input, self.bias_hidden):
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def reset_parameters(self) -> None:
        """Draw the float parameters afresh: biases as torch.nn.GRU, weights as their structure does."""
        self._reset_biases()
        for weight in (self.weight_input, self.weight_hidden):
            if weight.structure is not None:
                weight.structure.reset_parameters()

    @property
    def structure_input(self) -> StructureConfig:
        return self.weight_input.config

    @property
    def structure_hidden(self) -> StructureConfig:
        return self.weight_hidden.config

    @property
    def quant_state(self) -> QuantState:
        return self._state

    def prepare_qat(self: Self, recipe: QuantRecipe | Mapping[str, Any] | str) -> Self:
        """float → qat: attach the recipe's quantizers.

        Args:
            recipe: a QuantRecipe, its dict or a preset's name.

        Raises:
            LifecycleError: not in float.
            ValueError: a recipe that quantizes nothing, or that these shapes cannot have.
        """
        require_state("prepare_qat", self._state, QuantState.FLOAT)
        recipe = QuantRecipe.of(recipe)
        if not recipe.quantizes:
            raise ValueError(
                "prepare_qat(recipe): this recipe quantizes nothing; leave the model in float, or see PRESETS for others"
            )
        try:
            self.weight_input.prepare_qat(recipe.weight_input, recipe.mid_input, unit_input=False)
            self.weight_hidden.prepare_qat(recipe.weight_hidden, recipe.mid_hidden, unit_input=True)
            self.x = self._quantizer(recipe, "x", (self.input_size,), None)
            self.h = self._quantizer(recipe, "h", (self.hidden_size,), 1.0)
            self.state = self._quantizer(recipe, "state", (self.hidden_size,), 1.0)
            self.gates = self._quantizer(recipe, "gates", (3, self.hidden_size), _GATE_RANGE)
        except ValueError:
            self._drop_quantizers()
            raise
        self.recipe = recipe
        self._state = QuantState.QAT
        self._cached_plan = None
        return self.train(self.training)

    def _quantizer(
        self, recipe: QuantRecipe, point: str, shape: tuple[int, ...], known_range: float | None
    ) -> FakeQuantize | None:
        config = getattr(recipe, point)
        if config is None:
            return None
        layout = ScaleLayout.of_activation(config, shape)
        return scheme_class(config.scheme)(config, layout, known_range=known_range, name=point, device=self._device)

    def _drop_quantizers(self) -> None:
        self.x = self.h = self.state = self.gates = None
        for weight in (self.weight_input, self.weight_hidden):
            weight.quantizers = nn.ModuleDict()
            weight.mid = None

    @property
    def _device(self) -> torch.device:
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def freeze(self: Self) -> Self:
        """qat → frozen: weights become integer codes, activation quantizers fixed grids.

        Raises:
            LifecycleError: not in qat, or a quantizer has observed nothing yet; nothing is changed.
            ValueError: a weight with NaN or infinity in it; nothing is changed.
        """
        require_state("freeze", self._state, QuantState.QAT)
        require_calibrated(self.uncalibrated())
        self.require_finite()
        self.weight_input.freeze()
        self.weight_hidden.freeze()
        for point in ("x", "h", "state", "gates"):
            quantizer = getattr(self, point)
            if quantizer is not None:
                setattr(self, point, FrozenGrid(quantizer).train(self.training))
        self._state = QuantState.FROZEN
        self._cached_plan = None
        return self

    def abandon_qat(self) -> None:
        """Take the quantizers off again, as if prepare_qat had not been called."""
        require_state("abandon_qat", self._state, QuantState.QAT)
        self._drop_quantizers()
        self.recipe = None
        self._state = QuantState.FLOAT
        self._cached_plan = None

    def require_finite(self) -> None:
        """Refuse to freeze weights with NaN or infinity in them.

        Raises:
            ValueError: naming the weight.
        """
        self.weight_input.require_finite()
        self.weight_hidden.require_finite()

    def uncalibrated(self) -> list[str]:
        """Names of the quantizers that have no scale yet."""
        return [module.name for module in self.modules() if isinstance(module, FakeQuantize) and not module.is_calibrated]

    def dequantize(self: Self) -> Self:
        """frozen → float: parameters with the values that the codes stand for.

        A butterfly or ldr weight, whose codes are those of its operand, becomes dense; ``structure_hidden`` says so.

        Raises:
            LifecycleError: not in frozen.
        """
        require_state("dequantize", self._state, QuantState.FROZEN)
        dtype = torch.get_default_dtype() if self.bias_input is None else self.bias_input.dtype
        for weight in (self.weight_input, self.weight_hidden):
            weight.dequantize(dtype)
            if weight.structure is not None:
                weight.train(self.training)
        self._drop_quantizers()
        self.recipe = None
        self._state = QuantState.FLOAT
        self._cached_plan = None
        return self

    def _calibrate(self, loader: Iterable[Any], n_batches: int | None, progress: bool) -> None:
        require_state("calibrate", self._state, QuantState.QAT)
        run_calibration(
            self, loader, lambda batch: self(*batch) if isinstance(batch, (tuple, list)) else self(batch), n_batches, progress
        )

    def dense_parameters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``weight_ih`` ``[3H, I]``, ``weight_hh`` ``[3H, H]`` and the two biases, as torch.nn.GRU names and lays them out.

        Raises:
            ValueError: not in float.
        """
        if self._state != QuantState.FLOAT or self.weight_input.structure is None or self.weight_hidden.structure is None:
            right = "dequantize()" if self._state == QuantState.FROZEN else "freeze() and dequantize()"
            raise ValueError(f"float weights are read in the float state, but this is {self._state}; call {right} first")
        weight_ih, weight_hh = (
            weight.structure.lower().to_dense().flatten(0, 1) for weight in (self.weight_input, self.weight_hidden)
        )
        return weight_ih, weight_hh, self.bias_input, self.bias_hidden

    @torch.no_grad()
    def _load_dense(self, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> None:
        for weight, source in ((self.weight_input, weight_ih), (self.weight_hidden, weight_hh)):
            assert weight.structure is not None
            dense = source.unflatten(0, (3, -1)).unsqueeze(1).to(next(weight.structure.parameters()).dtype)
            weight.structure.load_operand(BlockDiagonalOperand(Factor(dense)))
        if bias_ih is not None and bias_hh is not None:
            self.bias_input.copy_(bias_ih)
            self.bias_hidden.copy_(bias_hh)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, bias={self.bias}, {self._state}"
        if self.recipe is not None:
            points = ", ".join(point for point in POINTS if getattr(self.recipe, point) is not None)
            text += f", recipe={self.recipe.name or points}"
        return text
