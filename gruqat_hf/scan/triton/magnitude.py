"""The largest magnitudes of gradients: what scales them for half precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_facts
from .exchange_plan import cdiv, power_of_two
from .family import KernelCall
from .math import count

#: Values that a program reads at a time, and programs for each processor.
_VALUES, _PROGRAMS = 4096, 4


@triton.jit
def magnitude_bits(value):
    """A magnitude as an integer, which has the same order; 0 for infinity and NaN, that no scale brings into range."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit(do_not_specialize=["T", "B"])
def _largest(dstates, dlast, out, T, B, H: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (b, p): raises ``out[0, b]``, bits of an fp32 value, to the largest magnitude of row b in its runs of STEPS steps;
    the first program of a row also sets ``out[1, b]`` to that of ``dlast``.

    A maximum is the same in whatever order it is taken.
    """
    b = tl.program_id(0)
    steps, c = tl.arange(0, STEPS), tl.arange(0, BLOCK)
    found = tl.zeros((STEPS, BLOCK), tl.int32)
    for start in tl.range(count(tl.program_id(1) * STEPS), count(T), count(tl.num_programs(1) * STEPS)):
        t = start + steps
        at = (tl.cast(t, tl.int64) * B + b) * H
        for first in tl.static_range(0, H, BLOCK):
            p = dstates + at[:, None] + (first + c)[None, :]
            value = tl.load(p, mask=(t < T)[:, None] & (first + c < H)[None, :], other=0.0)
            found = tl.maximum(found, magnitude_bits(value))
    tl.atomic_max(out + b, tl.max(tl.max(found, axis=1), axis=0), sem="relaxed")
    if tl.program_id(1) == 0:
        last = tl.zeros((BLOCK,), tl.int32)
        for first in tl.static_range(0, H, BLOCK):
            value = tl.load(dlast + b * H + first + c, mask=first + c < H, other=0.0)
            last = tl.maximum(last, magnitude_bits(value))
        tl.store(out + B + b, tl.max(last, axis=0))


def largest_magnitudes(dstates: Tensor, dlast: Tensor) -> Tensor:
    """For each row, of ``dstates`` ``[T, B, H]`` and of ``dlast`` ``[B, H]``, contiguous and of any float dtype: ``[2, B]`` fp32.

    A row's alone, so that what is in one row never changes another's gradients. Infinity and NaN do not count.
    """
    steps, rows, hidden = dstates.shape
    out = torch.zeros((2, rows), dtype=torch.int32, device=dstates.device)
    block = min(power_of_two(hidden), _VALUES)
    together = _VALUES // block
    programs = max(1, min(cdiv(steps, together), _PROGRAMS * device_facts(dstates.device).processors // rows))
    KernelCall(
        kernel=_largest,
        grid=(rows, programs, 1),
        io=(dstates, dlast, out),
        static=(steps, rows),
        constants={"H": hidden, "STEPS": together, "BLOCK": block},
        warps=8,
    ).run()
    return out.view(torch.float32)
