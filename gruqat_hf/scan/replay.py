"""What the backward pass computes over all rows of a finished scan at once: gates again, and gradients of weights and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic.gates import portable_sigmoid, portable_tanh
from .product import OperandProduct
from .reference import gru_step
from .spec import ScanSpec, SpecTensors, flatten, restore

#: Values of a gate that recomputing holds at a time.
_CHUNK = 1 << 24


def before_steps(states: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """The state before each step, ``[T, B, H]``."""
    h0 = h0.to(states.dtype).unsqueeze(0)
    return torch.cat([states[1:], h0]) if reverse else torch.cat([h0, states[:-1]])


def recompute_gates(
    spec: ScanSpec, gi: Tensor, h0: Tensor, states: Tensor, reverse: bool, gates: Tensor, packs: bool = False
) -> None:
    """Fill ``gates`` ``[T, B, 4, H]`` as forward kernels do: r, z, n and hn, z = -1 where the state was clipped.

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
        r, z = sigmoid(x[:, :2] + gh[:, :2]).unbind(1)
        hn = gh[:, 2]
        n = tanh(x[:, 2] + r * hn)
        if (grid := spec.grids.state) is not None:
            code = torch.round(((1.0 - z) * n + z * h) * grid.inv_scale)
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
    spec: ScanSpec, wanted: SpecTensors, h0: Tensor, states: Tensor, reverse: bool, dgi: Tensor, dgh_n: Tensor
) -> SpecTensors:
    """Gradients of weights and bias from those of the hidden product (``dgi`` of r and z, ``dgh_n``): one product of all rows."""
    dtype = next(iter(spec.operand.factors.values())).values.dtype
    dgh = torch.cat([dgi[:, :, :2], dgh_n.unsqueeze(2)], dim=2).flatten(0, 1).to(dtype)
    before = before_steps(states, h0, reverse).flatten(0, 1).to(dtype)
    with torch.enable_grad():
        spec, leaves = _leaves(spec, wanted._replace(bias=False))
        out = OperandProduct(spec.operand, spec.grids.h, spec.grids.mid)(before)
        found = _gradients(out, leaves, dgh)
    return found._replace(bias=dgh.sum(0) if wanted.bias else None)
