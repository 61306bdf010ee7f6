"""Translation quality and acceptance over a test set of spoken sentences, for several k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from sacrebleu import corpus_bleu
from torch import Tensor

from kvspn.assets import SpokenSentence
from kvspn.decoding import DecodeStats
from kvspn.engines import Engine
from kvspn.speech.audio import SAMPLING_RATE, load_audio
from kvspn.speech.translator import Translator


@dataclass(frozen=True)
class Score:
    """One direction, or several.

    bleu: sacrebleu's corpus BLEU, 0 to 100, with its Chinese tokenizer for Chinese and 13a for the others.
    acceptance: accepted / drafted tokens. tokens_per_step: generated tokens / decoder steps.
    identical_to_greedy: the share of outputs, 0 to 1, whose tokens are exactly greedy decoding's.
    identical_to_full: the same against greedy decoding with the weights in fp32; None where they are.
    """

    bleu: float
    acceptance: float
    tokens_per_step: float
    identical_to_greedy: float
    identical_to_full: float | None


@dataclass(frozen=True)
class Row:
    """One k on one test set.

    bleu: the mean over the directions between two languages; bleu_transcription: over those of a language
    into itself; None where there are none. The others: as in Score, over all directions. per_direction: by
    "en-de".
    """

    set: str
    k: int | str
    bleu: float | None
    bleu_transcription: float | None
    acceptance: float
    tokens_per_step: float
    identical_to_greedy: float
    identical_to_full: float | None
    per_direction: dict[str, Score]


@dataclass(frozen=True)
class Output:
    """One clip in one direction ("en-de")."""

    direction: str
    text: str
    reference: str
    stats: DecodeStats
    identical: bool
    identical_to_full: bool | None


class ClipDecoder:
    """Decodes clips into all their languages, greedily and at every k; the spoken language is given.

    Raises:
        ValueError: a model without a draft network.
    """

    def __init__(self, translator: Translator, ks: Sequence[int | str]) -> None:
        """ks: ints >= 1 or "inf"."""
        if translator.model.kvspn is None:
            raise ValueError(
                "the model has no draft network: there is nothing to compare with greedy decoding"
            )
        self._translator = translator
        self._ks = ks
        self._engines: dict[tuple[int, str | None, str | None], Engine] = {}

    def __call__(self, clip: SpokenSentence) -> dict[int | str, list[Output]]:
        """The outputs at each k.

        Raises:
            AudioError: a clip that cannot be used.
            ValueError: a language that the model does not know.
        """
        states = self._encode(clip)
        formats = self._translator.weights, self._translator.kv
        greedy, _ = self._decode(clip, states, 1, *formats, draft=False)
        full = None
        if formats != (None, None):
            full, _ = self._decode(clip, states, 1, None, None, draft=False)
        found = {}
        for k in self._ks:
            tokens, stats = self._decode(clip, states, k, *formats, draft=True)
            found[k] = [
                Output(
                    f"{clip.language}-{target}",
                    self._translator.decode(tokens[i]),
                    reference,
                    stats[i],
                    tokens[i] == greedy[i],
                    None if full is None else tokens[i] == full[i],
                )
                for i, (target, reference) in enumerate(clip.texts.items())
            ]
        return found

    @torch.no_grad()
    def _encode(self, clip: SpokenSentence) -> Tensor:
        """Encoder states [1, E, d]. Raises ValueError for a clip that is longer than the model's window."""
        samples = load_audio(clip.audio)
        features = self._translator.processor(samples, sampling_rate=SAMPLING_RATE).input_features
        return self._translator.model.encode(features)

    def _decode(
        self,
        clip: SpokenSentence,
        states: Tensor,
        k: int | str,
        weights: str | None,
        kv: str | None,
        draft: bool,
    ) -> tuple[list[list[int]], list[DecodeStats]]:
        """All languages at once, a row each: generated tokens and figures."""
        model, batch = self._translator.model, len(clip.texts)
        if (batch, weights, kv) not in self._engines:
            self._engines[batch, weights, kv] = model.engine(
                batch, model.config.max_source_positions, self._translator.backend, weights, kv
            )
        output: Any = model.generate(
            encoder_outputs=(states.expand(batch, -1, -1),),
            language=clip.language,
            target_language=list(clip.texts),
            k=k,
            draft=draft,
            return_dict_in_generate=True,
            engine=self._engines[batch, weights, kv],
        )
        rows = zip(output.sequences.tolist(), output.stats, strict=True)
        return [tokens[: stats.tokens] for tokens, stats in rows], output.stats


def score(name: str, clips: Iterable[Mapping[int | str, Sequence[Output]]]) -> list[Row]:
    """A row for each k, from what ClipDecoder made of the clips of the test set `name`."""
    by_k: dict[int | str, list[Output]] = defaultdict(list)
    for clip in clips:
        for k, outputs in clip.items():
            by_k[k] += outputs
    return [_row(name, k, outputs) for k, outputs in by_k.items()]


def _row(name: str, k: int | str, outputs: Sequence[Output]) -> Row:
    directions: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        directions[output.direction].append(output)
    scores = {direction: _score(direction, each) for direction, each in sorted(directions.items())}
    translated: list[float] = []
    transcribed: list[float] = []
    for direction, each in scores.items():
        source, target = direction.split("-")
        (transcribed if source == target else translated).append(each.bleu)
    return Row(
        name,
        k,
        round(fmean(translated), 2) if translated else None,
        round(fmean(transcribed), 2) if transcribed else None,
        *_figures(outputs),
        scores,
    )


def _score(direction: str, outputs: Sequence[Output]) -> Score:
    tokenizer = "zh" if direction.endswith("-zh") else "13a"
    texts, references = [each.text for each in outputs], [each.reference for each in outputs]
    bleu = corpus_bleu(texts, [references], tokenize=tokenizer).score
    return Score(round(bleu, 2), *_figures(outputs))


def _figures(outputs: Sequence[Output]) -> tuple[float, float, float, float | None]:
    """acceptance, tokens_per_step, identical_to_greedy, identical_to_full."""
    total = DecodeStats.total([output.stats for output in outputs], 0.0)
    identical = fmean(output.identical for output in outputs)
    to_full = [output.identical_to_full for output in outputs if output.identical_to_full is not None]
    return (
        round(total.acceptance, 4),
        round(total.tokens_per_step, 4),
        round(identical, 4),
        round(fmean(to_full), 4) if to_full else None,
    )
