"""The heads: losses against their formulas, masks, Auto classes, states and what they refuse."""

from __future__ import annotations

import pytest
import torch
from head_helpers import HEADS, STATES, head_model, ids, inputs_of, run, to_state
from model_helpers import features, small_config
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from gruqat_hf import GruQatConfig, GruQatForCausalLM, GruQatForTimeSeriesPrediction, GruQatForTokenClassification
from gruqat_hf.hub.registration import MODELS

pytestmark = pytest.mark.hf

FRAMES = ("token", "frame")


def _right_mask(batch=4, steps=6):
    return (torch.arange(steps) < torch.tensor([3, 6, 1, 4][:batch])[:, None]).long()


class TestEveryHead:
    @pytest.mark.parametrize("head", HEADS)
    def test_its_auto_class_loads_it(self, tmp_path, head):
        model = head_model(head, "frozen")
        model.save_pretrained(tmp_path)
        name = type(model).__name__.replace("GruQat", "AutoModel")
        again = getattr(modeling_auto, name).from_pretrained(tmp_path)
        assert type(again) is type(model) and again.main_input_name == model.main_input_name
        assert AutoConfig.from_pretrained(tmp_path).architectures == [type(model).__name__]
        x = inputs_of(model)
        assert torch.equal(run(model, x), run(again, x))

    def test_all_are_registered(self):
        assert set(HEADS.values()) <= set(MODELS.values())

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("state", STATES)
    def test_rows_do_not_depend_on_the_batch(self, head, state):
        model = head_model(head, state)
        x = inputs_of(model, batch=7)
        whole, parts = run(model, x), torch.cat([run(model, part) for part in x.split([1, 4, 2])])
        if state == "float":
            assert (whole - parts).abs().max() < 1e-6
        else:
            assert torch.equal(whole, parts)

    @pytest.mark.parametrize("head", HEADS)
    def test_qat_eval_is_frozen(self, head):
        model = head_model(head, "qat", dropout=0.2)
        x = inputs_of(model, seed=5)
        before = run(model, x)
        assert torch.equal(before, run(model.freeze(), x))

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("state", ["float", "qat"])
    def test_every_parameter_gets_a_gradient(self, head, state):
        model = head_model(head, state).train()
        x = inputs_of(model)
        labels = {
            "sequence": {"labels": torch.tensor([0, 1, 2, 0])},
            "audio": {"labels": torch.tensor([0, 1, 2, 0])},
            "token": {"labels": torch.randint(0, 3, (4, 6))},
            "frame": {"labels": torch.randint(0, 3, (4, 6))},
            "lm": {"labels": x},
            "series": {"future_values": torch.randn(4, 1, 8)},
        }[head]
        model(**{model.main_input_name: x}, **labels).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("head", HEADS)
    def test_tuples_and_hidden_states(self, head):
        model = head_model(head)
        out = model(**{model.main_input_name: inputs_of(model)}, output_hidden_states=True)
        assert out.loss is None and out.past_key_values.get_seq_length() == 6 and len(out.hidden_states) == 3
        first = model(**{model.main_input_name: inputs_of(model)}, return_dict=False)[0]
        assert torch.equal(first, out[model.stream_output])

    @pytest.mark.parametrize("head", [head for head in HEADS if head != "lm"])
    def test_bidirectional(self, head):
        model = head_model(head, "frozen", bidirectional=True)
        assert run(model, inputs_of(model)).shape[0] == 4

    @pytest.mark.parametrize("head", HEADS)
    def test_calibration_names_the_inputs_it_needs(self, head):
        model = head_model(head).prepare_qat("int8_state16")
        with pytest.raises(ValueError, match=f"a batch needs .*{'input_ids' if head == 'lm' else model.main_input_name}"):
            model.calibrate([{"labels": torch.zeros(4)}], progress=False)


class TestFrames:
    @pytest.mark.parametrize("head", FRAMES)
    def test_class_labels(self, head):
        model = head_model(head)
        x, labels, mask = inputs_of(model), torch.randint(0, 3, (4, 6)), _right_mask()
        labels[1, 2] = -100
        out = model(**{model.main_input_name: x}, attention_mask=mask, labels=labels)
        real = mask.bool() & (labels != -100)
        assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits[real], labels[real]))
        per_item = model(**{model.main_input_name: x}, attention_mask=mask, labels=labels, num_items_in_batch=real.sum() * 2).loss
        assert torch.allclose(per_item * 2, out.loss)

    @pytest.mark.parametrize("head", FRAMES)
    def test_several_labels_at_once(self, head):
        model = head_model(head)
        x, labels, mask = inputs_of(model), torch.randint(0, 2, (4, 6, 3)), _right_mask()
        out = model(**{model.main_input_name: x}, attention_mask=mask, labels=labels)
        real = mask.bool()
        reference = nn.functional.binary_cross_entropy_with_logits(out.logits[real], labels[real].float())
        assert torch.allclose(out.loss, reference)

    def test_nothing_labelled_is_no_loss(self):
        model = head_model("token")
        loss = model(inputs_embeds=features(), labels=torch.full((4, 6), -100)).loss
        assert loss == 0

    def test_refuses_labels_of_another_shape(self):
        with pytest.raises(ValueError, match=r"labels must be \[4, 6\].*got \[4\]"):
            head_model("token")(inputs_embeds=features(), labels=torch.zeros(4, dtype=torch.long))

    def test_reads_ids_too(self):
        model = head_model("token", "frozen", vocab_size=23)
        assert run(model, ids()).shape == (4, 6, 3)


class TestCausalLM:
    def test_loss_is_that_of_the_next_token(self):
        model = head_model("lm")
        x = ids()
        out = model(input_ids=x, labels=x)
        assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_has_no_loss(self, side):
        model = head_model("lm")
        x = ids(1, 4)
        plain = model(input_ids=x, labels=x).loss
        pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 1, 1, 1]])
        parts, masks = ([pad, x], [pad, mask]) if side == "left" else ([x, pad], [mask, pad])
        padded = torch.cat(parts, 1)
        out = model(input_ids=padded, attention_mask=torch.cat(masks, 1), labels=padded)
        assert torch.allclose(out.loss, plain)

    def test_accumulated_batches(self):
        model = head_model("lm")
        x = ids()
        whole = model(input_ids=x, labels=x).loss
        items = torch.tensor(4 * 5)
        parts = sum(model(input_ids=part, labels=part, num_items_in_batch=items).loss for part in x.split([1, 3]))
        assert torch.allclose(parts, whole)

    def test_some_logits(self):
        model, x = head_model("lm", "frozen"), ids()
        whole = run(model, x)
        assert torch.equal(run(model, x, logits_to_keep=2), whole[:, -2:])
        assert torch.equal(run(model, x, logits_to_keep=torch.tensor([0, 3])), whole[:, [0, 3]])
        assert torch.equal(run(model, x, prefill_chunk_size=4), whole[:, 4:])
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(input_ids=x, labels=x, logits_to_keep=1)
        with pytest.raises(ValueError, match="prefill_chunk_size must be"):
            model(input_ids=x, prefill_chunk_size=0)

    @pytest.mark.parametrize("state", STATES)
    def test_tied_embeddings(self, tmp_path, state):
        model = head_model("lm", state, input_size=16, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        again = GruQatForCausalLM.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(run(again, ids()), run(model, ids()))
        if state != "frozen":
            model.train()(input_ids=ids(), labels=ids()).loss.backward()
            assert model.lm_head.weight.grad.abs().sum() > 0

    def test_untied_by_default(self, tmp_path):
        model = head_model("lm", input_size=16)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids()), run(model, ids()))

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("tied", [False, True])
    def test_resizing_the_vocabulary(self, tmp_path, state, tied):
        # Frozen, a vocabulary can change only where it is in float.
        model = head_model(
            "lm", state, "int8_hidden" if state == "frozen" else "int8_state16", input_size=16, tie_word_embeddings=tied
        )
        before = run(model, ids())
        model.resize_token_embeddings(30)
        assert model.config.vocab_size == 30 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert torch.equal(run(model, ids())[..., :23], before)
        model.save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids()), run(model, ids()))

    def test_half_precision_keeps_the_type_of_a_float_weight(self):
        assert run(head_model("lm", "frozen", "int8_hidden").to(torch.bfloat16), ids()).dtype == torch.bfloat16
        assert run(head_model("lm", "frozen").to(torch.bfloat16), ids()).dtype == torch.float32

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"bidirectional": True}, "bidirectional=False"),
            ({"vocab_size": None}, "set GruQatConfig.vocab_size"),
            ({"tie_word_embeddings": True}, "hidden_size == input_size, got 16 and 8"),
        ],
    )
    def test_refuses(self, fields, message):
        with pytest.raises(ValueError, match=message):
            head_model("lm", **fields)


class TestAudio:
    @pytest.mark.parametrize("head", ["audio", "frame"])
    def test_every_name_of_the_features(self, head):
        model, x = head_model(head, "frozen"), features()
        outs = [model(**{name: x}).logits for name in ("input_values", "input_features", "inputs_embeds")]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])

    def test_a_waveform_of_one_feature(self):
        model, x = head_model("audio", input_size=1), features(size=1)
        assert torch.equal(run(model, x.squeeze(-1)), run(model, x))

    def test_padding_is_not_heard(self):
        model, x = head_model("audio", "frozen"), features()
        mask = _right_mask()
        out = run(model, x, attention_mask=mask)
        for row, length in enumerate(mask.sum(1)):
            assert torch.equal(out[row], run(model, x[row : row + 1, :length])[0])

    def test_losses(self):
        model, x = head_model("audio"), features()
        labels = torch.tensor([0, 2, 1, 1])
        out = model(input_values=x, labels=labels)
        assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits, labels))

    @pytest.mark.parametrize("head", ["audio", "frame"])
    def test_refuses(self, head):
        model = head_model(head)
        with pytest.raises(ValueError, match="none of them"):
            model()
        with pytest.raises(ValueError, match="input_values and inputs_embeds"):
            model(input_values=features(), inputs_embeds=features())
        with pytest.raises(ValueError, match="feature extractor"):
            model(input_values=torch.randn(2, 100))
        with pytest.raises(ValueError, match="vocab_size must be None"):
            head_model(head, vocab_size=10)


class TestTimeSeries:
    @pytest.mark.parametrize("loss", ["mse", "l1"])
    def test_losses(self, loss):
        model = head_model("series", prediction_length=5, forecast_loss=loss)
        future = torch.randn(4, 5, 8)
        out = model(past_values=features(), future_values=future)
        assert out.prediction_outputs.shape == (4, 5, 8)
        reference = nn.functional.l1_loss if loss == "l1" else nn.functional.mse_loss
        assert torch.allclose(out.loss, reference(out.prediction_outputs, future))
        mask = torch.rand(4, 5, 8) > 0.5
        masked = model(past_values=features(), future_values=future, future_observed_mask=mask).loss
        assert torch.allclose(masked, reference(out.prediction_outputs[mask], future[mask]))

    def test_one_channel(self):
        model = head_model("series", "frozen", input_size=1, prediction_length=3)
        x = features(size=1)
        flat = run(model, x.squeeze(-1))
        assert flat.shape == (4, 3) and torch.equal(flat, run(model, x).squeeze(-1))

    def test_missing_values(self):
        model, x = head_model("series", "frozen"), features()
        mask = _right_mask()
        out = run(model, x.masked_fill(mask.unsqueeze(-1) == 0, float("nan")), past_observed_mask=mask)
        for row, length in enumerate(mask.sum(1)):
            assert torch.equal(out[row], run(model, x[row : row + 1, :length])[0])
        assert torch.equal(run(model, x, attention_mask=mask), out)
        both = {"past_observed_mask": torch.ones_like(x), "attention_mask": mask}
        assert torch.equal(run(model, x, **both), out)
        some = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) > 0.3
        some[..., 0] = True
        assert torch.equal(run(model, x, past_observed_mask=some), run(model, x * some))

    def test_trains_to_forecast(self):
        torch.manual_seed(0)
        model = GruQatForTimeSeriesPrediction(small_config(input_size=1, num_hidden_layers=1, prediction_length=4))
        series = torch.sin(torch.arange(24) * 0.5 + torch.rand(32, 1) * 6)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        losses = []
        for _ in range(60):
            loss = model(past_values=series[:, :20], future_values=series[:, 20:]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]
        to_state(model.eval(), "frozen")

    def test_refuses(self):
        model = head_model("series")
        for inputs, message in [
            ({}, "past_values"),
            ({"past_values": torch.randn(4, 6)}, r"\[B, T, 8\]"),
            ({"past_values": features(), "future_values": torch.randn(4, 2, 8)}, r"future_values must be \[4, 1, 8\]"),
            ({"past_values": features(), "past_observed_mask": torch.ones(4)}, "past_observed_mask must be"),
            ({"past_values": features(), "attention_mask": torch.ones(4, 1)}, "attention_mask must be"),
            (
                {"past_values": features(), "past_observed_mask": torch.ones(4, 6), "attention_mask": torch.ones(4, 1)},
                "attention_mask must be",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                model(**inputs)
        for field, value in [("prediction_length", 0), ("forecast_loss", "huber"), ("tie_word_embeddings", "yes")]:
            with pytest.raises(ValueError, match=f"GruQatConfig.{field}"):
                GruQatConfig(**{field: value})
        with pytest.raises(ValueError, match="vocab_size must be None"):
            head_model("series", vocab_size=10)


def test_a_head_can_be_changed(tmp_path):
    model = head_model("sequence", "frozen")
    model.save_pretrained(tmp_path)
    again = GruQatForTokenClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = again.model(inputs_embeds=features()).last_hidden_state
        assert torch.equal(ours, model.model(inputs_embeds=features()).last_hidden_state)
