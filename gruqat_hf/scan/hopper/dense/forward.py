"""Forward scan of large blocks: of fp16 operands, on a cluster or a grid, or of 8-bit codes."""

from __future__ import annotations

from torch import Tensor

from ...spec import ScanSpec
from ...triton.family import aligned
from ..cluster import ClusterCall
from . import LARGEST_HALF, forward_bytes, forward_half, forward_wide, multiplies_bytes
from .strange import spread_nan
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
) -> ClusterCall | None:
    """The launch that fills ``states``, and ``gates`` if given; None where it takes more than one."""
    if isinstance(weights, ByteWeights) or weights.size > LARGEST_HALF:
        return None
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
    gi = aligned(gi)
    if isinstance(weights, ByteWeights):
        forward_bytes.call(weights, gi, h0, mask, reverse, states, gates).run()
        spread_nan(h0, mask, states, weights.size, reverse)
    elif weights.size > LARGEST_HALF:
        forward_wide.forward(weights, gi, h0, mask, reverse, states, gates)
    else:
        forward_half.call(weights, gi, h0, mask, reverse, states, gates).run()
