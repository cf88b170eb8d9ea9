"""GRU cell, layer and stack, and their way from float over qat to frozen."""

from .cell import GRUCell
from .layer import GRULayer
from .lifecycle import LifecycleError, QuantState
from .stack import GRUStack
from .warmup import warm_up

__all__ = ["GRUCell", "GRULayer", "GRUStack", "LifecycleError", "QuantState", "warm_up"]
