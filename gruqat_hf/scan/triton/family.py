"""What every kernel family offers, and how a kernel is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import INTERPRETED


class ScanGradients(NamedTuple):
    """What a backward kernel leaves behind.

    Attributes:
        dgi: of the input product, ``[T, B, 3, H]``, dtype of gi. Those of the hidden product's r and z are the same.
        dh0: ``[B, H]``.
        dgh_n: of the hidden product's n, ``[T, B, H]``; from a family that does not sum weight gradients itself.
        adjoint: of each step's output, ``[T, B, H]`` fp32, zero at padded steps; None unless asked for.
        dfirst: of the operand's first or only factor, fp32 in the shape of its values; from a family that sums weight gradients.
        dbias: ``[3, H]`` fp32, likewise.
        dsecond: of a monarch operand's second factor, likewise.
    """

    dgi: Tensor
    dh0: Tensor
    dgh_n: Tensor | None = None
    adjoint: Tensor | None = None
    dfirst: Tensor | None = None
    dbias: Tensor | None = None
    dsecond: Tensor | None = None


@dataclass(frozen=True)
class KernelCall:
    """One launch.

    Attributes:
        kernel: a ``triton.jit`` function whose first parameters are ``io``, then ``static``, then the constexprs.
        io: tensors that change from call to call; None for an absent one.
        static: weights, grids and sizes.
        constants: constexpr parameters by name, in the order of the kernel's signature.
        portable: launch without contraction of multiply and add, as quantized states need.
        cooperative: programs wait for one another: start all of them together, or none.
    """

    kernel: Any
    grid: tuple[int, int, int]
    io: tuple[Tensor | None, ...]
    static: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    portable: bool = False
    cooperative: bool = False

    def run(self) -> Any:
        """Launch; gives the compiled kernel, None in the interpreter."""
        launch = self.kernel[self.grid]
        if INTERPRETED:
            return launch(*self.io, *self.static, **self.constants)
        options = {
            "num_warps": self.warps,
            "enable_fp_fusion": not self.portable,
            "launch_cooperative_grid": self.cooperative,
        }
        device = next(tensor for tensor in self.io if tensor is not None).device
        if device.index == torch.cuda.current_device():
            return launch(*self.io, *self.static, **self.constants, **options)
        with torch.cuda.device(device):
            return launch(*self.io, *self.static, **self.constants, **options)

    def compiled(self) -> Callable[..., None]:
        """Launch once to compile; then a way to launch with other ``io`` that looks at nothing again.

        They must be of the same types, on the same device, and :func:`aligned`.
        """
        if INTERPRETED:
            return lambda *io: replace(self, io=io).run()
        device = next(tensor for tensor in self.io if tensor is not None).device
        launch = self.run()[self.grid]
        tail = (*self.static, *self.constants.values())

        def run(*io: Tensor | None) -> None:
            if device.index == torch.cuda.current_device():
                launch(*io, *tail)
            else:
                with torch.cuda.device(device):
                    launch(*io, *tail)

        return run


def needs_operators(tensor: Tensor) -> bool:
    """Whether a compiler or an exporter is watching, so that kernels must be called through operators registered with PyTorch."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 16, as compiled kernels expect."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def kernels(family: str, direction: str) -> ModuleType:
    """The module ``<family>/<direction>.py``; imports triton."""
    from .choice import family_rules

    return import_module(f"{family_rules(family).__name__}.{direction}")
