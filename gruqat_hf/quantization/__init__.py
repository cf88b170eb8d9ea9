"""Grids, observers, fake-quantizers and the recipes that place them."""

from .config import MODEL_POINTS, POINTS, QuantizerConfig, QuantRecipe
from .fake_quantize import FakeQuantize
from .frozen import FrozenGrid
from .granularity import ScaleLayout
from .grid import Grid
from .lsq import LearnedStepSize
from .observers import Observer, register_observer
from .packing import pack_nibbles, unpack_nibbles
from .presets import PRESETS
from .schemes import register_scheme, scheme_class

__all__ = [
    "MODEL_POINTS",
    "POINTS",
    "PRESETS",
    "FakeQuantize",
    "FrozenGrid",
    "Grid",
    "LearnedStepSize",
    "Observer",
    "QuantRecipe",
    "QuantizerConfig",
    "ScaleLayout",
    "pack_nibbles",
    "register_observer",
    "register_scheme",
    "scheme_class",
    "unpack_nibbles",
]
