"""The input product of a whole sequence in inference: one product, with everything around it in the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import BlockDiagonalOperand
from ..capture import is_capturing
from ..inputs import LayerWeights
from ..product import OperandProduct
from ..spec import is_integer, pack_grid
from .device import device_facts
from .exchange_plan import cdiv, power_of_two
from .family import KernelCall, aligned
from .math import codes, load_grid
from .transposition import transposed

#: Gives ``[R, 3 * H]`` for rows ``[R, I]``.
InputProduct = Callable[[Tensor], Tensor]

#: Tile of the product, and values that a program quantizes.
_ROWS, _COLUMNS, _DEPTH, _VALUES = 128, 128, 128, 1024


@triton.jit(do_not_specialize=["R"])
def _quantize(x, out, unit, grid, R, INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of rows, which may have no NaN, and for each row NaN if ``x`` has one there, else 1: what its products are to be
    multiplied by."""
    _, inv, low, high = load_grid(grid, 0, 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    strange = tl.zeros((ROWS,), tl.int32)
    for start in tl.range(0, INPUTS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (r < R)[:, None] & (i < INPUTS)[None, :]
        at = tl.cast(r, tl.int64)[:, None] * INPUTS + i[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        strange = tl.maximum(strange, tl.max((value != value).to(tl.int32), axis=1))
        tl.store(out + at, codes(value, inv, low, high).to(out.dtype.element_ty), mask=inside)
    tl.store(unit + r, tl.where(strange != 0, float("nan"), 1.0), mask=r < R)


@triton.jit(do_not_specialize=["R"])
def _integer_product(
    x, unit, out, weight, scale, bias, R,
    INPUTS: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out = sum over groups of (x @ weight.T) * scale + bias`` of codes ``x`` and ``weight`` ``[N, INPUTS]``, int8 or fp16.

    ``unit``: see :func:`_quantize`.
    """
    tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    WIDTH: tl.constexpr = INPUTS // GROUPS
    HALF: tl.constexpr = weight.dtype.element_ty == tl.float16
    # Programs that follow each other share their rows of x.
    r = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    x_p = x + tl.cast(r, tl.int64)[:, None] * INPUTS
    weight_p = weight + c[None, :] * INPUTS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for g in tl.static_range(GROUPS):
        acc = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            k = start + tl.arange(0, DEPTH)
            own = k < WIDTH
            i = g * WIDTH + k
            if WIDTH % DEPTH == 0:
                q = tl.load(x_p + i[None, :], mask=(r < R)[:, None], other=0)
                w = tl.load(weight_p + i[:, None], mask=(c < N)[None, :], other=0)
            else:
                q = tl.load(x_p + i[None, :], mask=(r < R)[:, None] & own[None, :], other=0)
                w = tl.load(weight_p + i[:, None], mask=(c < N)[None, :] & own[:, None], other=0)
            if HALF:
                acc += tl.dot(q, w).to(tl.int32)
            else:
                acc = tl.dot(q, w, acc, out_dtype=tl.int32)
        term = acc.to(tl.float32) * tl.load(scale + g * N + c, mask=c < N, other=0.0)[None, :]
        if g == 0:
            total = term
        else:
            total += term
    total *= tl.load(unit + r, mask=r < R, other=1.0)[:, None]
    if bias is not None:
        total += tl.load(bias + c, mask=c < N, other=0.0)[None, :]
    tl.store(out + tl.cast(r, tl.int64)[:, None] * N + c[None, :], total, mask=(r < R)[:, None] & (c < N)[None, :])


def integer_calls(
    rows: Tensor, codes: Tensor, unit: Tensor, out: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, grid: Tensor
) -> tuple[KernelCall, KernelCall]:
    """Fill ``codes`` with those of ``rows`` ``[R, I]``, ``unit`` ``[R]`` fp32, and ``out`` ``[R, N]``.

    Args:
        weight: codes ``[N, I]``, dtype of ``codes``; scale: ``[groups, N]``; bias: ``[N]`` or None; grid: packed.
    """
    number, features = rows.shape
    columns, groups = weight.shape[0], scale.shape[0]
    block = min(_VALUES, power_of_two(features))
    together = _VALUES // block
    quantize = KernelCall(
        kernel=_quantize,
        grid=(cdiv(number, together), 1, 1),
        io=(rows, codes, unit),
        static=(grid, number),
        constants={"INPUTS": features, "ROWS": together, "BLOCK": block},
        portable=True,
    )
    multiply = KernelCall(
        kernel=_integer_product,
        grid=(cdiv(number, _ROWS) * cdiv(columns, _COLUMNS), 1, 1),
        io=(codes, unit, out),
        static=(weight, scale, bias, number),
        constants={
            "INPUTS": features,
            "N": columns,
            "GROUPS": groups,
            "ROWS": _ROWS,
            "COLUMNS": _COLUMNS,
            "DEPTH": min(_DEPTH, max(32, power_of_two(features // groups))),
            "STAGES": max(1, min(3, device_facts(rows.device).shared_bytes // (_ROWS + _COLUMNS) // _DEPTH)),
        },
        warps=8,
        portable=True,
    )
    return quantize, multiply


def _interleaved(values: Tensor, programs: int) -> Tensor:
    """``[3 * H, ...]``, all channels of each gate, in the exchange order of so many programs."""
    return values.unflatten(0, (3, -1, programs)).transpose(1, 2).flatten(0, 2) if programs > 1 else values


def _integer(weights: LayerWeights, programs: int) -> InputProduct:
    """A dense product of codes."""
    factor = weights.input.factors["blocks"]
    assert weights.x is not None
    scale = weights.x.scale.reshape(-1, 1, 1, 1) * factor.scale
    features = factor.values.shape[-1]
    scale = _interleaved(scale.expand(*factor.values.shape[:3], -1).reshape(-1, scale.shape[-1]), programs).t().contiguous()
    dtype = torch.int8 if weights.x.magnitude <= 127 else torch.float16
    weight = _interleaved(factor.values.to(dtype).reshape(-1, features), programs).contiguous()
    bias = None if weights.bias_input is None else _interleaved(weights.bias_input.reshape(-1), programs).contiguous()
    grid = pack_grid(weights.x)
    columns = weight.shape[0]

    launches: dict[int, tuple[Callable[..., None], Callable[..., None]]] = {}

    def product(rows: Tensor) -> Tensor:
        rows = aligned(rows.contiguous())
        quantized = torch.empty_like(rows, dtype=dtype)
        unit, out = rows.new_empty(rows.shape[0]), rows.new_empty((rows.shape[0], columns))
        found = launches.get(rows.shape[0])
        if found is None:
            keep = not is_capturing(rows.device)
            calls = integer_calls(rows, quantized, unit, out, weight, scale, bias, grid)
            found = calls[0].launcher(keep), calls[1].launcher(keep)
            if keep:
                launches[rows.shape[0]] = found
        quantize, multiply = found
        quantize(rows, quantized, unit)
        multiply(quantized, unit, out)
        return out

    return product


def _float(weights: LayerWeights, programs: int) -> InputProduct:
    """A product with the operand written out as one matrix, in the precision that PyTorch is set to."""
    # Transposed as a view: tf32 matrix units want both sides contiguous along the summed dimension.
    weight = _interleaved(weights.input.to_dense().flatten(0, 1), programs).contiguous().t()
    bias = None if weights.bias_input is None else _interleaved(weights.bias_input.reshape(-1), programs).to(weight.dtype)

    def product(rows: Tensor) -> Tensor:
        rows = rows.to(weight.dtype)
        return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)

    return product


def input_product(weights: LayerWeights, programs: int = 1) -> InputProduct:
    """The product of a layer's input, prepared once; the bits of the reference where quantized.

    Args:
        programs: in whose exchange order each gate's channels are to be; 1 for natural order.
    """
    if isinstance(weights.input, BlockDiagonalOperand):
        blocks = weights.input.blocks
        if not weights.quantized:
            return _float(weights, programs)
        if is_integer(blocks, weights.x) and blocks.values.shape[1] == 1:
            return _integer(weights, programs)
    reference = OperandProduct(weights.input, weights.x, weights.mid_input)

    def product(rows: Tensor) -> Tensor:
        out = reference(rows)
        if weights.bias_input is not None:
            out = out + weights.bias_input
        out = out if programs == 1 else transposed(out, programs)
        return out.flatten(1)

    return product
