"""generate() with a recurrent cache: the tokens of the path without one, in every state."""

from __future__ import annotations

import functools

import pytest
import torch
from head_helpers import STATES, VOCABULARY, head_model, ids
from transformers import set_seed

from gruqat_hf.models import GruQatCache

pytestmark = pytest.mark.hf

NEW = 12


@functools.cache
def _model(state):
    # Sharp enough that sequences differ and beams have something to choose from.
    model = head_model("lm", "float", input_size=16, pad_token_id=0, eos_token_id=VOCABULARY - 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        for layer in model.get_stack().flat_layers():
            layer.weight_hidden.structure.second.mul_(3)
    model.prepare_qat("int8_state16").calibrate([{"input_ids": ids(seed=seed)} for seed in range(3)], progress=False)
    if state == "float":
        return model.freeze().dequantize()
    return model.freeze() if state == "frozen" else model


def _generate(model, x=None, seed=0, **options):
    set_seed(seed)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(x, **options)


def _by_hand(model, x, mask=None):
    """Greedy, reading everything anew for each token."""
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits[:, -1]
        logits[:, VOCABULARY - 1] = -torch.inf
        x = torch.cat([x, logits.argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return x


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.9, "top_k": 10},
    "beams": {"num_beams": 4},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "min_new_tokens": 1},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("state", STATES)
class TestEveryState:
    def test_greedy_is_what_forward_says(self, state):
        model, x = _model(state), ids(3, 5)
        tokens = _generate(model, x)
        assert torch.equal(tokens, _by_hand(model, x))
        assert len({tuple(row[5:].tolist()) for row in tokens}) > 1

    @pytest.mark.parametrize("mode", MODES)
    def test_with_and_without_cache(self, state, mode):
        model, x = _model(state), ids(3, 5)
        assert torch.equal(_generate(model, x, **MODES[mode]), _generate(model, x, use_cache=False, **MODES[mode]))

    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    def test_left_padding(self, state, mode):
        model, rows = _model(state), [ids(1, length, seed=length) for length in (3, 7, 5)]
        padded, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
        for row, x in enumerate(rows):
            padded[row, 7 - x.shape[1] :], mask[row, 7 - x.shape[1] :] = x[0], 1
        for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
            tokens = _generate(model, padded, attention_mask=mask, **MODES[mode], **options)
            for row, x in enumerate(rows):
                alone = _generate(model, x, **MODES[mode])[0, x.shape[1] :]
                assert torch.equal(tokens[row, 7:], alone)

    def test_inputs_embeds(self, state):
        model, x = _model(state), ids(3, 5)
        embeds = model.get_input_embeddings()(x).detach()
        expected = _generate(model, x)
        for options in ({}, {"prefill_chunk_size": 2}, {"num_beams": 2}):
            reference = _generate(model, x, num_beams=2) if "num_beams" in options else expected
            assert torch.equal(_generate(model, inputs_embeds=embeds, **options), reference[:, 5:])
            both = _generate(model, x, inputs_embeds=embeds, **options)
            assert torch.equal(both, reference)

    @pytest.mark.parametrize("size", [1, 2, 4, 5, 100])
    def test_prefill_in_chunks(self, state, size):
        model, x = _model(state), ids(3, 5)
        assert torch.equal(_generate(model, x, prefill_chunk_size=size), _generate(model, x))

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_continues_from_a_cache(self, state, chunk):
        model, x, more = _model(state), ids(3, 5), ids(3, 4, seed=9)
        first = _generate(model, x, return_dict_in_generate=True)
        assert isinstance(first.past_key_values, GruQatCache)
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        longer = torch.cat([first.sequences, more], 1)
        second = _generate(model, longer, past_key_values=first.past_key_values, prefill_chunk_size=chunk)
        assert torch.equal(second, _generate(model, longer))

    def test_a_cache_of_one_prompt_serves_beams(self, state):
        model, x = _model(state), ids(3, 5)
        with torch.no_grad():
            cache = model(input_ids=x[:, :3]).past_key_values
        assert torch.equal(_generate(model, x, past_key_values=cache, num_beams=3), _generate(model, x, num_beams=3))


class TestDetails:
    def test_a_state_may_be_given_as_a_tensor(self):
        model, x = _model("frozen"), ids(3, 5)
        with torch.no_grad():
            state = model(input_ids=x[:, :3]).past_key_values.state
        mask = torch.ones(3, 2, dtype=torch.long)
        tokens = _generate(model, x[:, 3:], attention_mask=mask, past_key_values=state)
        assert torch.equal(tokens[:, 2:], _generate(model, x)[:, 5:])

    def test_stops_at_the_end_token(self):
        model = _model("float")
        x = ids(6, 4)
        tokens = _generate(model, x, do_sample=True, max_new_tokens=60, min_new_tokens=None, temperature=3.0)
        for row in tokens[:, 4:]:
            ends = (row == VOCABULARY - 1).nonzero()
            if len(ends):
                assert (row[int(ends[0]) + 1 :] == 0).all()

    def test_scores_are_the_logits(self):
        model, x = _model("frozen"), ids(2, 5)
        out = _generate(model, x, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
        with torch.no_grad():
            logits = model(input_ids=out.sequences).logits[:, 4:-1]
        assert torch.equal(torch.stack(out.logits, 1), logits)
        assert len(out.hidden_states) == NEW

    def test_without_cache_in_the_config(self):
        # As Trainer leaves it.
        model, x = head_model("lm", use_cache=False), ids(2, 4)
        assert model(input_ids=x).past_key_values is None
        assert torch.equal(_generate(model, x), _generate(model, x, use_cache=False))

    def test_one_step_per_token(self):
        model, steps = _model("frozen"), []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            _generate(model, ids(2, 9))
            _generate(model, ids(2, 9), prefill_chunk_size=4)
        finally:
            hook.remove()
        assert steps == [9, *[1] * (NEW - 1), 4, 4, 1, *[1] * (NEW - 1)]

    def test_the_cache_does_not_grow(self):
        sizes = [
            _generate(_model("frozen"), ids(2, steps), return_dict_in_generate=True).past_key_values.state.numel()
            for steps in (1, 50)
        ]
        assert sizes[0] == sizes[1]

    def test_refuses_chunks_without_a_cache(self):
        with pytest.raises(ValueError, match=r"without a cache|needs a cache"):
            _generate(_model("float"), ids(), use_cache=False, prefill_chunk_size=2)

    def test_refuses_other_caches(self):
        from transformers import DynamicCache

        with pytest.raises(ValueError, match="GruQatCache"):
            _generate(_model("float"), ids(), past_key_values=DynamicCache())

    def test_assisted_decoding_is_refused(self):
        # It would have to take back tokens that the state has read already.
        with pytest.raises(ValueError, match="[Aa]ssisted|stateful"):
            _generate(_model("float"), ids(1), assistant_model=_model("float"))
