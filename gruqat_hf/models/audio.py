"""Heads on the features of sound."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache import GruQatCache
from .configuration_gruqat import GruQatConfig
from .frames import FrameClassifier, FrameClassifierOutput
from .linear import WideLinear, run_head
from .modeling_gruqat import GruQatModel
from .pretrained import GruQatPreTrainedModel

_INPUTS = ("input_values", "input_features", "inputs_embeds")


class AudioInputs:
    """Takes features as transformers' feature extractors name them."""

    main_input_name = "input_values"
    input_names = _INPUTS

    def __init__(self, config: GruQatConfig, *args: Any, **kwargs: Any) -> None:
        if config.vocab_size is not None:
            raise ValueError(
                f"{type(self).__name__} takes features, not ids: GruQatConfig.vocab_size must be None, got {config.vocab_size!r}"
            )
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "input_values"

    def _features(self, *given: Tensor | None) -> Tensor:
        """The one that is given of ``_INPUTS``, as ``[B, T, input_size]``."""
        size = self.config.input_size  # type: ignore[attr-defined]
        names = [name for name, value in zip(_INPUTS, given) if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"pass the features [B, T, {size}] as one of {', '.join(_INPUTS)}, got {' and '.join(names) or 'none of them'}"
            )
        x = next(value for value in given if value is not None)
        if x.dim() == 2 and size == 1:
            return x.unsqueeze(-1)
        if x.dim() != 3 or x.shape[-1] != size:
            samples = "; a waveform [B, T] needs input_size=1, or a feature extractor before the model" if x.dim() == 2 else ""
            raise ValueError(f"{names[0]} must be [B, T, {size}], got {list(x.shape)}{samples}")
        return x


class GruQatForAudioClassification(AudioInputs, GruQatPreTrainedModel):
    """A GRU with a linear layer on its last state, for the features of a whole recording."""

    # The loss is the mean over the batch: without this, Trainer would not divide it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: GruQatConfig) -> None:
        super().__init__(config)
        self.model = GruQatModel(config)
        self.dropout = nn.Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)
        self.classifier = WideLinear(config.hidden_size * config.num_directions, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: GruQatCache | Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As :meth:`GruQatModel.forward`, with ``logits`` ``[B, num_labels]`` from the last state of the last layer.

        Args:
            input_values, input_features, inputs_embeds: features ``[B, T, input_size]`` under the name that the feature extractor
                gives them; a waveform ``[B, T]`` where ``input_size`` is 1.
            labels: ``[B]`` classes or numbers, or ``[B, num_labels]``; gives ``loss``, of ``config.problem_type``.

        Raises:
            ValueError: not exactly one input, or a shape that does not fit.
        """
        outputs = self.model(
            inputs_embeds=self._features(input_values, input_features, inputs_embeds),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = run_head(self.classifier, outputs.pooler_output, self.dropout)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class GruQatForAudioFrameClassification(AudioInputs, FrameClassifier):
    """A GRU with a linear layer on the output of each frame, as for voice activity and speaker diarisation."""

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: GruQatCache | Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> FrameClassifierOutput:
        """As :meth:`GruQatForAudioClassification.forward`, with ``logits`` ``[B, T, num_labels]``.

        Args:
            labels: gives ``loss``: classes ``[B, T]``, or ``[B, T, num_labels]`` of 0 and 1 where several hold at once. -100 and
                padded frames are left out.

        Raises:
            ValueError: not exactly one input, or a shape that does not fit.
        """
        outputs = self.model(
            inputs_embeds=self._features(input_values, input_features, inputs_embeds),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return self.classify(outputs, attention_mask, labels, **kwargs)
