"""Audio files to the samples that the models take, and long audio to chunks that fit a model's window."""

from __future__ import annotations

from os import PathLike

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
SILENCE = 1e-4  # a peak below this, -80 dB of full scale, is no speech

_HOP = SAMPLING_RATE // 100  # how finely a cut is placed: 10 ms
_PAUSE = 20  # hops of a pause between words or sentences: 0.2 s
_LATE_DB = 12.0  # how much louder than an earlier one a pause may be at the window's end


class AudioError(ValueError):
    """Audio that cannot be used: one line that names the file and says why."""


def load_audio(path: str | PathLike[str]) -> np.ndarray:
    """Reads wav, flac, mp3, ogg and whatever else libsndfile reads, at any rate, with any number of channels.

    Returns: float32 [N], mono at 16 kHz, in [-1, 1].

    Raises:
        AudioError: no such file, a folder, not audio, damaged, empty, not finite, or silent.
    """
    try:
        with open(path, "rb"):  # libsndfile would only say "System error"
            pass
        with soundfile.SoundFile(path) as file:
            samples, rate, frames = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames
    except OSError as error:
        raise AudioError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").lower()
        raise AudioError(
            f"{path}: not a readable audio file ({reason}); try wav, flac, mp3 or ogg"
        ) from error
    if not samples.size:
        raise AudioError(f"{path}: no audio in it")
    if len(samples) < frames:
        raise AudioError(f"{path}: damaged after {len(samples) / rate:.1f} of {frames / rate:.1f} seconds")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: broken samples (NaN or infinite)")
    samples /= max(1.0, float(np.abs(samples).max()))  # floating-point files may go beyond full scale
    mono = soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)
    if not is_speech(mono):
        raise AudioError(f"{path}: only silence in it")
    return mono.clip(-1, 1)


def is_speech(samples: np.ndarray) -> bool:
    """Whether anything can be heard in samples [N]."""
    return bool(np.abs(samples).max(initial=0.0) >= SILENCE)


def split_audio(samples: np.ndarray, window_samples: int) -> list[np.ndarray]:
    """Cuts samples [N] into chunks of at most `window_samples`, at pauses; silent chunks are left out.

    A cut falls in the last two thirds of a window, where the audio is quietest over 0.2 s. Later cuts are
    preferred, but a pause wins over a merely softer place behind it.
    """
    if window_samples < 1:
        raise ValueError(f"window_samples must be at least 1, got {window_samples}")
    chunks = []
    while len(samples):
        end = len(samples) if len(samples) <= window_samples else _quietest(samples[:window_samples])
        chunks.append(samples[:end])
        samples = samples[end:]
    return [chunk for chunk in chunks if is_speech(chunk)]


def _quietest(window: np.ndarray) -> int:
    """Where to cut a window of samples [N]: 1 to N."""
    hops = len(window) // _HOP
    energy = np.square(window[: hops * _HOP].reshape(hops, _HOP)).mean(axis=1)
    if hops < 3 * _PAUSE:
        return len(window)
    # level[i]: of the 0.2 s around the start of hop i + _PAUSE / 2
    level = 10 * np.log10(np.convolve(energy, np.full(_PAUSE, 1 / _PAUSE), mode="valid") + SILENCE**2)
    middle = np.arange(len(level)) + _PAUSE // 2
    cost = np.where(middle < hops / 3, np.inf, level - _LATE_DB * middle / hops)
    return int(middle[cost.argmin()]) * _HOP
