"""Makes transformers' Auto classes, its quantizer dispatch and the remote code of checkpoints know this package."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..models import (
    GruQatConfig,
    GruQatForAudioClassification,
    GruQatForAudioFrameClassification,
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatForTimeSeriesPrediction,
    GruQatForTokenClassification,
    GruQatModel,
    GruQatPreTrainedModel,
)
from ..sharing import shim
from .quantization_config import GruQatQuantizationConfig
from .quantizer import GruQatHfQuantizer

#: Every model class, by the Auto class that finds it; the package itself exports each. A new model is a new line here.
MODELS: dict[type, type[GruQatPreTrainedModel]] = {
    AutoModel: GruQatModel,
    AutoModelForAudioClassification: GruQatForAudioClassification,
    AutoModelForAudioFrameClassification: GruQatForAudioFrameClassification,
    AutoModelForCausalLM: GruQatForCausalLM,
    AutoModelForSequenceClassification: GruQatForSequenceClassification,
    AutoModelForTimeSeriesPrediction: GruQatForTimeSeriesPrediction,
    AutoModelForTokenClassification: GruQatForTokenClassification,
}


def register() -> None:
    """Register everything; calling it again changes nothing."""
    AutoConfig.register(GruQatConfig.model_type, GruQatConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(GruQatConfig, model_class, exist_ok=True)
    shim.AUTO_CLASSES["AutoConfig"] = GruQatConfig.__name__
    shim.AUTO_CLASSES.update({auto_class.__name__: model_class.__name__ for auto_class, model_class in MODELS.items()})
    # Set rather than registered: register_quantizer() refuses a second call.
    AUTO_QUANTIZATION_CONFIG_MAPPING["gruqat"] = GruQatQuantizationConfig
    AUTO_QUANTIZER_MAPPING["gruqat"] = GruQatHfQuantizer
