"""Heads that classify every time step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .cache import GruQatCache
from .configuration_gruqat import GruQatConfig
from .linear import WideLinear, run_head
from .modeling_gruqat import GruQatModel, GruQatModelOutput
from .pretrained import GruQatPreTrainedModel


@dataclass
class FrameClassifierOutput(TokenClassifierOutput):
    """transformers' TokenClassifierOutput, with the state to go on from."""

    past_key_values: GruQatCache | None = None


class FrameClassifier(GruQatPreTrainedModel):
    """A linear layer on the output of each time step."""

    streams_every_step = True

    def __init__(self, config: GruQatConfig) -> None:
        super().__init__(config)
        self.model = GruQatModel(config)
        self.dropout = nn.Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)
        self.classifier = WideLinear(config.hidden_size * config.num_directions, config.num_labels)
        self.post_init()

    def classify(self, outputs: GruQatModelOutput, mask: Tensor | None, labels: Tensor | None, **kwargs: Any) -> ModelOutput:
        """Logits ``[B, T, num_labels]`` and, given labels, the loss."""
        logits = run_head(self.classifier, outputs.last_hidden_state, self.dropout)
        loss = None if labels is None else self._loss(logits, labels, mask, kwargs.get("num_items_in_batch"))
        return FrameClassifierOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None, items: Tensor | int | None) -> Tensor:
        steps = logits.shape[:2]
        if labels.shape not in (steps, logits.shape):
            raise ValueError(
                f"labels must be {list(steps)} (classes) or {list(logits.shape)} (0 or 1 for each label), "
                f"got {list(labels.shape)}"
            )
        labels = labels.to(logits.device)
        real = torch.ones(steps, dtype=torch.bool, device=logits.device) if mask is None else mask[:, -steps[1] :].bool()
        logits = logits.float()
        # -100 has no label of its own: left out by cross_entropy, and here by hand.
        if labels.dim() == 2:
            labels = labels.masked_fill(~real, -100)
            counted = (labels != -100).sum()
            total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        else:
            real = real.unsqueeze(-1) & (labels != -100)
            counted = real.sum()
            total = nn.functional.binary_cross_entropy_with_logits(logits[real], labels[real].to(logits.dtype), reduction="sum")
        if items is None:
            return total / counted.clamp(min=1)
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


class GruQatForTokenClassification(FrameClassifier):
    """A GRU with a linear layer on the output of each token or time step."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: GruQatCache | Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> FrameClassifierOutput:
        """As :meth:`GruQatModel.forward`, with ``logits`` ``[B, T, num_labels]``.

        Args:
            labels: gives ``loss``: classes ``[B, T]`` (cross entropy), or ``[B, T, num_labels]`` of 0 and 1 where a step can have
                several (binary cross entropy). -100 and padded steps are left out.

        Raises:
            ValueError: as GruQatModel.forward, or labels of another shape.
        """
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return self.classify(outputs, attention_mask, labels, **kwargs)
