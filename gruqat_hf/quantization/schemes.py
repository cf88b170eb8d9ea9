"""Schemes by name: where a quantizer's scale comes from."""

from __future__ import annotations

from .fake_quantize import FakeQuantize
from .lsq import LearnedStepSize

_SCHEMES: dict[str, type[FakeQuantize]] = {"observed": FakeQuantize, "lsq": LearnedStepSize}


def register_scheme(name: str, cls: type[FakeQuantize]) -> type[FakeQuantize]:
    """Make ``QuantizerConfig(scheme=name)`` use ``cls``.

    Raises:
        ValueError: the name is taken by another class.
    """
    if _SCHEMES.setdefault(name, cls) is not cls:
        raise ValueError(f"scheme {name!r} is {_SCHEMES[name].__name__} already; choose another name")
    return cls


def scheme_class(name: str) -> type[FakeQuantize]:
    """The class of a scheme.

    Raises:
        ValueError: unknown name.
    """
    if name not in _SCHEMES:
        raise ValueError(f"QuantizerConfig.scheme is {name!r}; known: {', '.join(sorted(_SCHEMES))}")
    return _SCHEMES[name]
