"""Checkpoints of quantized models in transformers."""

from .quantization_config import GruQatQuantizationConfig
from .quantizer import GruQatHfQuantizer
from .registration import register

__all__ = ["GruQatHfQuantizer", "GruQatQuantizationConfig", "register"]
