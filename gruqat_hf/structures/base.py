"""What every structure has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..operands import Operand
from .config import StructureConfig

_RECTANGULAR = "dense, blockdiag, monarch"

AnyOperand = TypeVar("AnyOperand", bound=Operand)


class Structure(nn.Module, ABC):
    """A weight matrix per gate, and how it is parameterised.

    A subclass says which parameters it has (:meth:`parameter_shapes`), how they start (:meth:`initial_parameters`) and which
    operand they make (:meth:`lower`); it refuses sizes it cannot have in :meth:`check_sizes`.

    Args:
        in_features: columns of each gate's matrix.
        out_features: rows of each gate's matrix.
        config: its kind and options.
        gates: how many matrices; 3 for a GRU (reset, update, new).
        device: of the parameters, "meta" included.
        dtype: of the parameters.

    Raises:
        ValueError: the structure cannot have these sizes; the message names ones that would work.
    """

    kind: ClassVar[str]
    #: Whether :meth:`load_operand` can set the parameters from an operand.
    invertible: ClassVar[bool] = False
    #: Whether the rows of a gate's operand are made of the same values, so that channel and group granularity mean gate.
    rows_share_values: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: StructureConfig | None = None,
        *,
        gates: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = StructureConfig(kind=self.kind) if config is None else config
        if config.kind != self.kind:
            raise ValueError(
                f"{type(self).__name__} is of kind {self.kind!r}, got a config of kind {config.kind!r}; call build_structure"
            )
        for name, size in (("in_features", in_features), ("out_features", out_features), ("gates", gates)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        self.check_sizes(in_features, out_features, config)
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.gates = gates
        for name, shape in self.parameter_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        """Refuse sizes that the structure cannot have.

        Raises:
            ValueError: naming the sizes or options that would work.
        """

    @abstractmethod
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""

    @abstractmethod
    def initial_parameters(self) -> dict[str, Tensor]:
        """Fresh random values for every parameter, by name, of its shape, dtype and device."""

    @abstractmethod
    def lower(self) -> Operand:
        """The float operand, of the parameters' dtype; ordinary PyTorch, so gradients reach the parameters."""

    def forward(self) -> Operand:
        """:meth:`lower`, as a call that module hooks see."""
        return self.lower()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in place."""
        with torch.no_grad():
            for name, values in self.initial_parameters().items():
                self.get_parameter(name).copy_(values)

    def load_operand(self, operand: Operand) -> None:
        """Set the parameters, in place, so that :meth:`lower` gives ``operand`` (its float values when it is quantized).

        Raises:
            ValueError: the structure is not invertible, or the operand is of another form or shape.
        """
        loaded = self.parameters_from(operand)
        for name, values in loaded.items():
            own = self.get_parameter(name)
            if values.shape != own.shape:
                raise ValueError(
                    f"operand gives {name} the shape {list(values.shape)}, "
                    f"but structure kind {self.kind!r} of {self.extra_repr()} has {list(own.shape)}"
                )
        with torch.no_grad():
            for name, values in loaded.items():
                self.get_parameter(name).copy_(values)

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        """The parameter values that make ``operand``, by name; every invertible structure has its own.

        Raises:
            ValueError: the structure is not invertible, or the operand is of another form.
        """
        raise ValueError(
            f"structure kind {self.kind!r} cannot be recovered from an operand; build a 'dense' structure and load "
            "operand.to_dense().unsqueeze(1) into its weight instead"
        )

    @classmethod
    def pack_codes(cls, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Integer codes by factor name, as the operand has them → what a checkpoint stores."""
        return dict(codes)

    @classmethod
    def unpack_codes(cls, stored: dict[str, Tensor], in_features: int) -> dict[str, Tensor]:
        """The inverse of :meth:`pack_codes` for an operand with ``in_features`` columns."""
        return dict(stored)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.config.to_dict().items() if name != "kind")
        return f"in_features={self.in_features}, out_features={self.out_features}, gates={self.gates}{options}"

    def uniform(self, name: str, bound: float) -> Tensor:
        """A draw from U(-bound, bound) for the parameter ``name``."""
        return torch.empty_like(self.get_parameter(name), requires_grad=False).uniform_(-bound, bound)

    def normal(self, name: str, std: float) -> Tensor:
        """A draw from N(0, std²) for the parameter ``name``."""
        return torch.empty_like(self.get_parameter(name), requires_grad=False).normal_(0.0, std)

    def expect(self, operand: Operand, form: type[AnyOperand]) -> AnyOperand:
        """``operand`` itself if it is of the given form.

        Raises:
            ValueError: it is of another.
        """
        if not isinstance(operand, form):
            raise ValueError(f"structure kind {self.kind!r} is loaded from a {form.__name__}, got {type(operand).__name__}")
        return operand


def require_square(kind: str, in_features: int, out_features: int, sizes: Iterable[int]) -> None:
    """Refuse in_features != out_features, naming ``sizes`` as those that would work."""
    if in_features != out_features:
        works = " or ".join(f"{size}x{size}" for size in dict.fromkeys(sizes))
        raise ValueError(
            f"structure kind {kind!r} needs in_features == out_features, got in_features={in_features}, "
            f"out_features={out_features}; {works} would work, and the kinds {_RECTANGULAR} accept in_features != out_features"
        )


def require_nblocks(kind: str, in_features: int, out_features: int, nblocks: int) -> None:
    """Refuse an ``nblocks`` that does not divide both sides, naming the ones that do."""
    if in_features % nblocks or out_features % nblocks:
        works = [n for n in range(1, min(in_features, out_features) + 1) if not in_features % n and not out_features % n]
        raise ValueError(
            f"StructureConfig.nblocks={nblocks} of kind {kind!r} must divide in_features={in_features} and "
            f"out_features={out_features}; nblocks that would work: {', '.join(map(str, works))}"
        )
