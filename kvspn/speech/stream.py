"""Live speech: text while samples come, each update decoded by the one before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvspn.checks import boolean, integer
from kvspn.decoding import DecodeStats
from kvspn.models import prompts
from kvspn.speech.audio import SAMPLING_RATE
from kvspn.speech.options import read_samples
from kvspn.speech.segments import STEP, Piece, Segment, split
from kvspn.speech.transcription import audible, segments_of, warn_cut
from kvspn.speech.windows import Choice, Heard, Windows, is_silence


@dataclass(frozen=True)
class Update:
    """What samples brought.

    segments: those that are stable from now on, none of which comes again. unstable: the text of what
    follows, which the next update may change. language: the one that is spoken, its code; None where nothing
    was decoded. stats: what decoding took. Stable texts, one after the other, and the unstable one of the
    last update are the whole text.
    """

    segments: list[Segment] = field(default_factory=list)
    unstable: str = ""
    language: str | None = None
    stats: DecodeStats = field(default_factory=lambda: DecodeStats(0, 0, 0, 0, 0.0))

    @property
    def stable(self) -> str:
        """The text of the segments."""
        return "".join(segment.text for segment in self.segments)


class Stream:
    """Transcribes or translates speech while it comes, with a model that has timestamps.

    Every update decodes the window anew: all sound since the last stable segment. The hypothesis before it
    is its draft, verified up to 15 tokens a pass, and where the two part the draft network goes on, if there
    is one. With k = 1 the tokens are therefore those of decoding the window without any, bit for bit.

    A segment is stable when `agreement` updates one after the other give it with the same tokens, times
    included, and it had ended within what the first of them heard. The window then begins where the last
    stable segment ends. One that is full is decoded a last time, and what follows begins where its segments
    end, as in a recording (`kvspn.speech.transcription`). So every sample is in some window.

    One thread at a time may use a stream; streams may share a model.
    """

    def __init__(
        self,
        windows: Windows,
        language: str | None = None,
        target_language: str | None = None,
        *,
        task: str | None = None,
        initial_prompt: str | Sequence[int] | None = None,
        hotwords: str | None = None,
        condition_on_previous_text: bool = True,
        agreement: int = 2,
        choice: Choice = Choice(temperatures=(0.0,)),  # noqa: B008
    ) -> None:
        """
        Args:
            windows: of a `kvspn.WhisperModel` or a `Translator`: its `windows`.
            language: what is spoken, its code or name; None detects it until a segment is stable.
            target_language: to translate to; None is the language spoken. A Whisper knows English alone.
            task: "transcribe", or "translate", to English where there is no target.
            initial_prompt: text, or tokens, that went before.
            hotwords: words to expect, told to each window.
            condition_on_previous_text: whether a window is told the stable text before it.
            agreement: how many updates must give a segment alike.
            choice: what tokens are chosen by. One temperature by default: an update comes soon enough.

        Raises:
            TypeError, ValueError: naming the argument; a model without timestamps.
        """
        if not windows.has_timestamps or choice.without_timestamps:
            raise ValueError("windows must be a model's with timestamps, which a stream moves by, got none")
        if choice.word_timestamps:
            raise ValueError("choice.word_timestamps must be False in a stream, got True")
        if task not in (None, *prompts.TASKS):
            raise ValueError(f"task must be one of {', '.join(prompts.TASKS)}, got {task!r}")
        if task == "transcribe" and target_language is not None:
            raise ValueError(f"target_language must be None for task 'transcribe', got {target_language!r}")
        if task == "translate" and target_language is None:
            target_language = "en"
        spoken = prompts.languages("language", language, 1, windows.languages)
        target = prompts.languages("target_language", target_language, 1, windows.languages)
        boolean("condition_on_previous_text", condition_on_previous_text)
        integer("agreement", agreement, 1, 100)
        self._windows = windows
        self._language = spoken[0] if spoken else None
        self._target = target[0] if target else None
        if self._target is not None:
            prompts.check_target(self._target, self._language, windows.model.config.target_languages)
        self._task = task
        self._hotwords = hotwords
        self._conditioned = condition_on_previous_text
        self._choice = choice
        self._before = (
            (windows.ids(initial_prompt) if initial_prompt.strip() else [])
            if isinstance(initial_prompt, str)
            else list(initial_prompt or ())
        )
        self._samples = windows.extractor.hop_length  # of a frame
        self._sound = np.zeros(0, np.float32)  # of the window
        self._seek = 0  # the frame where it begins
        self._draft: list[int] = []  # what was made of it last
        self._updates: deque[tuple[float, list[Piece]]] = deque(maxlen=agreement)
        self._segments = 0  # that are stable

    def feed(self, samples: np.ndarray) -> Update:
        """Take samples [N] at 16 kHz, mono, any number of floats, and decode what is not stable yet."""
        self._sound = np.concatenate([self._sound, read_samples("samples", samples)])
        return self._update(last=False)

    def finish(self) -> Update:
        """All that is left becomes stable."""
        return self._update(last=True)

    def _update(self, last: bool) -> Update:
        """Decode what is there; a window that grows no more, for the last time."""
        rate, window = self._windows.frames_per_second, self._windows.frames * self._samples
        stable: list[Segment] = []
        unstable, language = "", None
        stats: list[DecodeStats] = []
        while (size := min(len(self._sound), window)) and (last or size == window):
            heard, language = self._hear(size)
            stats.append(heard.stats)
            found, forward = self._found(heard, size)
            if not heard.whole and forward == -(-size // self._samples) / rate:
                warn_cut(found, self._seek / rate, forward)
            stable += self._keep(heard, found, forward, language)
        if len(self._sound):
            heard, language = self._hear(len(self._sound))
            stats.append(heard.stats)
            found, _ = self._found(heard, len(self._sound))
            agreed = self._agreed(heard)
            stable += self._keep(heard, found[: len(agreed)], agreed[-1].end if agreed else 0.0, language)
            unstable = "" if not heard.tokens else self._windows.text(self._draft)
        total = DecodeStats.total(stats, sum(each.seconds for each in stats))
        return Update(stable, unstable, language, total)

    def _hear(self, samples: int) -> tuple[Heard, str]:
        """What the first samples of the window say, by the last hypothesis, and their language."""
        windows = self._windows
        states = windows.encode(windows.features(self._sound[:samples]), keep=True)
        language = self._language or next(iter(windows.likely([states])[0]))
        target = self._target or language
        task = self._task or ("transcribe" if target == language else "translate")
        prompt = windows.prompt(
            *(language, task, self._target, self._before, self._hotwords, None), without_timestamps=False
        )
        end = [windows.model.config.eos_token_id]
        # Without a hypothesis the guess is that nothing is said: the text may then still repeat itself.
        (heard,) = windows.hear(
            [states], [prompt], self._choice, seed=self._seek, draft_tokens=[self._draft or end]
        )
        self._draft = [*heard.tokens, *end * heard.whole]
        if is_silence(heard, self._choice):
            heard = replace(heard, tokens=[], text="")
        return heard, language

    def _found(self, heard: Heard, samples: int) -> tuple[list[Segment], float]:
        """The window's segments, and the seconds that they account for."""
        rate = self._windows.frames_per_second
        seconds = -(-samples // self._samples) / rate
        return segments_of(self._windows, heard, self._seek, self._seek / rate, seconds)

    def _agreed(self, heard: Heard) -> list[Piece]:
        """The first segments of a window that the last updates agree on."""
        seconds = len(self._sound) / SAMPLING_RATE
        begin = self._windows.begin
        pieces, _ = split(heard.tokens, begin, seconds)
        self._updates.append((seconds, [each for each in pieces if each.tokens and each.tokens[-1] >= begin]))
        if len(self._updates) < (self._updates.maxlen or 0):
            return []
        sound = self._updates[0][0]
        agreed = []
        for alike in zip(*(pieces for _, pieces in self._updates), strict=False):
            if any(piece != alike[0] for piece in alike) or not 0 < alike[0].end <= sound:
                break
            agreed.append(alike[0])
        return agreed

    def _keep(self, heard: Heard, segments: list[Segment], forward: float, language: str) -> list[Segment]:
        """Let segments stand, and the window begin where the last of them ends; those that have a text."""
        if not forward:
            return []
        frames = max(1, round(forward * self._windows.frames_per_second))
        self._sound = self._sound[frames * self._samples :]
        self._seek += frames
        self._updates.clear()
        begin = self._windows.begin
        rest = self._draft[sum(len(segment.tokens) for segment in segments) :]
        earlier = round(frames / self._windows.frames_per_second / STEP)
        self._draft = [token if token < begin else max(begin, token - earlier) for token in rest]
        kept = audible(segments)
        for segment in kept:
            self._segments += 1
            segment.id = self._segments
            self._language = language
            self._before += segment.tokens
        if not self._conditioned or heard.temperature > 0.5:
            self._before = []
        self._before = self._before[-self._windows.positions :]
        return kept
