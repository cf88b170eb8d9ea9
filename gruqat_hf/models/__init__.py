"""transformers models on the GRU stack."""

from .audio import GruQatForAudioClassification, GruQatForAudioFrameClassification
from .cache import GruQatCache
from .causal_lm import GruQatForCausalLM
from .configuration_gruqat import GruQatConfig
from .frames import GruQatForTokenClassification
from .modeling_gruqat import GruQatForSequenceClassification, GruQatModel, GruQatModelOutput
from .pretrained import GruQatPreTrainedModel
from .streaming import GruQatStream
from .time_series import GruQatForTimeSeriesPrediction, GruQatTimeSeriesPredictionOutput

__all__ = [
    "GruQatCache",
    "GruQatConfig",
    "GruQatForAudioClassification",
    "GruQatForAudioFrameClassification",
    "GruQatForCausalLM",
    "GruQatForSequenceClassification",
    "GruQatForTimeSeriesPrediction",
    "GruQatForTokenClassification",
    "GruQatModel",
    "GruQatModelOutput",
    "GruQatPreTrainedModel",
    "GruQatStream",
    "GruQatTimeSeriesPredictionOutput",
]
