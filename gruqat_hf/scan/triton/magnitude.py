"""The largest magnitude of a tensor: what scales half-precision gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_facts
from .exchange_plan import cdiv
from .family import KernelCall
from .math import count

#: Values that a program reads at a time, and programs for each processor.
_VALUES, _PROGRAMS = 4096, 4


@triton.jit(do_not_specialize=["size", "rest_size", "programs"])
def _largest(x, rest, out, size, rest_size, programs, VALUES: tl.constexpr):
    """Raises ``out[0]``, bits of an fp32 value, to the largest magnitude of ``x``, and ``out[1]`` to that of ``rest``.

    As integers magnitudes have the same order, with NaN as the largest; and a maximum is the same in whatever order it is taken.
    """
    program, step = tl.program_id(0).to(tl.int64), tl.cast(programs, tl.int64) * VALUES
    found = tl.zeros((VALUES,), tl.int32)
    if program < programs:
        for start in tl.range(count(program * VALUES), count(tl.cast(size, tl.int64)), count(step)):
            i = start + tl.arange(0, VALUES)
            value = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
            found = tl.maximum(found, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.atomic_max(out, tl.max(found, axis=0), sem="relaxed")
    else:
        i = (program - programs) * VALUES + tl.arange(0, VALUES)
        value = tl.load(rest + i, mask=i < rest_size, other=0.0).to(tl.float32)
        tl.atomic_max(out + 1, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), sem="relaxed")


def largest_magnitudes(x: Tensor, rest: Tensor) -> Tensor:
    """Of ``x`` and of ``rest``, both contiguous and of any float dtype: ``[2]`` fp32; NaN where there is one."""
    out = torch.zeros(2, dtype=torch.int32, device=x.device)
    programs = min(cdiv(x.numel(), _VALUES), _PROGRAMS * device_facts(x.device).processors)
    KernelCall(
        kernel=_largest,
        grid=(programs + cdiv(rest.numel(), _VALUES), 1, 1),
        io=(x, rest, out),
        static=(x.numel(), rest.numel(), programs),
        constants={"VALUES": _VALUES},
        warps=8,
    ).run()
    return out.view(torch.float32)
