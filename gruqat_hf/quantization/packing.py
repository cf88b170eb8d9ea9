"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes in [-8, 7], ``[..., n]`` → uint8 ``[..., ceil(n/2)]``; the even position is the low nibble, stored as ``code + 8``.

    Raises:
        ValueError: a code outside [-8, 7].
    """
    if codes.numel() and codes.device.type != "meta" and not (-8 <= int(codes.min()) and int(codes.max()) <= 7):
        raise ValueError(f"4-bit codes lie in [-8, 7], got [{int(codes.min())}, {int(codes.max())}]")
    nibbles = (codes.to(torch.int16) + 8).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """uint8 ``[..., ceil(n/2)]`` → int8 codes ``[..., n]``, the inverse of :func:`pack_nibbles`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :n]
    return nibbles.to(torch.int8) - 8
