"""Checkpoints that load with trust_remote_code and no import of this package before."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hub_client import HubClient, RemoteError
from model_helpers import KINDS, features, in_state, small_config, small_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

import gruqat_hf
from gruqat_hf import GruQatConfig, GruQatForSequenceClassification, GruQatModel
from gruqat_hf.hub.registration import MODELS
from gruqat_hf.sharing import shim

pytestmark = pytest.mark.hf

STATES = ("float", "qat", "frozen")


def _model(cls, state):
    """A small model of any class, and an input for it."""
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 20} if cls.__name__.endswith("ForCausalLM") else {}
    model = cls(small_config(structure_hidden=KINDS["monarch"], **vocabulary)).eval()
    inputs = torch.randint(0, 20, (4, 6)) if vocabulary else features(seed=5)
    if state != "float":
        model.prepare_qat("int8_state16").calibrate([{model.main_input_name: inputs}], progress=False)
    return (model.freeze() if state == "frozen" else model), inputs


def _contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_checkpoint_names_every_class(tmp_path):
    small_model().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    registered = {
        name: auto._model_mapping[GruQatConfig].__name__
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and isinstance(auto, type) and GruQatConfig in auto._model_mapping
    }
    assert auto_map == {name: f"modeling_gruqat.{cls}" for name, cls in {"AutoConfig": "GruQatConfig", **registered}.items()}
    source = (tmp_path / "modeling_gruqat.py").read_text()
    for name in {"GruQatConfig", *registered.values()}:
        assert name in source and name in gruqat_hf.__all__
    GruQatConfig().save_pretrained(tmp_path / "config_only")
    assert _contents(tmp_path / "config_only").keys() == {"config.json", "modeling_gruqat.py"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A process that has not imported gruqat_hf."""
    client = HubClient("http://127.0.0.1:9", tmp_path_factory.mktemp("stranger") / "home", HF_HUB_OFFLINE="1")
    yield client
    client.close()


def test_without_the_package_the_error_names_it(stranger, tmp_path):
    small_model().prepare_qat("int8_state16").save_pretrained(tmp_path)
    with pytest.raises(RemoteError, match="pip install gruqat-hf") as missing:
        stranger.run(
            """
            import sys
            from transformers import AutoModel

            class Absent:
                def find_spec(self, name, path=None, target=None):
                    if name == "gruqat_hf":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, absent := Absent())
            try:
                AutoModel.from_pretrained(path, trust_remote_code=True)
            finally:
                sys.meta_path.remove(absent)
            """,
            path=str(tmp_path),
        )
    assert "ImportError" in missing.value.kinds


def test_without_trust_nothing_is_loaded(stranger, tmp_path):
    in_state(small_model(), "frozen").save_pretrained(tmp_path)
    with pytest.raises(RemoteError, match="trust_remote_code=True"):
        stranger.run("AutoModel.from_pretrained(path, trust_remote_code=False)", path=str(tmp_path))
    assert stranger.run("result = 'gruqat_hf' in sys.modules") is False


def test_every_class_in_every_state_loads_without_import_and_saves_again(stranger, tmp_path):
    expected = {}
    for auto_class, cls in MODELS.items():
        for state in STATES:
            name = f"{auto_class.__name__}-{state}"
            model, inputs = _model(cls, state)
            model.save_pretrained(tmp_path / name)
            with torch.no_grad():
                outputs = model(**{model.main_input_name: inputs})[0]
            expected[name] = outputs
            torch.save((model.main_input_name, inputs), tmp_path / f"{name}.pt")
    # The first that is loaded is quantized: transformers looks up its quantizer before it looks for the model's class.
    names = sorted(expected, key=lambda name: name.endswith("float"))
    code = """
    import transformers, torch
    result = ["gruqat_hf" in sys.modules]
    torch.set_num_threads(1)
    outputs = {}
    for name in names:
        auto_class = getattr(transformers, name.split("-")[0])
        field, inputs = torch.load(f"{path}/{name}.pt")
        first = auto_class.from_pretrained(f"{path}/{name}", trust_remote_code=True)
        first.save_pretrained(f"{path}/again/{name}")
        second = auto_class.from_pretrained(f"{path}/again/{name}", trust_remote_code=True)
        with torch.no_grad():
            outputs[name] = [model(**{field: inputs})[0] for model in (first, second)]
    torch.save(outputs, f"{path}/outputs.pt")
    result.append("gruqat_hf" in sys.modules)
    """
    assert stranger.run(code, names=names, path=str(tmp_path)) == [False, True]
    outputs = torch.load(tmp_path / "outputs.pt")
    for name, wanted in expected.items():
        for got in outputs[name]:
            assert torch.allclose(got, wanted, atol=1e-6) if name.endswith("float") else torch.equal(got, wanted), name
        before, after = _contents(tmp_path / name), _contents(tmp_path / "again" / name)
        assert before == after, name


class TestShim:
    def _run(self, monkeypatch, package):
        monkeypatch.setitem(__import__("sys").modules, "gruqat_hf", package)
        exec(shim._TEMPLATE.format(names="GruQatModel"), {})

    def test_a_package_that_is_too_old(self, monkeypatch):
        with pytest.raises(ImportError, match="pip install -U gruqat-hf"):
            self._run(monkeypatch, type(os)("gruqat_hf"))

    def test_a_package_that_cannot_be_imported_for_another_reason(self, tmp_path, monkeypatch):
        package = tmp_path / "gruqat_hf"
        package.mkdir()
        (package / "__init__.py").write_text("import a_dependency_that_is_missing")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "gruqat_hf")
        with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
            exec(shim._TEMPLATE.format(names="GruQatModel"), {})


class TestAutoMap:
    def test_references_to_a_repository_are_not_carried_on(self):
        theirs = {"AutoModel": "user/repo--modeling_gruqat.GruQatModel", "AutoTokenizer": ["tokens.Fast", None]}
        assert shim.auto_map(theirs) == {**shim.auto_map(), "AutoTokenizer": ["tokens.Fast", None]}

    def test_other_code_is_left_alone(self):
        theirs = {"AutoModel": "user/repo--their_model.TheirModel"}
        assert shim.auto_map(theirs)["AutoModel"] == theirs["AutoModel"]


def test_registering_for_an_auto_class_copies_no_source(tmp_path):
    for cls in (GruQatConfig, GruQatModel, GruQatForSequenceClassification):
        cls.register_for_auto_class()
        assert cls._auto_class is None
    GruQatForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    small_model().save_pretrained(tmp_path)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".py")] == ["modeling_gruqat.py"]

    class Mine(GruQatModel):
        pass

    Mine.register_for_auto_class("AutoModel")
    assert Mine._auto_class == "AutoModel" and GruQatModel._auto_class is None


def test_with_the_package_imported_the_shim_is_not_run(tmp_path):
    in_state(small_model(), "frozen").save_pretrained(tmp_path)
    (tmp_path / "modeling_gruqat.py").write_text("raise RuntimeError('not to be run')")
    for kwargs in ({}, {"trust_remote_code": False}):
        assert type(AutoModel.from_pretrained(tmp_path, **kwargs)) is GruQatModel
        assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path, **kwargs)) is GruQatForSequenceClassification
        assert type(AutoConfig.from_pretrained(tmp_path, **kwargs)) is GruQatConfig
