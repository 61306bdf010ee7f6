"""Moving through a recording: tokens to segments, windows that follow each other, fallback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from kvspn.decoding import DecodeStats, compression_ratio
from kvspn.models.folder import open_model
from kvspn.speech.segments import Segment, split
from kvspn.speech.transcription import Task, transcribe, transcribe_batch
from kvspn.speech.windows import Choice, Heard, Prompt, Windows, is_silence
from support import tiny

BEGIN = 1000  # the token of 0.00 s


def t(seconds: float) -> int:
    return BEGIN + round(seconds / 0.02)


def test_a_segment_lies_between_the_timestamps_of_two_pairs() -> None:
    tokens = [t(0), 1, 2, t(1.5), t(2), 3, t(4), t(4), 4, 5]
    pieces, heard = split(tokens, BEGIN, 30)
    assert pieces == [(0.0, 1.5, [t(0), 1, 2, t(1.5)]), (2.0, 4.0, [t(2), 3, t(4)])]
    assert heard == 4.0  # what was cut off by the window comes again in the next


def test_a_single_timestamp_at_the_end_says_that_nothing_follows() -> None:
    tokens = [t(0), 1, t(1.5), t(2), 3, t(4)]
    pieces, heard = split(tokens, BEGIN, 12.5)
    assert [piece[:2] for piece in pieces] == [(0.0, 1.5), (2.0, 4.0)]
    assert heard == 12.5


def test_a_pair_at_the_end_begins_the_next_window_there() -> None:
    pieces, heard = split([t(1), 1, t(6), t(6)], BEGIN, 30)
    assert pieces == [(1.0, 6.0, [t(1), 1, t(6)])]
    assert heard == 6.0


@pytest.mark.parametrize(
    ("tokens", "end"),
    [([1, 2], 8.0), ([t(0), 1, 2], 8.0), ([t(0), 1, t(5)], 5.0), ([t(0.5), 1], 0.5), ([], 8.0)],
)
def test_a_window_without_pairs_is_one_segment(tokens: list[int], end: float) -> None:
    assert split(tokens, BEGIN, 8.0) == ([(0.0, end, tokens)], 8.0)


def test_a_window_that_leads_nowhere_is_passed() -> None:
    assert split([t(0), t(0), 1, 2], BEGIN, 30)[1] == 30


def test_a_prefix_leaves_the_first_segment_without_its_start() -> None:
    pieces, _ = split([7, 8, t(2), t(2), 9, t(3)], BEGIN, 30)
    assert [piece[:2] for piece in pieces] == [(0.0, 2.0), (2.0, 3.0)]


def test_compression_ratio() -> None:
    assert compression_ratio("so it goes, " * 40) > 10
    assert compression_ratio("A quick brown fox jumps over the lazy dog.") < 1


class Scripted:
    """Windows whose tokens are written down by the frame at which they begin; 100 frames wide."""

    begin = BEGIN
    frames = 100
    frames_per_second = 100
    languages = {"en": 1, "de": 2}  # noqa: RUF012

    def __init__(self, script: dict[int, Any], spoken: dict[int, str] | None = None) -> None:
        self.script = script
        self.spoken = spoken or {}
        self.asked: list[tuple[int, int, list[int], str, str | None, int]] = []

    def encode(self, features: Tensor) -> Tensor:
        return features

    def likely(self, states: Sequence[Tensor]) -> list[dict[str, float]]:
        return [{self.spoken[int(each[0, 0])]: 0.9} for each in states]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in tokens if token < BEGIN)

    def prompt(
        self, language: str, task: str, target: Any, before: Any, hotwords: Any, prefix: Any, **_: Any
    ) -> Any:
        return list(before), language, prefix

    def hear(
        self, states: Any, prompts: Any, by: Choice, seed: int, rows: int = 1, frames: Sequence[int] = ()
    ) -> list[Heard]:
        found = []
        for features, (before, language, prefix) in zip(states, prompts, strict=True):
            first = int(features[0, 0])
            self.asked.append((first, features.shape[1], before, language, prefix, seed))
            said = self.script[first]
            found.append(said if isinstance(said, Heard) else heard(said))
        return found


def heard(tokens: list[int], **figures: Any) -> Heard:
    plain = {"whole": True, "avg_logprob": -0.3, "compression_ratio": 1.2, "no_speech_prob": 0.1}
    stats = DecodeStats(len(tokens), 1, 0, 0, 0.0)
    return Heard(**{"tokens": tokens, "text": "", "temperature": 0.0, "stats": stats, **plain, **figures})


def run(windows: Scripted, frames: int, **options: Any) -> list[Segment]:
    features = torch.arange(frames).float().expand(1, -1)  # that tell where they are
    plain = {"language": "en", "task": "transcribe", "target": None, "initial_prompt": [], "choice": Choice()}
    return list(transcribe(windows, features, Task(**{**plain, "window": 100, **options})))  # type: ignore[arg-type]


def brief(segments: list[Segment]) -> list[tuple[int, int, float, float, str]]:
    return [(each.id, each.seek, each.start, each.end, each.text) for each in segments]


def test_windows_follow_the_last_timestamp() -> None:
    windows = Scripted(
        {
            0: [t(0), 1, t(0.6), t(0.6), 2],  # the second is cut off
            60: [t(0), 2, 3, t(0.7), t(0.7)],
            130: [t(0.1), 4, t(0.5)],  # the last of the window
            230: [t(0), 5],
        }
    )
    assert brief(run(windows, 250)) == [
        (1, 0, 0.0, 0.6, " w1"),
        (2, 60, 0.6, 1.3, " w2 w3"),
        (3, 130, 1.3, 1.8, " w4"),  # by the window, as there is no pair
        (4, 230, 2.3, 2.5, " w5"),
    ]
    assert [(first, width) for first, width, *_ in windows.asked] == [
        (0, 100),
        (60, 100),
        (130, 100),
        (230, 20),
    ]
    assert [seed for *_, seed in windows.asked] == [0, 60, 130, 230]  # other draws in each


def test_segments_without_text_or_length_are_left_out() -> None:
    windows = Scripted({0: [t(0), t(0.2), t(0.2), 1, t(0.2), t(0.2), 2, t(0.9)]})
    assert brief(run(windows, 100)) == [(1, 0, 0.2, 0.9, " w2")]


def test_the_text_so_far_is_the_prompt_of_the_next_window() -> None:
    first, second, third = [t(0), 1, t(0.9)], [t(0), 2, t(0.9)], [t(0), 3, t(0.9)]
    script = {0: first, 100: second, 200: third}
    windows = Scripted(script)
    run(windows, 300, initial_prompt=[7], prefix="p")
    assert [before for _, _, before, *_ in windows.asked] == [[7], [7, *first], [7, *first, *second]]
    assert [prefix for *_, prefix, _ in windows.asked] == ["p", None, None]
    windows = Scripted(script)
    run(windows, 300, initial_prompt=[7], condition_on_previous_text=False)
    assert [before for _, _, before, *_ in windows.asked] == [[7], [], []]
    windows = Scripted({**script, 100: heard(second, temperature=0.8)})
    run(windows, 300, prompt_reset_on_temperature=0.5)
    assert [before for _, _, before, *_ in windows.asked] == [[], first, []]
    windows = Scripted({**script, 100: heard(second, temperature=0.4)})
    run(windows, 300, prompt_reset_on_temperature=0.5)
    assert [before for _, _, before, *_ in windows.asked] == [[], first, [*first, *second]]


def test_a_silent_window_has_no_segments_and_no_part_in_the_prompt() -> None:
    words = [t(0), 1, t(0.4), t(0.4)]
    silent = heard(words, no_speech_prob=0.7, avg_logprob=-1.2)
    windows = Scripted({0: words, 40: silent, 140: words, 180: [t(0), 1]})
    assert [each.seek for each in run(windows, 200)] == [0, 140, 180]
    assert windows.asked[2][2] == words[:3]


@pytest.mark.parametrize(
    ("no_speech", "likelihood", "choice", "silence"),
    [
        (0.7, -1.2, Choice(), True),
        (0.5, -1.2, Choice(), False),
        (0.7, -0.8, Choice(), False),  # the text is likely all the same
        (0.7, -0.8, Choice(log_prob_threshold=None), True),
        (0.9, -3.0, Choice(no_speech_threshold=None), False),
    ],
)
def test_silence(no_speech: float, likelihood: float, choice: Choice, silence: bool) -> None:
    assert is_silence(heard([1], no_speech_prob=no_speech, avg_logprob=likelihood), choice) is silence


def test_clips_are_all_that_is_listened_to() -> None:
    windows = Scripted({50: [t(0), 1, t(0.2)], 150: [t(0), 2, t(0.9)], 250: [t(0), 3]})
    found = run(windows, 260, clips=[(0.5, 0.9), (1.5, math.inf)])
    assert [(first, width) for first, width, *_ in windows.asked] == [(50, 40), (150, 100), (250, 10)]
    assert [(each.start, each.end) for each in found] == [(0.5, 0.7), (1.5, 2.4), (2.5, 2.6)]


def test_the_language_of_each_window() -> None:
    windows = Scripted({0: [t(0), 1, t(0.9)], 100: [t(0), 2]}, {0: "en", 100: "de"})
    run(windows, 150, multilingual=True)
    assert [language for _, _, _, language, *_ in windows.asked] == ["en", "de"]


def test_a_limit_that_cuts_a_text_off_is_told() -> None:
    cut = heard([t(0), 1, 2, 3], whole=False)
    with pytest.warns(UserWarning, match=r"the text of 0\.00 to 1\.00 seconds is cut short after 4 tokens"):
        run(Scripted({0: cut}), 100)


def test_a_batch_keeps_what_the_end_of_a_clip_cuts_off() -> None:
    windows = Scripted({0: [t(0), 1, t(0.4), t(0.4), 2], 200: [t(0), 3], 500: [t(0.1), 4, t(0.3)]})
    frames = torch.arange(600).float().expand(1, -1)
    parts = [
        (start, end - start, frames[:, round(100 * start) : round(100 * end)])
        for start, end in ((0, 0.9), (2, 2.5), (5, 6))
    ]
    task = Task("en", "transcribe", None, [], Choice(), 100)
    found = list(transcribe_batch(windows, parts, 2, task))  # type: ignore[arg-type]
    assert brief(found) == [
        (1, 0, 0.0, 0.4, " w1"),
        (2, 0, 0.4, 0.9, " w2"),
        (3, 200, 2.0, 2.5, " w3"),
        (4, 500, 5.0, 5.3, " w4"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)


@pytest.fixture(scope="module")
def windows(folder: Path) -> Windows:
    return Windows(*open_model(folder, torch.float32))


def test_features_are_those_of_the_whole_recording(windows: Windows) -> None:
    samples = np.concatenate(
        [0.01 * tiny.sound(31), tiny.sound(1.003, 1)]
    )  # more than a block; no whole frame
    theirs = WhisperFeatureExtractor(chunk_length=60)
    expected = theirs(samples, sampling_rate=16_000, return_tensors="pt").input_features[0]
    ours = windows.features(samples)
    assert ours.shape == (80, 3201)
    # Where the sound ends, theirs go on with silence.
    torch.testing.assert_close(ours[:, :3199], expected[:, :3199], rtol=1e-4, atol=1e-4)
    assert windows.features(samples[:0]).shape == (80, 0)
    assert windows.features(samples[:10]).shape == (80, 1)


def test_no_speech_is_as_likely_as_the_model_says(folder: Path, windows: Windows) -> None:
    theirs = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = windows.tokenizer.get_vocab()
    states = windows.encode(windows.features(tiny.sound(2)))
    for before in ([], [ids["<|startofprev|>"], *windows.ids("Wo ist der Bahnhof?")]):
        start = [*before, ids["<|startoftranscript|>"]]
        logits = theirs(encoder_outputs=(states[None],), decoder_input_ids=torch.tensor([start])).logits[
            0, -1
        ]
        expected = float(logits.softmax(-1)[ids["<|nospeech|>"]])
        (found,) = windows.hear(
            [states],
            [windows.prompt("de", "transcribe", None, before[1:], None, None, False)],
            Choice(temperatures=[0.0]),
            0,
        )
        assert found.no_speech_prob == pytest.approx(expected, rel=1e-4)


def passes(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the engines of all rows do: ("encode", row), ("prefill", tokens) and ("step", 1)."""
    done: list[tuple[str, int]] = []
    kind = type(windows.engine(1))
    encode, prefill, step = kind._encode, kind._prefill, kind._step

    def noted_encode(self: Any, row: int, states: Tensor) -> None:
        done.append(("encode", row))
        encode(self, row, states)

    def noted_prefill(self: Any, row: int, first: int, count: int, position: int | None) -> None:
        if count > first:
            done.append(("prefill", count - first))
        prefill(self, row, first, count, position)

    def noted_step(self: Any, *arguments: Any) -> None:
        done.append(("step", 1))
        step(self, *arguments)

    for name, noted in (("_encode", noted_encode), ("_prefill", noted_prefill), ("_step", noted_step)):
        monkeypatch.setattr(kind, name, noted)
    return done


def test_a_window_is_encoded_and_its_prompt_processed_once(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its language, its silence and every attempt together; the speech encoder hears it once, too."""
    heard: list[int] = []
    encoder = type(windows.model.model.encoder)
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, x: (heard.append(len(x)), forward(self, x))[1])
    features = windows.features(tiny.sound(2, 5))  # which no other test has heard last
    done = passes(windows, monkeypatch)
    (likely,) = windows.likely([windows.encode(features, keep=True)])
    assert done == [("encode", 0), ("prefill", 1)]
    by = Choice(temperatures=(0.0, 0.5, 0.7), best_of=1, log_prob_threshold=0.0, no_speech_threshold=None)
    before = windows.ids("Wo ist der Bahnhof?")
    prompt = windows.prompt(next(iter(likely)), "transcribe", None, before, None, None, True)
    states = windows.encode(features)
    done.clear()
    (found,) = windows.hear([states], [prompt], by, 0)
    tokens = len(prompt.before) + len(prompt.after) - 1
    assert found.temperature == 0.7
    assert [each for each in done if each[0] != "step"] == [("prefill", tokens)]
    # The same again, from the start of the transcript on: whose logits nobody has kept.
    done.clear()
    (again,) = windows.hear([states], [prompt], by, 0)
    assert (again.text, again.no_speech_prob) == (found.text, found.no_speech_prob)
    assert [each for each in done if each[0] != "step"] == [("prefill", len(prompt.after))]
    assert heard == [1]
    windows.encode(features)
    assert heard == [1, 1]  # kept once, and not for a recording that is heard again
    other = windows.encode(windows.features(tiny.sound(2, 6)))
    done.clear()
    windows.hear([other], [prompt], replace(by, temperatures=(0.0,)), 0)
    assert done[:2] == [("encode", 0), ("prefill", tokens)]


def test_log_probabilities_are_those_of_the_tokens(folder: Path, windows: Windows) -> None:
    theirs = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    states = windows.encode(windows.features(tiny.sound(2)))
    prompt = windows.prompt("de", "transcribe", None, [], None, None, True)
    by = Choice(temperatures=[0.0], without_timestamps=True, max_new_tokens=6, suppress_blank=False)
    (found,) = windows.hear([states], [prompt], by, 0)
    whole = [*prompt.before, *prompt.after, *found.tokens]
    logits = theirs(encoder_outputs=(states[None],), decoder_input_ids=torch.tensor([whole])).logits[0]
    allowed = logits + windows._masks(by)[0]
    first = len(whole) - len(found.tokens)
    new = [*found.tokens, *[windows._end] * found.whole]
    scores = [float(allowed[first - 1 + i].log_softmax(-1)[token]) for i, token in enumerate(new)]
    assert found.avg_logprob == pytest.approx(sum(scores) / (len(found.tokens) + 1), rel=1e-4)
    assert not set(new) & set(windows._symbols) - {windows._end}


def attempts(
    windows: Windows, monkeypatch: pytest.MonkeyPatch, said: dict[float, list[Heard]], by: Choice
) -> Heard:
    """What comes of scripted attempts, by their temperatures."""
    left = {temperature: iter(each) for temperature, each in said.items()}
    monkeypatch.setattr(
        Windows,
        "_decode",
        lambda self, engine, states, prompts, silent, by, temperature, *_: [
            next(left[temperature]) for _ in prompts
        ],
    )
    states = windows.encode(windows.features(tiny.sound(1)))
    (found,) = windows.hear([states], [Prompt([windows._start], [], 0)], by, 3)
    assert all(next(each, None) is None for each in left.values()), "an attempt was left out"
    return found


def test_fallback(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    good, unlikely, worse = heard([1]), heard([2], avg_logprob=-1.5), heard([3], avg_logprob=-2.0)
    repeats = heard([4], compression_ratio=3.0)
    by = Choice(temperatures=(0.0, 0.4, 0.8), best_of=2)
    for said, tokens, temperature in (
        ({0.0: [good]}, [1], 0.0),
        ({0.0: [unlikely], 0.4: [worse, good]}, [1], 0.4),  # the likelier of two draws
        ({0.0: [repeats], 0.4: [worse, worse], 0.8: [worse, unlikely]}, [2], 0.8),
        ({0.0: [repeats], 0.4: [repeats, repeats], 0.8: [repeats, repeats]}, [4], 0.8),
        ({0.0: [replace(unlikely, no_speech_prob=0.9)]}, [2], 0.0),  # silence is not tried again
        ({0.0: [replace(repeats, no_speech_prob=0.9)], 0.4: [good, good]}, [1], 0.4),
    ):
        found = attempts(windows, monkeypatch, said, by)
        assert (found.tokens, found.temperature) == (tokens, temperature)
        assert found.stats.tokens == sum(map(len, said.values()))
    by = replace(by, log_prob_threshold=None, compression_ratio_threshold=None)
    assert attempts(windows, monkeypatch, {0.0: [repeats]}, by).tokens == [4]


def test_a_run_with_draws_repeats_bit_for_bit(windows: Windows) -> None:
    features = windows.features(tiny.sound(5))
    task = Task("de", "transcribe", None, [], Choice(temperatures=(0.7, 0.9), best_of=2), windows.frames)
    first = list(transcribe(windows, features, task))
    assert first
    assert list(transcribe(windows, features, task)) == first
    other = replace(task, choice=replace(task.choice, temperatures=(0.9,)))
    assert [each.tokens for each in transcribe(windows, features, other)] != [each.tokens for each in first]


def test_draws_side_by_side_are_those_one_after_the_other(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in groups of two, the last with an idle row, as all at once; words too."""
    states = windows.encode(windows.features(tiny.sound(2)))
    prompt = windows.prompt("de", "transcribe", None, [], None, None, False)
    by = Choice((0.8,), best_of=3, log_prob_threshold=0.0, word_timestamps=True, max_new_tokens=9)
    config = windows.model.config
    row = 8 * config.decoder_layers * config.d_model * config.max_source_positions
    found, drawn = [], []
    decode = Windows._decode

    def noted(self: Windows, *arguments: Any) -> list[Heard]:
        made = decode(self, *arguments)
        drawn.append([replace(each, stats=None) for each in made])
        return made

    monkeypatch.setattr(Windows, "_decode", noted)
    for rows, groups in ((1, [1, 1, 1]), (2, [2, 1]), (9, [3])):
        monkeypatch.setattr("kvspn.speech.windows._MOST_DRAWN", rows * row)
        drawn.clear()
        (heard,) = windows.hear([states], [prompt], by, 7, frames=[200])
        assert [len(each) for each in drawn] == groups
        found.append(([each for some in drawn for each in some], replace(heard, stats=None)))
        assert (heard.stats.tokens, heard.stats.steps) == (27, 27)
    assert found[0] == found[1] == found[2]
    assert len({tuple(each.tokens) for each in found[0][0]}) == 3


def test_rows_of_a_batch_are_what_they_are_alone(windows: Windows) -> None:
    parts = [(3.0 * i, 2 - 0.4 * i, windows.features(tiny.sound(2 - 0.4 * i, i))) for i in range(3)]
    task = Task("de", "transcribe", None, windows.ids("Wo"), Choice(temperatures=[0.0]), windows.frames)
    together = list(transcribe_batch(windows, parts, 2, task))  # a full batch, and one with an idle row
    alone = [segment for part in parts for segment in transcribe_batch(windows, [part], 1, task)]
    assert [replace(each, id=0) for each in together] == [replace(each, id=0) for each in alone]
    assert {each.seek for each in together} == {0, 300, 600}
