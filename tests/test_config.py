"""Import and the two configs."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import run_python, small_config
from transformers import AutoConfig

import gruqat_hf
from gruqat_hf import PRESETS, GruQatConfig, GruQatModel, GruQatQuantizationConfig, StructureConfig

pytestmark = pytest.mark.hf


class TestImport:
    def test_public_names(self):
        promised = [
            *("GruQatConfig", "GruQatModel", "GruQatForSequenceClassification", "GruQatQuantizationConfig"),
            *("StructureConfig", "QuantizerConfig", "QuantRecipe", "PRESETS", "GRUCell", "GRULayer"),
        ]
        assert set(promised) <= set(gruqat_hf.__all__)
        assert all(hasattr(gruqat_hf, name) for name in gruqat_hf.__all__)

    def test_is_quick_and_needs_no_triton(self):
        out = run_python(
            """
            import json, sys, time
            from transformers import AutoModelForSequenceClassification, PreTrainedModel
            before, start = set(sys.modules), time.process_time()
            import gruqat_hf
            seconds = time.process_time() - start
            import torch
            new = [name for name in set(sys.modules) - before if name.split(".")[0] == "triton"]
            print(json.dumps([seconds, new, torch.cuda.is_initialized()]))
            """
        )
        seconds, triton, cuda = json.loads(out.splitlines()[-1])
        assert seconds < 0.3
        assert triton == []
        assert not cuda

    def test_registering_twice_changes_nothing(self):
        from transformers import AutoModel
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        from gruqat_hf.hub import GruQatHfQuantizer, register

        register()
        assert AUTO_QUANTIZER_MAPPING["gruqat"] is GruQatHfQuantizer
        assert isinstance(AutoModel.from_config(small_config()), GruQatModel)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("hidden_size", 0),
            ("hidden_size", -4),
            ("hidden_size", 16.0),
            ("hidden_size", "16"),
            ("hidden_size", True),
            ("hidden_size", None),
            ("hidden_size", 10**12),
            ("input_size", 0),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", 10**9),
            ("bidirectional", 1),
            ("bias", "yes"),
            ("use_cache", None),
            ("dropout", 1.0),
            ("dropout", -0.1),
            ("dropout", "0.1"),
            ("dropout", float("nan")),
            ("classifier_dropout", 2),
            ("vocab_size", 0),
            ("num_labels", 0),
            ("num_labels", -1),
            ("dtype", "float31"),
            ("structure_hidden", "nonesuch"),
            ("structure_hidden", {"kind": "monarch", "nblocks": 5}),
            ("structure_hidden", {"kind": "monarch", "nblocks": 10**9}),
            ("structure_hidden", {"kind": "monarch", "blocks": 4}),
            ("structure_hidden", {"kind": ["dense"]}),
            ("structure_hidden", 3),
            ("structure_input", {"kind": "diagonal"}),
            ("quantization_config", "int8"),
        ],
    )
    def test_refuses_by_name(self, field, value):
        with pytest.raises(ValueError, match=f"GruQatConfig.{field.replace('num_labels', '(num_labels|id2label)')}"):
            small_config(**{field: value})

    def test_padding_token_must_be_in_the_vocabulary(self):
        with pytest.raises(ValueError, match="pad_token_id"):
            small_config(vocab_size=10, pad_token_id=10)

    def test_a_value_set_later_is_refused_when_a_model_is_built(self):
        config = small_config()
        config.hidden_size = -1
        with pytest.raises(ValueError, match="hidden_size"):
            GruQatModel(config)

    @pytest.mark.parametrize("given_as", [StructureConfig("blockdiag", nblocks=2), {"kind": "blockdiag", "nblocks": 2}])
    def test_structures_are_dicts_however_given(self, given_as):
        config = small_config(structure_hidden=given_as)
        assert config.structure_hidden == {"kind": "blockdiag", "nblocks": 2}
        assert config.hidden_structure == StructureConfig("blockdiag", nblocks=2)
        config.structure_hidden = "diagonal"
        assert config.structure_hidden == {"kind": "diagonal"}
        assert small_config(structure_hidden=None).structure_hidden == {"kind": "dense"}

    @settings(max_examples=30, deadline=None)
    @given(
        hidden=st.sampled_from([4, 8, 16]),
        layers=st.integers(1, 3),
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        dropout=st.floats(0, 0.99),
        kind=st.sampled_from(
            ["dense", "diagonal", "butterfly", "circulant", {"kind": "monarch", "nblocks": 2, "per_gate": True}]
        ),
        vocab=st.none() | st.integers(2, 50),
        labels=st.integers(1, 5),
        recipe=st.none() | st.sampled_from(sorted(PRESETS)),
    )
    def test_round_trips(self, tmp_path_factory, hidden, layers, flags, dropout, kind, vocab, labels, recipe):
        config = GruQatConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            bidirectional=flags[0],
            bias=flags[1],
            use_cache=flags[2],
            dropout=dropout,
            structure_hidden=kind,
            vocab_size=vocab,
            num_labels=labels,
        )
        if recipe is not None:
            config.quantization_config = GruQatQuantizationConfig(recipe)
        path = tmp_path_factory.mktemp("config")
        config.save_pretrained(path)
        loaded = AutoConfig.from_pretrained(path)
        for other in (loaded, copy.deepcopy(config), GruQatConfig.from_dict(config.to_dict())):
            ours, theirs = config.to_dict(), other.to_dict()
            assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
                k: v for k, v in theirs.items() if k != "_name_or_path"
            }
        assert json.loads(config.to_json_string())["structure_hidden"]["kind"] == config.hidden_structure.kind

    def test_fields_can_be_overridden_on_loading(self, tmp_path):
        small_config().save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path, structure_hidden="diagonal", num_labels=7)
        assert config.structure_hidden == {"kind": "diagonal"}
        assert config.num_labels == 7


class TestQuantizationConfig:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_round_trips(self, name):
        config = GruQatQuantizationConfig(name, state="frozen")
        again = GruQatQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert again.recipe == PRESETS[name]
        assert config != GruQatQuantizationConfig(name)
        assert dict(config) == config.to_dict() == GruQatQuantizationConfig(PRESETS[name], state="frozen").to_dict()
        assert config.get("quant_method") == "gruqat"
        assert config.get("load_in_8bit", False) is False
        assert copy.deepcopy(config) == config

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "recipe"),
            ({"recipe": "int7"}, "int7"),
            ({"recipe": {"h": {"bits": 8, "colour": 1}}}, "colour"),
            ({"recipe": {"h": {"bits": "eight"}}}, "bits"),
            ({"recipe": {"h": {"ema_decay": "much"}}}, "type|ema_decay"),
            ({"recipe": 8}, "recipe"),
            ({"recipe": "int8_hidden", "state": "float"}, "state"),
            ({"recipe": "int8_hidden", "state": None}, "state"),
            ({"recipe": "int8_hidden", "bits": 8}, "bits"),
            ({"recipe": "int8_hidden", "format_version": 2}, "upgrade"),
            ({"recipe": "int8_hidden", "format_version": "1"}, "format_version"),
            ({"recipe": "int8_hidden", "format_version": 0}, "format_version"),
            ({"recipe": "int8_hidden", "quant_method": "gptq"}, "quant_method"),
            ({"recipe": {"unknown": 1}, "format_version": 9, "later": True}, "upgrade"),
        ],
    )
    def test_refuses(self, fields, message):
        with pytest.raises(ValueError, match=message):
            GruQatQuantizationConfig.from_dict(fields)
