"""Translation quality and acceptance over a test set of spoken sentences, for several k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from sacrebleu import corpus_bleu
from torch import Tensor

from kvspn.assets import SpokenSentence
from kvspn.audio import SAMPLING_RATE, load_audio
from kvspn.decoding import DecodeStats
from kvspn.engines import Engine
from kvspn.translator import Translator


@dataclass(frozen=True)
class Score:
    """One direction, or several.

    bleu: sacrebleu's corpus BLEU, 0 to 100, with its Chinese tokenizer for Chinese and 13a for the others.
    acceptance: accepted / drafted tokens. tokens_per_step: generated tokens / decoder steps.
    identical_to_greedy: the share of outputs, 0 to 1, whose tokens are exactly greedy decoding's.
    """

    bleu: float
    acceptance: float
    tokens_per_step: float
    identical_to_greedy: float


@dataclass(frozen=True)
class Row:
    """One k on one test set.

    bleu: the mean over the directions between two languages; bleu_transcription: over those of a language
    into itself; None where there are none. acceptance, tokens_per_step, identical_to_greedy: as in Score,
    over all directions. per_direction: by "en-de".
    """

    set: str
    k: int | str
    bleu: float | None
    bleu_transcription: float | None
    acceptance: float
    tokens_per_step: float
    identical_to_greedy: float
    per_direction: dict[str, Score]


@dataclass(frozen=True)
class _Output:
    """One sentence in one direction."""

    text: str
    reference: str
    stats: DecodeStats
    identical: bool


def evaluate(
    translator: Translator,
    name: str,
    clips: Sequence[SpokenSentence],
    ks: Sequence[int | str],
    on_clip: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Decodes every clip into all its languages, greedily and at every k; the spoken language is given.

    Args:
        name: the test set's.
        ks: ints >= 1 or "inf".
        on_clip: called after each clip.

    Returns: a row for each k.

    Raises:
        ValueError: no clips, a model without a draft network, a language that the model does not know.
        AudioError: a clip that cannot be used.
    """
    if not clips:
        raise ValueError(f"clips must not be empty, got none for the set {name!r}")
    if translator.model.kvspn is None:
        raise ValueError("the model has no draft network: there is nothing to compare with greedy decoding")
    outputs: dict[int | str, dict[str, list[_Output]]] = {k: defaultdict(list) for k in ks}
    engine = translator.model.engine(len(clips[0].texts), translator.model.config.max_source_positions)
    for clip in clips:
        states = _encode(translator, clip)
        greedy, _ = _decode(translator, engine, clip, states, 1, draft=False)
        for k in ks:
            tokens, stats = _decode(translator, engine, clip, states, k, draft=True)
            for i, (target, reference) in enumerate(clip.texts.items()):
                output = _Output(translator.decode(tokens[i]), reference, stats[i], tokens[i] == greedy[i])
                outputs[k][f"{clip.language}-{target}"].append(output)
        on_clip()
    return [_row(name, k, outputs[k]) for k in ks]


@torch.no_grad()
def _encode(translator: Translator, clip: SpokenSentence) -> Tensor:
    """Encoder states [1, E, d]; what lies past the model's window is cut off."""
    features = translator.processor(load_audio(clip.audio), sampling_rate=SAMPLING_RATE).input_features
    return translator.model.encode(features)


def _decode(
    translator: Translator, engine: Engine, clip: SpokenSentence, states: Tensor, k: int | str, draft: bool
) -> tuple[list[list[int]], list[DecodeStats]]:
    """One clip into all its languages at once, a row each: generated tokens and figures."""
    output: Any = translator.model.generate(
        encoder_outputs=(states.expand(len(clip.texts), -1, -1),),
        language=clip.language,
        target_language=list(clip.texts),
        k=k,
        draft=draft,
        return_dict_in_generate=True,
        engine=engine,
    )
    rows = zip(output.sequences.tolist(), output.stats, strict=True)
    return [tokens[: stats.tokens] for tokens, stats in rows], output.stats


def _row(name: str, k: int | str, directions: dict[str, list[_Output]]) -> Row:
    scores = {direction: _score(direction, outputs) for direction, outputs in sorted(directions.items())}
    translated: list[float] = []
    transcribed: list[float] = []
    for direction, score in scores.items():
        source, target = direction.split("-")
        (transcribed if source == target else translated).append(score.bleu)
    every = [output for outputs in directions.values() for output in outputs]
    return Row(
        name,
        k,
        round(fmean(translated), 2) if translated else None,
        round(fmean(transcribed), 2) if transcribed else None,
        *_figures(every),
        scores,
    )


def _score(direction: str, outputs: Sequence[_Output]) -> Score:
    tokenizer = "zh" if direction.endswith("-zh") else "13a"
    texts, references = [each.text for each in outputs], [each.reference for each in outputs]
    bleu = corpus_bleu(texts, [references], tokenize=tokenizer).score
    return Score(round(bleu, 2), *_figures(outputs))


def _figures(outputs: Sequence[_Output]) -> tuple[float, float, float]:
    """acceptance, tokens_per_step, identical_to_greedy."""
    total = DecodeStats.total([output.stats for output in outputs], 0.0)
    identical = fmean(output.identical for output in outputs)
    return round(total.acceptance, 4), round(total.tokens_per_step, 4), round(identical, 4)
