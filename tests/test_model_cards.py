"""Model cards: what they say, where it comes from, and whose words they leave alone."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from model_helpers import KINDS, features, in_state, output_of, small_config, small_model
from transformers import AutoModelForSequenceClassification

from gruqat_hf import PRESETS, GruQatModel
from gruqat_hf.hub.registration import MODELS
from gruqat_hf.sharing import card as cards
from gruqat_hf.sharing.card import MARKER, model_card, pipeline_tag
from gruqat_hf.sharing.results import read_results

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from make_model_card import make_card  # noqa: E402

pytestmark = pytest.mark.hf

# Every field of the format.
RESULTS = {
    "format": 1,
    "name": "gru-test",
    "task": "sequence-classification",
    "license": "apache-2.0",
    "dataset": {
        "name": "A data set",
        "id": "someone/data",
        "config": "small",
        "split": "test",
        "revision": "abc",
        "description": "rows of numbers",
        "url": "https://example.org/data",
        "license": "CC0",
        "examples": {"train": 4321, "test": 1234},
        "language": "en",
    },
    "data_preparation": "numbers are divided by 8.",
    "training": {
        "command": "python scripts/train_qat.py --task test",
        "seed": 7,
        "float": {"epochs": 3, "learning_rate": 0.00625},
        "qat": {"epochs": 2},
    },
    "metrics": [
        {"type": "accuracy", "name": "accuracy", "values": {"float": 0.9625, "qat": 0.9525, "frozen": 0.9525}},
        {"type": "mse", "higher_is_better": False, "unit": "pixel²", "values": {"frozen": 0.0678}},
    ],
    "reference": {"name": "a dense float GRU", "metrics": {"accuracy": 0.9725}, "bytes": 45678, "parameters": 9876},
    "parameters": 6543,
    "bytes": {"float": 34567, "frozen": 23456},
    "bit_identical": {"QAT eval = frozen": True, "frozen = reloaded": True},
    "speed": [
        {"what": "batch 1", "value": 1357.25, "unit": "steps/s", "path": "reference", "machine": {"cpu": "A CPU", "threads": 1}}
    ],
    "date": "2026-01-02",
    "machine": {"cpu": "Another CPU", "cores": 2, "threads": 1, "system": "Linux"},
    "versions": {"torch": "2.13.0", "gruqat-hf": "9.8.7"},
    "limits": ["It knows nothing but rows."],
}
MINIMAL = {"format": 1, "task": "sequence-classification", "dataset": {"name": "A data set"}}
MINIMAL["metrics"] = [{"type": "accuracy", "values": {"frozen": 0.5}}]


def build(state="frozen", results=None, recipe="int8_state16", **fields):
    model = in_state(small_model(**{"structure_hidden": KINDS["monarch"], **fields}), state, recipe)
    return model_card(model, read_results(results) if results else None, location="user/gru-test")


@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_of_a_model_alone(state, kind):
    card = build(state, structure_hidden=KINDS[kind], bidirectional=kind == "ldr")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.eval_results is None
    assert {"gruqat", "gru", kind} <= set(card.data.tags)
    assert {"quantization", "int8", "int8_state16", state} & set(card.data.tags) == (
        set() if state == "float" else {"quantization", "int8", "int8_state16", state}
    )
    assert MARKER in card.text and kind in card.text
    for word in ("None", "undefined", "Undefined", "Results", "Speed", "Plots", "{{", "{%", "  |  |"):
        assert word not in card.text, word
    assert "licence of these weights has not been stated" in card.text
    assert ("both directions" in card.text) == (kind == "ldr")


def test_of_results():
    card = build(results=RESULTS)
    metadata = ModelCard(str(card)).data
    assert metadata.license == "apache-2.0" and metadata.datasets == ["someone/data"] and metadata.language == "en"
    assert metadata.metrics == ["accuracy", "mse"] and metadata.model_name == "gru-test"
    accuracy, mse = metadata.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, mse.metric_value) == ("accuracy", 0.9525, 0.0678)
    assert (accuracy.dataset_type, accuracy.dataset_config, accuracy.dataset_split) == ("someone/data", "small", "test")
    assert accuracy.task_type == metadata.pipeline_tag == "tabular-classification"
    assert "| accuracy | 0.9625 | 0.9525 | 0.9525 | -0.01 |" in card.text
    assert "| mse (pixel²) (lower is better) | | | 0.06780 | |" in re.sub(" +", " ", card.text)
    numbers = ("1,234 examples", "0.9725", "45,678", "9,876", "6,543", "34,567", "1,357 steps/s", "0.00625", "seed 7")
    words = ("A CPU, 1 thread |", "2026-01-02", "train_qat.py --task test", "gruqat-hf 9.8.7", "by 8", "but rows", "CC0")
    for shown in numbers + words:
        assert shown in card.text, shown
    assert card.text.count("bit-identical") == 2 and "None" not in card.text


def test_what_is_not_known_is_left_out():
    card = build(results=MINIMAL)
    assert "| accuracy | 0.5000 |  |" in card.text
    for heading in ("## Speed", "## Training", "## Plots"):
        assert heading not in card.text
    assert "None" not in card.text and card.data.eval_results[0].dataset_type == "a-data-set"
    # The numbers of another state are not this checkpoint's.
    assert build("float", results=MINIMAL).data.eval_results is None


def test_bits_are_promised_only_where_they_are_equal():
    promise = "same bits on every machine"
    assert promise in build().text
    for recipe in ("int8_dynamic", "int8_hidden"):
        assert promise not in build(recipe=recipe).text
    assert "depend on what else is in the batch" in build(recipe="int8_dynamic").text


def test_tasks():
    assert pipeline_tag(small_model()) == "tabular-classification"
    assert pipeline_tag(small_model(num_labels=1)) == "tabular-regression"
    assert pipeline_tag(small_model(vocab_size=20)) == "text-classification"
    assert pipeline_tag(small_model(head=False)) == "feature-extraction"
    assert {auto_class.__name__ for auto_class in MODELS} <= cards._TASKS.keys()
    assert build(results={**MINIMAL, "pipeline_tag": "image-classification"}).data.pipeline_tag == "image-classification"

    class Mine(GruQatModel):
        pass

    assert pipeline_tag(Mine(small_config())) == "feature-extraction"


@pytest.mark.parametrize("auto_class", MODELS, ids=lambda auto_class: auto_class.__name__)
def test_the_code_in_the_card_runs(tmp_path, auto_class, capsys):
    cls = MODELS[auto_class]
    model = cls(small_config(**({"vocab_size": 20} if cls.__name__.endswith("ForCausalLM") else {})))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert auto_class.__name__ in code
    exec(code.replace(f"path/to/{tmp_path.name}", str(tmp_path)), {})
    assert capsys.readouterr().out.startswith("torch.Size([1, ")


def _without(*path):
    data = copy.deepcopy(RESULTS)
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return data


@pytest.mark.parametrize(
    "damaged, message",
    [
        ([], "format must be 1"),
        ({**RESULTS, "format": 2}, "format must be 1, got 2"),
        (_without("task"), "task must be"),
        (_without("dataset", "name"), "dataset must be"),
        ({**RESULTS, "metrics": []}, "metrics must be"),
        ({**RESULTS, "metrics": [{"values": {"float": 1}}]}, "type such as 'accuracy'"),
        ({**RESULTS, "metrics": [{"type": "mse"}]}, "mse must have values"),
        ({**RESULTS, "metrics": [{"type": "mse", "values": {"int8": 1.0}}]}, "'int8'; states are"),
        ({**RESULTS, "metrics": [{"type": "mse", "values": {"qat": float("nan")}}]}, "finite number in state qat"),
        ({**RESULTS, "metrics": [{"type": "mse", "values": {"qat": "0.1"}}]}, "finite number"),
        ({**RESULTS, "plots": [{"caption": "x"}]}, "plot must be"),
        ({**RESULTS, "plots": [{"path": "missing.png"}]}, r"missing.png do not exist"),
        ({**RESULTS, "config": {"hidden_size": 99}}, "hidden_size=99, this model 16"),
        ({**RESULTS, "config": {"structure_hidden": {"kind": "dense"}}}, "structure_hidden"),
    ],
)
def test_damaged_results_are_refused_before_anything_is_saved(tmp_path, damaged, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=message):
        small_model(structure_hidden=KINDS["monarch"]).save_pretrained(tmp_path / "model", results=path)
    assert not (tmp_path / "model").exists()
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_results(path)


def test_results_of_another_recipe_are_refused(tmp_path):
    model = in_state(small_model(), "frozen")
    with pytest.raises(ValueError, match=r"another recipe \(int4_per_group_64\) than this model's \(int8_state16\)"):
        model.save_pretrained(tmp_path / "model", results={**RESULTS, "recipe": "int4_per_group_64"})
    model.save_pretrained(tmp_path / "model", results={**RESULTS, "recipe": "int8_state16"})


class TestSaving:
    def test_results_and_plots_go_along(self, tmp_path):
        source = tmp_path / "training"
        (source / "figures").mkdir(parents=True)
        (source / "figures" / "loss.png").write_bytes(b"image")
        plots = [{"path": "figures/loss.png", "caption": "The loss"}]
        (source / "results.json").write_text(json.dumps({**RESULTS, "plots": plots}))
        model = in_state(small_model(), "frozen")
        model.save_pretrained(tmp_path / "model", results=source / "results.json")
        text = (tmp_path / "model" / "README.md").read_text()
        assert "![The loss](loss.png)" in text and (tmp_path / "model" / "loss.png").read_bytes() == b"image"
        size = (tmp_path / "model" / "model.safetensors").stat().st_size
        assert f"| weights on disk | {size:,} |" in text
        # What was copied is results again, and saving in the same place with them changes nothing.
        before = {name: (tmp_path / "model" / name).read_bytes() for name in os.listdir(tmp_path / "model")}
        model.save_pretrained(tmp_path / "model", results=tmp_path / "model" / "results.json")
        assert before == {name: (tmp_path / "model" / name).read_bytes() for name in os.listdir(tmp_path / "model")}
        # Without them, the numbers of what may be other weights by now are gone.
        model.save_pretrained(tmp_path / "model")
        assert "0.9525" not in (tmp_path / "model" / "README.md").read_text()

    def test_what_a_person_wrote_stays(self, tmp_path):
        model, readme = small_model(), tmp_path / "README.md"
        model.save_pretrained(tmp_path)
        generated = readme.read_text()
        assert MARKER in generated
        model.prepare_qat("int8_state16").save_pretrained(tmp_path)
        assert readme.read_text() != generated
        edited = generated.replace(MARKER, "My words.")
        readme.write_text(edited)
        model.save_pretrained(tmp_path)
        assert readme.read_text() == edited

    def test_only_the_main_process_writes(self, tmp_path):
        small_model().save_pretrained(tmp_path, is_main_process=False)
        assert os.listdir(tmp_path) == []

    def test_weights_of_an_earlier_save_are_not_loaded(self, tmp_path):
        x = features()
        for seed, options in ((1, {}), (2, {"max_shard_size": "2KB"}), (3, {}), (4, {"max_shard_size": "4KB"})):
            model = small_model(seed)
            model.save_pretrained(tmp_path, **options)
            loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
            assert torch.allclose(output_of(loaded, x), output_of(model, x), atol=1e-6)
            assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()

    def test_tags_of_the_model(self, tmp_path):
        model = small_model()
        model.add_model_tags("mine")
        model.save_pretrained(tmp_path)
        assert "mine" in ModelCard.load(tmp_path / "README.md").data.tags


PUBLISHED = sorted((ROOT / "model_cards").glob("*/results.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_cards_are_made_from_their_results(path):
    assert (path.parent / "README.md").read_text(encoding="utf-8") == make_card(read_results(path)), (
        f"run python scripts/make_model_card.py {path.relative_to(ROOT)}"
    )


def test_the_template_is_the_package_s():
    assert (ROOT / "model_cards" / "template.md").read_text() == cards.TEMPLATE.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/results.json")), ids=lambda path: path.parent.name)
def test_a_recipe_with_a_presets_name_is_that_preset(path):
    """A recipe's name takes no part in comparisons, so that a preset which changed would leave its cards behind unseen."""
    recipe = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    assert recipe["name"] in PRESETS
    assert recipe == json.loads(json.dumps(PRESETS[recipe["name"]].to_dict()))
