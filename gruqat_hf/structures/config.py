"""Which structure a weight has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Which options a kind reads, with their defaults; every other option must be left out.
_OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "diagonal": {},
    "blockdiag": {"nblocks": 4},
    "monarch": {"nblocks": 4, "per_gate": False},
    "butterfly": {"factor_pairs": 1},
    "circulant": {},
    "ldr": {"rank": 1},
}


@dataclass(frozen=True)
class StructureConfig:
    """How a weight matrix is parameterised.

    Args:
        kind: "dense", "diagonal", "blockdiag", "monarch", "butterfly", "circulant", "ldr", or the name of a structure that was
            added with :func:`gruqat_hf.structures.register_structure`.
        nblocks: number of diagonal blocks (blockdiag, monarch); must divide both sides of the matrix. Default 4.
        per_gate: monarch: give each gate a first factor of its own instead of one shared by the three. Default False.
        factor_pairs: butterfly: how many butterflies of log2(size) stages are multiplied. Default 1.
        rank: ldr: displacement rank. Default 1.

    Raises:
        ValueError: unknown kind, an option out of range, or one that the kind does not read.
    """

    kind: str = "dense"
    nblocks: int | None = None
    per_gate: bool | None = None
    factor_pairs: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _OPTIONS:
            raise ValueError(f"StructureConfig.kind is {self.kind!r}; known kinds: {', '.join(sorted(_OPTIONS))}")
        defaults = _OPTIONS[self.kind]
        for option in ("nblocks", "per_gate", "factor_pairs", "rank"):
            value = getattr(self, option)
            if option not in defaults:
                if value is not None:
                    reads = ", ".join(defaults) or "no options"
                    raise ValueError(
                        f"StructureConfig.{option}={value!r} has no meaning for kind {self.kind!r}, which reads {reads}"
                    )
            elif value is None:
                object.__setattr__(self, option, defaults[option])
            elif option == "per_gate":
                if not isinstance(value, bool):
                    raise ValueError(f"StructureConfig.per_gate must be True or False, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"StructureConfig.{option} must be an integer of at least 1, got {value!r}")

    @classmethod
    def of(cls, value: StructureConfig | Mapping[str, Any] | str | None) -> StructureConfig:
        """A config from itself, its dict or a kind's name; None is dense.

        Raises:
            ValueError: a dict with unknown fields, or another type.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(kind=value)
        if isinstance(value, Mapping):
            known = {field.name for field in fields(cls)}
            if unknown := sorted(set(value) - known):
                raise ValueError(f"StructureConfig has no field {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
            return cls(**value)
        raise ValueError(f"a structure is a StructureConfig, its dict or a kind's name, got {type(value).__name__}: {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields that the kind reads, as JSON types."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def add_kind(kind: str, options: Mapping[str, Any]) -> None:
    """Make ``kind`` known to :class:`StructureConfig` with the options it reads and their defaults."""
    _OPTIONS[kind] = dict(options)
