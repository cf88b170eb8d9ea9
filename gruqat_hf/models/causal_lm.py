"""The language model, and what generate() needs."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..layers import QuantState
from ..layers.lifecycle import LifecycleError
from ..operands import Factor
from .cache import GruQatCache
from .configuration_gruqat import GruQatConfig
from .embedding import QuantizableEmbedding
from .linear import WideLinear, run_head
from .modeling_gruqat import GruQatModel
from .parts import FROZEN_PART, is_tied
from .pretrained import GruQatPreTrainedModel


class GruQatForCausalLM(GruQatPreTrainedModel, GenerationMixin):
    """A GRU that predicts the next token.

    With ``config.tie_word_embeddings`` the embedding is the output layer's weight as well, for which ``hidden_size`` must be
    ``input_size``.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' own form)
    streams_every_step = True

    def __init__(self, config: GruQatConfig) -> None:
        _check(config)
        super().__init__(config)
        self.model = GruQatModel(config)
        self.lm_head = WideLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take over the weight (and bias) of ``new_embeddings``; resize_token_embeddings() passes a plain nn.Linear.

        In QAT the new layer is quantized as the old one was.

        Raises:
            LifecycleError: the old one is frozen.
        """
        old = self.lm_head
        if isinstance(old, WideLinear) and (old.weight is None or old.quant_state == QuantState.FROZEN):
            raise LifecycleError(FROZEN_PART.format(call="set_output_embeddings", part="output layer"))
        self.lm_head = WideLinear.of(new_embeddings).train(self.training)
        if isinstance(old, WideLinear):
            self.lm_head.take_quantizers(old)
        # transformers' mark that there is nothing to initialise.
        self.lm_head._is_hf_initialized = getattr(new_embeddings, "_is_hf_initialized", False)

    def _table(self) -> Factor | None:
        """The quantized weight of the embedding that the output layer is tied to; None where it has one of its own."""
        embedding = self.model.embed_tokens
        if not (is_tied(self) and isinstance(embedding, QuantizableEmbedding)) or embedding.quant_state == QuantState.FLOAT:
            return None
        hook = getattr(embedding, "_hf_hook", None)  # accelerate's, which brings offloaded weights to the device
        if hook is None:
            return embedding.table()
        hook.pre_forward(embedding)
        table = embedding.table()
        hook.post_forward(embedding, None)
        return table

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which weights transformers keeps the same; none where codes take their place, which the embedding alone holds."""
        embedding = self.model.embed_tokens
        if isinstance(embedding, QuantizableEmbedding) and embedding.is_frozen:
            return {}
        return super().get_expanded_tied_weights_keys(all_submodels)

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
        logits_to_keep: int | Tensor = 0,
        prefill_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As :meth:`GruQatModel.forward`, with ``logits`` ``[B, T, vocab_size]``.

        Args:
            labels: token ids ``[B, T]``, the same as ``input_ids`` (they are shifted here); gives ``loss``. -100 and padded steps
                are left out.
            logits_to_keep: only the last this many steps get logits, or those at the indices given; 0 means all. Not with labels.
            prefill_chunk_size: read the sequence in parts of this many steps, for less memory; only the last part gets logits.
                Needs a cache, and not with labels.
            shift_labels: ``[B, T]``: what each step has to predict, shifted already; takes the place of ``labels``.

        Raises:
            ValueError: as GruQatModel.forward, or arguments that exclude each other.
        """
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        # Not in the signature: Trainer takes every argument with "label" in its name for one that evaluation needs.
        targets = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            _check_labels(labels, inputs_embeds if input_ids is None else input_ids)
            targets = _next_tokens(labels, attention_mask)
        if targets is not None and not (keeps_all and prefill_chunk_size is None):
            raise ValueError("labels need the logits of every step: leave out logits_to_keep and prefill_chunk_size")
        table = self._table()  # once, for both who read it: an observer is to see it once a pass
        if prefill_chunk_size is not None:
            # The rest of the arguments is for the last part; the cache takes the others in.
            input_ids, inputs_embeds, attention_mask, past_key_values = self._read_ahead(
                prefill_chunk_size, input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, table
            )
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            embedding_table=table,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Sums over a vocabulary in float64 cost too much where training, or a float model, needs no equal bits.
        wide_sums = not self.training and self.quant_state != QuantState.FLOAT
        logits = run_head(self.lm_head, outputs.last_hidden_state[:, kept], table=table, wide_sums=wide_sums)
        loss = None
        if targets is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=targets, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _read_ahead(
        self,
        size: int,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
        past: GruQatCache | Tensor | None,
        use_cache: bool | None,
        table: Factor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, GruQatCache]:
        """Read all parts but the last; gives the last one, its mask and the cache."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"prefill_chunk_size must be an integer of at least 1, got {size!r}")
        if use_cache is False:
            raise ValueError("prefill_chunk_size needs a cache: use_cache=True, or leave out prefill_chunk_size")
        cache = past if isinstance(past, GruQatCache) else GruQatCache(past)
        name, x = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        parts = [None] if x is None else x.split(size, dim=1)
        # The mask may reach back over what the cache has read: its last entries are those of x.
        masks = [None] * len(parts) if mask is None or x is None else mask[:, -x.shape[1] :].split(size, dim=1)
        for part, part_mask in zip(parts[:-1], masks[:-1]):
            self.model(**{name: part}, attention_mask=part_mask, past_key_values=cache, use_cache=True, embedding_table=table)
        last = {"input_ids": None, "inputs_embeds": None, name: parts[-1]}
        return last["input_ids"], last["inputs_embeds"], masks[-1], cache

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            # From the start, so that a prompt can be read in chunks.
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = GruQatCache()
            return None
        if isinstance(cache, Tensor):
            cache = model_kwargs["past_key_values"] = GruQatCache(cache)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if isinstance(cache, GruQatCache) and cache.state is not None and cache.state.shape[1] == batch_size:
            # The prompts have been repeated for beams by now.
            cache.batch_repeat_interleave(copies)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
        )

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Chunks are cut by forward(): transformers' own way reads what the cache has read a second time (5.17), and no
        # inputs_embeds. What it does for a prompt in one piece is right.
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            model_kwargs = {**model_kwargs, "prefill_chunk_size": size}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _check(config: GruQatConfig) -> None:
    if config.vocab_size is None:
        raise ValueError("GruQatForCausalLM predicts tokens: set GruQatConfig.vocab_size")
    if config.bidirectional:
        raise ValueError(
            "GruQatForCausalLM with GruQatConfig.bidirectional=True: its backward direction would see the tokens to predict; "
            "use bidirectional=False"
        )
    if config.tie_word_embeddings and config.hidden_size != config.input_size:
        raise ValueError(
            f"GruQatConfig.tie_word_embeddings=True needs hidden_size == input_size, got {config.hidden_size} and "
            f"{config.input_size}; make them equal, or use tie_word_embeddings=False"
        )


def _check_labels(labels: Tensor, x: Tensor | None) -> None:
    if x is not None and labels.shape != x.shape[:2]:
        raise ValueError(f"labels must be {list(x.shape[:2])}, one for each step of the input, got {list(labels.shape)}")


def _next_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The label that each step has to predict: that of the next, unless either is padding."""
    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if mask is not None:
        real = mask[:, -labels.shape[1] :].to(labels.device).bool()
        both = real & nn.functional.pad(real, (0, 1))[:, 1:]
        following = following.masked_fill(~both, -100)
    return following.contiguous()
