"""Words with their times: the path through attention, splitting, Whisper's rules, and what looks invented."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers.models.whisper.generation_whisper import _dynamic_time_warping
from typer.testing import CliRunner

import kvspn
from kvspn.cli import app
from kvspn.decoding import alignment
from kvspn.models import convert_whisper
from kvspn.models.folder import open_model
from kvspn.speech.segments import Segment, Word
from kvspn.speech.transcription import Task, transcribe
from kvspn.speech.whisper_model import BatchedInferencePipeline, WhisperModel, _restored
from kvspn.speech.windows import Choice
from kvspn.speech.words import Punctuation, Timing, doubt, ended, give, looks_invented, words
from support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the text of")


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 9), (9, 4), (30, 120)])
def test_the_path_is_the_cheapest(shape: tuple[int, int]) -> None:
    for seed in range(3):
        costs = np.random.default_rng(seed).normal(size=shape)
        costs = costs.round(1) if seed == 2 else costs  # with equal ways
        row, column = alignment.path(costs)
        theirs = _dynamic_time_warping(costs)
        assert (row.tolist(), column.tolist()) == (theirs[0].tolist(), theirs[1].tolist())


def test_tokens_begin_where_they_listen() -> None:
    """Two heads that follow four tokens, beside what every token listens to."""
    begins = [3, 20, 21, 60]
    scores = torch.zeros(2, 4, 200)
    for i, (first, last) in enumerate(zip(begins, [*begins[1:], 100], strict=True)):
        scores[:, i, first:last] = 2.0
    scores[:, :, 70:90] += 9.0
    assert alignment.starts(scores[..., :100].softmax(-1)) == pytest.approx([0.0, 0.4, 0.42, 1.2], abs=0.061)
    assert alignment.starts(scores[:, :1, :2].softmax(-1)) == [0.0]
    found = alignment.starts(torch.randn(3, 17, 40).softmax(-1))
    assert found == sorted(found)
    assert len(found) == 17
    assert max(found) < 0.8


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def spoken(tokenizer: Any, text: str, language: str, step: float = 0.1, **marks: str) -> list[Word]:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    timing = Timing([step * i for i in range(len(tokens) + 1)], [0.5] * len(tokens))
    (found,), usual = words(tokenizer, [tokens], timing, language, Punctuation(**marks))
    assert "".join(word.word for word in found) == text
    assert 0 < usual <= 0.7
    assert all(word.probability == pytest.approx(0.5) for word in found)
    return found


def test_marks_join_their_words(tokenizer: Any) -> None:
    joined = spoken(tokenizer, " Wo ist (der) Bahnhof?", "de")
    assert [word.word for word in joined] == [" Wo", " ist", " (der)", " Bahnhof?"]
    apart = spoken(tokenizer, " Wo ist (der) Bahnhof?", "de", before="", after="")
    assert [word.word for word in apart] == [" Wo", " ist", " (der", ")", " Bahnhof", "?"]
    assert [(word.start, word.end) for word in joined] == [
        (word.start, word.end) for word in apart if word.word[-1] not in ")?"
    ]
    quoted = spoken(tokenizer, " « Wo", "de", before="«")
    assert [word.word for word in quoted] == [" « Wo"]


def test_languages_without_spaces(tokenizer: Any) -> None:
    found = [word.word for word in spoken(tokenizer, "车站在哪里?", "zh")]
    assert len(found) > 1
    assert found[-1].endswith("里?")
    assert len(spoken(tokenizer, "车站在哪里?", "en")) == 1


def test_no_word_reaches_into_the_next_segment(tokenizer: Any) -> None:
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (" Wo", "", "ist. Wo", "?")]
    count = sum(map(len, parts))
    timing = Timing([0.1 * i for i in range(count + 1)], [0.5] * count)
    found, _ = words(tokenizer, parts, timing, "de", Punctuation())
    assert [[word.word for word in part] for part in found] == [[" Wo"], [], ["ist.", " Wo"], ["?"]]
    assert found[3][0].end == pytest.approx(timing.starts[-1])
    assert words(tokenizer, [], Timing([0.0], []), "en", Punctuation()) == ([], 0.0)


def test_characters_that_are_not_whole(tokenizer: Any) -> None:
    cut = [*tokenizer.encode(" Wo", add_special_tokens=False), *tokenizer.encode("鑫")[:1]]
    timing = Timing([0.1 * i for i in range(len(cut) + 1)], [0.5] * len(cut))
    (found,), _ = words(tokenizer, [cut], timing, "zh", Punctuation())
    assert found[-1].end == pytest.approx(timing.starts[-1])


def test_a_pause_belongs_to_no_word(tokenizer: Any) -> None:
    tokens = tokenizer.encode(" Wo ist. Wo", add_special_tokens=False)
    mark = next(i for i, token in enumerate(tokens) if tokenizer.decode([token]) == ".")
    for slow in (mark, mark + 1):
        lengths = [0.2] * len(tokens)
        lengths[slow] = 3.0
        starts = [sum(lengths[:i]) for i in range(len(tokens) + 1)]
        timing = Timing(starts, [1.0] * len(tokens))
        (found,), usual = words(tokenizer, [tokens[: mark + 2]], timing, "de", Punctuation("", ""))
        word = found[-2 if slow == mark else -1]
        begin = starts[slow] if slow == mark else starts[slow + 1] - 2 * usual
        assert (word.start, word.end) == pytest.approx((begin, begin + 2 * usual))
        assert 0 < usual < 0.7


def segment(start: float, end: float, said: list[Word] | None = None) -> Segment:
    return Segment(0, 0, start, end, " text", [], -0.3, 1.2, 0.1, said, 0.0)


def end_to_end(*times: float, probability: float = 0.9) -> list[Word]:
    return [Word(start, end, f" w{i}", probability) for i, (start, end) in enumerate(pairwise(times))]


def test_segments_take_their_words_and_their_times() -> None:
    segments = [segment(0, 2), segment(2, 3), segment(3, 3.5)]
    give(segments, [end_to_end(0.3, 0.7, 1.8), [], end_to_end(1.8, 3.2)], 0.5, 0.0)
    assert [[word.word for word in each.words or []] for each in segments] == [[" w0", " w1"], [], [" w0"]]
    assert (segments[0].start, segments[0].end, segments[1].start, segments[2].end) == (0.3, 1.8, 2, 3.2)
    assert (ended(segments, 1.0), ended(segments[1:2], 1.0)) == (3.2, 1.0)


def test_a_long_word_yields_to_its_segment() -> None:
    (early,) = segments = [segment(2, 3)]
    give(segments, [end_to_end(0.5, 2.4, 3.0)], 0.3, 1.9)
    assert early.words is not None
    assert (early.words[0].start, early.start) == (2.0, 2)
    (late,) = segments = [segment(2, 3)]
    give(segments, [end_to_end(2.0, 2.4, 4.0)], 0.3, 1.9)
    assert late.words is not None
    assert (late.words[-1].end, late.end) == (3.0, 3)


def test_after_a_pause_words_are_short() -> None:
    (first,) = segments = [segment(10, 16)]
    give(segments, [end_to_end(10.0, 13.0, 15.5, 16.0)], 0.4, 2.0)
    assert first.words is not None
    assert [(word.start, word.end) for word in first.words] == [(13.9, 14.7), (14.7, 15.5), (15.5, 16.0)]
    (first,) = segments = [segment(10, 13)]
    give(segments, [end_to_end(10.0, 12.6, 13.0)], 0.4, 2.0)
    assert first.words is not None
    assert first.words[0].start == 11.8
    (first,) = segments = [segment(10, 13)]
    give(segments, [end_to_end(10.0, 12.6, 13.0)], 0.4, 11.5)  # no pause
    assert first.words is not None
    assert first.words[0].start == 10.0


def test_what_looks_invented() -> None:
    def seems(*times: float, probability: float = 0.9) -> bool:
        return looks_invented(segment(0, 1, end_to_end(*times, probability=probability)))

    assert not seems(0, 0.3, 0.6, 0.9)
    assert seems(0, 0.3, 0.6, 0.9, probability=0.1)
    assert seems(0, 0.01, 0.02)
    assert seems(0, 5.5)
    assert not looks_invented(None)
    assert not looks_invented(segment(0, 1, []))


def test_doubt() -> None:
    def said(*times: float, probability: float = 0.9) -> Segment:
        found = end_to_end(*times, probability=probability)
        return segment(times[0], times[-1], found)

    true, false = said(1, 1.4, 1.8), said(10, 10.4, 10.8, probability=0.05)
    window = (0.0, 30.0, 30.0)
    assert doubt([true], 0.0, window, 100.0, 2.0) is None
    assert doubt([true, false], 0.0, window, 100.0, 2.0) == (1, 10)
    assert doubt([true, segment(2, 3, []), false], 0.0, window, 100.0, 2.0) == (2, 10)
    assert doubt([true, false], 0.0, window, 100.0, 9.0) is None  # the silence is too short
    assert doubt([true, false, said(11, 11.4)], 0.0, window, 100.0, 2.0) is None  # speech behind it
    assert doubt([true, false], 0.0, (0.0, 12.0, 30.0), 12.0, 2.0) is None
    assert doubt([true, false], 0.0, (0.0, 13.0, 30.0), 12.0, 2.0) == (1, 12.0)  # to the end
    assert doubt([false, true], 0.0, window, 100.0, 2.0) == (0, 10)  # silence in front
    assert doubt([said(0.5, 0.9, probability=0.05)], 0.0, window, 100.0, 2.0) == (0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> WhisperModel:
    return kvspn.WhisperModel(str(folder), device="cpu")


def letters(text: str) -> str:
    """A random model's bytes are seldom characters, and what they make depends on where they are parted."""
    return "".join(filter(str.isascii, text))


def test_a_recording_to_words(model: WhisperModel) -> None:
    plain = {"language": "de", "temperature": 0.0}
    samples = tiny.sound(5)
    without = list(model.transcribe(samples, **plain)[0])  # type: ignore[arg-type]
    found = list(model.transcribe(samples, word_timestamps=True, **plain)[0])  # type: ignore[arg-type]
    assert found[0].tokens == without[0].tokens
    assert all(each.words is None for each in without)
    for each in found:
        assert each.words
        assert letters("".join(word.word for word in each.words)) == letters(each.text)
        times = [time for word in each.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert each.seek / 100 <= each.start <= times[0] + 0.01
        assert times[-1] <= each.end + 0.01
        assert all(0 < word.probability <= 1 for word in each.words)


@pytest.mark.parametrize("limit", [1, 3, None])
def test_texts_that_are_cut(model: WhisperModel, limit: int | None) -> None:
    """The newest token has not been processed, and so nothing says where it ends: where the sound does."""
    (first, *_), _ = model.transcribe(
        tiny.sound(1.5), "de", temperature=0.0, max_new_tokens=limit, without_timestamps=True,
        word_timestamps=True,
    )  # fmt: skip
    assert first.words is not None
    assert letters("".join(word.word for word in first.words)) == letters(first.text)
    assert first.words[-1].end <= 1.5


def test_clips_in_batches_have_the_words_that_they_have_alone(model: WhisperModel) -> None:
    batched = BatchedInferencePipeline(model)
    clips = [{"start": 0.0, "end": 1.2}, {"start": 1.5, "end": 3.5}, {"start": 3.5, "end": 4.0}]
    found, _ = batched.transcribe(
        tiny.sound(4), "de", clip_timestamps=clips, batch_size=2, word_timestamps=True
    )
    alone = [
        segment
        for clip in clips
        for segment in batched.transcribe(
            tiny.sound(4), "de", clip_timestamps=[clip], batch_size=1, word_timestamps=True
        )[0]
    ]
    assert [[word.word for word in each.words or []] for each in found] == [
        [word.word for word in each.words or []] for each in alone
    ]
    with pytest.raises(ValueError, match="hallucination_silence_threshold must be None where clips"):
        batched.transcribe(
            tiny.sound(1), clip_timestamps=clips[:1], hallucination_silence_threshold=1, word_timestamps=True
        )


def test_a_recording_that_is_silent_around_invented_words(model: WhisperModel) -> None:
    """A random model's words are doubtful: with a threshold of none of its text much is left."""
    plain = {"language": "de", "temperature": 0.0, "word_timestamps": True}
    all_of_it = list(model.transcribe(tiny.sound(6), **plain)[0])  # type: ignore[arg-type]
    less = list(
        model.transcribe(tiny.sound(6), hallucination_silence_threshold=0.01, **plain)[0]  # type: ignore[arg-type]
    )
    assert sum(len(each.words or []) for each in less) < sum(len(each.words or []) for each in all_of_it)


def test_words_of_joined_speech_lie_in_one_stretch() -> None:
    from kvspn.speech.vad import Joined

    joined = Joined([(16_000, 48_000), (80_000, 96_000)])  # 1 to 3 s and 5 to 6 s
    said = [Word(0.5, 1.9, " a", 1.0), Word(1.9, 2.05, " b", 1.0), Word(2.05, 2.5, " c", 1.0)]
    (found,) = _restored(iter([segment(0.5, 2.5, said)]), joined)
    assert found.words is not None
    times = [(word.start, word.end) for word in found.words]
    assert times == [(1.5, 2.9), (2.9, 3.05), (5.05, 5.5)]
    assert (found.start, found.end) == (1.5, 5.5)


def test_heads_of_a_pruned_decoder() -> None:
    whisper = tiny.whisper(tiny.tokenizer())
    whisper.generation_config.alignment_heads = [[0, 1], [2, 0], [3, 1]]
    pruned = convert_whisper(whisper, [0, 3], kvspn_groups=1, kvspn_blocks=1)
    assert pruned.generation_config.alignment_heads == [[0, 1], [1, 1]]
    assert whisper.generation_config.alignment_heads == [[0, 1], [2, 0], [3, 1]]
    assert convert_whisper(whisper, [1]).generation_config.alignment_heads is None


def test_heads_that_no_one_names(model: WhisperModel, folder: Path) -> None:
    assert model.windows.alignment_heads == [(layer, head) for layer in (2, 3) for head in (0, 1)]
    from kvspn.speech.windows import Windows

    opened, processor = open_model(str(folder), torch.float32)
    opened.generation_config.alignment_heads = [[1, 0]]
    windows = Windows(opened, processor)
    assert windows.alignment_heads == [(1, 0)]
    features = windows.features(tiny.sound(1))
    task = Task("de", "transcribe", None, [], Choice((0.0,), word_timestamps=True), windows.frames)
    assert all(each.words for each in transcribe(windows, features, task))


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", tiny.sound(2), 16_000)
    arguments = ["transcribe", str(tmp_path / "clip.wav"), "--model", str(folder), "--from", "de", "--words"]
    result = CliRunner().invoke(app, [*arguments, "--output", "json"])
    assert result.exit_code == 0, result.output
    (document,) = json.loads(result.stdout)
    said = document["segments"][0]["words"]
    assert letters("".join(word["word"] for word in said)) == letters(document["segments"][0]["text"])
    assert set(said[0]) == {"start", "end", "word", "probability"}
    for more in ([], ["--output", "srt"]):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 2
        assert "--output must be json with --words, got" in " ".join(result.output.split())
