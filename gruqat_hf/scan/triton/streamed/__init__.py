"""Scans of a block-diagonal or two-factor operand of any size, on any GPU: weights are read anew at every step.

Tiles of a product's outputs are dealt out to as many programs as the GPU can run at once, one at least; after every product they
wait for one another. States and what lies between the factors pass through global memory.
"""

from .backward import backward
from .forward import forward
from .tiles import StreamedFactor, StreamedWeights, pad_blocks, pad_weight

__all__ = ["StreamedFactor", "StreamedWeights", "backward", "forward", "pad_blocks", "pad_weight"]
