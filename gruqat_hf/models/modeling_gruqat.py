"""The models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from ..layers import GRULayer, GRUStack
from ..layers.lifecycle import LifecycleError
from ..operands import Factor
from .cache import GruQatCache, initial_state
from .configuration_gruqat import GruQatConfig
from .embedding import QuantizableEmbedding
from .linear import WideLinear, run_head
from .parts import FROZEN_PART
from .pretrained import GruQatPreTrainedModel
from .torch_gru import config_of, read_gru, write_gru


@dataclass
class GruQatModelOutput(BaseModelOutputWithPast):
    """Output of :class:`GruQatModel`.

    Attributes:
        last_hidden_state: outputs of the last layer ``[B, T, directions * hidden_size]``; zero at padded steps.
        past_key_values: :class:`GruQatCache` to go on from, or None.
        hidden_states: input and outputs of every layer, ``num_hidden_layers + 1`` tensors ``[B, T, ...]``, on request.
        pooler_output: last state of the last layer, directions side by side, ``[B, directions * hidden_size]``; fp32 in the
            quantized states.
    """

    pooler_output: Tensor | None = None


class GruQatModel(GruQatPreTrainedModel):
    """A stack of GRU layers, on float features or on an embedding of token ids."""

    stream_output = "last_hidden_state"
    streams_every_step = True

    def __init__(self, config: GruQatConfig) -> None:
        super().__init__(config)
        self.embed_tokens = None
        if config.vocab_size is not None:
            self.embed_tokens = QuantizableEmbedding(config.vocab_size, config.input_size, config.pad_token_id)
        self.stack = GRUStack(
            config.input_size,
            config.hidden_size,
            config.num_hidden_layers,
            bidirectional=config.bidirectional,
            bias=config.bias,
            dropout=config.dropout,
            structure_input=config.input_structure,
            structure_hidden=config.hidden_structure,
        )
        for layer in self.stack.modules():
            if isinstance(layer, GRULayer):
                layer.backend = config.backend
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The embedding, or None for a model of float features."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put ``value`` in the place of the embedding; in QAT it is quantized as that was.

        Raises:
            LifecycleError: the embedding is frozen.
        """
        old = self.embed_tokens
        if isinstance(old, QuantizableEmbedding) and old.is_frozen:
            raise LifecycleError(FROZEN_PART.format(call="set_input_embeddings", part="embedding"))
        if isinstance(old, QuantizableEmbedding) and old.quantizer is not None and type(value) is nn.Embedding:
            value = QuantizableEmbedding.of(value)
            value.quantizers, value.quantizer_config = old.quantizers, old.quantizer_config
        self.embed_tokens = value
        if isinstance(value, QuantizableEmbedding):
            value.fit_quantizer()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GruQatCache | Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        embedding_table: Factor | None = None,
        **kwargs: Any,
    ) -> GruQatModelOutput:
        """Run over a batch of sequences.

        Args:
            input_ids: token ids ``[B, T]``; or instead
            inputs_embeds: features ``[B, T, input_size]``.
            attention_mask: ``[B, T]``, 0 where a step is padding, anywhere: its output is zero and the state is held. With
                ``past_key_values`` it may reach back over earlier steps; the last T entries count.
            past_key_values: state to start from: a cache that an earlier call returned (it is brought up to date in place), or a
                tensor ``[num_layers, B, hidden_size]``.
            use_cache: whether to return the state; None for ``config.use_cache``, and False for a bidirectional model or under
                ``torch.export``, whose programs return tensors and no caches.
            output_hidden_states: whether to return the outputs of every layer.
            embedding_table: the weight of a quantized embedding in its present state, where the caller has it already.
            return_dict: False for a tuple.

        Raises:
            ValueError: not exactly one input, a shape that does not fit, or a cache with a bidirectional model.
        """
        config = self.config
        x = self._embed(input_ids, inputs_embeds, embedding_table)
        batch, steps = x.shape[:2]
        if config.bidirectional and (past_key_values is not None or use_cache):
            what = "past_key_values" if past_key_values is not None else "use_cache=True"
            raise ValueError(
                f"{what} with a bidirectional model: its backward direction starts at the last step, so a sequence cannot be "
                "read in parts; pass whole sequences, or use bidirectional=False"
            )
        if use_cache is None:
            use_cache = config.use_cache and not config.bidirectional and not torch.compiler.is_exporting()
        layers = config.num_hidden_layers * config.num_directions
        h0 = initial_state(past_key_values, (layers, batch, config.hidden_size), x.device)
        mask = _time_first_mask(attention_mask, batch, steps, past_key_values is not None)

        out, state, hidden = self.stack(x.transpose(0, 1), h0, mask)

        cache = None
        if use_cache:
            cache = past_key_values if isinstance(past_key_values, GruQatCache) else GruQatCache()
            cache.update(state, steps)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        last, hidden_states = out.transpose(0, 1), None
        if output_hidden_states:
            # The input is the very tensor that the outputs come from, so that its gradient can be retained.
            hidden_states = (x, *(layer.transpose(0, 1) for layer in hidden[1:-1]), last)
        return GruQatModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=hidden_states,
            pooler_output=torch.cat(tuple(state[-config.num_directions :]), dim=-1),
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, table: Factor | None) -> Tensor:
        size = self.config.input_size
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"pass either input_ids [B, T] or inputs_embeds [B, T, {size}], got {given}")
        if input_ids is not None:
            if self.embed_tokens is None:
                raise ValueError(
                    f"this model has no vocabulary; pass inputs_embeds [B, T, {size}], or set GruQatConfig.vocab_size"
                )
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
            inputs_embeds = self.embed_tokens(input_ids, **({} if table is None else {"table": table}))
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != size:
            raise ValueError(f"inputs_embeds must be [B, T, {size}], got {list(inputs_embeds.shape)}")
        if inputs_embeds.shape[1] == 0:
            raise ValueError("the sequences have no time steps; pass at least one")
        return inputs_embeds

    @classmethod
    def from_torch(cls, gru: nn.GRU, **config: Any) -> GruQatModel:
        """A float, dense model with the weights of ``gru``, all layers and directions of it, on its device and in its dtype.

        Args:
            config: further fields of :class:`GruQatConfig`, such as ``num_labels``.

        Raises:
            ValueError: not a torch.nn.GRU.
        """
        model = cls(config_of(gru, **config))
        weight = gru.weight_ih_l0
        model.to(device=weight.device, dtype=weight.dtype).train(gru.training)
        read_gru(model.stack, gru)
        return model

    def to_torch(self, *, batch_first: bool = True) -> nn.GRU:
        """A torch.nn.GRU with the same weights, without the embedding.

        Raises:
            ValueError: the model is quantized, or its weights are not dense.
        """
        return write_gru(self.stack, batch_first)


class GruQatForSequenceClassification(GruQatPreTrainedModel):
    """A GRU with a linear layer on its last state: classes, several labels at once, or numbers, by ``config.problem_type``."""

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
        input_ids: Tensor | None = None,
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
            labels: ``[B]`` classes or numbers, or ``[B, num_labels]``; gives ``loss``.
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
        logits = run_head(self.classifier, outputs.pooler_output, self.dropout)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def _time_first_mask(attention_mask: Tensor | None, batch: int, steps: int, continues: bool) -> Tensor | None:
    """``attention_mask`` as the layers take it, ``[T, B]`` bool."""
    if attention_mask is None:
        return None
    length = attention_mask.shape[-1]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or length < steps or (length > steps and not continues):
        longer = ", or longer with past_key_values" if not continues else " or longer"
        raise ValueError(f"attention_mask must be [{batch}, {steps}]{longer}, got {list(attention_mask.shape)}")
    return attention_mask[:, length - steps :].to(torch.bool).transpose(0, 1)
