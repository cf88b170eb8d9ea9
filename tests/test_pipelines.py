"""transformers' pipelines on saved models, with a tokenizer or a feature extractor beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_helpers import HEADS, STATES, to_state
from model_helpers import small_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTFeatureExtractor,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from gruqat_hf import GruQatModel

pytestmark = pytest.mark.hf

WORDS = ["<pad>", "<unk>", "<eos>", *"the a cat dog sat ran on under mat roof and then".split()]
TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat under a roof and then the cat ran"]


def _tokenizer(side="left"):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side=side
    )


def _text_model(cls, state, path, **fields):
    torch.manual_seed(0)
    config = small_config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, structure_hidden="diagonal", **fields)
    model = cls(config).eval()
    tokenizer = _tokenizer()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    if state != "float":
        model.prepare_qat("int8_state16").calibrate([batch], progress=False)
        model = model.freeze() if state == "frozen" else model
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


@pytest.mark.parametrize("state", STATES)
class TestText:
    def test_generation(self, tmp_path, state):
        model, tokenizer = _text_model(HEADS["lm"], state, tmp_path)
        generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
        options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
        alone = [generate(text, **options)[0]["generated_text"] for text in TEXTS]
        batched = [outs[0]["generated_text"] for outs in generate(TEXTS, batch_size=3, **options)]
        assert alone == batched
        ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert alone[0] == tokenizer.decode(expected, skip_special_tokens=True)

    def test_classification(self, tmp_path, state):
        model, tokenizer = _text_model(HEADS["sequence"], state, tmp_path, id2label={0: "good", 1: "bad", 2: "odd"})
        classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
        results = classify(TEXTS, batch_size=2, top_k=None)
        for text, result in zip(TEXTS, results):
            with torch.no_grad():
                expected = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits[0].softmax(-1)
            scores = {entry["label"]: entry["score"] for entry in result}
            assert torch.allclose(expected, torch.tensor([scores["good"], scores["bad"], scores["odd"]]), atol=1e-6)

    def test_token_classification(self, tmp_path, state):
        model, tokenizer = _text_model(HEADS["token"], state, tmp_path, id2label={0: "O", 1: "B-X", 2: "I-X"})
        tag = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])
        for text, result in zip(TEXTS, tag(TEXTS, batch_size=3)):
            with torch.no_grad():
                logits = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits[0]
            assert [entry["word"] for entry in result] == text.split()
            assert [entry["entity"] for entry in result] == [model.config.id2label[int(i)] for i in logits.argmax(-1)]

    def test_features(self, tmp_path, state):
        model, tokenizer = _text_model(GruQatModel, state, tmp_path)
        extract = pipeline("feature-extraction", model=str(tmp_path), device="cpu", return_tensors=True)
        with torch.no_grad():
            expected = model(**{"input_ids": tokenizer(TEXTS[0], return_tensors="pt").input_ids}).last_hidden_state
        assert torch.equal(extract(TEXTS[0]), expected)


EXTRACTORS = {
    "ast": (lambda: ASTFeatureExtractor(num_mel_bins=8, max_length=20), 8),
    "speech_to_text": (lambda: Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8), 8),
    "seamless": (lambda: SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, stride=2), 16),
    "waveform": (lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True), 1),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", EXTRACTORS)
def test_audio_classification(tmp_path, state, name):
    make, size = EXTRACTORS[name]
    extractor = make()
    torch.manual_seed(0)
    model = HEADS["audio"](small_config(input_size=size, num_labels=3)).eval()
    to_state(model, state).save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu", top_k=3)
    sounds = [np.random.default_rng(seed).normal(size=length).astype(np.float32) for seed, length in enumerate([800, 1600])]
    results = classify([sound.copy() for sound in sounds])
    for sound, result in zip(sounds, results):
        inputs = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].softmax(-1)
        scores = {entry["label"]: entry["score"] for entry in result}
        assert torch.allclose(expected, torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), atol=1e-6)
