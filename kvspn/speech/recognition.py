"""Real speech judged: error rates by language, of a model in several weight formats and of other runtimes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sacrebleu import corpus_bleu
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from kvspn.decoding import DecodeStats
from kvspn.speech.audio import SAMPLING_RATE, AudioError, load_audio
from kvspn.speech.manifest import ManifestError, Recording
from kvspn.speech.peers import Recogniser
from kvspn.speech.translator import UNSPACED, Translator

REFERENCE = "transformers fp32"
"""The system whose texts the others are compared with."""

Margins = Callable[[np.ndarray, str, list[int], Sequence[list[int]]], list[float]]


@dataclass(frozen=True)
class Score:
    """One system's on one language.

    measure: "WER" or "CER", errors in percent of the words or characters spoken, or sacrebleu's "BLEU".
    units: words or characters spoken, after the normaliser. clips: their number. identical: clips whose text
    is that of REFERENCE; None without it.
    """

    measure: str
    value: float
    units: int
    clips: int
    identical: int | None


@dataclass(frozen=True)
class Difference:
    """A clip whose text is not that of REFERENCE.

    margin: by how much, at the first token that differs, the logit of REFERENCE's own token exceeds that of
    the other, by its own fp32 model: what rounding must turn to give the other text.
    """

    clip: str
    language: str
    text: str
    reference: str
    margin: float


@dataclass(frozen=True)
class System:
    """What one system made of all clips. mean: of its languages' values, each counted once."""

    name: str
    mean: float
    languages: Mapping[str, Score]
    differences: Sequence[Difference]


class Formats:
    """A model's decoder in several weight formats, on the same encoder states: each clip is encoded once.

    stats: what each clip took, by format and language.
    """

    def __init__(self, translator: Translator, formats: Sequence[str], task: str) -> None:
        """Raises ValueError for an unknown format."""
        model = translator.model
        self._translator = translator
        self._task = task
        self._engines = {
            name: translator.engine
            if name == translator.weights
            else model.engine(1, model.config.max_source_positions, translator.backend, name, translator.kv)
            for name in formats
        }
        self.stats: dict[str, dict[str, list[DecodeStats]]] = {name: defaultdict(list) for name in formats}

    @torch.no_grad()
    def __call__(self, samples: np.ndarray, language: str) -> dict[str, list[int]]:
        """The text's tokens by format. Raises ValueError for a clip that is longer than the window."""
        model = self._translator.model
        states = model.encode(self._translator.processor(samples, sampling_rate=SAMPLING_RATE).input_features)
        end = model.config.eos_token_id  # text lies before it in the vocabulary, all else behind
        found = {}
        for name, engine in self._engines.items():
            made: Any = model.generate(
                encoder_outputs=(states,),
                language=language,
                task=self._task,
                draft=model.drafts,
                return_dict_in_generate=True,
                engine=engine,
            )
            self.stats[name][language].append(made.total)
            found[name] = [token for token in made.sequences[0].tolist() if token < end]
        return found


def check_recordings(clips: Sequence[Recording], translator: Translator, task: str) -> None:
    """Reads every clip, so that nothing is wrong with one after hours.

    Raises:
        ManifestError: naming the line: a language that the model does not know, audio that cannot be used or
            is longer than the model's window, a text without words; a clip without a translation for that
            task.
    """
    for clip in clips:
        try:
            language = translator.check_language(clip.language)
            length = len(load_audio(clip.audio, strict=True))
        except (AudioError, ValueError) as error:
            raise ManifestError(f"{clip.place}: {error}") from error
        if length > translator.window:
            raise ManifestError(
                f"{clip.place}: audio must be at most {translator.window / SAMPLING_RATE:g} seconds long, "
                f"the model's window, got {length / SAMPLING_RATE:.1f}"
            )
        if task == "translate" and clip.translation is None:
            raise ManifestError(f"{clip.place}: translation must be a text to judge translations, got none")
        if not _normaliser(language)(clip.text).strip():
            raise ManifestError(f"{clip.place}: text must have words, got {clip.text!r}")


def recognise(
    clips: Sequence[Recording], formats: Formats, peers: Mapping[str, Recogniser]
) -> Iterator[dict[str, list[int]]]:
    """Of each clip every system's tokens of its text: "kvspn fp32", ..., and the peers by their names."""
    for clip in clips:
        samples = load_audio(clip.audio)
        found = {f"kvspn {name}": tokens for name, tokens in formats(samples, clip.language).items()}
        yield found | {name: peer(samples, clip.language) for name, peer in peers.items()}


def judge(
    clips: Sequence[Recording],
    outputs: Sequence[Mapping[str, list[int]]],
    decode: Callable[[list[int]], str],
    task: str,
    margins: Margins | None,
) -> list[System]:
    """Every system's scores.

    Args:
        outputs: of each clip, by system, the tokens of its text.
        margins: of REFERENCE's model (`kvspn.speech.peers.transformers.Greedy.margins`); None without it.
    """
    texts = [{name: decode(tokens).strip() for name, tokens in output.items()} for output in outputs]
    differences: dict[str, list[Difference]] = {name: [] for name in outputs[0]}
    if margins is not None:
        for clip, output, heard in zip(clips, outputs, texts, strict=True):
            own = heard[REFERENCE]
            differing = [name for name, text in heard.items() if text != own]
            if not differing:
                continue
            others = [output[name] for name in differing]
            gaps = margins(load_audio(clip.audio), clip.language, output[REFERENCE], others)
            for name, gap in zip(differing, gaps, strict=True):
                differences[name].append(
                    Difference(clip.name, clip.language, heard[name], own, round(gap, 5))
                )
    systems = []
    for name, parted in differences.items():
        by_language: dict[str, list[tuple[Recording, str]]] = defaultdict(list)
        for clip, heard in zip(clips, texts, strict=True):
            by_language[clip.language].append((clip, heard[name]))
        scores = {}
        for language, pairs in sorted(by_language.items()):
            elsewhere = sum(each.language == language for each in parted)
            same = None if margins is None else len(pairs) - elsewhere
            scores[language] = _score(language, pairs, task, same)
        systems.append(
            System(name, round(fmean(score.value for score in scores.values()), 2), scores, parted)
        )
    return systems


def _score(language: str, pairs: Sequence[tuple[Recording, str]], task: str, identical: int | None) -> Score:
    if task == "translate":
        references = [clip.translation or "" for clip, _ in pairs]
        value = corpus_bleu([text for _, text in pairs], [references]).score
        units = sum(len(reference.split()) for reference in references)
        return Score("BLEU", round(value, 2), units, len(pairs), identical)
    import jiwer

    normalise = _normaliser(language)
    spoken = [normalise(clip.text) for clip, _ in pairs]
    heard = [normalise(text) for _, text in pairs]
    process = jiwer.process_characters if language in UNSPACED else jiwer.process_words
    found = process(spoken, heard)
    units = found.hits + found.substitutions + found.deletions
    errors = found.substitutions + found.deletions + found.insertions
    measure = "CER" if language in UNSPACED else "WER"
    return Score(measure, round(100 * errors / units, 2), units, len(pairs), identical)


def _normaliser(language: str) -> Callable[[str], str]:
    """Whisper's, of transformers; where words are not parted by spaces, there are none left."""
    if language == "en":
        return EnglishTextNormalizer({})  # no list of British spellings: it is not in every model's folder
    basic = BasicTextNormalizer()
    return (lambda text: "".join(basic(text).split())) if language in UNSPACED else basic
