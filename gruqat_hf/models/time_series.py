"""Forecasts of time series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .cache import GruQatCache
from .configuration_gruqat import GruQatConfig
from .linear import WideLinear, run_head
from .modeling_gruqat import GruQatModel
from .pretrained import GruQatPreTrainedModel


@dataclass
class GruQatTimeSeriesPredictionOutput(ModelOutput):
    """Output of :class:`GruQatForTimeSeriesPrediction`.

    Attributes:
        loss: given ``future_values``.
        prediction_outputs: ``[B, prediction_length, input_size]``, or ``[B, prediction_length]`` for ``past_values`` ``[B, T]``.
        past_key_values: state to go on from, or None.
        hidden_states: input and outputs of every layer, on request.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    past_key_values: GruQatCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class GruQatForTimeSeriesPrediction(GruQatPreTrainedModel):
    """A GRU that reads the past and forecasts the next ``config.prediction_length`` steps of all channels at once.

    ``config.input_size`` is the number of channels; values are taken as they come, so scale them first. With Trainer, pass
    ``TrainingArguments(label_names=["future_values"])``, or it computes no loss in evaluation.
    """

    accepts_loss_kwargs = False
    stream_output = "prediction_outputs"
    main_input_name = "past_values"
    input_names = ("past_values", "past_observed_mask")

    def __init__(self, config: GruQatConfig) -> None:
        if config.vocab_size is not None:
            raise ValueError(
                "GruQatForTimeSeriesPrediction takes values, not ids: GruQatConfig.vocab_size must be None, "
                f"got {config.vocab_size!r}"
            )
        super().__init__(config)
        self.main_input_name = "past_values"
        self.model = GruQatModel(config)
        self.dropout = nn.Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)
        self.forecast = WideLinear(config.hidden_size * config.num_directions, config.prediction_length * config.input_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: Tensor | None = None,
        past_observed_mask: Tensor | None = None,
        future_values: Tensor | None = None,
        future_observed_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GruQatCache | Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> GruQatTimeSeriesPredictionOutput:
        """Forecast.

        Args:
            past_values: ``[B, T, input_size]``, or ``[B, T]`` of a single channel.
            past_observed_mask: 0 where a value is missing, of the shape of ``past_values`` or ``[B, T]``. A missing value reads
                as zero; a step with none is skipped, as padding is.
            future_values: ``[B, prediction_length, input_size]``, or ``[B, prediction_length]`` with ``past_values`` ``[B, T]``;
                gives ``loss``, the mean of ``config.forecast_loss`` ("mse" or "l1").
            future_observed_mask: 0 where a future value does not count, of the shape of ``future_values``.
            attention_mask: ``[B, T]``, 0 where a step of the past is padding.
            past_key_values, use_cache, output_hidden_states, return_dict: as in :meth:`GruQatModel.forward`.

        Raises:
            ValueError: a shape that does not fit.
        """
        size = self.config.input_size
        if past_values is None:
            raise ValueError(f"GruQatForTimeSeriesPrediction needs past_values [B, T, {size}]")
        single = past_values.dim() == 2 and size == 1
        x = past_values.unsqueeze(-1) if single else past_values
        if x.dim() != 3 or x.shape[-1] != size:
            raise ValueError(f"past_values must be [B, T, {size}], got {list(past_values.shape)}")
        if past_observed_mask is not None:
            x, observed = _observed(x, past_observed_mask)
            attention_mask = observed if attention_mask is None else _both(observed, attention_mask)
        outputs = self.model(
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        forecast = run_head(self.forecast, outputs.pooler_output, self.dropout)
        forecast = forecast.unflatten(-1, (self.config.prediction_length, size))
        forecast = forecast.squeeze(-1) if single else forecast
        loss = None if future_values is None else self._loss(forecast, future_values, future_observed_mask)
        return GruQatTimeSeriesPredictionOutput(
            loss=loss,
            prediction_outputs=forecast,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(self, forecast: Tensor, future: Tensor, mask: Tensor | None) -> Tensor:
        for name, value in (("future_values", future), ("future_observed_mask", mask)):
            if value is not None and value.shape != forecast.shape:
                raise ValueError(f"{name} must be {list(forecast.shape)}, got {list(value.shape)}")
        forecast, future = forecast.float(), future.to(forecast.device).float()
        if mask is not None:
            real = mask.to(forecast.device).bool()
            forecast, future = forecast[real], future[real]
        difference = forecast - future
        errors = difference.abs() if self.config.forecast_loss == "l1" else difference.square()
        return errors.sum() / max(errors.numel(), 1)


def _both(observed: Tensor, mask: Tensor) -> Tensor:
    """Which steps ``[B, T]`` are observed and no padding; ``mask`` may reach back further."""
    if mask.dim() != 2 or mask.shape[0] != observed.shape[0] or mask.shape[1] < observed.shape[1]:
        raise ValueError(f"attention_mask must be {list(observed.shape)}, got {list(mask.shape)}")
    return observed & mask[:, -observed.shape[1] :].to(observed.device).bool()


def _observed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with zeros for missing values, and which steps ``[B, T]`` have any value."""
    if mask.shape == x.shape[:2]:
        mask = mask.unsqueeze(-1)
    elif mask.shape != x.shape:
        raise ValueError(f"past_observed_mask must be {list(x.shape)} or {list(x.shape[:2])}, got {list(mask.shape)}")
    mask = mask.to(x.device).bool()
    # Not a product: what is missing may be NaN.
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)), mask.any(-1)
