"""Sequences without an end, read as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..layers import QuantState
from .cache import GruQatCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GruQatStream:
    """A batch of sequences that a model reads a step or a chunk at a time; made by ``model.stream(batch_size)``.

    Memory does not grow with the steps read. In the quantized states the outputs are those of the whole sequence bit for bit,
    however it is cut (but for recipes with the observer "dynamic", whose ranges are those of each call).

    Args:
        model: any model of the package, unidirectional.
        batch_size: number of sequences.

    Raises:
        ValueError: a bidirectional model, or a batch size below 1.

    Attributes:
        seen_steps: number of steps read so far.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 1) -> None:
        if model.config.bidirectional:
            raise ValueError(
                f"a bidirectional {type(model).__name__} cannot stream: its backward direction starts at the last step; "
                "use bidirectional=False"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"stream(batch_size) must be an integer of at least 1, got {batch_size!r}")
        self.model, self.batch_size = model, batch_size
        self._cache = GruQatCache()

    @property
    def seen_steps(self) -> int:
        return self._cache.seen_tokens

    @torch.no_grad()
    def __call__(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read on.

        Args:
            x: one step: features ``[B, input_size]`` or ids ``[B]``; or a chunk of steps: ``[B, T, input_size]`` or ``[B, T]``.
            attention_mask: ``[B]`` or ``[B, T]``, 0 where a sequence has nothing to read: its state is held.

        Returns:
            Of a model that gives an output for every step (GruQatModel, and the heads for tokens, frames and language): these,
            ``[B, ...]`` for a step and ``[B, T, ...]`` for a chunk. Of a head on the last state: its output after what was read.

        Raises:
            ValueError: a shape that does not fit.
            RuntimeError: the model is in training mode.
        """
        model = self.model
        if model.training:
            raise RuntimeError("a stream needs the model in eval mode: call model.eval() first")
        is_ids = not x.is_floating_point()
        dims, what = (1, "ids [B] or [B, T]") if is_ids else (2, f"features [B, {model.config.input_size}] or [B, T, ...]")
        if x.dim() not in (dims, dims + 1) or x.shape[0] != self.batch_size:
            raise ValueError(f"this stream takes {what} with B = {self.batch_size}, got {list(x.shape)}")
        is_step = x.dim() == dims
        inputs: dict[str, Any] = {_input_name(model, is_ids): x.unsqueeze(1) if is_step else x}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.unsqueeze(1) if attention_mask.dim() == 1 else attention_mask
        # A copy: what fails half-way leaves the stream as it was.
        cache = GruQatCache(self._cache.state, self._cache.seen_tokens)
        outputs = model(**inputs, past_key_values=cache, use_cache=True, output_hidden_states=False, return_dict=True)
        self._cache = cache
        out = outputs[model.stream_output]
        return out[:, 0] if is_step and model.streams_every_step else out

    def reset(self, rows: Tensor | None = None) -> None:
        """Start anew: all sequences, or those of ``rows`` (indices, or a bool for each)."""
        if rows is None:
            self._cache = GruQatCache()
            return
        state = self._state().clone()
        state[:, rows.to(state.device)] = 0
        self._cache = GruQatCache(state, self._cache.seen_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a stream remembers: ``state`` ``[num_layers, B, hidden_size]`` and the number of ``seen_steps``."""
        return {"state": self._state().clone(), "seen_steps": torch.tensor(self.seen_steps)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on where the stream that gave ``state_dict`` stood.

        Raises:
            ValueError: entries missing or too many, a state of another shape or type or with NaN in it, or a count below 0.
        """
        if set(state_dict) != {"state", "seen_steps"}:
            raise ValueError(f"a stream's state_dict has state and seen_steps, got {', '.join(sorted(state_dict)) or 'nothing'}")
        state, present, seen = state_dict["state"], self._state(), int(state_dict["seen_steps"])
        if state.shape != present.shape or state.dtype != present.dtype:
            raise ValueError(
                f"this stream has a state {list(present.shape)} of {present.dtype} (num_layers, batch, hidden_size), "
                f"got {list(state.shape)} of {state.dtype}; make one with the batch size and the model it was saved from"
            )
        if not bool(torch.isfinite(state).all()):
            raise ValueError("the state of a stream is finite, this one holds NaN or infinity; it was damaged, or saved damaged")
        if seen < 0:
            raise ValueError(f"seen_steps of a stream is a count of at least 0, got {seen}")
        self._cache = GruQatCache(state.to(present.device, copy=True), seen)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, batch_size={self.batch_size}, seen_steps={self.seen_steps})"

    def _state(self) -> Tensor:
        """The present state; zeros before the first step."""
        if self._cache.state is not None:
            return self._cache.state
        model, config = self.model, self.model.config
        dtype = model.dtype if model.quant_state == QuantState.FLOAT else torch.float32
        device = "cpu" if model.device.type == "meta" else model.device  # offloaded; each call moves it to where it runs
        return torch.zeros(config.num_hidden_layers, self.batch_size, config.hidden_size, dtype=dtype, device=device)


class StreamingMixin:
    """stream() for a model."""

    #: The output that a stream gives, and whether it has one for every step.
    stream_output: ClassVar[str] = "logits"
    streams_every_step: ClassVar[bool] = False

    def stream(self, batch_size: int = 1) -> GruQatStream:
        """A stream of ``batch_size`` sequences that start from zero states; see :class:`GruQatStream`.

        Raises:
            ValueError: a bidirectional model, or a batch size below 1.
        """
        return GruQatStream(self, batch_size)  # type: ignore[arg-type]


def _input_name(model: Any, is_ids: bool) -> str:
    if is_ids:
        return "input_ids"
    return "inputs_embeds" if model.main_input_name == "input_ids" else model.main_input_name
