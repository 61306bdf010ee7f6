"""Where a recording holds speech, by Silero's voice activity detector, whose package brings the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvspn.speech.audio import SAMPLING_RATE

FRAME = 512  # samples that a probability is of: 32 ms
_CONTEXT = 64  # samples before them, which are looked at too
_BLOCK = 4_096  # frames at once: 2 min
_SHORT_PAUSE = 0.098  # seconds: where speech that is too long is cut


@dataclass(frozen=True)
class VadOptions:
    """Settings of faster-whisper's `vad_parameters`, with its defaults.

    threshold: from which probability on a frame is speech. neg_threshold: below which it ends; None: 0.15
    less, 0.01 at least. min_speech_duration_ms: shorter speech is none. max_speech_duration_s: longer speech
    is cut, at its last pause of 98 ms where there is one. min_silence_duration_ms: a shorter pause ends no
    speech. speech_pad_ms: speech is widened by as much on either side.
    """

    threshold: float = 0.5
    neg_threshold: float | None = None
    min_speech_duration_ms: float = 0
    max_speech_duration_s: float = math.inf
    min_silence_duration_ms: float = 2000
    speech_pad_ms: float = 400


class Silero(nn.Module):
    """The detector at 16 kHz: a spectrum, four convolutions, an LSTM over frames of 32 ms.

    Written anew for torch, so that all frames of a recording share the convolutions. The package itself is
    not imported: that would set torch to a single thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        shapes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.Sequential(
            *(
                part
                for inputs, outputs, stride in shapes
                for part in (nn.Conv1d(inputs, outputs, 3, stride, padding=1), nn.ReLU())
            )
        )
        self.lstm = nn.LSTM(128, 128)
        self.head = nn.Linear(128, 1)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights by the package's names."""
        found = {
            "spectrum.weight": weights["_model.stft.forward_basis_buffer"],
            "head.weight": weights["_model.decoder.decoder.2.weight"].squeeze(2),
            "head.bias": weights["_model.decoder.decoder.2.bias"],
        }
        for kind in ("weight", "bias"):
            for i in range(4):
                found[f"encoder.{2 * i}.{kind}"] = weights[f"_model.encoder.{i}.reparam_conv.{kind}"]
            for side in ("ih", "hh"):
                found[f"lstm.{kind}_{side}_l0"] = weights[f"_model.decoder.rnn.{kind}_{side}"]
        self.load_state_dict(found)

    @torch.inference_mode()
    def forward(self, samples: Tensor) -> Tensor:
        """float32 samples [N] at 16 kHz -> of each frame of 512 the probability of speech."""
        count = -(-len(samples) // FRAME)
        if not count:
            return samples.new_zeros(0)
        padded = F.pad(samples, (_CONTEXT, count * FRAME - len(samples)))
        state, found = None, []
        for frames in padded.unfold(0, _CONTEXT + FRAME, FRAME).split(_BLOCK):
            x = self.spectrum(F.pad(frames, (0, _CONTEXT), mode="reflect")[:, None])
            x = self.encoder((x[:, :129].square() + x[:, 129:].square()).sqrt())
            x, state = self.lstm(x.mT, state)  # a sequence of frames, a batch of one
            found.append(self.head(x.relu()).sigmoid().flatten())
        return torch.cat(found)


def open_silero() -> Silero:
    """The detector with the weights of the package silero-vad.

    Raises:
        ValueError: the package is not installed, or holds other weights.
    """
    spec = find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("vad_filter must be False without the package silero-vad: pip install 'kvspn[vad]'")
    file = Path(next(iter(spec.submodule_search_locations)), "data", "silero_vad.jit")
    detector = Silero()
    try:
        detector.load(torch.jit.load(file).state_dict())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"vad_filter: {file} must hold the weights of its version 6: {reason}") from error
    return detector.eval()


def speech(probabilities: Sequence[float], total: int, options: VadOptions) -> list[tuple[int, int]]:
    """Stretches of speech, as samples from and to, in order and apart.

    Args:
        probabilities: of each frame of 512 samples.
        total: samples of the recording.
    """
    low = options.neg_threshold
    low = max(options.threshold - 0.15, 0.01) if low is None else low
    pad = round(SAMPLING_RATE * options.speech_pad_ms / 1000)
    longest = SAMPLING_RATE * options.max_speech_duration_s - FRAME - 2 * pad
    shortest = SAMPLING_RATE * options.min_speech_duration_ms / 1000
    silence = SAMPLING_RATE * options.min_silence_duration_ms / 1000
    pause = SAMPLING_RATE * _SHORT_PAUSE
    found: list[tuple[int, int]] = []
    start: int | None = None  # of the speech that is open
    quiet: int | None = None  # since when it has been quiet
    cut: tuple[int, int] | None = None  # its last pause, where it can be cut

    def end(at: int) -> None:
        assert start is not None
        if at - start > shortest:
            found.append((start, at))

    for i, probability in enumerate(probabilities):
        now = i * FRAME
        if probability >= options.threshold:
            if start is None:
                start, quiet, cut = now, None, None
                continue
            if quiet is not None and cut is not None and cut[0] == quiet:
                cut = (quiet, now)  # speech goes on behind the pause
            quiet = None
        if start is None:
            continue
        if now - start > longest:
            paused = cut is not None and cut[0] == quiet  # and still is
            at, onwards = (now, now) if cut is None else cut
            found.append((start, at))
            start, quiet, cut = (None if paused else onwards), None, None
            continue
        if probability < low:
            quiet = now if quiet is None else quiet
            if now - quiet > pause:
                cut = (quiet, now)
            if now - quiet >= silence:
                end(quiet)
                start = quiet = cut = None
    if start is not None:
        end(total)
    return _widened(found, total, pad)


def _widened(found: list[tuple[int, int]], total: int, pad: int) -> list[tuple[int, int]]:
    """Stretches with `pad` samples more on either side; a pause that is too short for that is halved."""
    wide = []
    for i, (start, end) in enumerate(found):
        before = start - found[i - 1][1] if i else None
        after = found[i + 1][0] - end if i + 1 < len(found) else None
        start -= min(pad, start if before is None else before // 2)
        end += min(pad, total - end if after is None else after - after // 2)
        wide.append((start, end))
    return wide


class Joined:
    """A recording's stretches of speech, laid end to end, and the way back to their times."""

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        """stretches: samples from and to."""
        self._stretches = stretches
        lengths = [end - start for start, end in stretches]
        self._ends = np.cumsum(lengths)

    def samples(self, recording: np.ndarray) -> np.ndarray:
        """[N] of speech alone."""
        parts = [recording[start:end] for start, end in self._stretches]
        return np.concatenate(parts) if parts else recording[:0]

    def groups(self, most: int) -> list[tuple[int, int]]:
        """What was joined, cut at seams into parts of at most `most` samples where stretches allow it: from
        and to."""
        parts: list[tuple[int, int]] = []
        start = before = 0
        for end in map(int, self._ends):
            if end - start > most and before > start:
                parts.append((start, before))
                start = before
            before = end
        return [*parts, (start, before)] if before > start else parts

    def stretch(self, seconds: float, end: bool = False) -> int:
        """Which stretch a time in what was joined belongs to: at a seam, an `end` to that before it."""
        at = round(seconds * SAMPLING_RATE)
        i = int(np.searchsorted(self._ends, at, side="left" if end else "right"))
        return min(i, len(self._ends) - 1)

    def time(self, seconds: float, stretch: int | None = None) -> float:
        """Seconds in the recording of a time in what was joined, as of its own stretch or that one."""
        i = self.stretch(seconds) if stretch is None else stretch
        _, stop = self._stretches[i]
        return round((stop - (int(self._ends[i]) - round(seconds * SAMPLING_RATE))) / SAMPLING_RATE, 3)
