"""Quantized, structured GRUs for Hugging Face transformers.

Importing the package makes transformers' Auto classes know its models and its quantization method.
"""

from .hub import GruQatQuantizationConfig, register
from .layers import GRUCell, GRULayer, warm_up
from .models import (
    GruQatConfig,
    GruQatForAudioClassification,
    GruQatForAudioFrameClassification,
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatForTimeSeriesPrediction,
    GruQatForTokenClassification,
    GruQatModel,
)
from .quantization import PRESETS, QuantizerConfig, QuantRecipe
from .structures import StructureConfig

__all__ = [
    "PRESETS",
    "GRUCell",
    "GRULayer",
    "GruQatConfig",
    "GruQatForAudioClassification",
    "GruQatForAudioFrameClassification",
    "GruQatForCausalLM",
    "GruQatForSequenceClassification",
    "GruQatForTimeSeriesPrediction",
    "GruQatForTokenClassification",
    "GruQatModel",
    "GruQatQuantizationConfig",
    "QuantRecipe",
    "QuantizerConfig",
    "StructureConfig",
    "warm_up",
]

__version__ = "0.1.0"

register()
del register
