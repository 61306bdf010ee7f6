"""`kvspn.WhisperModel` by faster-whisper's interface, voice activity, subtitles, and the commands."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import kvspn
from kvspn.cli import app
from kvspn.speech import vad
from kvspn.speech.segments import Segment
from kvspn.speech.subtitles import WRITERS, clock
from kvspn.speech.translator import Translator
from kvspn.speech.vad import FRAME, Joined, Silero, VadOptions, speech
from kvspn.speech.whisper_model import BatchedInferencePipeline, TranscriptionInfo, WhisperModel, _name
from support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the text of")

# The arguments of faster-whisper 1.2.1, and the fields of what it returns.
ARGUMENTS = """
    audio language task log_progress beam_size best_of patience length_penalty repetition_penalty
    no_repeat_ngram_size temperature compression_ratio_threshold log_prob_threshold
    no_speech_threshold condition_on_previous_text prompt_reset_on_temperature initial_prompt
    prefix suppress_blank suppress_tokens without_timestamps max_initial_timestamp word_timestamps
    prepend_punctuations append_punctuations multilingual vad_filter vad_parameters max_new_tokens
    chunk_length clip_timestamps hallucination_silence_threshold hotwords
    language_detection_threshold language_detection_segments
"""
CONSTRUCTOR = """
    model_size_or_path device device_index compute_type cpu_threads num_workers download_root
    local_files_only files revision use_auth_token
"""
SEGMENT = "id seek start end text tokens avg_logprob compression_ratio no_speech_prob words temperature"
INFO = (
    "language language_probability duration duration_after_vad all_language_probs transcription_options "
    "vad_options"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> WhisperModel:
    return kvspn.WhisperModel(str(folder), device="cpu")


def test_the_interface_is_faster_whispers() -> None:
    def parameters(call: Any) -> list[str]:
        return [name for name in inspect.signature(call).parameters if name != "self"]

    assert parameters(WhisperModel.transcribe) == ARGUMENTS.split()
    assert parameters(WhisperModel.__init__)[:11] == CONSTRUCTOR.split()
    assert [field.name for field in dataclasses.fields(Segment)] == SEGMENT.split()
    assert [field.name for field in dataclasses.fields(TranscriptionInfo)] == INFO.split()


def test_import_loads_nothing_heavy() -> None:
    code = "import kvspn, sys; kvspn.__all__; assert not {'torch', 'numpy', 'av'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recording_to_segments(model: WhisperModel, tmp_path: Path) -> None:
    samples = tiny.sound(5)
    segments, info = model.transcribe(samples, temperature=0.0, hotwords="Bahnhof", initial_prompt="Wo")
    found = list(segments)
    assert found
    assert [each.id for each in found] == list(range(1, len(found) + 1))
    for one, other in pairwise(found):
        assert one.start < one.end <= other.start + 1e-6
        assert one.seek <= other.seek
    assert found[-1].seek < 500
    assert all(each.words is None and each.temperature == 0 for each in found)
    assert all(0 <= each.no_speech_prob <= 1 and each.avg_logprob < 0 for each in found)
    assert (info.duration, info.duration_after_vad, info.vad_options) == (5, 5, None)
    assert info.language in model.supported_languages
    assert info.all_language_probs is not None
    assert (
        info.language_probability
        == info.all_language_probs[0][1]
        == max(dict(info.all_language_probs).values())
    )
    assert info.transcription_options.temperatures == [0.0]
    soundfile.write(tmp_path / "clip.wav", samples, 16_000, "FLOAT")
    again, said = model.transcribe(tmp_path / "clip.wav", language=info.language, temperature=0.0,
                                   hotwords="Bahnhof", initial_prompt=model.windows.ids("Wo"))  # fmt: skip
    assert list(again) == found
    assert (said.language_probability, said.all_language_probs) == (1.0, None)


def test_arguments_have_their_effect(model: WhisperModel) -> None:
    def tokens(**options: Any) -> list[list[int]]:
        plain = {"language": "de", "temperature": 0.0}
        return [each.tokens for each in model.transcribe(tiny.sound(4), **{**plain, **options})[0]]

    plain = tokens()
    begin = model.windows.begin
    assert all(each[0] >= begin for each in plain)
    for options in (
        {"task": "translate"},
        {"language": "German", "initial_prompt": "gare"},
        {"hotwords": "stazione"},
        {"prefix": "Wo ist"},
        {"condition_on_previous_text": False},
        {"suppress_tokens": [plain[0][1]]},
        {"max_new_tokens": 3},
        {"chunk_length": 1},
        {"clip_timestamps": "1,3"},
        {"temperature": 0.9},
        {"without_timestamps": True},
    ):
        assert tokens(**options) != plain, options
    assert all(token < begin for each in tokens(without_timestamps=True) for token in each)
    (first, *_), (limited, *_) = plain, tokens(max_initial_timestamp=0.0)
    assert limited[0] == begin
    assert first[0] <= begin + 50


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beam_size": 5}, ValueError, "beam_size must be 1, since no engine honours it yet, got 5"),
        ({"word_timestamps": 1}, TypeError, "word_timestamps must be a bool"),
        ({"append_punctuations": None}, TypeError, "append_punctuations must be a string, got NoneType"),
        ({"patience": 2}, ValueError, "patience"),
        ({"length_penalty": 0.5}, ValueError, "length_penalty"),
        ({"repetition_penalty": 1.1}, ValueError, "repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, ValueError, "no_repeat_ngram_size"),
        (
            {"hallucination_silence_threshold": 2.0},
            ValueError,
            "word_timestamps must be True with hallucination_silence_threshold",
        ),
        ({"task": "sing"}, ValueError, "task must be one of transcribe, translate, got 'sing'"),
        ({"language": "xx"}, ValueError, "language must be one of"),
        ({"temperature": -0.5}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": []}, ValueError, "temperature"),
        ({"best_of": 0}, ValueError, "best_of"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"chunk_length": 3}, ValueError, r"chunk_length must be in 1\.\.2, got 3"),
        ({"clip_timestamps": "2,1"}, ValueError, "clip_timestamps must be seconds in ascending order"),
        ({"clip_timestamps": "a"}, ValueError, "clip_timestamps"),
        (
            {"clip_timestamps": "1", "vad_filter": True},
            ValueError,
            "vad_filter must be False with clip_times",
        ),
        ({"vad_parameters": {"loud": 1}}, ValueError, "vad_parameters must be of .*, got 'loud'"),
        ({"vad_parameters": {"threshold": -1}}, ValueError, r"vad_parameters\['threshold'\]"),
        ({"log_prob_threshold": "x"}, TypeError, "log_prob_threshold"),
        ({"multilingual": 1}, TypeError, "multilingual must be a bool"),
        ({"hotwords": 3}, TypeError, "hotwords must be a string"),
        ({"language_detection_segments": 0}, ValueError, "language_detection_segments"),
    ],
)
def test_what_is_not_honoured_is_refused(
    model: WhisperModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.transcribe(tiny.sound(1), **options)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 10), np.float32), "audio must be float samples of one dimension"),
        (np.zeros(10, np.int16), "audio must be float samples"),
        (np.full(10, np.nan, np.float32), "audio must be finite"),
    ],
)
def test_bad_samples(model: WhisperModel, samples: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.transcribe(samples)


def test_a_prompt_that_leaves_no_room(model: WhisperModel) -> None:
    segments, _ = model.transcribe(tiny.sound(1), "de", max_new_tokens=62)
    with pytest.raises(
        ValueError, match="max_new_tokens must be at most 61 beside a prompt of 3 tokens, got 62"
    ):
        list(segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_type": "int16"}, "compute_type must be one of default, .*, got 'int16'"),
        ({"compute_type": "int8_float32"}, "compute_type must be one of"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"device_index": [0, 1]}, "device_index must be the number of one GPU"),
        ({"num_workers": 2}, "num_workers must be 1"),
        ({"download_root": "/x"}, "download_root"),
        ({"local_files_only": True}, "local_files_only"),
        ({"files": {"model.bin": b""}}, "files"),
        ({"revision": "main"}, "revision"),
        ({"use_auth_token": True}, "use_auth_token"),
    ],
)
def test_what_the_constructor_refuses(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WhisperModel(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="device must be cpu or auto where PyTorch sees no GPU, got 'cuda'"):
        WhisperModel(folder, device="cuda")


def test_compute_types(folder: Path) -> None:
    for compute_type, dtype in (
        ("default", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("int8", torch.bfloat16),
    ):
        model = WhisperModel(folder, compute_type=compute_type)
        assert model.windows.engine(1).cache.kv.dtype is dtype  # type: ignore[attr-defined]
        assert list(model.transcribe(tiny.sound(1), "de", temperature=0.0)[0])


def test_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvspn.speech.whisper_model.files", lambda name: None)
    assert (_name("base"), _name("turbo")) == ("openai/whisper-base", "openai/whisper-large-v3-turbo")
    assert _name("distil-large-v3") == "distil-whisper/distil-large-v3"
    monkeypatch.setattr("kvspn.speech.whisper_model.files", lambda name: (Path(), []))
    assert (_name("base"), _name("small")) == ("whisper-base", "openai/whisper-small")
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    assert _name("base") == "base"


def test_a_model_without_timestamps(tmp_path: Path) -> None:
    model = WhisperModel(tiny.save_whisper(tmp_path))
    with pytest.raises(ValueError, match="without_timestamps must be True for this model"):
        model.transcribe(tiny.sound(1))
    (segment, *_), info = model.transcribe(tiny.sound(3), "de", without_timestamps=True, temperature=0.0)
    assert (segment.start, segment.end, info.language) == (0, 2, "de")


def test_the_language_of_most_windows(model: WhisperModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"de": 0.4, "en": 0.1}, {"en": 0.3}, {"de": 0.45}]
    likely = iter(said)
    monkeypatch.setattr(type(model.windows), "likely", lambda self, states, rows: [next(likely)])
    assert model.detect_language(tiny.sound(6), language_detection_segments=3)[:2] == ("de", 0.45)
    likely = iter(said)
    found = model.detect_language(
        tiny.sound(6), language_detection_segments=3, language_detection_threshold=0.2
    )
    assert found == ("de", 0.4, [("de", 0.4), ("en", 0.1)])


# Voice activity


def frames(*runs: tuple[float, float]) -> list[float]:
    """(seconds, probability), ... in frames of 32 ms."""
    return [p for seconds, p in runs for _ in range(round(seconds / 0.032))]


def seconds(found: list[tuple[int, int]]) -> list[tuple[float, float]]:
    return [(round(a / 16_000, 3), round(b / 16_000, 3)) for a, b in found]


def test_speech_ends_at_a_pause_that_is_long_enough() -> None:
    said = frames((3.2, 0.0), (3.2, 0.9), (1.6, 0.1), (3.2, 0.9), (6.4, 0.1), (0.32, 0.9), (3.2, 0.0))
    total = len(said) * FRAME
    bare = VadOptions(speech_pad_ms=0)
    assert seconds(speech(said, total, bare)) == [(3.2, 11.2), (17.6, 17.92)]
    short = dataclasses.replace(bare, min_silence_duration_ms=1000)
    assert seconds(speech(said, total, short)) == [(3.2, 6.4), (8.0, 11.2), (17.6, 17.92)]
    kept = dataclasses.replace(short, min_speech_duration_ms=500)
    assert seconds(speech(said, total, kept)) == [(3.2, 6.4), (8.0, 11.2)]
    padded = dataclasses.replace(short, speech_pad_ms=1000)  # a pause of 1.6 s is halved
    assert seconds(speech(said, total, padded)) == [(2.2, 7.2), (7.2, 12.2), (16.6, 18.92)]


def test_what_lies_between_the_thresholds_goes_on_but_does_not_begin() -> None:
    said = frames((1.6, 0.4), (1.6, 0.6), (3.2, 0.4), (3.2, 0.3), (1.6, 0.0))
    bare = VadOptions(speech_pad_ms=0, min_silence_duration_ms=500)
    assert seconds(speech(said, len(said) * FRAME, bare)) == [(1.6, 6.4)]
    low = dataclasses.replace(bare, neg_threshold=0.2)
    assert seconds(speech(said, len(said) * FRAME, low)) == [(1.6, 9.6)]


def test_speech_that_is_too_long_is_cut_at_its_last_pause_and_loses_nothing() -> None:
    said = frames((3.2, 0.9), (0.16, 0.1), (3.2, 0.9))
    options = VadOptions(speech_pad_ms=0, max_speech_duration_s=5)
    assert seconds(speech(said, len(said) * FRAME, options)) == [(0.0, 3.2), (3.36, 6.56)]
    endless = frames((12.8, 0.9))
    found = speech(endless, len(endless) * FRAME, options)
    assert [one[1] for one in found[:-1]] == [other[0] for other in found[1:]]
    assert (found[0][0], found[-1][1]) == (0, len(endless) * FRAME)
    assert all(end - start <= 5 * 16_000 for start, end in found)


def test_no_speech() -> None:
    assert speech(frames((3.2, 0.2)), 51_200, VadOptions()) == []
    assert speech([], 0, VadOptions()) == []


def test_joined_speech_finds_its_times_again() -> None:
    samples = np.arange(16_000 * 10, dtype=np.float32)
    joined = Joined([(16_000, 48_000), (80_000, 96_000)])
    found = joined.samples(samples)
    assert (len(found), found[0], found[32_000]) == (48_000, 16_000, 80_000)
    assert [joined.time(each) for each in (0, 1.5, 2.5, 3)] == [1.0, 2.5, 5.5, 6.0]
    assert (joined.time(2.0), joined.time(2.0, joined.stretch(2.0, end=True))) == (5.0, 3.0)  # at the seam
    assert joined.groups(48_000) == [(0, 48_000)]
    assert joined.groups(40_000) == [(0, 32_000), (32_000, 48_000)]
    assert Joined([]).groups(10) == []


def test_silero_runs_all_frames_as_it_runs_one_after_the_other() -> None:
    torch.manual_seed(0)
    detector = Silero().eval()
    samples = torch.from_numpy(tiny.sound(0.5))
    found = detector(samples)
    assert found.shape == (16,)
    state = None
    padded = torch.nn.functional.pad(samples, (64, 16 * FRAME - len(samples)))
    for i in range(16):
        frame = padded[i * FRAME : i * FRAME + 64 + FRAME]
        x = detector.spectrum(torch.nn.functional.pad(frame[None, None], (0, 64), mode="reflect"))
        x = detector.encoder((x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt())
        x, state = detector.lstm(x.mT, state)
        assert float(found[i]) == pytest.approx(detector.head(x.relu()).sigmoid().item(), abs=1e-6)
    assert detector(samples[:0]).shape == (0,)


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is None, reason="needs silero-vad")
def test_silero_hears_no_speech_in_noise() -> None:
    found = vad.open_silero()(torch.from_numpy(0.01 * tiny.sound(2)))
    assert float(found.max()) < 0.5


def test_silero_is_refused_by_name(
    model: WhisperModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    monkeypatch.setattr(vad, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vad_filter must be False without .*pip install 'kvspn\[vad\]'"):
        model.transcribe(tiny.sound(1), vad_filter=True)
    monkeypatch.undo()
    (tmp_path / "silero_vad/data").mkdir(parents=True)
    (tmp_path / "silero_vad/__init__.py").touch()
    (tmp_path / "silero_vad/data/silero_vad.jit").write_bytes(b"no model")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"silero_vad\.jit must hold the weights"):
        model.transcribe(tiny.sound(1), vad_filter=True)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hears speech in what is louder than a hundredth."""

    class Loud:
        def __call__(self, samples: torch.Tensor) -> torch.Tensor:
            count = -(-len(samples) // FRAME)
            padded = torch.nn.functional.pad(samples, (0, count * FRAME - len(samples)))
            return (padded.view(count, FRAME).abs().amax(1) > 0.01).float()

    monkeypatch.setattr("kvspn.speech.whisper_model.open_silero", Loud)


def recording() -> np.ndarray:
    """Sound from 2 to 3.5 and from 7 to 8.5 s of 10."""
    samples = np.zeros(160_000, np.float32)
    samples[32_000:56_000], samples[112_000:136_000] = tiny.sound(1.5), tiny.sound(1.5, 1)
    return samples


@pytest.mark.usefixtures("detector")
def test_only_speech_is_listened_to(model: WhisperModel) -> None:
    options = {"speech_pad_ms": 100, "min_silence_duration_ms": 500}
    segments, info = model.transcribe(
        recording(), "de", temperature=0.0, vad_filter=True, vad_parameters=options
    )
    found = list(segments)
    assert found
    times = [time for each in found for time in (each.start, each.end)]
    assert 1.85 <= times[0] <= 3.65
    assert not any(3.65 < time < 6.85 for time in times)
    assert found[-1].end > 6.8
    assert info.duration == 10
    assert info.duration_after_vad == pytest.approx(3.4, abs=0.1)
    assert info.vad_options == VadOptions(**options)
    nothing, info = model.transcribe(np.zeros(16_000, np.float32), "de", vad_filter=True)
    assert (list(nothing), info.duration_after_vad) == ([], 0)


@pytest.mark.usefixtures("detector")
def test_clips_in_batches(model: WhisperModel) -> None:
    pipeline = kvspn.BatchedInferencePipeline(model)
    options: dict[str, Any] = {"vad_parameters": {"speech_pad_ms": 0, "min_silence_duration_ms": 500}}
    found, info = pipeline.transcribe(recording(), "de", batch_size=2, **options)
    segments = list(found)
    assert [(each.id, round(each.start, 1), round(each.end, 1)) for each in segments] == [
        (1, 2.0, 3.5),
        (2, 7.0, 8.5),
    ]
    one = list(pipeline.transcribe(recording(), "de", batch_size=1, **options)[0])
    assert [each.tokens for each in one] == [each.tokens for each in segments]
    assert info.vad_options is not None
    assert info.vad_options.max_speech_duration_s == 2
    timed = list(pipeline.transcribe(recording(), "de", without_timestamps=False, **options)[0])
    assert all(each.tokens[0] >= model.windows.begin for each in timed)
    given = [{"start": 2.0, "end": 3.5}, {"start": 7.0, "end": 8.5}]
    clips = list(pipeline.transcribe(recording(), "de", clip_timestamps=given)[0])
    assert [(each.start, each.end) for each in clips] == [(2.0, 3.5), (7.0, 8.5)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix": "Wo"}, ValueError, "prefix must be None where clips are decoded in batches, got 'Wo'"),
        ({"log_prob_threshold": -2.0}, ValueError, "log_prob_threshold must be -1.0"),
        ({"beam_size": 5}, ValueError, "beam_size must be 1"),
        ({"loud": True}, TypeError, "no argument 'loud'"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        (
            {"vad_filter": False},
            ValueError,
            "vad_filter must be True, or clip_timestamps given, for more than 2",
        ),
        ({"vad_parameters": {"max_speech_duration_s": 1}}, ValueError, "leave out max_speech_duration_s"),
        ({"clip_timestamps": [{"start": 1}]}, ValueError, "clip_timestamps must be dicts of start and end"),
        ({"clip_timestamps": [{"start": 1, "end": 4}]}, ValueError, "2 seconds apart at most"),
        ({"clip_timestamps": [{"start": 20, "end": 21}]}, ValueError, "must start within the 10.0 seconds"),
    ],
)
def test_what_batches_refuse(
    model: WhisperModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BatchedInferencePipeline(model).transcribe(recording(), **options)


# Subtitles and commands

SEGMENTS = [
    Segment(1, 0, 0.0, 1.234, " Where & <when>?", [], -0.1, 1.0, 0.0, None, 0.0),
    Segment(2, 0, 3599.9996, 3661.5, " Two\n\tlines", [], -0.1, 1.0, 0.0, None, 0.0),
]


def test_subtitles() -> None:
    assert WRITERS["srt"](SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,234\nWhere & <when>?\n\n2\n01:00:00,000 --> 01:01:01,500\nTwo lines\n"
    )
    assert WRITERS["vtt"](SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\nWhere &amp; &lt;when&gt;?\n\n"
        "01:00:00.000 --> 01:01:01.500\nTwo lines\n"
    )
    assert (
        WRITERS["tsv"](SEGMENTS)
        == "start\tend\ttext\n0\t1234\tWhere & <when>?\n3600000\t3661500\tTwo lines\n"
    )
    assert WRITERS["txt"](SEGMENTS) == "Where & <when>?\nTwo lines\n"
    assert WRITERS["srt"]([]) == ""
    assert clock(0.0005, ".") == "00:00:00.000"
    assert clock(100 * 3600, ".") == "100:00:00.000"


def test_a_translator_gives_the_segments_of_the_model(folder: Path, model: WhisperModel) -> None:
    pieces: list[str] = []
    done: list[tuple[int, int]] = []
    result = Translator.from_folder(folder).translate(
        tiny.sound(5),
        source="de",
        task="transcribe",
        on_text=pieces.append,
        on_chunk=lambda *each: done.append(each),
    )
    assert result.segments == list(model.transcribe(tiny.sound(5), "de")[0])
    assert "".join(pieces).strip() == result.text == "".join(each.text for each in result.segments).strip()
    assert done[-1] == (5, 5)
    assert len(result.chunks) == len(done)
    assert result.total.tokens == sum(each.tokens for each in result.chunks) > 0


def kvspn_(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_command_writes_subtitles(folder: Path, tmp_path: Path, model: WhisperModel) -> None:
    (audio := tmp_path / "talks").mkdir()
    for i, name in enumerate(("b.wav", "a.flac")):
        soundfile.write(audio / name, tiny.sound(3, i), 16_000)
    (audio / "notes.pdf").touch()
    options = ("--model", folder, "--from", "de")
    result = kvspn_("transcribe", audio / "b.wav", *options, "--output", "srt")
    segments = list(model.transcribe(audio / "b.wav", "de")[0])
    assert (result.exit_code, result.stdout) == (0, WRITERS["srt"](segments))
    result = kvspn_("transcribe", audio, *options, "--output", "vtt", "--folder", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, "")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["a.vtt", "b.vtt"]
    assert (tmp_path / "out/b.vtt").read_text("utf-8") == WRITERS["vtt"](segments)
    documents = json.loads(kvspn_("transcribe", audio, *options, "--output", "json").stdout)
    assert [Path(each["file"]).name for each in documents] == ["a.flac", "b.wav"]
    assert [Segment(**each) for each in documents[1]["segments"]] == segments
    translated = kvspn_("translate", audio / "b.wav", *options, "--output", "tsv")
    assert translated.stdout == WRITERS["tsv"](list(model.transcribe(audio / "b.wav", "de", "translate")[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.wav", "b.wav", "--output", "srt"), "--folder must be given for 2 files in srt"),
        (("a.wav", "--folder", "out"), "--folder must be given with --output"),
        (
            ("a.wav", "a.mp3", "--output", "srt", "--folder", "out"),
            "--folder would hold a.srt of both a.wav and a.mp3",
        ),
    ],
)
def test_the_command_refuses(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = kvspn_("transcribe", *arguments)
    assert result.exit_code
    assert message in result.stderr
    assert not Path("out").exists()


def test_a_model_without_timestamps_writes_no_subtitles(tmp_path: Path) -> None:
    soundfile.write(clip := tmp_path / "a.wav", tiny.sound(1), 16_000)
    result = kvspn_("transcribe", clip, "--output", "srt")
    assert result.exit_code
    assert "--output must be txt or json for this model, which has no timestamps; got srt" in result.stderr
    assert math.isfinite(len(kvspn_("transcribe", clip, "--output", "txt").stdout))
