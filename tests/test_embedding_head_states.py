"""Quantized embeddings and heads through their lifecycle, in checkpoints, tied and resized."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from head_helpers import (
    HEADS,
    LAYERS,
    PART_RECIPES,
    VOCABULARY,
    WEIGHT,
    ids,
    inputs_of,
    model_of,
    run,
    to_state,
    train_once,
)
from model_helpers import small_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from gruqat_hf import (
    PRESETS,
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatModel,
    GruQatQuantizationConfig,
    QuantizerConfig,
    QuantRecipe,
)
from gruqat_hf.layers.lifecycle import LifecycleError, fake_quantizers
from gruqat_hf.models.embedding import QuantizableEmbedding
from gruqat_hf.quantization import ScaleLayout, unpack_nibbles

pytestmark = pytest.mark.hf


class TestLifecycle:
    @pytest.mark.parametrize("head", HEADS)
    def test_there_and_back(self, head):
        model = model_of(head, "float")
        names, float_bytes = set(model.state_dict()), model.get_memory_footprint()
        to_state(model, "frozen")
        expected = run(model, inputs_of(model))
        assert not any(p.dim() > 1 for p in model.parameters())
        assert model.get_memory_footprint() == sum(t.nbytes for t in model.state_dict().values()) < float_bytes
        model.dequantize()
        assert set(model.state_dict()) == names and model.get_memory_footprint() == float_bytes
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert (run(model, inputs_of(model)) - expected).abs().max() < 0.1
        to_state(train_once(model), "frozen")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_scales_stay_fp32(self, state):
        model = model_of("lm", state, PART_RECIPES["learned"])
        before = {n: t.clone() for n, t in model.state_dict().items() if "scale" in n or "_val" in n or "codes" in n}
        model.to(torch.bfloat16)
        assert all(model.state_dict()[n].dtype == t.dtype and torch.equal(model.state_dict()[n], t) for n, t in before.items())
        assert run(model, ids()).dtype == torch.float32

    def test_a_float_model_casts_as_before(self):
        model = model_of("lm", "float").to(torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("point", ["embedding", "head"])
    def test_what_cannot_be_prepared_changes_nothing(self, point):
        model = model_of("lm", "float")
        names = set(model.state_dict())
        groups = QuantizerConfig(granularity="group", group_size=5, observer="dynamic")
        with pytest.raises(ValueError, match=f"rows of {point}"):
            model.prepare_qat(QuantRecipe(**LAYERS, **{point: groups}))
        assert model.quant_state == "float" and set(model.state_dict()) == names and not list(fake_quantizers(model))

    def test_what_cannot_be_frozen_changes_nothing(self):
        model = model_of("lm", "qat")
        with torch.no_grad():
            model.lm_head.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="the head holds NaN"):
            model.freeze()
        recipe = QuantRecipe(**LAYERS, head_input=QuantizerConfig(scheme="lsq", observer="fixed"), head=WEIGHT)
        model = model_of("lm", "qat", recipe)
        model.get_stack().layers[0][0].x.observer.count.zero_()
        model.get_stack().layers[0][0].x.forget_calibration_state()
        with pytest.raises(LifecycleError, match="needs a scale for"):
            model.freeze()
        assert model.quant_state == "qat" and model.lm_head.weight is not None

    def test_a_lifecycle_of_the_stack_alone(self, tmp_path):
        """A checkpoint says what its tensors are, not what the recipe would make of them."""
        model = model_of("lm", "float")
        model.get_stack().prepare_qat("int8_dynamic").freeze()
        model.save_pretrained(tmp_path)
        again = GruQatForCausalLM.from_pretrained(tmp_path)
        assert again.config.quantization_config.recipe.embedding is None and again.lm_head.quant_state == "float"
        assert torch.equal(run(again, ids()), run(model, ids()))

    def test_layers_alone_leave_the_points_of_a_model_alone(self):
        model = GruQatModel(small_config()).prepare_qat("int8_state16")
        assert model.config.quantization_config.recipe == PRESETS["int8_state16"]
        with pytest.raises(ValueError, match="quantizes nothing"):
            model_of("lm", "float").prepare_qat(QuantRecipe(embedding=WEIGHT))

    def test_an_embedding_of_ones_own(self, tmp_path):
        model = model_of("lm", "float")
        model.set_input_embeddings(nn.Embedding(VOCABULARY, 8))
        to_state(model, "qat")
        assert isinstance(model.get_input_embeddings(), QuantizableEmbedding)
        model.set_input_embeddings(nn.Embedding(VOCABULARY + 4, 8))
        model.config.vocab_size = VOCABULARY + 4
        assert model.get_input_embeddings().quantizer.scale.shape == (VOCABULARY + 4, 1)

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_a_head_of_ones_own(self, state):
        model = model_of("sequence", state)
        model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        model.sync_quantization()
        assert run(model, ids()).shape == (4, 3) and model.quant_state == state

    def test_the_report(self):
        report = model_of("lm", "frozen", "int8_state16").report()
        embedding, head = report.parts
        assert (embedding.point, embedding.shape, embedding.bits) == ("embedding", (VOCABULARY, 8), {"embedding": 8})
        assert embedding.tensor_bytes == VOCABULARY * (8 + 4) and embedding.scales == VOCABULARY
        assert (head.point, head.shape, head.bits) == ("head", (VOCABULARY, 16), {"head": 8, "head_input": 16})
        assert head.tensor_bytes == VOCABULARY * (16 + 4) + 4 and head.state == "frozen"
        assert f"{VOCABULARY} scales" in str(report) and "embedding:8" in str(report)


class TestCheckpoints:
    def test_codes_in_the_file(self, tmp_path):
        model = model_of("lm", "frozen", PART_RECIPES["packed"])
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        codes = tensors["lm_head.weight_codes"]
        assert codes.dtype == torch.uint8 and codes.shape == (VOCABULARY, 8)
        assert torch.equal(unpack_nibbles(codes, 16), model.lm_head.factor().values)
        assert tensors["model.embed_tokens.weight_codes"].dtype == torch.uint8
        assert tensors["model.embed_tokens.weight_scale"].shape == (VOCABULARY, 2)
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        assert all("scale" in name or "bias" in name for name in floats)

    @pytest.mark.parametrize("recipe", ["int8_state16", "int4_per_group_64"])
    def test_a_float_checkpoint_quantized_on_loading(self, tmp_path, recipe):
        model = model_of("sequence", "float")
        model.save_pretrained(tmp_path)
        loaded = GruQatForSequenceClassification.from_pretrained(tmp_path, quantization_config=GruQatQuantizationConfig(recipe))
        assert loaded.classifier.quant_state == loaded.model.embed_tokens.quant_state == "qat"
        frozen = GruQatForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=GruQatQuantizationConfig("int8_dynamic", state="frozen")
        )
        assert frozen.classifier.weight_codes.dtype == torch.int8
        assert torch.equal(run(frozen, ids()), run(model.prepare_qat("int8_dynamic"), ids()))

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_a_recipe_from_before(self, tmp_path, state):
        """Older checkpoints have no such points: embedding and head are float."""
        model = model_of("sequence", state, QuantRecipe(**LAYERS, name="int8_state16"))
        model.save_pretrained(tmp_path)
        recipe = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["recipe"]
        assert not {"embedding", "head", "head_input"} & set(recipe)
        again = GruQatForSequenceClassification.from_pretrained(tmp_path)
        assert again.classifier.weight.dtype == again.model.embed_tokens.weight.dtype == torch.float32
        assert torch.equal(run(again, ids()), run(model, ids()))
        assert again.resize_token_embeddings(40).weight.shape == (40, 8)
        assert "embedding and the head in float" in (tmp_path / "README.md").read_text()

    def test_a_new_head_on_a_frozen_base(self, tmp_path):
        model_of("sequence", "frozen").model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
        assert again.classifier.quant_state == "float" and again.model.embed_tokens.is_frozen
        recipe = again.config.quantization_config.recipe
        assert recipe.head is None and recipe.head_input is None and recipe.embedding is not None and recipe.name is None
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(run(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"), ids()), run(again, ids()))

    @pytest.mark.parametrize("recipe", ["int8_state16", "learned", "packed"])
    def test_a_new_head_on_a_base_in_qat(self, tmp_path, recipe):
        model_of("sequence", "qat", PART_RECIPES[recipe]).model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
        assert again.classifier.quant_state == "qat" and 0 < again.classifier.weight.abs().max() <= 0.25
        to_freeze = train_once(again)
        expected = run(to_freeze, ids())
        assert torch.equal(run(to_freeze.freeze(), ids()), expected)

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_another_number_of_labels(self, tmp_path, state):
        model_of("sequence", state).save_pretrained(tmp_path / "head")
        with pytest.raises(
            ValueError, match=r"its size for good(.|\n)*AutoModel.from_pretrained(.|\n)*misshapen: classifier.weight"
        ):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", num_labels=5, ignore_mismatched_sizes=True)
        AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "base")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
        assert again.quant_state == state and run(again, ids()).shape == (4, 5)

    def test_a_base_model_leaves_the_head(self, tmp_path):
        model = model_of("sequence", "frozen")
        model.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(base(input_ids=ids()).last_hidden_state, model.model(input_ids=ids()).last_hidden_state)

    def test_copies_are_whole(self):
        model = model_of("lm", "frozen", input_size=16, tie_word_embeddings=True)
        clone = copy.deepcopy(model)
        assert torch.equal(run(clone, ids()), run(model, ids()))
        clone.model.embed_tokens.weight_codes.zero_()
        assert run(model, ids()).abs().sum() > 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Checkpoints by state; tests damage copies."""
    root = tmp_path_factory.mktemp("sound")
    for state in ("qat", "frozen"):
        model_of("lm", state, num_hidden_layers=1).save_pretrained(root / state)
    return root


class TestDamage:
    NAMES = (
        ("frozen", "lm_head.weight_codes"),
        ("frozen", "lm_head.weight_scale"),
        ("frozen", "lm_head.input.scale"),
        ("frozen", "model.embed_tokens.weight_codes"),
        ("frozen", "model.embed_tokens.weight_scale"),
        ("qat", "lm_head.weight"),
        ("qat", "lm_head.quantizers.weight.scale"),
        ("qat", "lm_head.input.scale"),
        ("qat", "model.embed_tokens.quantizers.weight.observer.count"),
    )

    def _refused(self, sound, tmp_path, state, change, *mentioned):
        path = shutil.copytree(sound / state, tmp_path / "damaged", dirs_exist_ok=True)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as caught:
            GruQatForCausalLM.from_pretrained(path)
        assert all(text in str(caught.value) for text in mentioned), str(caught.value)

    @pytest.mark.parametrize(("state", "name"), NAMES)
    def test_names_shapes_and_types(self, sound, tmp_path, state, name):
        bare = name.removeprefix("model.")

        def reshape(tensors):
            tensors[name] = tensors[name].flatten().repeat(2)

        def retype(tensors):
            tensors[name] = tensors[name].to(torch.int32 if name != "lm_head.weight" else torch.int64)

        self._refused(sound, tmp_path, state, lambda tensors: tensors.pop(name), "missing", bare)
        self._refused(sound, tmp_path, state, reshape, "misshapen", bare)
        self._refused(sound, tmp_path, state, retype, "mistyped", bare)
        self._refused(sound, tmp_path, state, lambda t: t.update({f"{name}_too": t[name].clone()}), "extra", f"{bare}_too")

    @pytest.mark.parametrize(("state", "name"), [(state, name) for state, name in NAMES if name.endswith("scale")])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e-42])
    def test_scales(self, sound, tmp_path, state, name, value):
        self._refused(sound, tmp_path, state, lambda tensors: tensors[name].view(-1)[:1].fill_(value), name)

    @pytest.mark.parametrize("name", ["lm_head.weight_codes", "model.embed_tokens.weight_codes"])
    def test_codes(self, sound, tmp_path, name):
        self._refused(sound, tmp_path, "frozen", lambda tensors: tensors[name].view(-1)[3:4].fill_(-128), name, "code outside")

    def test_floats_for_codes(self, sound, tmp_path):
        def swap(tensors):
            del tensors["lm_head.weight_codes"], tensors["lm_head.weight_scale"]
            tensors["lm_head.weight"] = torch.randn(VOCABULARY, 16)

        self._refused(sound, tmp_path, "frozen", swap, "missing: lm_head.weight_codes", "extra: lm_head.weight")


class TestTied:
    FIELDS = {"input_size": 16, "tie_word_embeddings": True}  # noqa: RUF012

    @pytest.mark.parametrize("recipe", ["int8_state16", "int4_per_group_64", "int8_per_channel"])
    def test_one_table(self, tmp_path, recipe):
        model = train_once(model_of("lm", "qat", recipe, **self.FIELDS))
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.quantizer is None
        expected = run(model, ids())
        for state in ("qat", "frozen"):
            if state == "frozen":
                model.freeze()
            assert torch.equal(run(model, ids()), expected)
            model.save_pretrained(tmp_path / state)
            held = [name for name in load_file(tmp_path / state / "model.safetensors") if name.startswith("lm_head.weight")]
            assert held == []
            again = GruQatForCausalLM.from_pretrained(tmp_path / state)
            assert again.quant_state == state and torch.equal(run(again, ids()), expected)
            assert torch.equal(torch.cat([run(again, part) for part in ids().split([1, 3])]), expected)
        assert again.report().parts[1].tensor_bytes == 4  # the scale of what it reads
        with torch.no_grad():
            again.model.embed_tokens.weight_codes[2] = 0
        assert run(again, ids())[..., 2].abs().max() == 0
        again.dequantize()
        assert again.lm_head.weight is again.model.embed_tokens.weight
        to_state(train_once(again), "frozen", recipe)

    def test_trains_both_ways(self):
        model = model_of("lm", "qat", PART_RECIPES["int8_state16"], **self.FIELDS).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        unread = [token for token in range(VOCABULARY) if token not in ids()]
        assert unread and model.lm_head.weight.grad[unread].abs().sum() > 0  # as outputs these count too

    def test_learned_scales(self):
        config = QuantizerConfig(granularity="channel", scheme="lsq")
        recipe = QuantRecipe(**LAYERS, embedding=config, head=config, head_input=PRESETS["int8_state16"].head_input)
        model = model_of("lm", "qat", recipe, **self.FIELDS).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert model.model.embed_tokens.quantizer.scale.grad.abs().sum() > 0
        expected = run(model.eval(), ids())
        assert torch.equal(run(model.freeze(), ids()), expected)

    @pytest.mark.parametrize("given", ["embedding", "head"])
    def test_one_of_the_two_is_enough(self, tmp_path, given):
        model = model_of("lm", "qat", QuantRecipe(**LAYERS, **{given: WEIGHT}), **self.FIELDS)
        recipe = model.config.quantization_config.recipe
        assert recipe.embedding == recipe.head == WEIGHT
        expected = run(model, ids())
        model.freeze().save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids()), expected)

    def test_two_ways_are_refused(self):
        recipe = QuantRecipe(**LAYERS, embedding=WEIGHT, head=QuantizerConfig(bits=4, observer="dynamic"))
        model = model_of("lm", "float", **self.FIELDS)
        with pytest.raises(ValueError, match=r"QuantRecipe.embedding and QuantRecipe.head"):
            model.prepare_qat(recipe)
        assert model.quant_state == "float"
        model_of("lm", "qat", recipe)  # untied it is fine

    def test_a_frozen_base(self, tmp_path):
        model_of("lm", "frozen", **self.FIELDS).model.save_pretrained(tmp_path)
        again = GruQatForCausalLM.from_pretrained(tmp_path)
        assert again.lm_head.input is None and run(again, ids()).abs().max() > 0  # the table is there, on one side in float


class TestResizing:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("size", [30, 12])
    @pytest.mark.parametrize("recipe", ["int8_state16", "learned"])
    def test_in_qat(self, tmp_path, tied, size, recipe):
        recipe = PART_RECIPES[recipe]
        if tied and isinstance(recipe, QuantRecipe):
            recipe = QuantRecipe(**LAYERS, embedding=recipe.embedding, head_input=recipe.head_input)
        model = model_of("lm", "qat", recipe, input_size=16, tie_word_embeddings=tied)
        if recipe != "int8_state16":
            with torch.no_grad():
                model.model.embed_tokens.quantizer.scale.mul_(1.25)  # learned
        x = ids() % 12
        before = run(model, x)
        model.resize_token_embeddings(size)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.model.embed_tokens.quantizer.scale.shape == (size, 1)
        kept = min(size, VOCABULARY)
        assert torch.equal(run(model, x)[..., :kept], before[..., :kept])
        model(input_ids=x, labels=x).loss.backward()
        expected = run(model, x)
        model.save_pretrained(tmp_path / "qat")
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path / "qat"), x), expected)
        model.freeze().save_pretrained(tmp_path / "frozen")
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path / "frozen"), x), expected)

    def test_observed_ranges_are_kept(self):
        recipe = QuantRecipe(**LAYERS, embedding=QuantizerConfig(granularity="channel", observer="minmax"))
        model = model_of("sequence", "qat", recipe)
        quantizer = model.model.embed_tokens.quantizer
        quantizer.observer.max_val.fill_(7.0)
        quantizer.fake_quant_enabled = False
        model.resize_token_embeddings(30)
        grown = model.model.embed_tokens.quantizer
        assert grown.layout == ScaleLayout((30, 8), (30, 1)) and not grown.fake_quant_enabled
        assert (grown.observer.max_val[:VOCABULARY] == 7.0).all() and (grown.observer.max_val[VOCABULARY:] != 7.0).all()

    @pytest.mark.parametrize("state", ["float", "qat"])
    def test_below_the_padding_token(self, tmp_path, state, caplog):
        model = model_of("lm", state, pad_token_id=20)
        model.resize_token_embeddings(21)
        assert model.config.pad_token_id == 20
        model.resize_token_embeddings(10)
        assert (
            model.config.pad_token_id is model.generation_config.pad_token_id is None
            and model.model.embed_tokens.padding_idx is None
        )
        assert "pad_token_id was 20" in caplog.text
        model.save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids() % 10), run(model, ids() % 10))

    @pytest.mark.parametrize("head", ["lm", "sequence"])
    def test_frozen_is_refused(self, head):
        with pytest.raises(LifecycleError, match=r"dequantize\(\)"):
            model_of(head, "frozen").resize_token_embeddings(30)
