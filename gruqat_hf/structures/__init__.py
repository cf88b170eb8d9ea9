"""Structures: how a weight is parameterised; each lowers to one of the three operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch

from .base import Structure
from .blockdiag import BlockDiagonalStructure
from .butterfly import ButterflyStructure
from .circulant import CirculantStructure
from .config import StructureConfig, add_kind
from .dense import DenseStructure
from .diagonal import DiagonalStructure
from .ldr import LDRStructure
from .monarch import MonarchStructure

__all__ = [
    "BlockDiagonalStructure",
    "ButterflyStructure",
    "CirculantStructure",
    "DenseStructure",
    "DiagonalStructure",
    "LDRStructure",
    "MonarchStructure",
    "Structure",
    "StructureConfig",
    "build_structure",
    "register_structure",
    "structure_class",
]

_BUILT_IN: tuple[type[Structure], ...] = (
    DenseStructure,
    DiagonalStructure,
    BlockDiagonalStructure,
    MonarchStructure,
    ButterflyStructure,
    CirculantStructure,
    LDRStructure,
)
_CLASSES: dict[str, type[Structure]] = {cls.kind: cls for cls in _BUILT_IN}
_OPTIONS = ("nblocks", "per_gate", "factor_pairs", "rank")


def structure_class(config: StructureConfig | Mapping[str, Any] | str | None) -> type[Structure]:
    """The class that a config's kind names.

    Raises:
        ValueError: no valid config.
    """
    return _CLASSES[StructureConfig.of(config).kind]


def build_structure(
    config: StructureConfig | Mapping[str, Any] | str | None,
    in_features: int,
    out_features: int,
    *,
    gates: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Structure:
    """A structure of the configured kind with freshly drawn parameters.

    Args:
        config: a StructureConfig, its dict or a kind's name; None is dense.
        in_features: columns of each gate's matrix.
        out_features: rows of each gate's matrix.
        gates: how many matrices.
        device: of the parameters, "meta" included.
        dtype: of the parameters.

    Raises:
        ValueError: no valid config, or sizes that the kind cannot have.
    """
    config = StructureConfig.of(config)
    return structure_class(config)(in_features, out_features, config, gates=gates, device=device, dtype=dtype)


@overload
def register_structure(cls: type[Structure], options: Mapping[str, Any] | None = None) -> type[Structure]: ...
@overload
def register_structure(
    cls: None = None, options: Mapping[str, Any] | None = None
) -> Callable[[type[Structure]], type[Structure]]: ...
def register_structure(cls=None, options=None):
    """Make a structure of your own known by its ``kind``; a decorator, with or without ``options``.

    Args:
        cls: a subclass of :class:`Structure` that defines ``kind``, ``parameter_shapes``, ``initial_parameters`` and ``lower``.
        options: which options of :class:`StructureConfig` the kind reads, with their defaults, such as ``{"rank": 4}``.

    A process that loads a checkpoint of this kind must import the module that registers it first.

    Raises:
        ValueError: no such subclass, one that says ``invertible`` without ``parameters_from``, an option that StructureConfig
            lacks, or a kind that is taken.
    """
    if cls is None:
        return lambda given: register_structure(given, options)
    if not (isinstance(cls, type) and issubclass(cls, Structure)):
        raise ValueError(f"register_structure takes a subclass of Structure, got {cls!r}")
    kind = getattr(cls, "kind", None)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"{cls.__name__}.kind must be a name for StructureConfig.kind, got {kind!r}")
    if cls.invertible and cls.parameters_from is Structure.parameters_from:
        raise ValueError(f"{cls.__name__}.invertible is True, so it must define parameters_from(operand); or leave it False")
    if unknown := sorted(set(options or {}) - set(_OPTIONS)):
        raise ValueError(f"register_structure options {', '.join(unknown)} are none of StructureConfig's: {', '.join(_OPTIONS)}")
    taken = _CLASSES.get(kind)
    # A notebook cell or a reloaded module defines the same class again; that one replaces itself.
    if taken is not None and (taken in _BUILT_IN or _full_name(taken) != _full_name(cls)):
        raise ValueError(f"structure kind {kind!r} is taken by {_full_name(taken)}; give {cls.__name__} another kind")
    add_kind(kind, options or {})
    _CLASSES[kind] = cls
    return cls


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
