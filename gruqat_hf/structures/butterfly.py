"""log2(size) stages of 2x2 matrices per gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from ..operands import BlockDiagonalOperand, Factor, MonarchOperand, Operand
from .base import Structure, require_square
from .config import StructureConfig

#: Ways to multiply a butterfly out at once, with the same bits: each gives :func:`multiply_out` of its argument, differentiable,
#: or None where it does not serve. Filled by the backends of scans.
AT_ONCE: list[Callable[[Tensor], tuple[Tensor, Tensor] | None]] = []


class ButterflyStructure(Structure):
    """A product of ``factor_pairs`` butterfly matrices per gate (Dao et al. 2019, arXiv 1903.05895).

    Parameter ``twiddle`` ``[gates, factor_pairs, log2(size), size/2, 2, 2]``. Stage ``s`` of the first butterfly mixes the
    elements ``2^s`` apart: with its twiddles read as ``[size/2^(s+1), 2^s, 2, 2]`` and its input as ``x[size/2^(s+1), 2, 2^s]``,
    ``y[c, i, p] = sum over j of twiddle[c, p, i, j] * x[c, j, p]``. The next butterfly takes its strides from size/2 down to 1,
    the one after upwards again. All start as N(0, 1/2), which keeps the variance of what passes through.

    One butterfly multiplies out into the two factors of a :class:`MonarchOperand`, several into one dense block. This is done by
    elementwise products and sums alone, which, unlike matrix products, eager PyTorch rounds alike on every device: the codes that
    a quantizer makes of the operand must not depend on where it was made.
    """

    kind: ClassVar[str] = "butterfly"
    invertible: ClassVar[bool] = False

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_square(cls.kind, in_features, out_features, (*_powers_near(in_features), *_powers_near(out_features)))
        works = _powers_near(in_features)
        if in_features not in works:
            raise ValueError(
                f"structure kind {cls.kind!r} needs a size that is a power of two and at least 2, "
                f"got in_features=out_features={in_features}; {' or '.join(map(str, works))} would work"
            )
        if config.factor_pairs > in_features:
            raise ValueError(
                f"StructureConfig.factor_pairs={config.factor_pairs} exceeds the size {in_features} of the matrix, of which as "
                f"many already make any matrix; 1 to {in_features} would work"
            )

    @property
    def stages(self) -> int:
        return self.in_features.bit_length() - 1

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"twiddle": (self.gates, self.config.factor_pairs, self.stages, self.in_features // 2, 2, 2)}

    def initial_parameters(self) -> dict[str, Tensor]:
        return {"twiddle": self.normal("twiddle", math.sqrt(0.5))}

    def lower(self) -> Operand:
        if self.config.factor_pairs > 1:
            return BlockDiagonalOperand(blocks=Factor(self._dense().unsqueeze(1)))
        twiddle = self.twiddle[:, 0]
        found = next((found for way in AT_ONCE if (found := way(twiddle)) is not None), None)
        first, second = multiply_out(twiddle) if found is None else found
        return MonarchOperand(first=Factor(first), second=Factor(second))

    def _dense(self) -> Tensor:
        size = self.in_features
        dense = _multiply_out(self.twiddle[:, 0], 1, 1)[:, 0]
        for pair in range(1, self.config.factor_pairs):
            for stage in range(self.stages):
                stride = size >> (stage + 1) if pair % 2 else 1 << stage
                twiddle = self.twiddle[:, pair, stage].unflatten(1, (size // (2 * stride), stride)).movedim(2, -1).unsqueeze(-1)
                low, high = dense.view(self.gates, size // (2 * stride), 1, 2, stride, size).unbind(3)
                dense = (twiddle[:, :, :, 0] * low + twiddle[:, :, :, 1] * high).reshape(self.gates, size, size)
        return dense


def multiply_out(twiddle: Tensor) -> tuple[Tensor, Tensor]:
    """``[gates, stages, size / 2, 2, 2]`` as the two block-diagonal factors ``[gates, blocks, width, width]``."""
    stages = twiddle.shape[1]
    inner = (stages + 1) // 2
    first = _multiply_out(twiddle[:, :inner], 1 << (stages - inner), 1)
    return first, _multiply_out(twiddle[:, inner:], 1, 1 << inner)


def _multiply_out(twiddle: Tensor, groups: int, inner: int) -> Tensor:
    """The block-diagonal product of consecutive stages.

    ``twiddle`` ``[gates, stages, size/2, 2, 2]`` mixes, within each of ``groups`` runs, elements ``inner * 2^stage`` apart; the
    result is ``[gates, groups * inner, 2^stages, 2^stages]``, blocks in the order group, then position within ``inner``.
    """
    gates, stages = twiddle.shape[:2]
    size = 1 << stages
    # A stage joins two blocks into one of twice the size. No entry of a butterfly is a sum: each pair of an input and an output
    # is joined by one path, so the new block's quarters are the two old blocks with rows scaled.
    blocks = twiddle.new_ones(gates, groups * inner, size, 1, 1)
    for stage in range(stages):
        stride, count = 1 << stage, size >> (stage + 1)
        scale = twiddle[:, stage].reshape(gates, groups, count, stride, inner, 2, 2)
        scale = scale.permute(0, 1, 4, 2, 5, 3, 6).reshape(gates, groups * inner, count, 2, stride, 2, 1)
        old = blocks.view(gates, groups * inner, count, 2, stride, stride).transpose(3, 4).unsqueeze(3)
        blocks = (scale * old).reshape(gates, groups * inner, count, 2 * stride, 2 * stride)
    return blocks.squeeze(2)


def _powers_near(size: int) -> tuple[int, ...]:
    """``size`` itself if it is a power of two and at least 2, else the two nearest that are."""
    low = max(2, 1 << (size.bit_length() - 1))
    return (low,) if low == size else (low, 2 * low)
