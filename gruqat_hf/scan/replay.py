"""What the backward pass computes over all rows of a finished scan at once: gates again, and gradients of weights and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic.gates import portable_sigmoid, portable_tanh
from ..operands import Factor
from .product import OperandProduct
from .reference import gru_step
from .spec import MOST_MARKED, ScanSpec, SpecTensors, flatten, is_integer, restore

#: Values of a gate that recomputing holds at a time.
_CHUNK = 1 << 24


def before_steps(states: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """The state before each step, ``[T, B, H]``."""
    h0 = h0.to(states.dtype).unsqueeze(0)
    return torch.cat([states[1:], h0]) if reverse else torch.cat([h0, states[:-1]])


def recompute_gates(
    spec: ScanSpec, gi: Tensor, h0: Tensor, states: Tensor, reverse: bool, gates: Tensor, packs: bool = False
) -> None:
    """Fill ``gates`` ``[T, B, 4, H]`` as forward kernels do: r, z, n and hn, marked where a grid clipped, see ``MOST_MARKED``.

    Args:
        packs: write 16 bits a value, the four of a channel together: r, z and n as integers of 1/32767, hn as fp16.
    """
    steps, rows, _, hidden = gi.shape
    product = OperandProduct(spec.operand, spec.grids.h, spec.grids.mid)
    sigmoid, tanh = (portable_sigmoid, portable_tanh) if spec.quantized else (torch.sigmoid, torch.tanh)
    before = before_steps(states, h0, reverse)
    for start in range(0, steps, max(1, _CHUNK // (rows * hidden))):
        part = slice(start, start + max(1, _CHUNK // (rows * hidden)))
        h = before[part].flatten(0, 1)
        x = gi[part].flatten(0, 1)
        gh = product(h)
        if spec.bias is not None:
            gh = gh + spec.bias
        rz_in, hn = x[:, :2] + gh[:, :2], gh[:, 2]
        if (grid := spec.grids.gates) is None:
            r, z = sigmoid(rz_in).unbind(1)
            n = tanh(x[:, 2] + r * hn)
            new = (1.0 - z) * n + z * h
        else:
            rz_grid, n_grid = grid.gates(0, 2), grid.gates(2, 3)
            r, z = sigmoid(rz_grid.round_trip(rz_in)).unbind(1)
            n_in = x[:, 2] + r * hn
            n = tanh(n_grid.round_trip(n_in))
            new = (1.0 - z) * n + z * h
            clips_r, clips_z = rz_grid.clips(rz_in).unbind(1)
            r, z = torch.where(clips_r, -r, r), torch.where(clips_z & (z < MOST_MARKED), -z, z)
            hn = torch.where(n_grid.clips(n_in), torch.inf, hn)
        if (grid := spec.grids.state) is not None:
            code = torch.round(new * grid.inv_scale)
            z = torch.where((code >= grid.low) & (code <= grid.high), z, -1.0)
        if packs:
            fixed = [torch.round(value * 32767.0).to(torch.int16) for value in (r, z, n)]
            packed = torch.stack([*fixed, hn.to(torch.float16).view(torch.int16)], dim=-1)
            gates.view(torch.int16).view(steps, rows, hidden, 4)[part] = packed.view(-1, rows, hidden, 4)
        else:
            gates[part] = torch.stack([r, z, n, hn], dim=1).view(-1, rows, 4, hidden)


def _leaves(spec: ScanSpec, wanted: SpecTensors) -> tuple[ScanSpec, list[Tensor | None]]:
    """The spec with the wanted tensors as leaves of a new graph, and these leaves."""
    tensors, limits = flatten(spec)
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(bool(want) and tensor.is_floating_point())
        for tensor, want in zip(tensors, wanted)
    ]
    return restore(SpecTensors(*leaves), limits, spec.quantized, spec.exact), leaves


def _gradients(output: Tensor, leaves: list[Tensor | None], grad: Tensor) -> SpecTensors:
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    return SpecTensors(*(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves))


def replay_step(
    spec: ScanSpec, wanted: SpecTensors, gi: Tensor, h0: Tensor, states: Tensor, reverse: bool, adjoint: Tensor
) -> SpecTensors:
    """Gradients of weights, bias and scales: every step once more, all in one batch, against the gradient of its output.

    Args:
        adjoint: ``[T, B, H]``, zero at padded steps.
    """
    before = before_steps(states, h0, reverse).flatten(0, 1)
    with torch.enable_grad():
        spec, leaves = _leaves(spec, wanted)
        product = OperandProduct(spec.operand, spec.grids.h, spec.grids.mid)
        out = gru_step(gi.flatten(0, 1), before, product, spec.bias, spec.grids, spec.quantized)
        return _gradients(out, leaves, adjoint.flatten(0, 1))


def replay_product(
    spec: ScanSpec,
    wanted: SpecTensors,
    h0: Tensor,
    states: Tensor,
    reverse: bool,
    dgi: Tensor,
    dgh_n: Tensor,
    dbias: Tensor | None = None,
    dbias_input: Tensor | None = None,
) -> SpecTensors:
    """Gradients of a block-diagonal operand's values and of the bias from those of the hidden product (``dgi`` of r and z,
    ``dgh_n``): matrix products over all rows, of tensors where they lie.

    Args:
        dbias: that of the bias, where it is known; else the sums are taken here.
        dbias_input: the sums of ``dgi`` over steps and rows, ``[3, H]``, where they are known.
    """
    (factor,) = spec.operand.factors.values()
    grid = spec.grids.h
    dtype = factor.values.dtype if factor.values.is_floating_point() else torch.float32  # frozen: the bias alone trains
    integer = is_integer(factor, grid)
    if dbias is None and wanted.bias:
        dbias = hidden_bias(dgi, dgh_n, dbias_input)
    dgi, dgh_n = dgi[:, :, :2].to(dtype), dgh_n.unsqueeze(2).to(dtype)
    # The state before a step: the step's before it, or h0.
    first, later, before = (-1, slice(0, -1), states[1:]) if reverse else (0, slice(1, None), states[:-1])
    result: Tensor | None = None
    for rows_of, h in ((later, before.flatten(0, 1)), (first, h0)):
        if grid is not None:
            h = grid.codes(h) if integer else grid.round_trip(h)
        h = h.to(dtype)
        parts = [d[rows_of].reshape(-1, *d.shape[2:]) for d in (dgi, dgh_n)]
        found = torch.cat([_outer_products(d, h, factor) for d in parts]) if wanted.first else None
        result = found if result is None or found is None else result.add_(found)
    if result is not None and factor.scale is not None:
        scale = grid.scale.reshape(-1, 1, 1, 1) * factor.scale if integer else factor.scale
        result = (result.unflatten(-1, (factor.groups, -1)) * scale.unsqueeze(-1)).flatten(-2)
    return SpecTensors(*(None,) * len(SpecTensors._fields))._replace(first=result, bias=dbias if wanted.bias else None)


def hidden_bias(dgi: Tensor, dgh_n: Tensor, dbias_input: Tensor | None) -> Tensor:
    """The gradient of the hidden bias, ``[3, H]``; that of the input's, where it is known, has two of its three rows."""
    if dbias_input is None:
        of_r_and_z = column_sums(dgi[:, :, :2].flatten(0, 1).flatten(1)).view(2, -1)
    else:
        of_r_and_z = dbias_input[:2]
    return torch.cat([of_r_and_z, column_sums(dgh_n.flatten(0, 1))[None]])


def _outer_products(d: Tensor, h: Tensor, factor: Factor) -> Tensor:
    """``[R, gates, H]`` with ``[R, H]``, summed over rows: ``[gates, blocks, out, in]``."""
    _, blocks, out, size = factor.values.shape
    if blocks == 1:
        return (d.flatten(1).t() @ h).view(-1, 1, out, size)
    h = h.unflatten(1, (blocks, size)).transpose(0, 1)
    return torch.stack([torch.bmm(gate.unflatten(1, (blocks, out)).permute(1, 2, 0), h) for gate in d.unbind(1)])


def column_sums(rows: Tensor) -> Tensor:
    """``rows.sum(0)`` in fp32 or better; of fp32 as a product with ones, which reads memory faster than the sum does."""
    # Autocast, under which a backward pass may run, would take the product in half precision.
    if rows.dtype != torch.float32 or torch.is_autocast_enabled(rows.device.type):
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))
