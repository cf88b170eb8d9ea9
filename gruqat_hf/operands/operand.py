"""What every operand has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .factor import Factor


class Operand(ABC):
    """A weight matrix per gate, in one of the three forms that scans multiply by.

    Subclasses are frozen dataclasses whose fields are :class:`Factor`; ``factor_names`` lists them in the order in which they
    act on the input.
    """

    factor_names: ClassVar[tuple[str, ...]]

    @property
    def factors(self) -> dict[str, Factor]:
        return {name: getattr(self, name) for name in self.factor_names}

    @property
    def is_quantized(self) -> bool:
        return any(factor.is_quantized for factor in self.factors.values())

    def replace(self, factors: Mapping[str, Factor]) -> Operand:
        """The same form of operand with other factors."""
        return type(self)(**factors)

    @property
    @abstractmethod
    def in_features(self) -> int: ...

    @property
    @abstractmethod
    def out_features(self) -> int: ...

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The float matrices ``[gates, out_features, in_features]`` that this operand multiplies by."""
