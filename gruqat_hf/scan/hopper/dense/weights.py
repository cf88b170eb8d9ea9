"""Weights of large blocks as the Hopper kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...spec import ScanSpec, pack_grid
from ...triton.block_diagonal.weights import product_scale
from ...triton.dense.backward import Prepared as PortableWeights
from ...triton.dense.backward import prepare as portable_weights
from ...triton.math import gate_factors
from . import LARGEST_HALF, byte_channels, padded_size
from .byte_layouts import PIECE, splits
from .layouts import CHANNELS, parts_of


class HalfWeights(NamedTuple):
    """Attributes:
    weight: ``[3, blocks, programs, parts, CHANNELS, inputs of a part]`` fp16, inputs named as the exchange has them: codes, or
        prescaled in the float state.
    scale: of an integer product, ``[1, 3, H]``, or None.
    bias: ``[3, H]``, prescaled in the float state.
    h_grid, state_grid: packed, or None.
    size: of a block.
    quantized: whether gates are the portable ones.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    state_grid: Tensor | None
    size: int
    quantized: bool

    @property
    def blocks(self) -> int:
        return self.weight.shape[1]

    @property
    def programs(self) -> int:
        return self.weight.shape[2]


def _packed(weight: Tensor) -> Tensor:
    """``[3, blocks, out, in]`` → the layout of :class:`HalfWeights`."""
    gates, blocks, size, _ = weight.shape
    padded = padded_size(size)
    parts = parts_of(padded)
    weight = pad(weight, (0, padded - size, 0, padded - size))
    # Inputs of a part by program, chunk, inside the chunk. A lane's k-th of 16 inputs is k // 2 * 8 + 2 * chunk + k % 2.
    weight = weight.view(gates, blocks, padded // CHANNELS, CHANNELS, parts, padded // parts // CHANNELS, 4, 2, 2, 2)
    weight = weight.permute(0, 1, 2, 4, 3, 5, 7, 8, 6, 9)
    return weight.reshape(gates, blocks, padded // CHANNELS, parts, CHANNELS, padded // parts).contiguous()


def packed_by_rows(weight: Tensor) -> Tensor:
    """``[3, blocks, out, in]`` → ``[3, blocks, programs, in, CHANNELS]``, in as the backward scan's exchange has them."""
    gates, blocks, size, _ = weight.shape
    padded = padded_size(size)
    weight = pad(weight, (0, padded - size, 0, padded - size)).transpose(2, 3)
    # An input is of one of 8 warps' one or two programs, there of a lane's 4 channels, which are 2 product rows twice.
    weight = weight.reshape(gates, blocks, 8, padded // 256, 8, 2, 2, padded // CHANNELS, CHANNELS)
    return weight.permute(0, 1, 7, 3, 5, 2, 6, 4, 8).reshape(gates, blocks, padded // CHANNELS, padded, CHANNELS).contiguous()


def half_weights(spec: ScanSpec) -> HalfWeights:
    """For products of fp16 operands."""
    (factor,) = spec.operand.factors.values()
    scale = product_scale(spec)
    weight = factor.values if scale is not None else factor.dequantize().float()
    gates, blocks, size, _ = weight.shape
    bias = torch.zeros(gates, blocks * size, device=weight.device) if spec.bias is None else spec.bias.float()
    if not spec.quantized:
        factors = gate_factors(weight.device)
        weight, bias = weight * factors[..., None, None], bias * factors
    grids = pack_grid(spec.grids.h), pack_grid(spec.grids.state)
    return HalfWeights(_packed(weight.to(torch.float16)), scale, bias.contiguous(), *grids, size, spec.quantized)


class ByteWeights(NamedTuple):
    """Attributes:
    weight: codes ``[3, blocks, programs, pieces, parts, channels of a program, inputs of a part]`` int8: :func:`packed_bytes`.
    scale: of the integer product, ``[1, 3, H]``.
    bias: ``[3, H]``.
    h_grid, state_grid: packed; the latter may be None.
    size: of a block.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    h_grid: Tensor
    state_grid: Tensor | None
    size: int

    @property
    def blocks(self) -> int:
        return self.weight.shape[1]

    @property
    def programs(self) -> int:
        return self.weight.shape[2]

    @property
    def channels(self) -> int:
        """Of a program."""
        return self.weight.shape[5]


def packed_bytes(codes: Tensor, channels: int) -> Tensor:
    """``[3, blocks, out, in]`` → that of :class:`ByteWeights`, for programs of so many channels; see :mod:`.byte_layouts`."""
    gates, blocks, size, _ = codes.shape
    pieces, parts = -(-size // PIECE), splits(channels)
    padded = pieces * PIECE
    codes = pad(codes.to(torch.int8), (0, padded - size, 0, padded - size))
    # Outputs by program, 16 channels, pair, inside the pair. Inputs by piece, part, 64 of them; these by chunk, instruction, half
    # of its inputs, and 4 values of a lane.
    codes = codes.view(gates, blocks, -1, channels // 16, 8, 2, pieces, parts, PIECE // parts // 64, 4, 2, 2, 4)
    codes = codes.permute(0, 1, 2, 6, 7, 3, 5, 4, 8, 10, 11, 9, 12)
    codes = codes.reshape(gates, blocks, -1, pieces, parts, channels, PIECE // parts)
    if pieces == 2:  # a program's own piece first
        first, second = codes.chunk(2, dim=2)
        codes = torch.cat([first, second.flip(3)], dim=2)
    return codes.contiguous()


def byte_weights(spec: ScanSpec) -> ByteWeights:
    """For products of 8-bit codes."""
    (factor,) = spec.operand.factors.values()
    scale, h_grid = product_scale(spec), pack_grid(spec.grids.h)
    assert scale is not None and h_grid is not None
    _, blocks, size, _ = factor.values.shape
    bias = scale.new_zeros(3, blocks * size) if spec.bias is None else spec.bias.float().contiguous()
    weight = packed_bytes(factor.values, byte_channels(size))
    return ByteWeights(weight, scale, bias, h_grid, pack_grid(spec.grids.state), size)


class BackwardWeights(NamedTuple):
    """Attributes:
    weight: fp16, ``[3, blocks, programs, inputs, CHANNELS]``, see :func:`packed_by_rows`; of blocks that no cluster holds the
        transposed ones in the layout of :class:`HalfWeights`.
    h_grid: packed, or None.
    clipped: whether the carried state has a grid, so that saved gates may be marked.
    size: of a block.
    portable: the weights of the portable kernels, which serve products as exact as fp32; else None.
    """

    weight: Tensor | None
    h_grid: Tensor | None
    clipped: bool
    size: int
    portable: PortableWeights | None


def backward_weights(spec: ScanSpec) -> BackwardWeights:
    """Once for each set of weights."""
    (factor,) = spec.operand.factors.values()
    size = factor.values.shape[-1]
    if spec.exact:
        return BackwardWeights(None, None, False, size, portable_weights(spec))
    weight, clipped = factor.dequantize().to(torch.float16), spec.grids.state is not None
    weight = _packed(weight.transpose(-1, -2)) if size > LARGEST_HALF else packed_by_rows(weight)
    return BackwardWeights(weight, pack_grid(spec.grids.h), clipped, size, None)
