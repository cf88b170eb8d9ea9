"""What every kernel family offers, and how a kernel is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
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
        dbias_input: of the input's bias, ``[3, H]`` fp32: dgi summed over steps and rows; from a kernel that sums it.
    """

    dgi: Tensor
    dh0: Tensor
    dgh_n: Tensor | None = None
    adjoint: Tensor | None = None
    dfirst: Tensor | None = None
    dbias: Tensor | None = None
    dsecond: Tensor | None = None
    dbias_input: Tensor | None = None


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
        registers: of a thread at most, if the compiler is not to weigh them against more programs on a processor; NVIDIA only.
    """

    kernel: Any
    grid: tuple[int, int, int]
    io: tuple[Tensor | None, ...]
    static: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    portable: bool = False
    cooperative: bool = False
    registers: int | None = None

    def run(self) -> None:
        """Launch; what was compiled for arguments of the same types is launched without being looked for in Triton again, which
        takes longer than a short scan."""
        if INTERPRETED:
            self._launch()
            return
        device = self._device()
        signature = (id(self.kernel), device.index, *self._options(), *map(_type_of, (*self.io, *self.static)))
        signature = (*signature, *self.constants.values())
        if device.index == torch.cuda.current_device():
            self._run_compiled(signature)
        else:
            with torch.cuda.device(device):
                self._run_compiled(signature)

    def _run_compiled(self, signature: tuple[Any, ...]) -> None:
        compiled = _COMPILED.get(signature)
        if compiled is None:
            _refuse_specialized(self.kernel, len(self.io), self.static)
            _COMPILED[signature] = self._launch()
        else:
            compiled[self.grid](*self.io, *self.static, *self.constants.values())

    def _device(self) -> torch.device:
        return next(tensor for tensor in self.io if tensor is not None).device

    def _options(self) -> tuple[Any, ...]:
        """What else a kernel is compiled for."""
        return self.warps, self.portable, self.cooperative, self.registers

    def _launch(self) -> Any:
        """Launch through Triton, which compiles if it has to; gives the compiled kernel, None in the interpreter."""
        launch = self.kernel[self.grid]
        if INTERPRETED:
            return launch(*self.io, *self.static, **self.constants)
        options = {
            "num_warps": self.warps,
            "enable_fp_fusion": not self.portable,
            "launch_cooperative_grid": self.cooperative,
        }
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return launch(*self.io, *self.static, **self.constants, **options)

    def launcher(self, keep: bool) -> Callable[..., None]:
        """A way to launch with other ``io``. keep: :meth:`compiled`, quick, and launched once now; else by :meth:`run` each time,
        as a launch for nothing would be recorded into a CUDA graph."""
        return self.compiled() if keep else lambda *io: replace(self, io=io).run()

    def compiled(self) -> Callable[..., None]:
        """Launch once to compile; then a way to launch with other ``io`` that looks at nothing again.

        They must be of the same types, on the same device, and :func:`aligned`.
        """
        if INTERPRETED:
            return lambda *io: replace(self, io=io).run()
        device = self._device()
        with torch.cuda.device(device):
            launch = self._launch()[self.grid]
        tail = (*self.static, *self.constants.values())

        def run(*io: Tensor | None) -> None:
            if device.index == torch.cuda.current_device():
                launch(*io, *tail)
            else:
                with torch.cuda.device(device):
                    launch(*io, *tail)

        return run


_HIP = torch.version.hip is not None

#: Compiled kernels by the signatures of their launches.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def _type_of(value: Tensor | int | float | None) -> object:
    """What Triton compiles for: of a tensor its dtype and whether its address is a multiple of 16, of a number its type."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        # For AMD Triton addresses what is below 2 GB by 32 bits.
        return (value.dtype, aligned, value.untyped_storage().nbytes() < 1 << 31) if _HIP else (value.dtype, aligned)
    return type(value), isinstance(value, int) and value >= 1 << 31


def _refuse_specialized(kernel: Any, first: int, static: tuple[Any, ...]) -> None:
    """Refuse integers that Triton would compile a kernel anew for: signatures do not tell them apart."""
    for parameter, value in zip(kernel.params[first:], static):
        if isinstance(value, int) and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: parameter {parameter.name} must be named in do_not_specialize")


def needs_operators(tensor: Tensor) -> bool:
    """Whether a compiler or an exporter is watching, so that kernels must be called through operators registered with PyTorch."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 16, as compiled kernels expect."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def kernels(family: str, direction: str) -> ModuleType:
    """The module ``<family>/<direction>.py``; imports triton."""
    from .choice import family_rules

    return import_module(f"{family_rules(family).__name__}.{direction}")
