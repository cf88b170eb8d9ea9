"""Embeddings and heads, quantized with the layers: the promise of equal bits reaches from ids to logits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from head_helpers import (
    HEADS,
    LAYERS,
    PART_RECIPES,
    VOCABULARY,
    WEIGHT,
    head_model,
    ids,
    inputs_of,
    model_of,
    run,
    train_once,
)
from model_helpers import features
from torch import nn

from gruqat_hf import (
    PRESETS,
    QuantizerConfig,
    QuantRecipe,
)
from gruqat_hf.arithmetic.integer_matmul import split_matmul, wide_integer_matmul
from gruqat_hf.layers.lifecycle import fake_quantizers
from gruqat_hf.models.linear import WideLinear
from gruqat_hf.training import parameter_groups

pytestmark = pytest.mark.hf

EVERY_STEP = ("token", "lm", "frame")


class TestSameBits:
    @pytest.mark.parametrize("recipe", PART_RECIPES)
    @pytest.mark.parametrize("head", HEADS)
    def test_logits(self, tmp_path, head, recipe):
        model = train_once(model_of(head, "qat", PART_RECIPES[recipe]))
        x = inputs_of(model, batch=5, steps=7)
        expected = run(model, x)
        frozen = copy.deepcopy(model).freeze()
        frozen.save_pretrained(tmp_path / "frozen")
        model.save_pretrained(tmp_path / "qat")
        reloaded = [type(model).from_pretrained(tmp_path / state) for state in ("qat", "frozen")]
        assert reloaded[1].quant_state == "frozen"
        for other in (frozen, *reloaded):
            assert torch.equal(run(other, x), expected)
            assert torch.equal(torch.cat([run(other, part) for part in x.split([1, 3, 1])]), expected)
        if head in EVERY_STEP:
            for cuts in ((3, 4), (1,) * 7):
                stream = frozen.stream(batch_size=5)
                assert torch.equal(torch.cat([stream(part) for part in x.split(cuts, dim=1)], dim=1), expected)

    @pytest.mark.parametrize("recipe", ["int8_per_channel", "int8_state16", "packed"])
    def test_logits_are_integer_products(self, recipe):
        """As counted by Python's integers."""
        model = model_of("sequence", "frozen", PART_RECIPES[recipe])
        with torch.no_grad():
            state = model.model(input_ids=ids()).pooler_output
        head, grid = model.classifier, model.classifier.input.grid()
        codes = grid.codes(state).long()
        factor = head.factor()
        groups = factor.groups
        weight = factor.values.long().unflatten(-1, (groups, -1))
        accumulated = torch.einsum("bgi,ogi->gbo", codes.unflatten(-1, (groups, -1)), weight)
        scales = grid.scale * factor.scale
        expected = accumulated[0].float() * scales[:, 0]
        for group in range(1, groups):
            expected = expected + accumulated[group].float() * scales[:, group]
        assert torch.equal(run(model, ids()), expected + head.bias)

    def test_states_lie_on_the_grid_of_the_head(self):
        for preset in ("int8_per_channel", "int8_state16"):
            model = model_of("sequence", "frozen", preset)
            with torch.no_grad():
                state = model.model(input_ids=ids()).pooler_output
            assert torch.equal(model.classifier.input.grid().round_trip(state), state)

    def test_embedding_rows(self):
        model = model_of("lm", "qat", "int8_state16")
        table = model.model.embed_tokens.factor().dequantize()
        model.freeze()
        embedding = model.model.embed_tokens
        assert torch.equal(embedding(ids()), table[ids()])
        assert torch.equal(embedding.weight_codes[ids()].float() * embedding.weight_scale[ids()], table[ids()])
        for wrong in (-1, VOCABULARY):
            with pytest.raises((IndexError, RuntimeError)):
                embedding(torch.tensor([[wrong]]))

    def test_generation(self):
        model = model_of("lm", "frozen")
        prompt = ids(batch=2, steps=4)
        settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        cached, whole = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        assert all(torch.equal(one, other) for one, other in zip(cached.logits, whole.logits))

    @pytest.mark.parametrize("head", ["sequence", "lm"])
    @pytest.mark.parametrize("recipe", ["int8_state16", "packed"])
    def test_under_autocast(self, head, recipe):
        model = model_of(head, "frozen", PART_RECIPES[recipe])
        expected = run(model, inputs_of(model))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model, inputs_of(model)), expected)

    @pytest.mark.parametrize("only", ["head", "head_input"])
    def test_one_side_is_computed_in_float(self, only):
        recipe = QuantRecipe(**LAYERS, **{only: getattr(PRESETS["int8_state16"], only)})
        model = model_of("sequence", "qat", recipe)
        expected = run(model, ids())
        assert torch.equal(run(model.freeze(), ids()), expected)
        assert torch.equal(torch.cat([run(model, part) for part in ids().split([1, 3])]), expected)


@pytest.mark.gpu
class TestOnCuda:
    @pytest.mark.parametrize("precision", ["highest", "high"])
    @pytest.mark.parametrize("recipe", PART_RECIPES)
    @pytest.mark.parametrize("head", HEADS)
    def test_logits_are_those_of_the_cpu(self, head, recipe, precision):
        model = train_once(model_of(head, "qat", PART_RECIPES[recipe], hidden_size=64))
        x = inputs_of(model, batch=33, steps=7)
        expected = run(model, x)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            for frozen in (False, True):
                on_cuda = copy.deepcopy(model)
                on_cuda = (on_cuda.freeze() if frozen else on_cuda).cuda()
                assert torch.equal(run(on_cuda, x.cuda()).cpu(), expected)
                assert torch.equal(run(on_cuda, x[:1].cuda()).cpu(), expected[:1])
        finally:
            torch.set_float32_matmul_precision(before)

    def test_training(self):
        model = model_of("lm", "qat", input_size=16, tie_word_embeddings=True).cuda().train()
        model(input_ids=ids().cuda(), labels=ids().cuda()).loss.backward()
        assert model.lm_head.weight.grad.isfinite().all() and model.lm_head.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("length", [7, 512, 3000])
    def test_wide_products(self, length):
        a = torch.randint(-32767, 32768, (33, length))
        b = torch.randint(-127, 128, (length, 17))
        exact = (a @ b).double().float()
        assert torch.equal(wide_integer_matmul(a.float().cuda(), b.float().cuda(), 32767, 127).cpu(), exact)


class TestWideProducts:
    @pytest.mark.parametrize("largest", [128, 255, 32767, 65535])
    @pytest.mark.parametrize("length", [1, 7, 512, 3000])
    def test_exact(self, largest, length):
        generator = torch.Generator().manual_seed(length)
        a = torch.randint(-largest, largest + 1, (6, length), generator=generator)
        b = torch.randint(-127, 128, (length, 5), generator=generator)
        a[0], b[:, 0], a[1] = largest, 127, -largest
        exact = (a @ b).double().float()
        assert torch.equal(wide_integer_matmul(a.float(), b.float(), largest, 127), exact)
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("highest", "medium"):  # tf32 or bf16, where the machine has them
                torch.set_float32_matmul_precision(precision)
                assert torch.equal(split_matmul(a.float(), b.float(), largest, 127), exact)
        finally:
            torch.set_float32_matmul_precision(before)

    def test_gradients_are_those_of_the_float_product(self):
        a = torch.randint(-32767, 32768, (4, 9)).float().requires_grad_()
        b = torch.randint(-127, 128, (9, 3)).float().requires_grad_()
        seed = torch.randn(4, 3)
        found = torch.autograd.grad(wide_integer_matmul(a, b, 32767, 127), (a, b), seed)
        for one, other in zip(found, torch.autograd.grad(a @ b, (a, b), seed)):
            torch.testing.assert_close(one, other)


class TestTraining:
    def test_every_part_learns(self):
        model = model_of("sequence", "qat", PART_RECIPES["learned"]).train()
        model(input_ids=ids(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        embedding, head = model.model.embed_tokens, model.classifier
        scales = [embedding.quantizer.scale, head.quantizer.scale, head.input.scale]
        for parameter in (embedding.weight, head.weight, head.bias, *scales):
            assert parameter.grad.abs().sum() > 0
        grouped = {id(parameter) for parameter in parameter_groups(model, lr=1.0)[-1]["params"]}
        assert {id(scale) for scale in scales} <= grouped

    def test_gradients_pass_straight_through(self):
        """Where nothing is clipped, the gradient of the weight is that of a float head on the rounded input."""
        head = WideLinear(6, 4)
        head.prepare_qat(WEIGHT, QuantizerConfig(bits=16, observer="fixed"))
        x = torch.rand(5, 6) * 2 - 1
        head(x).square().sum().backward()
        rounded = head.factor().dequantize().detach().requires_grad_()
        nn.functional.linear(head.input.grid().round_trip(x), rounded, head.bias.detach()).square().sum().backward()
        # A scale follows its row's largest weight, and a dynamic one gets no gradient: the codes' ends are not clipped.
        torch.testing.assert_close(head.weight.grad, rounded.grad)

    def test_learned_scales_wait_for_rounding(self):
        model = model_of("sequence", "qat", PART_RECIPES["learned"]).train()
        for quantizer in fake_quantizers(model):
            quantizer.fake_quant_enabled = False
        model(input_ids=ids()).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.classifier.input.scale.grad.abs().sum() == 0

    def test_dropout_does_not_push_values_off_the_grid(self):
        head = WideLinear(64, 3, bias=False)
        head.prepare_qat(WEIGHT, QuantizerConfig(bits=16, observer="fixed"))
        x = torch.full((50, 64), 0.9, requires_grad=True)
        torch.manual_seed(0)
        found = head(x, nn.Dropout(0.5))
        torch.manual_seed(0)
        mask = nn.functional.dropout(torch.ones(50, 64), 0.5)
        torch.testing.assert_close(found, (0.9 * mask) @ head.factor().dequantize().T, rtol=1e-3, atol=1e-4)
        found.sum().backward()
        assert torch.equal(x.grad != 0, mask != 0)

    def test_calibration_observes_the_input_of_the_head(self):
        recipe = QuantRecipe(**LAYERS, head=WEIGHT, head_input=QuantizerConfig(observer="minmax"))
        model = model_of("sequence", "float").prepare_qat(recipe)
        model.calibrate([{"input_ids": ids(seed=seed)} for seed in range(3)], progress=False)
        assert int(model.classifier.input.observer.count) == 3
        assert 0 < model.classifier.input.observer.max_val <= 1

    def test_autocast_trains(self):
        model = model_of("lm", "qat").train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        assert model.lm_head.weight.grad.isfinite().all() and model.lm_head.weight.grad.abs().sum() > 0


class TestRecipe:
    @pytest.mark.parametrize(
        ("points", "said"),
        [
            ({"embedding": QuantizerConfig(granularity="gate")}, "QuantRecipe.embedding cannot have granularity 'gate'"),
            ({"head": QuantizerConfig(bits=16)}, "QuantRecipe.head has 16 bits"),
            ({"embedding": QuantizerConfig(bits=16)}, "QuantRecipe.embedding has 16 bits"),
            ({"head": QuantizerConfig(symmetric=False)}, "QuantRecipe.head is affine"),
            ({"head_input": QuantizerConfig(granularity="channel")}, "QuantRecipe.head_input cannot have granularity"),
        ],
    )
    def test_refused(self, points, said):
        with pytest.raises(ValueError) as caught:
            QuantRecipe(**points)
        assert said in str(caught.value)

    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_presets(self, name):
        recipe = PRESETS[name]
        given = [recipe.embedding, recipe.head, recipe.head_input]
        if name in ("fp32", "int8_hidden"):
            assert given == [None] * 3
            return
        assert recipe.embedding == recipe.head and recipe.head.bits == 8  # so that they can be tied
        assert recipe.head_input == recipe.state

    def test_json(self):
        assert QuantRecipe.of(json.loads(json.dumps(PART_RECIPES["packed"].to_dict()))) == PART_RECIPES["packed"]

    def test_features_need_no_embedding(self):
        model = head_model("audio", "frozen")
        assert torch.equal(run(model, features()), run(model, features()))
        assert model.config.quantization_config.recipe == PRESETS["int8_state16"]
