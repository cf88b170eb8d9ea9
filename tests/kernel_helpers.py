"""What the tests of kernel families share: scans with random weights, and a family's kernels against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gruqat_hf.operands import BlockDiagonalOperand, Factor, MonarchOperand, Operand
from gruqat_hf.quantization import Grid
from gruqat_hf.scan import ScanGrids, ScanInputs, scan_reference
from gruqat_hf.scan.spec import ScanSpec
from gruqat_hf.scan.triton.device import INTERPRETED
from gruqat_hf.scan.triton.family import ScanGradients, kernels
from gruqat_hf.scan.triton.precision import spec_of


def skip_unless_kernels_run(device: torch.device) -> None:
    """Kernels run on the CPU in Triton's interpreter alone, and in it nowhere else."""
    pytest.importorskip("triton")
    if INTERPRETED != (device.type == "cpu"):
        pytest.skip("set TRITON_INTERPRET=1 for kernels on the CPU, and unset it for those on a GPU: NOT TESTED here")


def skip_unless_hopper() -> None:
    """For tests marked gpu, which need any GPU."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0, and this machine has none: NOT TESTED here")


@dataclass(frozen=True)
class Case:
    """A scan to try. ``second`` is ``(l, s)`` of a monarch's second factor; None takes that of the first."""

    steps: int
    rows: int
    blocks: int
    size: int
    quantized: bool = False
    groups: int = 1
    per_gate: bool = False
    per_channel: bool = False
    masked: bool = False
    reverse: bool = False
    bias: bool = True
    second: tuple[int, int] | None = None
    h_scale: float = 1 / 127
    gates: bool = False
    affine: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, kind: str, device: torch.device) -> ScanInputs:
        """Inputs for a "dense" or "monarch" operand."""
        hidden, gates = self.blocks * self.size, 3 if self.per_gate else 1

        def factor(*shape: int) -> Factor:
            width = shape[-1] ** -0.5
            if not self.quantized:
                return Factor((torch.rand(shape, device=device) * 2 - 1) * width)
            most = 7 if self.affine else 127
            codes = torch.randint(-most, most + 1, shape, device=device).to(torch.int8)
            return Factor(codes, (torch.rand(*shape[:-1], self.groups, device=device) + 0.5) * width / most, most)

        operand: Operand
        if kind == "dense":
            operand = BlockDiagonalOperand(factor(3, self.blocks, self.size, self.size))
        else:
            count, size = self.second or (self.blocks, self.size)
            operand = MonarchOperand(factor(gates, self.blocks, self.size, self.size), factor(3, count, size, size))
        grids = ScanGrids()
        if self.quantized:
            wiggle = torch.rand(hidden if self.per_channel else 1, device=device) * 0.1 + 1
            mid = (torch.rand(gates, 1, 1, device=device) * 0.2 + 1) * 1.5 / 127
            grids = ScanGrids(
                h=self._h_grid(device),
                mid=None if kind == "dense" else Grid.build(mid, None, -127, 127),
                gates=self._gates_grid(hidden, device) if self.gates else None,
                state=Grid.build(wiggle / 32767, None, -32767, 32767),
            )
        return ScanInputs(
            gi=torch.randn(self.steps, self.rows, 3, hidden, device=device).to(self.dtype),
            h0=(torch.rand(self.rows, hidden, device=device) * 2 - 1).to(self.dtype),
            operand=operand,
            bias=torch.randn(3, hidden, device=device) * 0.3 if self.bias else None,
            grids=grids,
            mask=torch.rand(self.steps, self.rows, device=device) > 0.3 if self.masked else None,
            reverse=self.reverse,
            quantized=self.quantized,
        )

    def _h_grid(self, device: torch.device) -> Grid:
        """Of 8 bits; affine: codes less the zero point are more than a byte, and weights have 4 bits, so that sums stay exact."""
        scale = torch.full((1,), self.h_scale, device=device)
        if not self.affine:
            return Grid.build(scale, None, -127, 127)
        return Grid.build(scale, torch.full((1,), 20, dtype=torch.int32, device=device), -128, 127)

    def _gates_grid(self, hidden: int, device: torch.device) -> Grid:
        """Of 8 bits, affine, with values beyond; its scales by channel or one for all."""
        scale = (torch.rand((3, hidden) if self.per_channel else (1, 1), device=device) * 0.1 + 1) * 2 / 127
        return Grid.build(scale, torch.full_like(scale, 20, dtype=torch.int32), -128, 127)


@dataclass
class Run:
    """A family's own results; outputs start as NaN, so that a value left out is seen."""

    family: str
    inputs: ScanInputs
    spec: ScanSpec
    h0: Tensor
    states: Tensor
    gates: Tensor

    @classmethod
    def of(cls, family: str, inputs: ScanInputs) -> Run:
        steps, rows, _, hidden = inputs.gi.shape
        spec, state = spec_of(inputs), inputs.grids.state
        dtype = torch.float32 if inputs.quantized else inputs.gi.dtype
        run = cls(
            family,
            inputs,
            spec,
            inputs.h0 if state is None else state.round_trip(inputs.h0),
            inputs.gi.new_full((steps, rows, hidden), float("nan"), dtype=dtype),
            inputs.gi.new_full((steps, rows, 4, hidden), float("nan"), dtype=spec.gates_dtype),
        )
        run.forward()
        return run

    @property
    def _mask(self) -> Tensor | None:
        return None if self.inputs.mask is None else self.inputs.mask.view(torch.uint8)

    def module(self, direction: str) -> ModuleType:
        return kernels(self.family, direction)

    @torch.no_grad()
    def forward(self) -> Tensor:
        module, inputs = self.module("forward"), self.inputs
        module.forward(module.prepare(self.spec), inputs.gi, self.h0, self._mask, inputs.reverse, self.states, self.gates)
        return self.states

    @torch.no_grad()
    def backward(self, dstates: Tensor, dlast: Tensor, want_adjoint: bool = False, want_weights: bool = False) -> ScanGradients:
        module, inputs = self.module("backward"), self.inputs
        return module.backward(
            module.prepare(self.spec),
            inputs.gi,
            self.h0,
            self.states,
            self.gates,
            self._mask,
            inputs.reverse,
            dstates,
            dlast,
            want_adjoint,
            want_weights,
        )


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of ``wanted``, in float64; NaN where ``found`` has one."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def check_against_reference(
    family: str, inputs: ScanInputs, states_within: float, gradients_within: float, precision: str = "high"
) -> None:
    """States and all gradients that the kernels give; a quantized scan's bits."""
    bias = torch.zeros(3, inputs.h0.shape[1], device=inputs.gi.device) if inputs.bias is None else inputs.bias
    factors = inputs.operand.factors
    values = [factor.values for factor in factors.values()]
    leaves = [tensor.float().clone().requires_grad_() for tensor in (inputs.gi, inputs.h0, bias, *values)]
    operand = inputs.operand.replace(
        {name: replace(factor, values=leaf) for (name, factor), leaf in zip(factors.items(), leaves[3:])}
    )
    with matmul_precision("highest"):
        states, last = scan_reference(replace(inputs, gi=leaves[0], h0=leaves[1], bias=leaves[2], operand=operand))
        dstates, dlast = torch.randn_like(states), torch.randn_like(last)
        dgi, dh0, dbias, *dvalues = torch.autograd.grad((states * dstates).sum() + (last * dlast).sum(), leaves)

    with matmul_precision(precision):
        run = Run.of(family, inputs)
        grads = dstates.to(run.states.dtype), dlast.to(run.states.dtype)
        found = run.backward(*grads, want_adjoint=True, want_weights=True)
    if inputs.quantized:
        assert torch.equal(run.states, states)
    assert distance(run.states, states) <= states_within
    found_dh0 = found.dh0
    if (grid := inputs.grids.state) is not None:  # the grid of h0 lies outside the kernel
        code = torch.round(inputs.h0 * grid.inv_scale)
        found_dh0 = torch.where((code >= grid.low) & (code <= grid.high), found_dh0, 0.0)
    assert found.adjoint is not None
    assert distance(found.dgi, dgi) <= gradients_within
    assert distance(found_dh0, dh0) <= gradients_within
    if found.dgh_n is not None:  # weights and bias are left to a product over all rows
        hidden = torch.stack([found.dgi[:, :, 0], found.dgi[:, :, 1], found.dgh_n], dim=2)
        assert distance(hidden.float().sum((0, 1)), dbias) <= gradients_within
    else:
        assert found.dbias is not None
        for gradient, wanted in zip((found.dfirst, found.dsecond), dvalues):
            assert gradient is not None and distance(gradient, wanted) <= gradients_within
    if found.dbias is not None:
        assert distance(found.dbias, dbias) <= gradients_within
    if found.dbias_input is not None:
        assert distance(found.dbias_input, dgi.sum((0, 1))) <= gradients_within
    if inputs.mask is not None:
        assert not found.adjoint[~inputs.mask].any()
    assert found.dgi.dtype == inputs.gi.dtype and found.dh0.dtype == inputs.h0.dtype
