"""Forward scan of large blocks on Hopper clusters: in fp16, or in 8-bit codes where blocks are too large for that."""

from __future__ import annotations

from torch import Tensor

from ...spec import ScanSpec
from ...triton.family import aligned
from ..cluster import ClusterCall
from . import forward_bytes, forward_half, multiplies_bytes
from .weights import ByteWeights, HalfWeights, byte_weights, half_weights

__all__ = ["call", "forward", "prepare"]


def prepare(spec: ScanSpec) -> HalfWeights | ByteWeights:
    """Once for each set of weights."""
    return byte_weights(spec) if multiplies_bytes(spec) else half_weights(spec)


def call(
    weights: HalfWeights | ByteWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    if isinstance(weights, ByteWeights):
        return forward_bytes.call(weights, gi, h0, mask, reverse, states, gates)
    return forward_half.call(weights, gi, h0, mask, reverse, states, gates)


def forward(
    weights: HalfWeights | ByteWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    call(weights, aligned(gi), h0, mask, reverse, states, gates).run()
