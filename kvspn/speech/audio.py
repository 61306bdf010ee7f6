"""Audio files to the samples that the models take, and long audio to chunks that fit a model's window."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import av
import numpy as np
import soxr

SAMPLING_RATE = 16_000
SILENCE = 1e-4  # a peak below this, -80 dB of full scale, is no speech

_RATES = 1_000, 768_000  # Hz: what a file may claim
_TOLERANCE = 0.1  # seconds: headers round, and encoders pad
_UNKNOWN = 0x7FFF_0000  # bytes: a wav's header counts so many where the program could not know

_HOP = SAMPLING_RATE // 100  # how finely a cut is placed: 10 ms
_PAUSE = 20  # hops of a pause between words or sentences: 0.2 s
_LATE_DB = 12.0  # how much louder than an earlier one a pause may be at the window's end


class AudioError(ValueError):
    """Audio that cannot be used: one line that names the file and says why."""


def load_audio(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    strict: bool = False,
    on_loss: Callable[[str], object] = warnings.warn,
) -> np.ndarray:
    """Reads whatever FFmpeg reads (wav, flac, mp3, ogg, opus, m4a, webm, ...), whatever its header counts.

    To its end, at any rate, with any number of channels, also recordings that were joined into one file. It
    is decoded, mixed and resampled in blocks: little more than the result is held in memory.

    Args:
        source: a file, a pipe such as /dev/stdin, or something open for reading bytes.
        strict: whether a file of which something is lost is an error.
        on_loss: else called with one line that names the file and says what of it is lost: it is cut short,
            damaged, or holds other audio tracks than the first.

    Returns: float32 [N], mono at 16 kHz, in [-1, 1].

    Raises:
        AudioError: no such file, a folder, not audio, empty, not finite, or silent; with `strict`, a loss.
    """
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "audio")
    try:
        with _seekable(source) as file:
            samples, losses = _decode(file)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from error.__cause__
    except av.error.FFmpegError as error:
        reason = (error.strerror or str(error)).lower()
        raise AudioError(
            f"{name}: not a readable audio file ({reason}); try wav, flac, mp3, ogg or m4a"
        ) from error
    except OSError as error:
        raise AudioError(f"{name}: {(error.strerror or str(error)).lower()}") from error
    if losses:
        line = f"{name}: {'; '.join(losses)}"
        if strict:
            raise AudioError(line)
        on_loss(line)
    return samples


def live_audio(
    source: BinaryIO, raw: int | None = None, on_loss: Callable[[str], object] = warnings.warn
) -> Iterator[np.ndarray]:
    """What comes out of a pipe, as it comes: blocks of float32 [N], mono at 16 kHz, in [-1, 1].

    Args:
        source: open for reading bytes; it is never sought in.
        raw: its rate in Hz, where it is headerless 16-bit samples (little-endian, mono) and nothing that
            FFmpeg knows.
        on_loss: as in `load_audio`, called at the end.

    Raises:
        AudioError: not audio, or not finite.
    """
    name = getattr(source, "name", "audio")
    name = "standard input" if name == "<stdin>" else name
    # Without these FFmpeg reads for seconds before it gives anything.
    options = {"protocol_whitelist": "none", "probesize": "8192", "analyzeduration": "0"}
    if raw is not None:
        options |= {"sample_rate": str(raw), "ch_layout": "mono"}
    form = None if raw is None else "s16le"
    try:
        with av.open(_Pipe(source), "r", format=form, options=options, buffer_size=4096) as container:
            if not container.streams.audio:
                raise AudioError("no audio in it")
            track = _Track(container)
            for block, _ in _blocks(track):
                if len(block):
                    yield block.clip(-1, 1)
            for fault in track.faults():
                on_loss(f"{name}: {fault}")
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from error.__cause__
    except av.error.FFmpegError as error:
        reason = (error.strerror or str(error)).lower()
        raise AudioError(f"{name}: not readable as audio ({reason}); try wav, ogg, flac or --raw") from error


class _Pipe:
    """A file that gives what is there, where another would wait until it is full."""

    def __init__(self, source: BinaryIO) -> None:
        self._read = getattr(source, "read1", source.read)

    def read(self, size: int) -> bytes:
        found: bytes = self._read(size)
        return found


@contextmanager
def _seekable(source: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    """The file itself, or a copy of what comes out of a pipe: containers are read to and fro."""
    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            file: BinaryIO = stack.enter_context(open(source, "rb"))
        else:
            file = source
        if not file.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            file = copy
        file.seek(0)
        yield file


def _decode(file: BinaryIO) -> tuple[np.ndarray, list[str]]:
    """The samples, as `load_audio` returns them, and what is lost, in words."""
    # A playlist or a concat script must not open files or addresses of its own.
    with av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
        if not container.streams.audio:
            raise AudioError("no audio in it")
        track = _Track(container)
        samples, peak = _mono(track)
        tracks = len(container.streams.audio)
        losses = track.losses(file)
    if not len(samples):
        raise AudioError("; ".join(["no audio in it", *losses]))
    samples /= max(1.0, peak)  # floating-point files may go beyond full scale
    if not is_speech(samples):
        raise AudioError("only silence in it" if peak < SILENCE else "its channels cancel each other out")
    if tracks > 1:
        losses.append(f"holds {tracks} audio tracks, of which the first is used")
    return samples.clip(-1, 1, out=samples), losses


class _Track:
    """The first audio track of a container, decoded frame by frame, with an account of what was lost."""

    def __init__(self, container: av.container.InputContainer) -> None:
        self._container = container
        self._stream = container.streams.audio[0]
        self._stream.codec_context.options = {"err_detect": "crccheck+explode"}  # damage is no sound
        self._seconds = 0.0  # decoded
        self._damaged = 0.0  # seconds
        self._end: str | None = None  # why reading ended early
        self._first: int | None = None  # where the first packet lies in the file

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rate in Hz and the float samples [channels, N] of each frame."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                self._end = (error.strerror or str(error)).lower()
                return
            if self._first is None:
                self._first = packet.pos
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self._damaged += float((packet.duration or 0) * (packet.time_base or 0))
                continue
            for frame in frames:
                self._seconds += frame.samples / frame.sample_rate
                yield frame.sample_rate, _floats(frame)

    def losses(self, file: BinaryIO) -> list[str]:
        """What of the file is not among the frames, in words."""
        losses = []
        kind = self._container.format.name
        whole = self._claimed(file, kind)
        if whole is not None and self._seconds < whole - _TOLERANCE:
            losses.append(f"ends after {self._seconds:.1f} of {whole:.1f} seconds")
        elif faults := self.faults():
            losses += faults
        elif kind == "ogg" and not _ogg_ends(file):
            losses.append(f"is cut short after {self._seconds:.1f} seconds")
        return losses

    def faults(self) -> list[str]:
        """Those that decoding met."""
        if self._damaged:
            return [f"damaged: {self._damaged:.1f} seconds cannot be decoded"]
        if self._end:
            return [f"cannot be read after {self._seconds:.1f} seconds ({self._end})"]
        return []

    def _claimed(self, file: BinaryIO, kind: str) -> float | None:
        """The seconds that the header counts, where it does: FFmpeg gives an estimate where it does not."""
        stream, context = self._stream, self._stream.codec_context
        if kind == "ogg":
            return None
        if kind == "wav":  # FFmpeg's is what the file's size leaves of it
            return self._seconds + 8 * _wav_bytes_missing(file) / (context.bit_rate or 1)
        track = float((stream.duration or 0) * (stream.time_base or 0))
        if kind == "mp3":
            counted = _mp3_frames(file, self._first or 0) * context.frame_size / context.sample_rate
            return min(counted, track)
        alone = len(self._container.streams) == 1
        return track or (alone and (self._container.duration or 0) / av.time_base) or None


def _floats(frame: av.AudioFrame) -> np.ndarray:
    """A frame's samples as [channels, N], full scale being 1."""
    data: Any = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype == np.uint8:
        return (data - np.float32(128)) / 128
    return data if data.dtype.kind == "f" else data / -np.float32(np.iinfo(data.dtype).min)


def _mono(frames: Iterable[tuple[int, np.ndarray]]) -> tuple[np.ndarray, float]:
    """The mean of the channels at 16 kHz, float32 [N], and the highest peak of any channel."""
    mixed = bytearray()  # grows in place
    peak = 0.0
    for block, highest in _blocks(frames):
        mixed += block.tobytes()
        peak = max(peak, highest)
    return np.frombuffer(mixed, np.float32), peak


def _blocks(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[np.ndarray, float]]:
    """The same frame by frame."""
    for rate, run in groupby(frames, itemgetter(0)):  # recordings that were joined may differ in it
        if not _RATES[0] <= rate <= _RATES[1]:
            raise AudioError(f"its sampling rate must be {_RATES[0]} to {_RATES[1]} Hz, got {rate}")
        resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32")
        for _, channels in run:
            highest = float(np.abs(channels).max(initial=0))
            if not np.isfinite(highest):
                raise AudioError("broken samples (NaN or infinite)")
            mono = channels.mean(axis=0, dtype=np.float64).astype(np.float32)
            yield resampler.resample_chunk(mono), highest
        yield resampler.resample_chunk(np.empty(0, np.float32), last=True), 0.0


def _wav_bytes_missing(file: BinaryIO) -> int:
    """Of the samples that a wav's header counts; 0 where they are there, or where it does not know."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            start, end = file.tell(), file.seek(0, os.SEEK_END)
            return max(0, start + size - end) if size < _UNKNOWN else 0
        file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def _mp3_frames(file: BinaryIO, first: int) -> int:
    """The frames that an mp3 counts ahead of the first of sound, which is at byte `first`; 0 for no count."""
    file.seek(max(0, first - 2048))  # the longest frame has 1,441 bytes
    before = file.read(min(first, 2048))
    start = max(before.rfind(b"Xing"), before.rfind(b"Info"))
    known = start >= 0 and before[start + 7] & 1  # a flag
    return int.from_bytes(before[start + 8 : start + 12], "big") if known else 0


def _ogg_ends(file: BinaryIO) -> bool:
    """Whether the last page of an ogg file is whole and marked as the last one."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * 65_307))  # the longest page has 65,307 bytes
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def is_speech(samples: np.ndarray) -> bool:
    """Whether anything can be heard in samples [N]."""
    return bool(max(samples.max(initial=0.0), -samples.min(initial=0.0)) >= SILENCE)


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
