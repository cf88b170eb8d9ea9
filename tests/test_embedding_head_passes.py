"""Forward passes of embeddings and heads: hooks of others, what is kept between passes, and what is computed once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from head_helpers import LAYERS, VOCABULARY, ids, model_of, run, train_once
from torch import nn

from gruqat_hf import PRESETS, QuantizerConfig, QuantRecipe
from gruqat_hf.arithmetic import integer_matmul
from gruqat_hf.models.linear import WideLinear

pytestmark = pytest.mark.hf

TIES = {"untied": {}, "tied": {"input_size": 16, "tie_word_embeddings": True}}


@pytest.mark.parametrize("tied", TIES)
class TestHooks:
    @pytest.mark.parametrize("noise", [False, True])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_training_in_qat(self, tied, checkpointing, noise):
        """As transformers attaches them for gradient checkpointing (Trainer with adapters) and for NEFTune."""
        model = model_of("lm", "qat", **TIES[tied]).train()
        plain = copy.deepcopy(model)
        plain(input_ids=ids(), labels=ids()).loss.backward()
        seen = []

        def hook(module, args, output):
            seen.append(output.shape)
            return output + (0.1 * torch.rand_like(output) if noise else 0.0)

        if checkpointing:
            model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.get_input_embeddings().register_forward_hook(hook)
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert seen == [(4, 6, model.config.input_size)]
        for (name, one), other in zip(model.named_parameters(), plain.parameters()):
            assert one.grad.isfinite().all()
            assert noise or torch.equal(one.grad, other.grad), name

    @pytest.mark.parametrize("state", ["float", "qat", "frozen"])
    def test_inference(self, tied, state):
        model = model_of("lm", state, **TIES[tied])
        expected, seen = run(model, ids()), []
        model.enable_input_require_grads()
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert torch.equal(run(model, ids()), expected) and seen == [(4, 6, model.config.input_size)]
        model.disable_input_require_grads()
        prompt = ids(2, 4)
        assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 7)


class TestOncePerPass:
    def test_a_table_is_observed_once(self):
        config = QuantizerConfig(granularity="channel", observer="ema", ema_decay=0.5)
        recipe = QuantRecipe(**LAYERS, embedding=config, head=config, head_input=PRESETS["int8_state16"].head_input)
        for fields in TIES.values():
            model = model_of("lm", "float", **fields).prepare_qat(recipe)
            count = model.model.embed_tokens.quantizer.observer.count
            start = int(count)
            model.calibrate([ids()], progress=False)
            assert int(count) == start + 1
            model.train()(input_ids=ids(), labels=ids()).loss.backward()
            assert int(count) == start + 2

    def test_a_table_is_put_on_its_grid_once(self, monkeypatch):
        model, calls = model_of("lm", "qat", **TIES["tied"]).train(), []
        embedding = model.model.embed_tokens
        monkeypatch.setattr(embedding, "factor", lambda: calls.append(1) or type(embedding).factor(embedding))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert len(calls) == 1
        model.eval()
        for _ in range(3):
            run(model, ids())
        assert len(calls) == 2  # in eval mode it is kept


@pytest.mark.parametrize("tied", TIES)
class TestKept:
    """What eval mode keeps of a table in QAT never outlives the weight that it was made from."""

    def test_weights_change(self, tied):
        model = model_of("lm", "qat", **TIES[tied])
        changes = (
            lambda: model.lm_head.weight.mul_(1.5),
            lambda: model.model.embed_tokens.weight[1].neg_(),
            lambda: setattr(model.lm_head, "weight", nn.Parameter(torch.randn(VOCABULARY, 16))) if tied == "untied" else None,
            lambda: model.to(torch.bfloat16),
            lambda: model.load_state_dict({name: t * 0.5 if "weight" in name else t for name, t in model.state_dict().items()}),
        )
        for change in changes:
            run(model, ids())
            with torch.no_grad():
                change()
            fresh = copy.deepcopy(model)
            assert fresh.lm_head._kept is None and fresh.model.embed_tokens._kept is None
            assert torch.equal(run(model, ids()), run(fresh, ids()))
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), ids()), run(model, ids()))

    def test_writes_that_count_no_version(self, tied):
        """Fused optimizers and writes through .data are seen by a pass with gradients, and by train() and eval()."""
        model = model_of("lm", "qat", **TIES[tied])
        run(model, ids())
        model.lm_head.weight.data.mul_(0.5)
        model.train().eval()
        assert torch.equal(run(model, ids()), run(copy.deepcopy(model), ids()))
        model(input_ids=ids())
        model.lm_head.weight.data.mul_(0.5)
        assert torch.equal(run(model, ids()), run(copy.deepcopy(model), ids()))

    def test_training_between_evaluations(self, tied):
        model = model_of("lm", "qat", **TIES[tied])
        for _ in range(2):
            run(model, ids())
            train_once(model)
            expected = run(model, ids())
            assert torch.equal(run(copy.deepcopy(model).freeze(), ids()), expected)

    def test_switches(self, tied):
        config = QuantizerConfig(granularity="channel", observer="minmax")
        model = model_of("lm", "qat", QuantRecipe(**LAYERS, embedding=config), **TIES[tied])
        run(model, ids())
        embedding = model.model.embed_tokens
        assert embedding._kept[1].values.dtype == torch.int8
        model.calibrate([ids()], progress=False)
        assert embedding._kept is None  # for the table was observed
        run(model, ids())
        model.freeze()
        run(model, ids())
        assert embedding._kept is None and embedding.weight is None


class TestBlocks:
    @pytest.mark.parametrize("recipe", ["int8_state16", "int8_per_channel", "groups"])
    def test_a_vocabulary_in_blocks(self, monkeypatch, recipe):
        if recipe == "groups":
            head = QuantizerConfig(bits=4, granularity="group", group_size=8, observer="dynamic")
            recipe = QuantRecipe(**LAYERS, head=head, head_input=PRESETS["int8_state16"].head_input)
        model = model_of("lm", "qat", recipe)
        x = ids(3, 5)
        expected = run(model, x)
        for weights in (1, 64, 7 * 16, VOCABULARY * 16):  # a row; 4; 7, which leaves two over; all
            monkeypatch.setattr(integer_matmul, "_BLOCK", weights)
            assert torch.equal(run(model, x), expected)
            assert torch.equal(run(copy.deepcopy(model).freeze(), x), expected)

    @pytest.mark.parametrize("recipe", ["int8_state16", "int8_per_channel"])
    def test_gradients_reach_the_input_of_a_frozen_model(self, monkeypatch, recipe):
        monkeypatch.setattr(integer_matmul, "_BLOCK", 64)
        model = model_of("lm", "qat", recipe)
        grads = []
        for state in (model, copy.deepcopy(model).freeze()):
            x = state.model.embed_tokens(ids()).detach().requires_grad_()
            state(inputs_embeds=x, labels=ids()).loss.backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)
        assert grads[0].abs().sum() > 0

    def test_one_scale_for_all(self, monkeypatch):
        monkeypatch.setattr(integer_matmul, "_BLOCK", 32)
        head = WideLinear(16, 9).eval()
        head.prepare_qat(QuantizerConfig(observer="dynamic"), QuantizerConfig(bits=16, observer="fixed"))
        x = torch.rand(4, 16) * 2 - 1
        expected = head(x)  # with gradients, and so in one
        head.freeze()
        with torch.no_grad():
            assert torch.equal(head(x), expected)


class TestFloat:
    def test_a_float_model_multiplies_as_torch_does(self):
        model = model_of("lm", "float")
        with torch.no_grad():
            states = model.model(input_ids=ids()).last_hidden_state
            assert torch.equal(run(model, ids()), nn.functional.linear(states, model.lm_head.weight))

    def test_a_float_head_of_quantized_layers_does_not_depend_on_the_batch(self):
        model = model_of("lm", "frozen", QuantRecipe(**LAYERS), hidden_size=64)
        x = ids(33, 7)
        assert torch.equal(run(model, x)[:1], run(model, x[:1]))


def test_labels_of_another_length():
    model = model_of("lm", "frozen")
    for labels in (ids()[:, :3], ids()[:2], ids().flatten()):
        with pytest.raises(ValueError, match=r"labels must be \[4, 6\]"):
            model(input_ids=ids(), labels=labels)
