"""The choice of what runs a scan: forced for a model; as torch.compile meets it, traced, on the first call as on any other."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import matmul_precision
from model_helpers import features, small_config, small_model
from scan_helpers import build

from gruqat_hf import GruQatForSequenceClassification
from gruqat_hf.scan import dispatch
from gruqat_hf.scan.hopper import cluster
from gruqat_hf.scan.triton import device


def test_the_first_call_may_be_a_compiled_one(monkeypatch):
    """Nothing was logged yet, and logging would break the graph."""
    layer, x = build({"kind": "dense"}, "int8_state16", 8, 4, torch.device("cpu")), torch.randn(5, 3, 4)
    layer.backend = None
    monkeypatch.setattr(dispatch, "_logged", set())
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
        assert torch.equal(found, layer(x)[0])


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize(
    "structure, family",
    [
        ({"kind": "diagonal"}, "diagonal"),
        ({"kind": "blockdiag", "nblocks": 8}, "hopper_block_diagonal"),
        ({"kind": "dense"}, "hopper_dense"),
        ({"kind": "monarch", "nblocks": 8}, "hopper_monarch"),
    ],
)
def test_compilers_see_through_the_choice_on_a_hopper_gpu(monkeypatch, structure, family, recipe):
    """Traced only: this machine need not have such a GPU."""
    pytest.importorskip("triton")
    layer = build(structure, recipe, 512, 16, torch.device("cpu"))  # runs, on this machine
    layer.backend = None
    monkeypatch.setattr(device, "_refuses_device", lambda *_: None)
    monkeypatch.setattr(device, "_device_facts", lambda *_: device.DeviceFacts(132, 232448, (9, 0)))
    monkeypatch.setattr(cluster, "clusters_at_once", lambda *_: 7)
    families: list[str] = []

    def trace(graph: torch.fx.GraphModule, _: object) -> None:
        calls = [node for node in graph.graph.nodes if "triton_scan" in str(node.target)]
        families.extend(argument for node in calls for argument in node.args if isinstance(argument, str))
        raise NotImplementedError("traced")

    torch._dynamo.reset()
    with matmul_precision("high"), pytest.raises(Exception, match="traced"):
        torch.compile(layer, fullgraph=True, backend=trace)(torch.randn(5, 3, 16))
    assert families == [family]


@pytest.mark.parametrize("structure", [{"kind": "diagonal"}, {"kind": "dense"}, {"kind": "monarch", "nblocks": 8}])
def test_exporters_make_no_limit_of_what_kernels_take(monkeypatch, structure):
    """Traced only, as above: a batch of any size stays one."""
    pytest.importorskip("triton")
    layer = build(structure, None, 64, 16, torch.device("cpu"))
    layer.backend = "triton"
    monkeypatch.setattr(device, "_refuses_device", lambda *_: None)
    monkeypatch.setattr(device, "_device_facts", lambda *_: device.DeviceFacts(132, 232448, (9, 0)))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (torch.randn(5, 3, 16),), dynamic_shapes={"x": {1: batch}}, strict=False)
    assert any("triton_scan" in str(node.target) for node in program.graph.nodes)


@pytest.mark.hf
class TestBackendOfAModel:
    def test_a_config_forces_it_and_it_is_not_saved(self, tmp_path, monkeypatch):
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")  # which the model's own comes before
        model = small_model(backend="reference", bidirectional=True)
        x = features()
        wanted = model(inputs_embeds=x).logits
        assert {layer.path for layer in model.report().layers} == {"reference (forced)"}
        model.save_pretrained(tmp_path)
        assert "backend" not in (tmp_path / "config.json").read_text()
        assert GruQatForSequenceClassification.from_pretrained(tmp_path).config.backend is None
        again = GruQatForSequenceClassification.from_pretrained(tmp_path, backend="reference")
        assert torch.equal(again(inputs_embeds=x).logits, wanted)

    def test_one_that_cannot_run_raises(self):
        with pytest.raises(RuntimeError, match="'hopper' was forced, but cannot run this scan: hopper: "):
            small_model(backend="hopper")(inputs_embeds=features())

    def test_one_that_does_not_exist_is_refused(self):
        with pytest.raises(ValueError, match=r"GruQatConfig.backend: backend 'cuda' does not exist; choose one of auto, hopper"):
            small_config(backend="cuda")
