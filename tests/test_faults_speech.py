"""Faults from the field: audio dropped past the window, languages heard once, states projected twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, pipeline

from kvspn.engines import backends, engine
from kvspn.engines.base import CachedEngine
from kvspn.models import WhisperM2MFeatureExtractor, WhisperM2MForConditionalGeneration, WhisperM2MProcessor
from kvspn.speech.audio import SAMPLING_RATE
from kvspn.speech.translator import Translator
from kvspn.weights.random import random_decoder
from support.tiny import WINDOW_SECONDS, save_model, save_whisper, sound

READY = [name for name, missing in backends().items() if missing is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows whose encoder states an engine has projected."""
    rows: list[int] = []
    sizes = {"batch": 1, "capacity": 2, "cross_capacity": 1}
    kinds = {type(engine(name, random_decoder(), **sizes)) for name in READY}
    for kind in {base for each in kinds for base in each.__mro__ if "_encode" in vars(base)}:
        once = kind._encode

        def counted(self: Any, row: int, states: torch.Tensor, once: Any = once) -> None:
            rows.append(row)
            once(self, row, states)

        monkeypatch.setattr(kind, "_encode", counted)
    return rows


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("name", READY)
def test_faults_another_prompt_for_the_same_states(name: str, kv: str | None, encoded: list[int]) -> None:
    weights = random_decoder(heads=1, head_dim=16)
    made = engine(name, weights, batch=2, capacity=12, cross_capacity=6, kv=kv)
    with pytest.raises(ValueError, match="encoder_states must be given to the first start"):
        made.start(None, [[1], [2]], eos=-1, max_length=12)
    states = [torch.randn(5, 16), torch.randn(2, 16)]

    def tokens(given: list[torch.Tensor] | None, prompt: list[list[int]]) -> torch.Tensor:
        made.start(given, prompt, eos=-1, max_length=12)
        while not made.finished.all():
            made.step()
        return made.tokens.clone()

    expected = tokens(states, [[1, 2, 3], [4]])
    encoded.clear()
    tokens(states, [[9], [8, 7]])
    assert torch.equal(tokens(None, [[1, 2, 3], [4]]), expected)
    assert encoded == [0, 1]


def test_faults_detection_and_decoding_share_one_encode(folder: Path, encoded: list[int]) -> None:
    model = WhisperM2MForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = WhisperM2MProcessor.from_pretrained(folder)
    features = processor([sound(2, seed) for seed in range(3)], sampling_rate=SAMPLING_RATE).input_features
    found = model.generate(features, return_dict_in_generate=True)
    assert encoded == [0, 1, 2]
    assert torch.equal(model.generate(features, language=found.languages), found.sequences)


def test_faults_a_file_in_two_languages_keeps_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = iter(["it", "de", "it", "it", "it", "it"])
    monkeypatch.setattr("kvspn.models.generation.likely_languages", lambda *_: [{next(spoken): 1.0}])
    # What the engine holds is the chunk's own, which detection would have given it.
    start = CachedEngine.start
    held: list[Any] = []

    def with_states(self: CachedEngine, states: Any, *args: Any, **options: Any) -> None:
        start(self, held[-1] if states is None else states, *args, **options)

    monkeypatch.setattr(CachedEngine, "start", with_states)
    encode = WhisperM2MForConditionalGeneration.encode
    monkeypatch.setattr(
        WhisperM2MForConditionalGeneration,
        "encode",
        lambda *args, **options: held.append(encode(*args, **options)) or held[-1],
    )
    result = Translator.from_folder(folder).translate(sound(5), "de")
    assert result.sources[:3] == ["it", "de", "it"]
    assert (len(result.sources), result.source) == (len(result.chunks), "it")


@pytest.mark.parametrize("clips", [1, 2])
def test_faults_the_processor_cuts_nothing_unasked(folder: Path, clips: int) -> None:
    processor = WhisperM2MProcessor.from_pretrained(folder)
    fits, long = sound(WINDOW_SECONDS), sound(WINDOW_SECONDS + 0.5)
    audio = [fits, long] if clips == 2 else long
    for extract in (processor, processor.feature_extractor):
        extract(fits, sampling_rate=SAMPLING_RATE)
        with pytest.raises(ValueError, match=r"at most 2 seconds long, the model.s window, got 2\.5"):
            extract(audio, sampling_rate=SAMPLING_RATE)
        assert len(extract(audio, sampling_rate=SAMPLING_RATE, truncation=True).input_features) == clips


def test_faults_a_processor_of_whisper_cuts_nothing_either(tmp_path: Path) -> None:
    processor = WhisperM2MProcessor.from_pretrained(save_whisper(tmp_path))
    assert not isinstance(processor.feature_extractor, WhisperM2MFeatureExtractor)
    with pytest.raises(ValueError, match="at most 2 seconds"):
        processor(sound(3), sampling_rate=SAMPLING_RATE)


def test_faults_the_pipeline_drops_no_sample(folder: Path) -> None:
    assert isinstance(AutoFeatureExtractor.from_pretrained(folder), WhisperM2MFeatureExtractor)
    pipe = pipeline("automatic-speech-recognition", model=str(folder))
    options = {"generate_kwargs": {"language": "en"}}
    short, long = sound(WINDOW_SECONDS), np.tile(sound(WINDOW_SECONDS), 2)
    assert pipe(short, **options)["text"]
    together = pipe([short, short[: len(short) // 2]], batch_size=2, **options)
    assert [each["text"] for each in together] == [
        pipe(clip, **options)["text"] for clip in (short, short[: len(short) // 2])
    ]
    with pytest.raises(ValueError, match=r"return_timestamps must be True .* of more than 200 frames"):
        pipe(long, **options)
