"""Which products these kernels compute: of fp16 operands, which are floats or integers, summed in fp32."""

from __future__ import annotations

from ..inputs import ScanInputs
from ..spec import sums_floats
from ..triton.precision import is_exact

#: Integers up to here are exact in fp16, and in fp32.
_HALF, _SINGLE = 1 << 11, 1 << 24


def refuses_products(inputs: ScanInputs) -> str | None:
    """Why a scan wants other products, or None."""
    if not inputs.quantized:
        if is_exact(inputs):
            return 'float products are wanted as exact as fp32: see torch.set_float32_matmul_precision("high")'
        return None
    if inputs.grids.gates is not None:
        return "gate pre-activations are quantized"
    if sums_floats(inputs.operand, inputs.grids, inputs.quantized):
        return "a product has one side in float"
    for factor, grid in zip(inputs.operand.factors.values(), (inputs.grids.h, inputs.grids.mid)):
        assert grid is not None
        if factor.groups > 1:
            return f"weights have {factor.groups} scales in each row"
        if max(factor.qmax, grid.magnitude) > _HALF or factor.qmax * grid.magnitude * factor.values.shape[-1] >= _SINGLE:
            return "integers are not exact in fp16, or their sums in fp32"
    return None
