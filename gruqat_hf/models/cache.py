"""The recurrent state that a model carries from one call to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GruQatCache:
    """What ``past_key_values`` holds for a GRU: one state per layer, whatever the length of the sequence read so far.

    As with the caches of transformers, a model that is given one brings it up to date in place. The tensors themselves are never
    written to, so that earlier states and gradients through them stay valid.

    Args:
        state: ``[num_layers, batch, hidden_size]``, or None before the first step.
        seen_tokens: number of time steps read so far, padding included.
    """

    is_compileable = False

    def __init__(self, state: Tensor | None = None, seen_tokens: int = 0) -> None:
        self.state = state
        self.seen_tokens = seen_tokens

    def update(self, state: Tensor, steps: int) -> None:
        """Replace the state by that after ``steps`` more time steps."""
        self.state = state
        self.seen_tokens += steps

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of time steps read so far."""
        return self.seen_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: a recurrent state never fills up."""
        return -1

    def reset(self) -> None:
        """Forget everything read."""
        self.state = None
        self.seen_tokens = 0

    def detach(self) -> GruQatCache:
        """A cache of the same values that no gradient flows through."""
        return GruQatCache(None if self.state is None else self.state.detach(), self.seen_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the batch rows ``beam_idx`` ``[batch]``, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        if self.state is not None:
            self.state = self.state.index_select(1, indices.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=1)

    def to(self, *args: Any, **kwargs: Any) -> GruQatCache:
        """A cache whose state is at the given device (and dtype)."""
        return GruQatCache(None if self.state is None else self.state.to(*args, **kwargs), self.seen_tokens)

    def __repr__(self) -> str:
        shape = None if self.state is None else list(self.state.shape)
        return f"{type(self).__name__}(state={shape}, seen_tokens={self.seen_tokens})"


def initial_state(past: GruQatCache | Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """The state that a call starts from, ``shape`` being ``[num_layers, batch, hidden_size]``; None for zeros.

    Raises:
        ValueError: ``past`` is neither a cache nor a tensor, or has another shape.
    """
    state = past.state if isinstance(past, GruQatCache) else past
    if state is None:
        return None
    if not isinstance(state, Tensor):
        raise ValueError(f"past_key_values must be a GruQatCache or a tensor {list(shape)}, got {type(past).__name__}")
    if tuple(state.shape) != shape:
        raise ValueError(
            f"past_key_values holds a state {list(state.shape)}, but this model and batch need {list(shape)} "
            "(num_layers, batch, hidden_size); start a new sequence with past_key_values=None"
        )
    return state.to(device)
