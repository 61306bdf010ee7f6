"""Live speech: what becomes stable and when, windows that move, drafts that change nothing, the commands."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from kvspn.cli import app
from kvspn.decoding import DecodeStats
from kvspn.decoding.drafts import GivenDrafts
from kvspn.speech.audio import AudioError, live_audio, load_audio
from kvspn.speech.stream import Stream, Update
from kvspn.speech.whisper_model import WhisperModel
from kvspn.speech.windows import Choice, Heard, Windows
from support import tiny

BEGIN, END = 1000, 999  # the token of 0.00 s, and that of the text's end


def t(seconds: float) -> int:
    return BEGIN + round(seconds / 0.02)


class Scripted:
    """Windows of 4 s whose texts are written down, one an update; samples tell where they are."""

    has_timestamps, begin, frames, frames_per_second, positions = True, BEGIN, 400, 100, 40
    languages = {"en": 1, "de": 2}  # noqa: RUF012
    extractor = SimpleNamespace(hop_length=160)
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=END, target_languages=()))

    def __init__(self, *script: list[int] | Heard) -> None:
        self.script = list(script)
        self.asked: list[tuple[float, float]] = []  # from where to where it listened
        self.drafts: list[list[int]] = []
        self.before: list[list[int]] = []

    def features(self, samples: np.ndarray) -> torch.Tensor:
        self.asked.append((float(samples[0]), float(samples[-1])))
        return torch.zeros(1, 1)

    def encode(self, features: torch.Tensor, keep: bool = False) -> torch.Tensor:
        return features

    def likely(self, states: Sequence[torch.Tensor]) -> list[dict[str, float]]:
        return [{"de": 0.9, "en": 0.1}] * len(states)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in tokens if token < END)

    def prompt(self, language: str, task: str, target: Any, before: Any, *_: Any, **__: Any) -> Any:
        self.before.append(list(before))
        return language, task, target

    def hear(self, states: Any, prompts: Any, by: Choice, seed: int, draft_tokens: Any) -> list[Heard]:
        self.drafts.append(draft_tokens[0])
        said = self.script.pop(0)
        return [said if isinstance(said, Heard) else heard(said)]


def heard(tokens: list[int], **figures: Any) -> Heard:
    plain = {"whole": True, "avg_logprob": -0.3, "compression_ratio": 1.2, "no_speech_prob": 0.1}
    stats = DecodeStats(len(tokens), 1, 0, 0, 0.0)
    return Heard(**{"tokens": tokens, "text": "", "temperature": 0.0, "stats": stats, **plain, **figures})


def clock(seconds: float) -> np.ndarray:
    """Samples that tell their own time."""
    return (np.arange(round(seconds * 16_000)) / 16_000).astype(np.float32)


def run(windows: Scripted, seconds: float, every: float = 1.0, **options: Any) -> list[Update]:
    stream = Stream(windows, "en", **options)  # type: ignore[arg-type]
    sound, size = clock(seconds), round(every * 16_000)
    updates = [stream.feed(sound[i : i + size]) for i in range(0, len(sound), size)]
    return [*updates, stream.finish()]


def brief(updates: list[Update]) -> list[tuple[str, str]]:
    return [(update.stable, update.unstable) for update in updates]


def test_a_segment_that_two_updates_give_alike_is_stable() -> None:
    windows = Scripted(
        [t(0), 1, t(0.9)],
        [t(0), 1, 2, t(1.4)],  # another text
        [t(0), 1, 2, t(1.4), t(1.5), 3],  # as before: stable
        [t(0), 3, 4, t(2.0)],
    )
    updates = run(windows, 3)
    assert brief(updates) == [("", " w1"), ("", " w1 w2"), (" w1 w2", " w3"), (" w3 w4", "")]
    (segment,) = updates[2].segments
    assert (segment.id, segment.start, segment.end, segment.tokens) == (1, 0, 1.4, [t(0), 1, 2, t(1.4)])
    (last,) = updates[3].segments
    assert (last.id, last.start, last.seek) == (2, 1.4, 140)
    # The window begins where the stable segment ends; what follows it is the draft, in the window's time.
    assert [start for start, _ in windows.asked] == pytest.approx([0, 0, 0, 1.4])
    assert windows.drafts == [
        [END],  # a guess that nothing is said
        [t(0), 1, t(0.9), END],
        [t(0), 1, 2, t(1.4), END],
        [t(0.1), 3, END],
    ]
    assert windows.before[-1] == [t(0), 1, 2, t(1.4)]


def test_times_are_part_of_the_agreement_and_lie_within_what_was_heard() -> None:
    later = [[t(0), 1, t(0.8)], [t(0), 1, t(1.6)], [t(0), 1, t(2.4)], [t(0), 1, t(2.4)], []]
    assert [update.stable for update in run(Scripted(*later), 3.6, every=0.9)] == ["", "", "", " w1", ""]
    ahead = [[t(0), 1, t(2.8)]] * 5  # which the first of two has heard after 2.7 s only in part
    assert [update.stable for update in run(Scripted(*ahead), 3.6, every=0.9)] == ["", "", "", "", " w1"]


def test_the_number_that_must_agree() -> None:
    one = [t(0), 1, t(0.5), t(0.5)]
    for agreement, stable in ((1, [" w1", "", ""]), (3, ["", "", " w1"])):
        windows = Scripted(*[one] * agreement, *[[]] * (4 - agreement))
        assert [update.stable for update in run(windows, 3, agreement=agreement)][:3] == stable


def test_every_sample_is_in_a_window() -> None:
    """Also where a window fills up without a segment, and where a block is longer than one."""
    for every in (0.7, 1.0, 9.5):
        windows = Scripted(*[[t(0), 1, t(1.0), t(1.2), 2]] * 100)
        updates = run(windows, 9.5, every=every)
        ends = [0.0]
        for one, other in pairwise(windows.asked):
            assert other[0] <= max(ends[-1], one[1]) + 1e-3
            ends.append(max(ends[-1], one[1]))
        assert windows.asked[0][0] == 0
        assert windows.asked[-1][1] == clock(9.5)[-1]
        assert updates[-1].stable
        assert not updates[-1].unstable
    full = Scripted(*[[t(0), 1]] * 6)
    assert brief(run(full, 4.5)) == [("", " w1")] * 3 + [(" w1", ""), ("", " w1"), (" w1", "")]
    assert [start for start, _ in full.asked] == pytest.approx([0, 0, 0, 0, 4, 4])


def test_silence_has_no_text_and_the_text_cut_short_is_warned_of() -> None:
    silent = heard([t(0), 1, t(0.5)], no_speech_prob=0.9, avg_logprob=-2.0)
    assert brief(run(Scripted(silent, silent, silent), 2)) == [("", "")] * 3
    with pytest.warns(UserWarning, match=r"^the text of 0\.00 to 1\.00 seconds is cut short after 2 tokens"):
        run(Scripted([], heard([t(0), 1], whole=False)), 1)


def test_languages_tasks_and_what_went_before() -> None:
    windows = Scripted(*[[t(0), 1, t(0.5), t(0.5)]] * 3)
    stream = Stream(windows, initial_prompt=[7], agreement=1, condition_on_previous_text=False)  # type: ignore[arg-type]
    assert stream.feed(clock(1)).language == "de"  # the likeliest
    assert stream.feed(clock(1)).segments[0].id == 2
    assert windows.before == [[7], []]
    asked: list[Any] = []

    def hear(states: Any, prompts: Any, *_: Any, **__: Any) -> list[Heard]:
        asked.extend(prompts)
        return [heard([])]

    windows.hear = hear  # type: ignore[method-assign]
    for options in (
        {"target_language": "English"},
        {"task": "translate"},
        {"language": "en", "task": "transcribe"},
    ):
        Stream(windows, **options).feed(clock(1))  # type: ignore[arg-type]
    assert asked == [("de", "translate", "en"), ("de", "translate", "en"), ("en", "transcribe", None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "ja"}, "language must be one of de, en, got 'ja'"),
        ({"target_language": "de", "language": "en"}, "target_language must be en, the one"),
        (
            {"target_language": "en", "task": "transcribe"},
            "target_language must be None for task 'transcribe'",
        ),
        ({"task": "listen"}, "task must be one of transcribe, translate, got 'listen'"),
        ({"agreement": 0}, r"agreement must be in 1\.\.100, got 0"),
        ({"choice": Choice(word_timestamps=True)}, "choice.word_timestamps must be False"),
        ({"choice": Choice(without_timestamps=True)}, "windows must be a model's with timestamps"),
    ],
)
def test_what_a_stream_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Stream(Scripted(), **options)  # type: ignore[arg-type]
    stream = Stream(Scripted(), "en")  # type: ignore[arg-type]
    for bad in ([0.5], np.zeros((2, 3), np.float32), np.zeros(3, np.int16), np.full(3, np.nan, np.float32)):
        with pytest.raises(ValueError, match=r"^samples must be"):
            stream.feed(bad)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)


@pytest.mark.parametrize("choice", [Choice((0.0,)), Choice((0.7,), best_of=1)], ids=["greedy", "sampled"])
@pytest.mark.filterwarnings("ignore:the text of")
def test_updates_are_those_of_decoding_anew(
    folder: Path, choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, on windows that grow and move, timestamps included."""
    windows = WhisperModel(folder, device="cpu").windows
    hear = Windows.hear
    steps = {"anew": 0, "drafted": 0}

    def both(self: Windows, *arguments: Any, **named: Any) -> list[Heard]:
        draft_tokens = named.pop("draft_tokens")
        (anew,) = hear(self, *arguments, **named)
        (drafted,) = hear(self, *arguments, **named | {"draft_tokens": draft_tokens})
        assert (drafted.tokens, drafted.avg_logprob) == (anew.tokens, anew.avg_logprob)
        assert drafted.stats.drafted
        steps["anew"] += anew.stats.steps
        steps["drafted"] += drafted.stats.steps
        return [drafted]

    monkeypatch.setattr(Windows, "hear", both)
    stream = Stream(windows, "de", choice=choice)
    sound = tiny.sound(5)
    updates = [stream.feed(part) for part in np.array_split(sound, 10)]
    updates.append(stream.finish())
    assert any(update.unstable for update in updates)
    assert [each.id for update in updates for each in update.segments]
    assert steps["drafted"] < 0.9 * steps["anew"]


def test_a_guess_goes_on_where_the_row_meets_it_again() -> None:
    drafts = GivenDrafts([[1, 2, 3, 4, 2, 5], [1], []], 3)
    like = torch.zeros(1, dtype=torch.int32)

    def guess(row: int = 0) -> list[int]:
        finished = [each != row for each in range(3)]
        found = drafts.next(finished, like)
        return [] if found is None else [token for token in found[row].tolist() if token >= 0]

    assert guess() == [1, 2, 3, 4, 2, 5]
    drafts.advance(0, [1, 9])  # 9 instead of 2: nothing to go on from
    assert guess() == []
    drafts.advance(0, [3])
    assert guess() == [4, 2, 5]
    drafts.advance(0, [2])  # without the 4: the nearer 2
    assert guess() == [5]
    drafts.advance(0, [5, 6])
    assert guess() == []
    drafts.advance(0, [1, 9])  # as at the beginning
    assert guess() == [3, 2, 5, 6, 1, 9]
    assert guess(2) == []
    drafts.advance(2, [1, 2, 1, 2])
    assert guess(2) == []
    alone = GivenDrafts([[8]], 1, repeats=False)
    alone.advance(0, [1, 2, 1, 2])
    assert alone.next([False], like) is None


def live(folder: Path, *arguments: object, stdin: bytes = b"") -> Result:
    plain = ["transcribe", "--model", folder, "--from", "de", *arguments]
    return CliRunner().invoke(app, [str(each) for each in plain], input=stdin)


@pytest.mark.filterwarnings("ignore:the text of")
def test_live_prints_what_is_stable(folder: Path, tmp_path: Path) -> None:
    sound = tiny.sound(3)
    soundfile.write(tmp_path / "clip.wav", sound, 16_000, "PCM_16")
    samples = load_audio(tmp_path / "clip.wav")
    stream = Stream(WhisperModel(folder, device="cpu").windows, "de")
    updates = [stream.feed(samples[i : i + 8_000]) for i in range(0, len(samples), 8_000)]
    updates.append(stream.finish())
    segments = [segment for update in updates for segment in update.segments]
    assert segments
    found = live(folder, tmp_path / "clip.wav", "--live", "0.5")
    assert (found.exit_code, found.stdout) == (0, "".join(each.text for each in segments).lstrip() + "\n")
    found = live(folder, tmp_path / "clip.wav", "--live", "0.5", "--output", "txt")
    assert found.stdout == "".join(f"{each.text.strip()}\n" for each in segments)
    found = live(folder, tmp_path / "clip.wav", "--live", "0.5", "--output", "json")
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(line["stable"], line["unstable"]) for line in lines] == brief(updates)
    assert lines[0].keys() == {"stable", "unstable", "language", "segments", "stats"}
    # Of a pipe all that is there is taken at once: here the whole.
    whole = Stream(WhisperModel(folder, device="cpu").windows, "de")
    text = (whole.feed(samples).stable + whole.finish().stable).lstrip()
    content = (tmp_path / "clip.wav").read_bytes()
    assert live(folder, "-", "--live", "30", stdin=content).stdout == text + "\n"
    raw = (samples * 32768).astype("<i2").tobytes()
    assert live(folder, "-", "--live", "30", "--raw", "16000", stdin=raw).stdout == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.wav", "b.wav", "--live", "1"), "--live takes one AUDIO, got 2"),
        (("-", "--live", "1", "--output", "srt"), "--output must be txt or json with --live, got srt"),
        (("-", "--live", "1", "--words"), "--words must be left out with --live"),
        (("-", "--live", "1", "--strict"), "--strict must be left out with --live"),
        (("-", "--live", "1", "--prefix", "Wo"), "--prefix must be left out with --live"),
        (("a.wav", "--live", "1", "--raw", "8000"), "--raw must be left out for a.wav, which is no pipe"),
        (("-", "--raw", "8000"), "--raw must be left out without --live, got 8000"),
        (("-", "--live", "1"), "not readable as audio"),
        (("missing.wav", "--live", "1"), "missing.wav"),
    ],
)
def test_live_refuses(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = live(folder, *arguments, stdin=b"no audio at all")
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())


def test_what_a_pipe_has_comes_at_once() -> None:
    """And not when a buffer is full, or the pipe closed."""
    reading, writing = os.pipe()
    samples = (tiny.sound(1) * 32767).astype("<i2")
    blocks: list[np.ndarray] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as source:
            for block in live_audio(source, 16_000):
                blocks.append(block)

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writing, "wb", buffering=0) as target:
        target.write(samples[:7_900].tobytes())
        deadline = time.monotonic() + 10
        packet = 1_024  # samples, which FFmpeg waits for
        while sum(map(len, blocks)) <= 7_900 - packet and time.monotonic() < deadline:
            time.sleep(0.01)
        come = sum(map(len, blocks))
        target.write(samples[7_900:].tobytes())
    thread.join()
    assert come > 7_900 - packet
    assert np.array_equal(np.concatenate(blocks), samples / np.float32(32768))


def test_a_pipe_of_any_rate_and_what_is_lost_of_it(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.flac", np.stack([tiny.sound(2, i, 44_100) for i in (0, 1)], 1), 44_100)
    content = (tmp_path / "clip.flac").read_bytes()
    assert np.array_equal(
        np.concatenate(list(live_audio(io.BytesIO(content)))), load_audio(tmp_path / "clip.flac")
    )
    lost: list[str] = []
    damaged = tiny.damaged(tmp_path / "damaged.mp3").read_bytes()
    list(live_audio(io.BytesIO(damaged), on_loss=lost.append))
    assert lost
    assert "audio: damaged" in lost[0]
    with pytest.raises(AudioError, match=r"^audio: not readable as audio"):
        next(live_audio(io.BytesIO(b"nothing")))
