"""Audio files of every kind become mono samples at 16 kHz; long audio is cut at pauses."""

from __future__ import annotations

import io
import os
import re
import threading
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from kvspn.speech.audio import SAMPLING_RATE, AudioError, load_audio, split_audio
from support.tiny import damaged, sound


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """440 Hz, float32 [N, channels], each channel half as loud as the one before."""
    wave = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / 2 ** (i + 1) for i in range(channels)], axis=1).astype(np.float32)


def pitch(samples: np.ndarray) -> float:
    """The strongest frequency in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * SAMPLING_RATE / len(samples))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_any_format_rate_and_channel_count(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    if suffix == "mp3" and channels > 2:
        pytest.skip("mp3 has at most two channels")
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone(0.5, rate, channels), rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    # FFmpeg trims the last block of an ogg file only where it is not on the first page of sound.
    assert len(samples) == pytest.approx(SAMPLING_RATE / 2, abs=seconds(0.02) if suffix == "ogg" else 1)
    assert pitch(samples) == pytest.approx(440, abs=5)
    assert np.abs(samples).max() == pytest.approx((1 - 0.5**channels) / channels, rel=0.1)


def test_samples_at_16_khz_stay_as_they_are(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", sound(0.1), SAMPLING_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "clip.wav"), sound(0.1))


def test_samples_beyond_full_scale_are_scaled_down(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", 1e30 * sound(0.1), SAMPLING_RATE, subtype="FLOAT")
    samples = load_audio(str(tmp_path / "clip.wav"))
    assert np.abs(samples).max() == pytest.approx(1)


def with_sample(value: float) -> np.ndarray:
    samples = sound(0.1)
    samples[7] = value
    return samples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a readable audio file"),
        (b"These are words. " * 99, "not a readable audio file"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a readable audio file"),
        (np.zeros(0, np.float32), "no audio in it"),
        (np.zeros(1600, np.float32), "only silence"),
        (np.full(1600, 5e-5, np.float32), "only silence"),
        (with_sample(np.nan), "broken samples"),
        (with_sample(-np.inf), "broken samples"),
    ],
    ids=["missing", "empty", "text", "cut header", "no samples", "zeros", "below -80 dB", "NaN", "infinity"],
)
def test_unusable_audio_is_one_line_that_names_the_file(
    tmp_path: Path, content: bytes | np.ndarray | None, message: str
) -> None:
    path = tmp_path / "clip.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_audio(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="is a directory"):
        load_audio(tmp_path)


def encoded(samples: np.ndarray, rate: int = SAMPLING_RATE, **kind: str) -> bytes:
    """A file of its own, in memory."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **kind)
    return file.getvalue()


KINDS = {
    "wav": {"format": "WAV"},
    "flac": {"format": "FLAC"},
    "mp3": {"format": "MP3"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}


def loaded(content: bytes) -> tuple[np.ndarray, list[str]]:
    """The samples, and what is lost of them."""
    losses: list[str] = []
    return load_audio(io.BytesIO(content), on_loss=losses.append), losses


@pytest.mark.parametrize("kind", ["flac", "mp3", "ogg", "opus"])
def test_faults_joined_recordings_are_all_read(kind: str) -> None:
    parts = [encoded(sound(length, seed), **KINDS[kind]) for seed, length in enumerate((3, 2, 4))]
    samples, losses = loaded(b"".join(parts))
    assert losses == []
    assert len(samples) == pytest.approx(9 * SAMPLING_RATE, abs=seconds(0.35))  # mp3 pads each
    assert np.abs(samples[-seconds(0.5) :]).max() > 0.3


def test_faults_joined_recordings_may_differ_in_rate() -> None:
    samples, losses = loaded(
        encoded(tone(1, 16_000), format="FLAC") + encoded(tone(2, 44_100), 44_100, format="FLAC")
    )
    assert losses == []
    assert len(samples) == pytest.approx(3 * SAMPLING_RATE, abs=2)
    assert pitch(samples[-SAMPLING_RATE:]) == pytest.approx(440, abs=1)


def with_bytes(content: bytes, **at: bytes) -> bytes:
    """The content with other bytes at named places: at_4=b"..."."""
    changed = bytearray(content)
    for place, new in at.items():
        start = int(place.removeprefix("at_"))
        changed[start : start + len(new)] = new
    return bytes(changed)


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F000, 0x7FFF_FFFF])
def test_faults_a_wav_whose_header_does_not_know_its_size(size: int) -> None:
    written = size.to_bytes(4, "little")
    samples, losses = loaded(with_bytes(encoded(sound(2), **KINDS["wav"]), at_4=written, at_40=written))
    assert (len(samples), losses) == (seconds(2), [])


def test_faults_a_flac_of_unknown_length() -> None:
    content = encoded(sound(2), **KINDS["flac"])
    unknown = with_bytes(content, at_21=bytes([content[21] & 0xF0, 0, 0, 0, 0]))
    samples, losses = loaded(unknown)
    assert (len(samples), losses) == (seconds(2), [])


@pytest.mark.parametrize("count", [0, 5, 2**30])
def test_faults_an_mp3_whose_header_counts_wrongly(count: int) -> None:
    content = encoded(sound(3), **KINDS["mp3"])
    place = content.index(b"Xing") + 8
    samples, losses = loaded(with_bytes(content, **{f"at_{place}": count.to_bytes(4, "big")}))
    assert len(samples) == pytest.approx(seconds(3), abs=seconds(0.1))
    assert len(losses) == (count == 2**30)


def test_faults_an_mp3_without_a_count() -> None:
    content = encoded(sound(3), **KINDS["mp3"])
    samples, losses = loaded(with_bytes(content, **{f"at_{content.index(b'Xing')}": bytes(4)}))
    assert len(samples) == pytest.approx(seconds(3), abs=seconds(0.2))
    assert losses == []


@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_a_truncated_file_what_is_there_is_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"clip.{kind}"
    content = encoded(sound(8), **KINDS[kind])
    path.write_bytes(content[: len(content) // 2])
    losses: list[str] = []
    samples = load_audio(path, on_loss=losses.append)
    assert seconds(2.5) < len(samples) < seconds(5)
    (line,) = losses
    assert line.startswith(f"{path}: ")
    assert re.search(r"ends after \d\.\d of 8\.0 seconds|is cut short after \d\.\d seconds", line)
    with pytest.raises(AudioError, match=re.escape(line)):
        load_audio(path, strict=True)
    with pytest.warns(UserWarning, match=re.escape(line)):
        load_audio(path)


@pytest.mark.parametrize("kind", KINDS)
def test_faults_a_whole_file_has_lost_nothing(kind: str) -> None:
    for rate in (8_000, 16_000, 44_100, 48_000):
        if (kind, rate) != ("opus", 44_100):
            samples, losses = loaded(encoded(sound(3, rate=rate), rate, **KINDS[kind]))
            assert losses == []
            assert len(samples) == pytest.approx(seconds(3), abs=seconds(0.02))


def test_faults_damage_inside_a_file(tmp_path: Path) -> None:
    losses: list[str] = []
    samples = load_audio(damaged(tmp_path / "clip.mp3"), on_loss=losses.append)
    assert 0 < len(samples) < seconds(3)
    (line,) = losses
    assert re.search(r"ends after [12]\.\d of 3\.0 seconds", line)


def test_faults_noise_in_the_middle_of_a_flac_costs_its_frames_alone() -> None:
    content = encoded(sound(8), **KINDS["flac"])
    middle = len(content) // 2
    samples, losses = loaded(with_bytes(content, **{f"at_{middle}": bytes(100)}))
    assert seconds(7) < len(samples) < seconds(8)
    assert re.search(r"ends after 7\.\d of 8\.0 seconds|damaged", losses[0])


@pytest.mark.parametrize("kind", KINDS)
def test_faults_pipes(tmp_path: Path, kind: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = encoded(sound(4), **KINDS[kind])
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    samples = load_audio(pipe, strict=True)
    writer.join()
    np.testing.assert_array_equal(samples, loaded(content)[0])


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("mov", "pcm_s16le")]
)
def test_containers_of_other_programs(tmp_path: Path, container: str, codec: str) -> None:
    path = tmp_path / "clip"
    tracks = 2 if container == "matroska" else 1
    with av.open(path, "w", format=container) as file:
        streams = [file.add_stream(codec, rate=48_000, layout="mono") for _ in range(tracks)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray((tone(1, 48_000).T * 32_767).astype(np.int16), layout="mono")
            frame.sample_rate = 48_000
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                file.mux(packet)
    losses: list[str] = []
    samples = load_audio(path, on_loss=losses.append)
    assert pitch(samples) == pytest.approx(440, abs=2)
    assert len(samples) == pytest.approx(SAMPLING_RATE, abs=seconds(0.1))
    assert losses == ([f"{path}: holds 2 audio tracks, of which the first is used"] if tracks == 2 else [])


def test_a_script_of_ffmpeg_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("secret.wav", sound(1), SAMPLING_RATE)
    (tmp_path / "clip.wav").write_text("ffconcat version 1.0\nfile secret.wav\n")
    with pytest.raises(AudioError, match="not a readable audio file"):
        load_audio("clip.wav")


@pytest.mark.parametrize("rate", [0, 1, 2**31 - 1])
def test_faults_absurd_rates(rate: int) -> None:
    content = with_bytes(encoded(sound(1), **KINDS["wav"]), at_24=rate.to_bytes(4, "little"))
    with pytest.raises(AudioError, match=r"sampling rate must be 1000 to 768000 Hz|not a readable"):
        load_audio(io.BytesIO(content))


def test_channels_that_cancel_each_other_are_no_silence() -> None:
    with pytest.raises(AudioError, match="cancel each other"):
        loaded(encoded(np.stack([sound(1), -sound(1)], 1), **KINDS["wav"]))


def test_faults_memory_is_that_of_the_result(tmp_path: Path) -> None:
    rate, minutes = 44_100, 4
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 2) as file:
        for seed in range(minutes):
            file.write(np.stack([sound(60, seed, rate)] * 2, axis=1))
    tracemalloc.start()
    samples = load_audio(tmp_path / "long.wav")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == minutes * 60 * SAMPLING_RATE
    assert peak < 1.5 * samples.nbytes


def test_blocks_resample_as_the_whole_does() -> None:
    stereo = np.stack([sound(3, seed, 44_100) for seed in range(2)], axis=1)
    samples, _ = loaded(encoded(stereo, 44_100, format="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples, soxr.resample(stereo.mean(axis=1), 44_100, SAMPLING_RATE), atol=1e-6)


def seconds(value: float) -> int:
    return round(value * SAMPLING_RATE)


def test_what_fits_is_one_chunk() -> None:
    (chunk,) = split_audio(sound(2), seconds(2))
    np.testing.assert_array_equal(chunk, sound(2))


@pytest.mark.parametrize("length", [2.001, 3, 4.05, 11.7])
@pytest.mark.parametrize("window", [0.5, 2])
def test_chunks_fit_the_window_and_lose_nothing(length: float, window: float) -> None:
    chunks = split_audio(sound(length), seconds(window))
    assert max(map(len, chunks)) <= seconds(window)
    np.testing.assert_array_equal(np.concatenate(chunks), sound(length))


@pytest.mark.parametrize("noise", [0, 0.01])
def test_cuts_fall_into_pauses(noise: float) -> None:
    samples = sound(10)
    pauses = [(2.5, 2.9), (4.6, 4.85), (7.2, 7.5)]
    for start, stop in pauses:
        samples[seconds(start) : seconds(stop)] *= noise
    cuts = np.cumsum([len(chunk) for chunk in split_audio(samples, seconds(4))])[:-1] / SAMPLING_RATE
    assert len(cuts) == len(pauses)
    for cut, (start, stop) in zip(cuts, pauses, strict=True):
        assert start < cut < stop


def test_of_two_pauses_the_later_one_is_cut() -> None:
    samples = sound(3.5)
    for start in (1.0, 2.0):
        samples[seconds(start) : seconds(start + 0.3)] = 0
    first, _ = split_audio(samples, seconds(3))
    assert seconds(2) < len(first) < seconds(2.3)


def test_silent_chunks_are_left_out() -> None:
    samples = np.concatenate([sound(2), np.zeros(seconds(7), np.float32), sound(2)])
    chunks = split_audio(samples, seconds(2))
    assert 2 <= len(chunks) <= 4
    assert sum(np.count_nonzero(chunk) for chunk in chunks) == np.count_nonzero(samples)
    assert split_audio(np.zeros(seconds(9), np.float32), seconds(2)) == []


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window_samples"):
        split_audio(sound(1), 0)
