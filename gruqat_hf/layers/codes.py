"""Integer codes of a frozen weight, as buffers of the module that holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..quantization import QuantizerConfig, pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class FrozenFactor:
    """What a frozen factor's codes are: their last dimension once unpacked, and their grid."""

    row: int
    bits: int
    qmax: int

    def unpack(self, stored: Tensor) -> Tensor:
        """int8 codes ``[..., row]`` of what is stored for them."""
        return unpack_nibbles(stored, self.row) if self.bits <= 4 else stored


def store_codes(module: nn.Module, name: str, codes: Tensor, scale: Tensor, config: QuantizerConfig) -> FrozenFactor:
    """Give ``module`` the buffers ``{name}_codes`` (int8; uint8 with two codes a byte for up to 4 bits) and ``{name}_scale``.

    Args:
        codes: int8 ``[..., row]``; scale: fp32.
    """
    packed = pack_nibbles(codes) if config.bits <= 4 else codes
    module.register_buffer(f"{name}_codes", packed.contiguous())
    module.register_buffer(f"{name}_scale", scale.detach().clone())
    return FrozenFactor(codes.shape[-1], config.bits, config.qmax)


def drop_codes(module: nn.Module, name: str) -> None:
    """Take the buffers of :func:`store_codes` off again."""
    delattr(module, f"{name}_codes")
    delattr(module, f"{name}_scale")
