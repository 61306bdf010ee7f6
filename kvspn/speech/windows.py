"""One window of a recording to tokens: features, language, speech or none, decoding with fallback."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.decoding import DecodeStats, alignment, compression_ratio, decode
from kvspn.engines import Engine
from kvspn.models import WhisperM2MForConditionalGeneration, WhisperM2MProcessor, prompts, settings
from kvspn.models.checkpoints.vocabulary import NO_SPEECH, not_speech, prompt_tokens
from kvspn.models.languages import likely_languages
from kvspn.ops.rules import Timestamps
from kvspn.speech.segments import STEP
from kvspn.speech.words import Timing

_BLOCK = 3_000  # frames of which a spectrum is taken at once: 30 s
_MOST_DRAWN = 1 << 30  # bytes of encoder's keys and values in fp32, for draws side by side


@dataclass(frozen=True)
class Choice:
    """What a window's tokens are chosen by, as `kvspn.WhisperModel.transcribe` says it.

    k: a draft is accepted if among the base model's k likeliest tokens. draft: whether to draft, where there
    is a draft network that has been trained.
    """

    temperatures: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    best_of: int = 5
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    suppress_blank: bool = True
    suppress_tokens: Sequence[int] | None = (-1,)
    without_timestamps: bool = False
    max_initial_timestamp: float = 1.0
    max_new_tokens: int | None = None
    word_timestamps: bool = False
    k: int | float | str = 1
    draft: bool = True


class Prompt(NamedTuple):
    """What stands before a window's text: to the start of the transcript, what follows, and of that how many
    tokens are the text's own beginning."""

    before: list[int]
    after: list[int]
    prefix: int


@dataclass(frozen=True)
class Heard:
    """What was made of a window.

    tokens: generated ones without the end token; `whole`: whether there was one, else a limit came first.
    The figures: as in `kvspn.speech.segments.Segment`; `stats`: of all attempts together; `timing`: of the
    text's tokens, where words are asked for.
    """

    tokens: list[int]
    text: str
    whole: bool
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float
    stats: DecodeStats
    timing: Timing | None = None


class Windows:
    """Hears windows of a recording with one model, on engines of its own."""

    def __init__(
        self,
        model: WhisperM2MForConditionalGeneration,
        processor: WhisperM2MProcessor,
        encoder_format: str | None = None,
        **engine: Any,
    ) -> None:
        """encoder_format: of the speech encoder on the CPU (see `model.speech_encoder`); None is torch.
        engine: what `model.engine` is told: backend, weights, kv."""
        self._encoder = None if encoder_format is None else model.speech_encoder(encoder_format)
        self.model = model
        self.tokenizer = processor.tokenizer
        self.extractor = processor.feature_extractor
        self._said = settings.merge(model.generation_config, None, {})
        self.languages = prompts.language_ids(self._said)
        self.begin = self._said["no_timestamps_token_id"] + 1
        self.has_timestamps = model.config.vocab_size > self.begin
        self.positions = model.config.max_target_positions
        self.frames = self.extractor.nb_max_frames
        self.frames_per_second = self.extractor.sampling_rate // self.extractor.hop_length
        tokens = self.tokenizer.get_vocab()
        self._start = self._said.get("decoder_start_token_id", model.config.decoder_start_token_id)
        self._end = model.config.eos_token_id
        self._no_speech = next((tokens[t] for t in NO_SPEECH if t in tokens), None)
        self._options = engine
        self._engines: dict[int, Engine] = {}
        self._held: dict[int, Sequence[Tensor]] = {}  # by an engine's rows the states that it has
        self._kept: tuple[Tensor, Tensor] | None = None  # a window's features, padded, and states

    def engine(self, rows: int) -> Engine:
        """The engine for so many rows; the last one is kept beside that for one."""
        if rows not in self._engines:
            for other in [n for n in self._engines if n > 1]:
                del self._engines[other]
                self._held.pop(other, None)
            positions = self.model.config.max_source_positions
            self._engines[rows] = self.model.engine(rows, positions, **self._options)
        return self._engines[rows]

    def features(self, samples: np.ndarray) -> Tensor:
        """Samples [N] at the extractor's rate -> log-mel features [mel bins, N / hop, rounded up].

        As the extractor's, to the bit, of the whole recording: its loudest place sets the floor of all
        windows. In blocks, so that hours of sound need no spectrum of hours.
        """
        extractor = self.extractor
        hop, half = extractor.hop_length, extractor.n_fft // 2
        frames = -(-len(samples) // hop)
        padded = F.pad(torch.from_numpy(samples), (0, max(0, frames * hop - len(samples))))
        if len(padded) <= half:
            padded = F.pad(padded, (0, half + 1 - len(padded)))
        padded = F.pad(padded[None], (half, half), mode="reflect")[0]
        filters = torch.from_numpy(np.asarray(extractor.mel_filters)).float().T
        window = torch.hann_window(extractor.n_fft)
        blocks = []
        for first in range(0, frames, _BLOCK):
            count = min(_BLOCK, frames - first)
            part = padded[first * hop : (first + count - 1) * hop + extractor.n_fft]
            spectrum = torch.stft(
                part, extractor.n_fft, hop, window=window, center=False, return_complex=True
            )
            blocks.append((filters @ spectrum.abs().square()).clamp(min=1e-10).log10())
        if not blocks:
            return torch.zeros(len(filters), 0)
        whole = torch.cat(blocks, dim=1)
        return (torch.maximum(whole, whole.max() - 8) + 4) / 4

    @torch.no_grad()
    def encode(self, features: Tensor, keep: bool = False) -> Tensor:
        """A window's features [mel bins, frames], padded with zeros as Whisper's are -> states [E, d].

        keep: whether the next call may have these states for the same features: a language is detected in the
        window that is decoded next. Else every call computes them, that of a recording heard again, too.
        """
        padded = F.pad(features, (0, self.frames - features.shape[1]))
        kept, self._kept = self._kept, None
        if kept is not None and torch.equal(kept[0], padded):
            states = kept[1]
        elif self._encoder is not None:
            states = self._encoder(padded).to(self.model.dtype)
        else:
            states = self.model.encode(padded[None].to(self.model.device))[0]
        if keep:
            self._kept = padded, states
        return states

    def likely(self, states: Sequence[Tensor], rows: int = 1) -> list[dict[str, float]]:
        """Of windows by their states [E, d] every language's probability, the likeliest first; English alone
        where the model knows no other.

        rows: of the engine, which has the states then; see `hear`.
        """
        if not self.languages:
            return [{"en": 1.0}] * len(states)
        engine = self.engine(rows)
        with engine.lock:
            given = self._given(rows, states)
            found = likely_languages(engine, given, self._start, self.languages)[: len(states)]
            self._held[rows] = states
        return found

    def _given(self, rows: int, states: Sequence[Tensor]) -> list[Tensor] | None:
        """What the engine for so many rows is to be started with: None where it has these states.

        They count as lost until the start has been noted in `_held`.
        """
        held = self._held.pop(rows, ())
        if len(held) == len(states) and all(map(operator.is_, held, states)):
            return None
        return [*states, *[states[0][:1]] * (rows - len(states))]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that begins with a word."""
        return self.tokenizer.encode(f" {text.strip()}", add_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, white space at its ends included, timestamps and special tokens left out."""
        return self.tokenizer.decode(self.text_tokens(tokens))

    def text_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Without timestamps and special tokens."""
        return [token for token in tokens if token < self._end]

    def prompt(
        self,
        language: str,
        task: str,
        target: str | None,
        before: Sequence[int],
        hotwords: str | None,
        prefix: str | None,
        without_timestamps: bool,
    ) -> Prompt:
        """A window's prompt.

        Args:
            target: the language to translate to; None is the one that is spoken.
            before: tokens that went before; a text's, or an earlier window's, timestamps included.
        """
        context, prefix_ids = prompts.text_before(self.tokenizer, self.positions, before, hotwords, prefix)
        taught = self.model.config.target_languages
        after = prompts.after_start(
            self._said, self.languages, language, target or language, task, taught, not without_timestamps
        )
        if prefix_ids and not without_timestamps:
            prefix_ids.insert(0, self.begin)
        return Prompt([*context, self._start], [*after, *prefix_ids], len(prefix_ids))

    def hear(
        self,
        states: Sequence[Tensor],
        prompts: Sequence[Prompt],
        by: Choice,
        seed: int,
        rows: int = 1,
        frames: Sequence[int] = (),
        draft_tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[Heard]:
        """Windows, a row of an engine each, by their states [E, d] and prompts.

        Args:
            frames: of each window, those that are sound, where words are asked for.
            draft_tokens: a guess of each window's tokens, timestamps and end included, for the first attempt.
            rows: of the engine; those above the windows' number stay idle.

        A single window is tried again at the next temperature where its text compresses too well or is too
        unlikely, unless no speech is what is likely. Draws are made side by side, and depend on `seed`,
        temperature and attempt alone.
        """
        engine = self.engine(rows)
        with engine.lock:
            silent = self._silence(engine, states, prompts, by)
            if rows > 1:
                return self._decode(
                    engine, None, prompts, silent, by, by.temperatures[0], seed, frames, draft_tokens
                )
            tried: list[Heard] = []
            spent: list[DecodeStats] = []
            seconds, guess = 0.0, draft_tokens
            for i, temperature in enumerate(by.temperatures):
                draws = by.best_of if temperature else 1
                seeds = [(seed * 100 + i) * 1000 + draw for draw in range(draws)]
                heard: list[Heard] = []
                for first in range(0, draws, abreast := self._abreast(draws)):
                    some = seeds[first : first + abreast]
                    heard += self._draw(
                        abreast, states, prompts, silent, by, temperature, some, frames, guess
                    )
                    seconds += max(each.stats.seconds for each in heard[first:])
                guess = None  # it was of the first temperature's text
                tried.append(max(heard, key=_likelihood))
                spent += [each.stats for each in heard]
                if not _failed(tried[-1], by):
                    best = tried[-1]
                    break
            else:
                best = max([each for each in tried if not _repeats(each, by)] or tried, key=_likelihood)
            # Of several attempts the last temperature counts: the next window is told a text or not by it.
            total = DecodeStats.total(spent, seconds)
            return [replace(best, temperature=temperature, stats=total)]

    def _silence(
        self, engine: Engine, states: Sequence[Tensor], prompts: Sequence[Prompt], by: Choice
    ) -> list[float]:
        """How likely "no speech" is behind the start of each transcript, from the passes of the prompts; the
        engine has their keys and values then."""
        rows = len(engine.tokens)
        idle = rows - len(states)
        # The newest token is not processed: where it would be the start of the transcript, any one follows.
        starts = [[*prompt.before, *(prompt.after or [self._start])] for prompt in prompts]
        given = self._given(rows, states)
        engine.start(
            given,
            [*starts, *[[self._start]] * idle],
            eos=-1,
            max_length=max(map(len, starts)),
            cross_queries=by.word_timestamps,
            logits_at=[*(len(prompt.before) - 1 for prompt in prompts), *[None] * idle],
        )
        self._held[rows] = states
        if self._no_speech is None:
            return [0.0] * len(states)
        found: list[float] = engine.logits[: len(states)].softmax(-1)[:, self._no_speech].tolist()
        return found

    def _abreast(self, draws: int) -> int:
        """How many of a window's draws are made at once: each has the encoder's keys and values beside it."""
        config = self.model.config
        values = 2 * config.decoder_layers * config.d_model * config.max_source_positions
        return max(1, min(draws, _MOST_DRAWN // (4 * values)))

    def _draw(
        self,
        rows: int,
        states: Sequence[Tensor],
        prompts: Sequence[Prompt],
        silent: Sequence[float],
        by: Choice,
        temperature: float,
        seeds: list[int],
        frames: Sequence[int],
        draft_tokens: Sequence[Sequence[int]] | None,
    ) -> list[Heard]:
        """One window, once for each seed, on the engine for so many rows."""
        engine, every = self.engine(rows), list(states) * rows
        with engine.lock:
            given = self._given(rows, every)
            count = len(seeds)
            found = self._decode(
                *(engine, given, [*prompts] * count, [*silent] * count, by, temperature, seeds),
                [*frames] * count,
                None if draft_tokens is None else [*draft_tokens] * count,
            )
            self._held[rows] = every
        return found

    def _decode(
        self,
        engine: Engine,
        states: Sequence[Tensor] | None,
        prompts: Sequence[Prompt],
        silent: Sequence[float],
        by: Choice,
        temperature: float,
        seed: int | list[int],
        frames: Sequence[int],
        draft_tokens: Sequence[Sequence[int]] | None,
    ) -> list[Heard]:
        """The rows, once. states: of all the engine's rows; None: those that it has."""
        starts = [[*prompt.before, *prompt.after] for prompt in prompts]
        limits = [self._limit(len(start), by.max_new_tokens) for start in starts]
        idle = len(engine.tokens) - len(prompts)
        mask, first_mask = self._masks(by)
        grammar = None
        if not by.without_timestamps:
            latest = round(by.max_initial_timestamp / STEP)
            grammar = Timestamps(self.begin, self._end, latest, prompts[0].prefix)
        found = decode(
            engine,
            states,
            [*starts, *[[self._start]] * idle],
            eos=self._end,
            max_length=limits + [1] * idle,
            k=by.k,
            draft=by.draft and self.model.drafts,
            draft_tokens=None if draft_tokens is None else [*draft_tokens, *[[]] * idle],
            mask=mask,
            begin_mask=first_mask,
            temperature=temperature,
            seed=seed if isinstance(seed, int) else [*seed, *[0] * idle],
            log_probs=True,
            timestamps=grammar,
            cross_queries=by.word_timestamps,
        )
        assert found.log_probs is not None
        heard = []
        rows = len(prompts)
        for row, (tokens, start, log_probs, no_speech, stats) in enumerate(
            zip(
                found.sequences[:rows], starts, found.log_probs[:rows], silent, found.rows[:rows], strict=True
            )
        ):
            new = tokens[len(start) :]
            whole = new[-1:] == [self._end]
            new = new[:-1] if whole else new
            text = self.text(new)
            heard.append(
                Heard(
                    tokens=new,
                    text=text,
                    whole=whole,
                    avg_logprob=sum(log_probs) / (len(new) + 1),
                    compression_ratio=compression_ratio(text.strip()),
                    no_speech_prob=no_speech,
                    temperature=temperature,
                    stats=stats,
                    timing=self._timing(engine, row, tokens, len(start), log_probs, frames[row])
                    if by.word_timestamps
                    else None,
                )
            )
        return heard

    def _timing(
        self,
        engine: Engine,
        row: int,
        tokens: Sequence[int],
        first: int,
        log_probs: Sequence[float],
        frames: int,
    ) -> Timing:
        """When the text of a row's tokens is said, those from `first` on being its window's own."""
        text = [i for i in range(first, len(tokens)) if tokens[i] < self._end]
        sound = max(1, frames // 2)
        if not text:
            return Timing([0.0], [])
        # A token is chosen at the one before it; where the last one's end is chosen, it has been processed.
        chosen = [i - 1 for i in text] + [text[-1]] * (text[-1] + 1 < len(tokens))
        scores = engine.cross_scores(row, self.alignment_heads, chosen)[..., :sound]
        begin = alignment.starts(scores.softmax(-1))
        probabilities = [math.exp(log_probs[i - first]) for i in text]
        return Timing([*begin, sound * alignment.POSITION][: len(text) + 1], probabilities)

    @cached_property
    def alignment_heads(self) -> list[tuple[int, int]]:
        """Layer and head of cross-attention that follow the speech."""
        return settings.alignment_heads(self._said, self.model.config)

    def _limit(self, prompt: int, max_new_tokens: int | None) -> int:
        """Tokens of a row, its prompt included."""
        if max_new_tokens is None:
            return self.positions
        if prompt + max_new_tokens > self.positions:
            raise ValueError(
                f"max_new_tokens must be at most {self.positions - prompt} beside a prompt of {prompt} "
                f"tokens, got {max_new_tokens}"
            )
        return prompt + max_new_tokens

    @cached_property
    def _symbols(self) -> list[int]:
        return not_speech(self.tokenizer)

    def _masks(self, by: Choice) -> tuple[Tensor, Tensor | None]:
        """Additive float32 [V]: for all tokens, and for the first."""
        given = list(by.suppress_tokens or ())
        vocabulary = self.model.config.vocab_size
        suppressed = {*settings.token_ids("suppress_tokens", [t for t in given if t != -1], vocabulary)}
        suppressed.update(self._symbols if -1 in given else prompt_tokens(self.tokenizer))
        # <|notimestamps|>, or all timestamps
        suppressed |= set(range(self.begin, vocabulary)) if by.without_timestamps else {self.begin - 1}
        blank = [*self.tokenizer.encode(" ", add_special_tokens=False)[:1], self._end]
        return self._mask(suppressed), self._mask(blank) if by.suppress_blank else None

    def _mask(self, tokens: Any) -> Tensor:
        mask = torch.zeros(self.model.config.vocab_size, device=self.model.device)
        mask[list(tokens)] = -torch.inf
        return mask


def _likelihood(heard: Heard) -> float:
    return heard.avg_logprob


def _repeats(heard: Heard, by: Choice) -> bool:
    most = by.compression_ratio_threshold
    return most is not None and heard.compression_ratio > most


def _failed(heard: Heard, by: Choice) -> bool:
    """Whether a window is to be tried at another temperature."""
    unlikely = by.log_prob_threshold is not None and heard.avg_logprob < by.log_prob_threshold
    silence = by.no_speech_threshold is not None and heard.no_speech_prob > by.no_speech_threshold
    return (_repeats(heard, by) or unlikely) and not (silence and unlikely)


def is_silence(heard: Heard, by: Choice) -> bool:
    """Whether a window is left out: "no speech" is likely, and its text is not."""
    if by.no_speech_threshold is None or heard.no_speech_prob <= by.no_speech_threshold:
        return False
    return by.log_prob_threshold is None or heard.avg_logprob <= by.log_prob_threshold
