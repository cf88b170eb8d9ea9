"""model.stream(): a sequence read in pieces gives what it gives as a whole."""

from __future__ import annotations

import gc

import pytest
import torch
from head_helpers import HEADS, STATES, VOCABULARY, head_model, ids, inputs_of, run, to_state
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import KINDS, features, small_config, small_model
from safetensors.torch import load_file, save_file

from gruqat_hf import GruQatModel
from gruqat_hf.models import GruQatStream

pytestmark = pytest.mark.hf


def _same(a, b, state):
    return torch.equal(a, b) if state != "float" else bool((a - b).abs().max() < 1e-5)


def _read(stream, x, cuts):
    """``x`` in chunks of the sizes ``cuts``; 0 is a single step without a time dimension."""
    outs, at = [], 0
    while at < x.shape[1]:
        size = cuts[len(outs) % len(cuts)]
        out = stream(x[:, at]) if size == 0 else stream(x[:, at : at + size])
        outs.append(out.unsqueeze(1) if size == 0 else out)
        at += max(size, 1)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("state", STATES)
class TestEqualsTheWhole:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_structure(self, state, kind):
        model = to_state(small_model(head=False, structure_hidden=KINDS[kind]), state)
        x = features(3, 11)
        whole = run(model, x)
        for cuts in ([0], [1, 0, 4], [11]):
            assert _same(_read(model.stream(3), x, cuts), whole, state)

    @pytest.mark.parametrize("head", ["token", "lm", "frame"])
    def test_heads_on_every_step(self, state, head):
        model = head_model(head, state)
        x = inputs_of(model, 3, 11)
        whole = run(model, x)
        for cuts in ([0], [3, 0, 0]):
            assert _same(_read(model.stream(3), x, cuts), whole, state)

    @pytest.mark.parametrize("head", ["sequence", "audio", "series"])
    def test_heads_on_the_last_state(self, state, head):
        model = head_model(head, state)
        x, stream = inputs_of(model, 3, 8), None
        stream = model.stream(3)
        for at in range(5):
            assert _same(stream(x[:, at]), run(model, x[:, : at + 1]), state)
        assert _same(stream(x[:, 5:]), run(model, x), state)

    def test_embeddings_and_one_channel(self, state):
        lm, series = head_model("lm", state), head_model("series", state, input_size=1)
        embeds = lm.get_input_embeddings()(ids(2, 5)).detach()
        assert _same(_read(lm.stream(2), embeds, [2]), run(lm, ids(2, 5)), state)
        x = features(2, 5, 1)
        assert _same(series.stream(2)(x), run(series, x), state)

    def test_goes_on_after_saving(self, state, tmp_path):
        model = head_model("token", state)
        x, stream = features(2, 10), model.stream(2)
        stream(x[:, :4])
        save_file(stream.state_dict(), tmp_path / "stream.safetensors")
        rest = stream(x[:, 4:])
        again = model.stream(2)
        again.load_state_dict(load_file(tmp_path / "stream.safetensors"))
        assert again.seen_steps == 4
        assert torch.equal(again(x[:, 4:]), rest) and again.seen_steps == 10
        assert _same(rest, run(model, x)[:, 4:], state)


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    steps=st.integers(1, 20),
    batch=st.integers(1, 3),
    recipe=st.sampled_from(["int8_state16", "int8_per_channel", "int4_per_group_64", "int8_hidden"]),
    state=st.sampled_from(["qat", "frozen"]),
)
def test_any_cuts(cuts, steps, batch, recipe, state):
    model = head_model("token", state, recipe)
    x = features(batch, steps, seed=steps)
    assert torch.equal(_read(model.stream(batch), x, cuts), run(model, x))


class TestRows:
    def test_masked_rows_hold_their_state(self):
        model = head_model("token", "frozen")
        x, stream = features(2, 6), model.stream(2)
        outs = [stream(x[:, at], attention_mask=torch.tensor([1, at % 2])) for at in range(6)]
        whole = run(model, x)
        assert torch.equal(torch.stack(outs, 1)[0], whole[0])
        alone = run(model, x[1:, 1::2])
        assert torch.equal(torch.stack(outs[1::2], 1)[1], alone[0])

    def test_masked_values_of_a_series(self):
        model = head_model("series", "frozen")
        x, stream = features(2, 4), model.stream(2)
        stream(x[:, :2])
        out = stream(x[:, 2], attention_mask=torch.tensor([1, 0]))
        assert torch.equal(out[1], run(model, x[1:, :2])[0])

    def test_rows_start_anew(self):
        model = head_model("token", "frozen")
        x, stream = features(3, 6), model.stream(3)
        stream(x)
        stream.reset(torch.tensor([False, True, False]))
        outs, fresh = stream(x), run(model, x)
        assert torch.equal(outs[1], fresh[1]) and not torch.equal(outs[0], fresh[0])
        stream.reset(torch.tensor([0, 2]))
        outs = stream(x)
        assert torch.equal(outs[0], fresh[0]) and not torch.equal(outs[1], fresh[1])
        stream.reset()
        assert stream.seen_steps == 0 and torch.equal(stream(x), fresh)

    def test_streams_of_a_model_are_independent(self):
        model = head_model("lm", "frozen")
        one, two = model.stream(2), model.stream(2)
        x, y = ids(2, 5, 1), ids(2, 5, 2)
        outs = [(one(x[:, at]), two(y[:, at])) for at in range(5)]
        assert torch.equal(torch.stack([a for a, _ in outs], 1), run(model, x))
        assert torch.equal(torch.stack([b for _, b in outs], 1), run(model, y))

    def test_what_is_saved_does_not_change(self):
        stream = head_model("token", "frozen").stream(1)
        stream(features(1, 3))
        saved = stream.state_dict()
        before = saved["state"].clone()
        stream(features(1, 3))
        assert torch.equal(saved["state"], before)
        stream.load_state_dict(saved)
        saved["state"].zero_()
        assert torch.equal(stream.state_dict()["state"], before)

    def test_no_gradients(self):
        assert not head_model("token").stream(1)(features(1, 3)).requires_grad


class TestRefuses:
    @pytest.mark.parametrize("head", [None, *(head for head in HEADS if head != "lm")])
    def test_bidirectional(self, head):
        model = GruQatModel(small_config(bidirectional=True)) if head is None else head_model(head, bidirectional=True)
        with pytest.raises(ValueError, match="bidirectional=False"):
            model.stream()

    @pytest.mark.parametrize("batch_size", [0, -1, 1.5, "2", True, None])
    def test_batch_size(self, batch_size):
        with pytest.raises(ValueError, match=r"stream\(batch_size\)"):
            small_model(head=False).stream(batch_size)

    def test_training(self):
        stream = small_model(head=False).train().stream(1)
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            stream(features(1, 1))

    @pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 4, 9), (2, 1, 1, 8)])
    def test_shapes(self, shape):
        stream = small_model(head=False).stream(2)
        with pytest.raises(ValueError, match=r"\[B, T|\[B, T, 8\]"):
            stream(torch.randn(shape))
        assert stream.seen_steps == 0

    def test_ids(self):
        with pytest.raises(ValueError, match="no vocabulary"):
            small_model(head=False).stream(1)(ids(1, 2))
        with pytest.raises(ValueError, match=r"ids \[B\] or \[B, T\] with B = 2"):
            head_model("lm").stream(2)(ids(3, 2))

    def test_a_failed_call_changes_nothing(self):
        stream = head_model("lm", "frozen").stream(2)
        stream(ids(2, 3))
        before = stream.state_dict()
        with pytest.raises(IndexError):
            stream(torch.full((2, 2), VOCABULARY))
        assert torch.equal(stream.state_dict()["state"], before["state"]) and stream.seen_steps == 3

    def test_states_that_do_not_fit(self):
        stream = head_model("token", "frozen").stream(2)
        good = stream.state_dict()
        for bad, message in [
            ({"state": good["state"]}, "state and seen_steps"),
            ({**good, "more": good["state"]}, "state and seen_steps"),
            ({}, "nothing"),
            ({**good, "state": good["state"][:, :1]}, r"\[2, 2, 16\].*got \[2, 1, 16\]"),
            ({**good, "state": good["state"].double()}, "float64"),
            ({**good, "state": good["state"] * torch.nan}, "NaN"),
            ({**good, "seen_steps": torch.tensor(-1)}, "at least 0, got -1"),
        ]:
            with pytest.raises(ValueError, match=message):
                stream.load_state_dict(bad)

    def test_names_itself(self):
        stream = head_model("lm").stream(2)
        stream(ids(2, 3))
        assert isinstance(stream, GruQatStream)
        assert repr(stream) == "GruQatStream(GruQatForCausalLM, batch_size=2, seen_steps=3)"


def _living() -> tuple[int, int]:
    """Number of Python's objects, and of tensors among them."""
    gc.collect()
    things = gc.get_objects()
    return len(things), sum(issubclass(type(thing), torch.Tensor) for thing in things)


@pytest.mark.parametrize("state", ["float", "frozen"])
def test_nothing_piles_up(state):
    stream, x = head_model("token", state).stream(1), features(1, 64)
    counts = []
    for _ in range(2):
        for at in range(200):
            stream(x[:, at % 64])
        counts.append(_living())
    assert counts[1][0] - counts[0][0] < 50
    assert counts[1][1] <= counts[0][1]  # fewer, if what other tests left behind goes meanwhile


@pytest.mark.slow
@pytest.mark.parametrize("state", ["float", "frozen"])
def test_a_million_steps(state):
    import resource

    model = head_model("token", state)
    stream, x = model.stream(1), features(1, 1000)
    used = []
    for turn in range(1000):
        if turn % 100 == 0:
            for at in range(1000):
                stream(x[:, at])
            used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        else:
            out = stream(x)
    assert stream.seen_steps == 1_000_000 and out.isfinite().all()
    assert used[-1] - used[1] < 20_000  # KiB
