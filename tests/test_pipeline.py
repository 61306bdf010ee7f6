"""transformers' speech recognition pipeline takes a kvspn model for a Whisper: what it gives or refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)

from kvspn.models import WhisperM2MConfig
from kvspn.models.folder import open_model
from support.tiny import WINDOW_SECONDS, save_model, save_whisper, sound

Pipeline = AutomaticSpeechRecognitionPipeline
SAID = {"language": "de", "task": "transcribe", "max_new_tokens": 10, "num_beams": 1}
SHORT, OTHER, LONG = sound(1.5), sound(WINDOW_SECONDS, 1), sound(7.3, 2)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline]:
    """Of the same Whisper: kvspn's model, and transformers' own."""
    folder = save_whisper(tmp_path_factory.mktemp("whisper"))
    model, processor = open_model(folder, torch.float32)
    ours = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    theirs = {**ours, "feature_extractor": WhisperFeatureExtractor.from_pretrained(folder)}
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    kind = "automatic-speech-recognition"
    return pipeline(kind, model=model, **ours), pipeline(kind, model=whisper, **theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("audio", "options"),
    [
        (SHORT, {}),
        ([SHORT, OTHER, SHORT], {"batch_size": 2}),
        (LONG, {"chunk_length_s": WINDOW_SECONDS}),
        ([LONG, SHORT], {"chunk_length_s": 1.5, "stride_length_s": (0.5, 0.25), "batch_size": 3}),
        (SHORT, {"generate_kwargs": {**SAID, "task": "translate"}}),
        (SHORT, {"generate_kwargs": {**SAID, "max_new_tokens": 3}}),
    ],
    ids=["one", "a batch", "long", "long in batches", "a task", "a limit"],
)
def test_texts_are_those_of_transformers(pipelines: Any, audio: Any, options: dict[str, Any]) -> None:
    ours, theirs = (each(audio, **{"generate_kwargs": dict(SAID), **options}) for each in pipelines)
    assert ours == theirs
    assert all(each["text"] for each in (ours if isinstance(ours, list) else [ours]))


def test_long_audio_is_heard_to_its_end(pipelines: Any) -> None:
    """The text of chunks without overlap is that of the chunks."""
    heard: Callable[..., Any] = pipelines[0]
    options = {"generate_kwargs": SAID}
    chunks = [heard(LONG[i : i + 32_000], **options)["text"] for i in range(0, len(LONG), 32_000)]
    whole = heard(LONG, chunk_length_s=WINDOW_SECONDS, stride_length_s=0, **options)["text"]
    assert len(chunks) == 4 and whole.endswith(chunks[-1])


def test_times_of_segments(tmp_path: Path) -> None:
    """Those of the tokens."""
    model, processor = open_model(save_whisper(tmp_path, timestamps=True), torch.float32)
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    recognise = pipeline("automatic-speech-recognition", model=model, **parts)
    said = {"language": "de", "task": "transcribe"}
    short = recognise(SHORT, return_timestamps=True, generate_kwargs=said)
    features = processor(SHORT, sampling_rate=16_000).input_features
    tokens = model.generate(features, return_timestamps=True, **said)[0].tolist()
    zero = processor.tokenizer.convert_tokens_to_ids("<|0.00|>")
    times = [(token - zero) / 50 for token in tokens if token >= zero]
    assert short["chunks"] and short["chunks"][0]["timestamp"][0] == pytest.approx(times[0])
    assert short["text"] == "".join(chunk["text"] for chunk in short["chunks"])


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline]:
    """Of a Whisper with timestamps and alignment heads; each window is decoded once, by transformers' too."""
    folder = save_whisper(tmp_path_factory.mktemp("timed"), timestamps=True)
    model, processor = open_model(folder, torch.float32)
    ours = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    theirs = {**ours, "feature_extractor": WhisperFeatureExtractor.from_pretrained(folder)}
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    whisper.generation_config.force_unique_generate_call = True
    for each in (model, whisper):
        each.generation_config.alignment_heads = [[0, 1], [2, 0], [3, 1]]
    kind = "automatic-speech-recognition"
    return pipeline(kind, model=model, **ours), pipeline(kind, model=whisper, **theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"return_language": True}, {"return_timestamps": True}])
def test_languages_and_segments_are_those_of_transformers(timed: Any, options: dict[str, Any]) -> None:
    said = {"task": "transcribe", "num_beams": 1, "max_new_tokens": 12}
    ours, theirs = (each(SHORT, generate_kwargs=dict(said), **options) for each in timed)
    assert ours == theirs
    assert ours["chunks"]


@pytest.mark.filterwarnings("ignore")
def test_times_of_tokens_and_words_are_those_of_transformers(timed: Any) -> None:
    """Of clips of several lengths in a batch; the pipeline's words are what its tokenizer makes of them."""
    audio = [SHORT, OTHER, sound(0.4, 3)]
    extracted = timed[0].feature_extractor(
        audio, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
    )
    said = {**SAID, "max_new_tokens": 24, "return_timestamps": True, "return_token_timestamps": True}
    given = {"input_features": extracted.input_features, "attention_mask": extracted.attention_mask}
    ours, theirs = (each.model.generate(**given, **said) for each in timed)
    first = theirs["sequences"].shape[1] - ours.sequences.shape[1]
    assert torch.equal(ours.sequences, theirs["sequences"][:, first:])
    assert torch.equal(ours.token_timestamps, theirs["token_timestamps"][:, first:])
    found = timed[0](audio, return_timestamps="word", generate_kwargs={**SAID, "max_new_tokens": 24})
    for row, words in enumerate(found):
        output = {"tokens": ours.sequences[row, None].numpy()}
        output["token_timestamps"] = ours.token_timestamps[row, None]
        text, more = timed[0].tokenizer._decode_asr(
            [output], return_timestamps="word", return_language=False, time_precision=0.02
        )
        assert words == {"text": text, **more}
        assert len(words["chunks"]) > 1
    short = timed[0](SHORT, return_timestamps="word", generate_kwargs={**SAID, "max_new_tokens": 1})
    assert "text" in short


@pytest.mark.filterwarnings("ignore")
def test_words_of_long_audio(timed: Any) -> None:
    """They go on from chunk to chunk, and the chunk's words are at the chunk's place."""
    options = {"return_timestamps": "word", "generate_kwargs": {**SAID, "max_new_tokens": 24}}
    found = timed[0](LONG, chunk_length_s=2, stride_length_s=0, batch_size=3, **options)
    last = timed[0](LONG[96_000:], **options)
    ends = [chunk["timestamp"][1] for chunk in found["chunks"]]
    assert found["text"].endswith(last["text"])
    assert ends[-1] == pytest.approx(6 + last["chunks"][-1]["timestamp"][1])
    assert {int(end) // 2 for end in ends} >= {0, 1, 2, 3}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [True, "word"])
def test_audio_longer_than_a_window(timed: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Window after window, each from where the last whole segment ended, as transformers does."""
    monkeypatch.setattr(timed[1].generation_config, "force_unique_generate_call", False)
    said = {"task": "transcribe", "num_beams": 1, "max_new_tokens": 24}
    ours, theirs = (
        q(
            LONG[: 16_000 * 4],
            return_timestamps=kind,
            return_language=kind is True,
            generate_kwargs=dict(said),
        )
        for q in timed
    )
    assert ours == theirs
    assert len(ours["chunks"]) > 3


def test_segments_of_long_audio_are_those_of_transformers(timed: Any) -> None:
    given = timed[0].feature_extractor(
        LONG, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="pt"
    )
    said = {"return_timestamps": True, "return_segments": True, "task": "transcribe", "max_new_tokens": 24}
    ours, theirs = (
        each.model.generate(**given, **said, **more)
        for each, more in zip(timed, ({}, {"force_unique_generate_call": False}), strict=True)
    )
    assert torch.equal(ours["sequences"], theirs["sequences"])
    for one, other in zip(ours["segments"][0], theirs["segments"][0], strict=True):
        assert [float(one[name]) for name in ("start", "end")] == pytest.approx(
            [float(other[name]) for name in ("start", "end")]
        )
        assert torch.equal(one["tokens"], other["tokens"])
        assert torch.equal(one["result"][slice(*one["idxs"])], one["tokens"])


def test_long_rows_are_what_they_are_alone(timed: Any) -> None:
    model, audio = timed[0].model, [LONG, SHORT]
    given = timed[0].feature_extractor(
        audio,
        sampling_rate=16_000,
        padding="longest",
        return_tensors="pt",
        return_attention_mask=True,
    )
    said = {"return_timestamps": True, "return_segments": True, "return_token_timestamps": True}
    whole = model.generate(**given, **said, max_new_tokens=20, language_probabilities=True)
    for row, mask in enumerate(given.attention_mask):
        x = given.input_features[row : row + 1, :, : max(201, int(mask.sum()))]
        alone = model.generate(
            input_features=x, attention_mask=mask[None, : x.shape[-1]], **said, max_new_tokens=20
        )
        count = alone.sequences.shape[1]
        assert torch.equal(whole.sequences[row, :count], alone.sequences[0])
        assert torch.equal(whole.token_timestamps[row, :count], alone.token_timestamps[0])
        assert whole.languages[row] == alone.languages[0] == next(iter(whole.language_probabilities[row]))
        assert whole.stats[row].tokens == alone.total.tokens >= count
    for name, value in (("prompt_ids", [1]), ("draft_tokens", [[1]]), ("log_probs", True)):
        with pytest.raises(ValueError, match=f"^{name} must be left out"):
            model.generate(**given, **said, **{name: value})
    with pytest.raises(ValueError, match=r"^target_language must be one for all rows"):
        model.generate(**given, **said, target_language=["en", "en"])


def test_segments_hold_every_token(timed: Any) -> None:
    model, features = timed[0].model, timed[0].feature_extractor([SHORT, OTHER], sampling_rate=16_000)
    x = torch.tensor(features.input_features)
    said = {**SAID, "return_timestamps": True, "return_segments": True, "max_new_tokens": 60}
    found = model.generate(x, return_token_timestamps=True, **said)
    plain = model.generate(x, **said)
    assert plain.token_timestamps is None and torch.equal(plain.sequences, found.sequences)
    begin = model.generation_config.no_timestamps_token_id + 1
    for row, segments in enumerate(found.segments):
        tokens = torch.cat([each["tokens"] for each in segments]).tolist()
        assert found.sequences[row, : len(tokens)].tolist() == tokens
        times = torch.cat([each["token_timestamps"] for each in segments])
        assert torch.equal(found.token_timestamps[row, : len(tokens)], times)
        assert times.tolist() == sorted(times.tolist())
        assert len(segments) > 1
        for each in segments:
            first, last = each["tokens"][[0, -1]].tolist()
            assert first < begin or float(each["start"]) == pytest.approx((first - begin) / 50)
            assert float(each["end"]) == pytest.approx((last - begin) / 50 if last >= begin else 2)
            assert each["result"][slice(*each["idxs"])].tolist() == each["tokens"].tolist()


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (LONG, {}, "return_timestamps must be True for input_features of more than 200 frames"),
        (LONG, {"chunk_length_s": 3}, "audio must be at most 2 seconds long, the model's window, got 3.0"),
        (SHORT, {"return_timestamps": True}, "the model's vocabulary has no timestamps"),
        (SHORT, {"return_timestamps": "word"}, "the model's vocabulary has no timestamps"),
        (SHORT, {"generate_kwargs": {"num_beams": 3}}, "num_beams must be 1 or left out"),
        (SHORT, {"generate_kwargs": {"language": "xx"}}, "language must be one of"),
        (SHORT, {"generate_kwargs": {"task": "sing"}}, "task must be one of"),
        (SHORT, {"generate_kwargs": {"repetition_penalty": 1.2}}, "repetition_penalty must be"),
        (SHORT, {"generate_kwargs": {"k": 0}}, "k must be"),
    ],
)
def test_what_is_not_honoured_is_refused(
    pipelines: Any, audio: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipelines[0](audio, **options)


def test_drafts_and_a_target_language(tmp_path: Path) -> None:
    """A whisperM2M in its folder; k reaches the draft network."""
    recognise = pipeline("automatic-speech-recognition", model=str(save_model(tmp_path)))
    heard = {
        k: recognise(
            LONG, chunk_length_s=2, generate_kwargs={"language": "en", "target_language": "de", "k": k}
        )
        for k in (1, "inf")
    }
    plain = recognise(
        LONG, chunk_length_s=2, generate_kwargs={"language": "en", "target_language": "de", "draft": False}
    )
    assert heard[1] == plain != heard["inf"]


def test_the_name_that_the_pipeline_sees_is_not_saved(tmp_path: Path) -> None:
    config = WhisperM2MConfig()
    assert config.model_type == "whisper" and WhisperM2MConfig.model_type == "whisper_m2m"
    config.save_pretrained(tmp_path)
    assert '"model_type": "whisper_m2m"' in (tmp_path / "config.json").read_text()
