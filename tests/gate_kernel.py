"""The portable gates of the kernels by themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gruqat_hf.scan.triton.family import KernelCall
from gruqat_hf.scan.triton.math import portable_sigmoid, portable_tanh

_VALUES = 1 << 12


@triton.jit(do_not_specialize=["first"])
def _kernel(sigmoid, tanh, first, VALUES: tl.constexpr):
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    x = (at + first).to(tl.float32, bitcast=True)
    tl.store(sigmoid + at, portable_sigmoid(x))
    tl.store(tanh + at, portable_tanh(x))


def gates_of_bits(first: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sigmoid and tanh of the floats whose bits are the integers from ``first`` on; their number is a multiple of 4,096."""
    sigmoid, tanh = torch.empty(2, number, device=device).unbind()
    call = KernelCall(
        kernel=_kernel,
        grid=(number // _VALUES, 1, 1),
        io=(sigmoid, tanh),
        static=(first,),
        constants={"VALUES": _VALUES},
        portable=True,
    )
    call.run()
    return sigmoid, tanh
