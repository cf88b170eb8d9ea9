"""Models against torch.nn.GRU, their inputs and outputs, the head and the cache."""

from __future__ import annotations

import pytest
import torch
from model_helpers import KINDS, features, in_state, output_of, small_model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gruqat_hf import GruQatModel
from gruqat_hf.models import GruQatCache

pytestmark = pytest.mark.hf


def _gru_case(layers, bidirectional, bias, hidden=5, size=3, seed=0):
    torch.manual_seed(seed)
    return nn.GRU(size, hidden, layers, bias=bias, bidirectional=bidirectional, batch_first=True)


class TestAgainstTorch:
    @pytest.mark.parametrize("layers", [1, 2, 3])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_outputs_states_and_gradients(self, layers, bidirectional, bias):
        for steps, batch, hidden in [(1, 1, 1), (1, 3, 5), (7, 1, 5), (4, 3, 1), (9, 2, 7)]:
            gru = _gru_case(layers, bidirectional, bias, hidden)
            model = GruQatModel.from_torch(gru)
            x, x_ref = (features(batch, steps, 3).requires_grad_() for _ in range(2))
            out = model(inputs_embeds=x)
            ref, h_n = gru(x_ref)
            assert (out.last_hidden_state - ref).abs().max() < 1e-5
            directions = 2 if bidirectional else 1
            assert (out.pooler_output - torch.cat(tuple(h_n[-directions:]), -1)).abs().max() < 1e-5
            if not bidirectional:
                assert (out.past_key_values.state - h_n).abs().max() < 1e-5
            (out.last_hidden_state.pow(2).sum() + out.pooler_output.sum()).backward()
            (ref.pow(2).sum() + h_n[-directions:].sum()).backward()
            assert (x.grad - x_ref.grad).abs().max() < 1e-4
            layer = model.stack.layers[-1][-1]
            suffix = f"l{layers - 1}_reverse" if bidirectional else f"l{layers - 1}"
            ours = layer.weight_hidden.structure.weight.grad.flatten(0, 2)
            assert (ours - getattr(gru, f"weight_hh_{suffix}").grad).abs().max() < 1e-4

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_right_padding_is_a_packed_sequence(self, bidirectional):
        gru = _gru_case(2, bidirectional, True)
        model = GruQatModel.from_torch(gru)
        x, lengths = features(4, 6, 3), torch.tensor([3, 6, 1, 4])
        packed, h_n = gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        ref, _ = pad_packed_sequence(packed, batch_first=True)
        mask = (torch.arange(6) < lengths[:, None]).long()
        out = model(inputs_embeds=x, attention_mask=mask)
        assert (out.last_hidden_state - ref).abs().max() < 1e-5
        assert (out.pooler_output - torch.cat(tuple(h_n[-model.config.num_directions :]), -1)).abs().max() < 1e-5

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("pattern", [[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    def test_masked_steps_are_as_if_they_were_not_there(self, bidirectional, pattern):
        model = GruQatModel.from_torch(_gru_case(2, bidirectional, True))
        x, mask = features(1, 6, 3), torch.tensor([pattern])
        out = model(inputs_embeds=x, attention_mask=mask)
        real = mask[0].bool()
        assert out.last_hidden_state[:, ~real].abs().max() == 0 if (~real).any() else True
        if real.any():
            ref = model(inputs_embeds=x[:, real])
            assert (out.last_hidden_state[:, real] - ref.last_hidden_state).abs().max() < 1e-6
            assert (out.pooler_output - ref.pooler_output).abs().max() < 1e-6
        else:
            assert out.pooler_output.abs().max() == 0

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_to_torch_and_back(self, bidirectional, bias):
        gru = _gru_case(2, bidirectional, bias)
        again = GruQatModel.from_torch(gru).to_torch()
        assert again.batch_first and again.bidirectional == bidirectional and again.num_layers == 2
        assert list(again.state_dict()) == list(gru.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), gru.state_dict().values()))
        model = small_model(head=False, structure_hidden="dense", dropout=0.25)
        assert model.to_torch(batch_first=False).dropout == 0.25

    def test_dtype_and_mode_follow(self):
        gru = _gru_case(1, False, True).double().eval()
        model = GruQatModel.from_torch(gru, num_labels=5)
        assert model.dtype == torch.float64 and not model.training and model.config.num_labels == 5

    def test_to_torch_refuses(self):
        with pytest.raises(ValueError, match="dense"):
            small_model(head=False, structure_hidden="circulant").to_torch()
        with pytest.raises(ValueError, match="dequantize"):
            in_state(small_model(head=False), "frozen").to_torch()
        with pytest.raises(ValueError, match=r"nn\.GRU"):
            GruQatModel.from_torch(nn.LSTM(3, 5))


class TestForward:
    def test_shapes(self):
        model = small_model(head=False, bidirectional=True)
        out = model(inputs_embeds=features(), output_hidden_states=True)
        assert out.last_hidden_state.shape == (4, 6, 32)
        assert out.pooler_output.shape == (4, 32)
        assert out.past_key_values is None
        assert [tuple(h.shape) for h in out.hidden_states] == [(4, 6, 8), (4, 6, 32), (4, 6, 32)]
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert small_model(head=False)(inputs_embeds=features()).hidden_states is None

    def test_tuple(self):
        out = small_model(head=False)(inputs_embeds=features(), return_dict=False)
        assert isinstance(out, tuple) and out[0].shape == (4, 6, 16) and isinstance(out[1], GruQatCache)

    def test_token_ids(self):
        model = small_model(head=False, vocab_size=11, pad_token_id=0)
        ids = torch.randint(1, 11, (3, 5))
        embeds = model.get_input_embeddings()(ids)
        assert model.main_input_name == "input_ids"
        assert torch.equal(model(input_ids=ids).last_hidden_state, model(inputs_embeds=embeds).last_hidden_state)
        assert model.get_input_embeddings().weight[0].abs().max() == 0
        model.resize_token_embeddings(20)
        assert model.config.vocab_size == 20 and model(input_ids=ids + 9).last_hidden_state.shape == (3, 5, 16)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "neither"),
            ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "inputs_embeds": features()}, "both"),
            ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "vocab_size"),
            ({"inputs_embeds": features(size=7)}, "inputs_embeds"),
            ({"inputs_embeds": features()[0]}, "inputs_embeds"),
            ({"inputs_embeds": features()[:, :0]}, "time steps"),
            ({"inputs_embeds": features(), "attention_mask": torch.ones(4, 5)}, "attention_mask"),
            ({"inputs_embeds": features(), "attention_mask": torch.ones(4, 7)}, "attention_mask"),
            ({"inputs_embeds": features(), "attention_mask": torch.ones(3, 6)}, "attention_mask"),
            ({"inputs_embeds": features(), "attention_mask": torch.ones(4, 1, 1, 6)}, "attention_mask"),
            ({"inputs_embeds": features(), "past_key_values": torch.zeros(2, 3, 16)}, "past_key_values"),
            ({"inputs_embeds": features(), "past_key_values": [1]}, "past_key_values"),
        ],
    )
    def test_refuses(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            small_model(head=False)(**inputs)

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_every_structure_trains(self, kind):
        model = small_model(structure_hidden=KINDS[kind], num_hidden_layers=1)
        model.train()(inputs_embeds=features(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_counts_parameters(self):
        model = small_model(num_hidden_layers=1)
        assert model.num_parameters() == 3 * 16 * (16 + 8 + 2) + 3 * 16 + 3
        assert in_state(model, "frozen").num_parameters() == 3 * 16 * 2 + 3

    def test_a_model_without_parameters_has_a_device(self):
        model = in_state(small_model(head=False, bias=False), "frozen")
        assert next(model.parameters(), None) is None
        assert model.device == torch.device("cpu") and model.dtype == torch.float32
        assert small_model(head=False).to(torch.bfloat16).dtype == torch.bfloat16


class TestHead:
    @pytest.mark.parametrize(
        ("labels", "num_labels", "kind", "reference"),
        [
            (torch.tensor([0, 1, 2, 1]), 3, "single_label_classification", nn.CrossEntropyLoss()),
            (torch.rand(4, 3).round(), 3, "multi_label_classification", nn.BCEWithLogitsLoss()),
            (torch.rand(4), 1, "regression", lambda logits, y: nn.functional.mse_loss(logits[:, 0], y)),
        ],
    )
    def test_losses(self, labels, num_labels, kind, reference):
        model = small_model(num_labels=num_labels)
        out = model(inputs_embeds=features(), labels=labels)
        assert model.config.problem_type == kind
        assert torch.allclose(out.loss, reference(out.logits, labels))
        assert out.logits.shape == (4, num_labels)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_reads_the_state_of_the_last_real_step(self, bidirectional):
        model = small_model(bidirectional=bidirectional)
        x, lengths = features(), [2, 6, 5, 1]
        mask = torch.zeros(4, 6)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        together = output_of(model, x, attention_mask=mask)
        alone = torch.cat([output_of(model, x[row : row + 1, :length]) for row, length in enumerate(lengths)])
        assert (together - alone).abs().max() < 1e-6


class TestCache:
    @pytest.mark.parametrize("state", ["float", "qat", "frozen"])
    @pytest.mark.parametrize("cuts", [[1, 2], [3], [1, 2, 3, 4, 5]])
    def test_chunks_equal_the_whole(self, state, cuts):
        model = in_state(small_model(head=False, structure_hidden=KINDS["monarch"]), state)
        x = features()
        with torch.no_grad():
            whole = model(inputs_embeds=x)
            cache, outs = None, []
            for chunk in x.tensor_split(cuts, dim=1):
                out = model(inputs_embeds=chunk, past_key_values=cache)
                cache = out.past_key_values
                outs.append(out.last_hidden_state)
        exact = state != "float"
        same = torch.equal if exact else (lambda a, b: torch.allclose(a, b, atol=1e-6))
        assert same(torch.cat(outs, 1), whole.last_hidden_state)
        assert same(cache.state, whole.past_key_values.state)
        assert cache.get_seq_length() == 6 and cache.state.dtype == torch.float32

    def test_is_brought_up_to_date_in_place(self):
        model, x = small_model(head=False), features()
        first = model(inputs_embeds=x)
        before = first.past_key_values.state
        second = model(inputs_embeds=x, past_key_values=first.past_key_values)
        assert second.past_key_values is first.past_key_values and second.past_key_values.state is not before
        untouched = GruQatCache(before)
        third = model(inputs_embeds=x, past_key_values=untouched, use_cache=False)
        assert third.past_key_values is None and untouched.state is before
        assert torch.equal(third.last_hidden_state, second.last_hidden_state)
        assert torch.equal(model(inputs_embeds=x, past_key_values=before).last_hidden_state, second.last_hidden_state)

    def test_mask_may_reach_back(self):
        model, x = small_model(head=False), features()
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(4, 6)
        whole = model(inputs_embeds=x, attention_mask=mask)
        first = model(inputs_embeds=x[:, :3], attention_mask=mask[:, :3])
        second = model(inputs_embeds=x[:, 3:], attention_mask=mask, past_key_values=first.past_key_values)
        assert torch.allclose(second.last_hidden_state, whole.last_hidden_state[:, 3:], atol=1e-6)

    @pytest.mark.parametrize(
        "inputs", [{"use_cache": True}, {"past_key_values": torch.zeros(4, 4, 16)}, {"past_key_values": GruQatCache()}]
    )
    def test_bidirectional_models_refuse(self, inputs):
        with pytest.raises(ValueError, match="bidirectional"):
            small_model(head=False, bidirectional=True)(inputs_embeds=features(), **inputs)

    def test_batch_operations(self):
        state = torch.arange(6.0).view(1, 3, 2)
        cache = GruQatCache(state, 4)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert torch.equal(cache.state, state[:, [2, 0, 0]])
        cache.batch_repeat_interleave(2)
        assert cache.state.shape == (1, 6, 2)
        cache.batch_select_indices(torch.tensor([0]))
        assert torch.equal(cache.to(torch.float64).state, state[:, [2]].double())
        assert cache.detach().get_seq_length() == 4
        cache.reset()
        assert cache.state is None and cache.get_seq_length() == 0
        cache.batch_repeat_interleave(2)
        assert "None" in repr(cache)


def test_initialisation_depends_on_the_seed_only():
    a, b, c = small_model(seed=3), small_model(seed=3), small_model(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))
    bound = 16**-0.5
    assert all(p.abs().max() <= bound for p in a.model.stack.parameters())
