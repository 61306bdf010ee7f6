"""Audio files of every kind become mono samples at 16 kHz; long audio is cut at pauses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

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
    assert len(samples) == pytest.approx(SAMPLING_RATE / 2, abs=1)
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


def test_damage_inside_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"damaged after 0\.\d of 3\.\d seconds"):
        load_audio(damaged(tmp_path / "clip.mp3"))


def test_a_file_cut_short_gives_what_is_there_or_an_error(tmp_path: Path) -> None:
    for suffix in ("wav", "flac", "mp3", "ogg"):
        path = tmp_path / f"clip.{suffix}"
        soundfile.write(path, tone(1, 16_000), 16_000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        try:
            samples = load_audio(path)
        except AudioError as error:
            assert str(path) in str(error)
        else:
            assert len(samples) <= SAMPLING_RATE


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
