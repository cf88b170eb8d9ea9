"""transformers' own model tests on this package's classes; test_transformers_suite.py runs this file beside the tests it imports.

What a test here overrides is skipped with the reason why it does not apply.
"""

from __future__ import annotations

import copy
import unittest
from dataclasses import replace
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from gruqat_hf import PRESETS, GruQatConfig, GruQatQuantizationConfig, QuantizerConfig
from gruqat_hf.hub.registration import MODELS

from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

#: transformers' tests find out by name what a class computes: for its own models by these tables.
NAMES = {
    "MODEL_MAPPING_NAMES": "AutoModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "AutoModelForAudioClassification",
}
CLASSES = {auto.__name__: cls for auto, cls in MODELS.items()}
for table, auto_name in NAMES.items():
    getattr(modeling_auto, table)["gruqat"] = CLASSES[auto_name].__name__

# Nothing to calibrate, and nothing that depends on the rest of a batch.
RECIPE = replace(PRESETS["int8_state16"], x=QuantizerConfig(observer="fixed", scale=4 / 127), name=None)
TEXT = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
AUDIO = ("AutoModelForAudioClassification", "AutoModelForAudioFrameClassification")
SERIES = ("AutoModelForTimeSeriesPrediction",)


def in_state(cls: type, state: str) -> type:
    """``cls`` whose instances are born in ``state``; those that from_pretrained() builds, on meta, get there by the quantizer."""

    def __init__(self: Any, config: GruQatConfig) -> None:
        loading = torch.empty(0).device.type == "meta"
        cls.__init__(self, config if loading else copy.deepcopy(config))  # type: ignore[misc]
        if not loading:
            self.prepare_qat(RECIPE)
            if state == "frozen":
                self.freeze()

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": __name__})


class Tester:
    batch_size, seq_length, hidden_size, num_hidden_layers = 3, 7, 32, 2

    def __init__(self, inputs: str, state: str) -> None:
        self.inputs, self.state = inputs, state
        self.is_training = state != "frozen"

    def get_config(self) -> GruQatConfig:
        vocabulary = {"vocab_size": 99, "pad_token_id": 0} if self.inputs == "input_ids" else {}
        config = GruQatConfig(input_size=32, hidden_size=32, num_hidden_layers=2, num_labels=3, **vocabulary)
        if self.state != "float":
            config.quantization_config = GruQatQuantizationConfig(RECIPE, state=self.state)
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[GruQatConfig, dict[str, torch.Tensor]]:
        if self.inputs == "input_ids":
            return self.get_config(), {"input_ids": ids_tensor([3, 7], 99), "attention_mask": random_attention_mask([3, 7])}
        return self.get_config(), {self.inputs: floats_tensor([3, 7, 32])}


_CHECKPOINTING = "watches transformers' GradientCheckpointingLayer; here layers recompute their own scans: see test_training.py"
_PARTIAL = "loads a part of a checkpoint; one that is quantized is refused unless it is whole: see test_hf_hostile.py"


class Common(ModelTesterMixin):
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True
    inputs, state = "input_ids", "float"

    def setUp(self) -> None:
        self.model_tester = Tester(self.inputs, self.state)

    @unittest.skip(_CHECKPOINTING)
    def test_gradient_checkpointing_enable_disable(self) -> None: ...

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("AudioFrameClassification"):
            inputs["labels"] = torch.zeros(3, 7, dtype=torch.long)
        if return_labels and model_class.__name__.endswith("TimeSeriesPrediction"):
            inputs["future_values"] = torch.zeros(3, self.model_tester.get_config().prediction_length, 32)
        return inputs

    @unittest.skip(_CHECKPOINTING)
    def test_training_gradient_checkpointing(self) -> None: ...

    @unittest.skip(_CHECKPOINTING)
    def test_training_gradient_checkpointing_use_reentrant_false(self) -> None: ...

    @unittest.skip(_CHECKPOINTING)
    def test_training_gradient_checkpointing_use_reentrant_true(self) -> None: ...

    @unittest.skip("wants transformers' GenerationTesterMixin, which its sdist lacks; test_generation.py has tests of our own")
    def test_generation_tester_mixin_inheritance(self) -> None: ...


class FloatTextTest(Common, unittest.TestCase):
    all_model_classes = tuple(CLASSES[name] for name in TEXT)


# Those below are no children of Common: transformers' mixin copies all of its tests into each class derived from it, and a copy
# in one parent would go before what another parent overrides.


class Features:
    test_resize_embeddings = False

    @unittest.skip("takes features: there are no embeddings of ids")
    def test_model_get_set_embeddings(self) -> None: ...

    @unittest.skip("takes features: there are no embeddings of ids")
    def test_inputs_embeds_matches_input_ids(self) -> None: ...

    @unittest.skip("takes features: there are no embeddings of ids")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip("the first hidden state is the input, which has no gradient here")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...


class FloatAudioTest(Features, Common, unittest.TestCase):
    inputs = "input_values"
    all_model_classes = tuple(CLASSES[name] for name in AUDIO)


class FloatSeriesTest(Features, Common, unittest.TestCase):
    inputs = "past_values"
    all_model_classes = tuple(CLASSES[name] for name in SERIES)


class Quantized:
    @unittest.skip(_PARTIAL)
    def test_can_init_all_missing_weights(self) -> None: ...

    @unittest.skip(_PARTIAL)
    def test_model_weights_reload_no_missing_tied_weights(self) -> None: ...

    @unittest.skip(_PARTIAL)
    def test_load_with_mismatched_shapes(self) -> None: ...

    @unittest.skip("builds models on meta, where those of this suite leave their quantizers to from_pretrained()")
    def test_init_weights_can_init_buffers(self) -> None: ...

    @unittest.skip("a quantized head of another size than the config says is refused, as every quantized tensor is")
    def test_can_load_ignoring_mismatched_shapes(self) -> None: ...


class Frozen:
    test_resize_embeddings = False  # integers are not resized: refused with what to do instead

    @unittest.skip("there is no gradient through integers")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...

    @unittest.skip("looks for Parameters that are tied; tables of integers are buffers: see test_embedding_head.py")
    def test_tied_weights_keys(self) -> None: ...


class QatTextTest(Quantized, Common, unittest.TestCase):
    state = "qat"
    all_model_classes = tuple(in_state(CLASSES[name], "qat") for name in TEXT)

    @unittest.skip("sets an nn.Embedding and wants the very same back; in QAT it becomes one that rounds")
    def test_model_get_set_embeddings(self) -> None: ...


class QatSeriesTest(Quantized, Features, Common, unittest.TestCase):
    state, inputs = "qat", "past_values"
    all_model_classes = tuple(in_state(CLASSES[name], "qat") for name in SERIES)


class FrozenTextTest(Frozen, Quantized, Common, unittest.TestCase):
    state = "frozen"
    all_model_classes = tuple(in_state(CLASSES[name], "frozen") for name in TEXT)

    @unittest.skip("sets an nn.Embedding; a frozen one is integers and not replaced: refused with what to do instead")
    def test_model_get_set_embeddings(self) -> None: ...


class FrozenSeriesTest(Frozen, Quantized, Features, Common, unittest.TestCase):
    state, inputs = "frozen", "past_values"
    all_model_classes = tuple(in_state(CLASSES[name], "frozen") for name in SERIES)
