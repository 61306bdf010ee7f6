"""The data stage: sentences, tokenizer, spoken clips and their features."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import WhisperFeatureExtractor, WhisperTokenizer

from kvspn.models import WhisperM2MFeatureExtractor
from kvspn.training.corpus import LANGUAGES, Phrasebook, Sentence, Split, split
from kvspn.training.recipe import Recipe
from kvspn.training.speech import TEST_VARIANTS, TRAIN_VARIANTS
from kvspn.training.store import Clip, FeatureStore
from kvspn.training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Corpus:
    """What the data stage leaves."""

    split: Split
    tokenizer: WhisperTokenizer
    extractor: WhisperFeatureExtractor
    store: FeatureStore
    held_out: FeatureStore  # the unseen test set, in test voices


def make_data(folder: Path, recipe: Recipe, log: Callable[[str], None] = print) -> Corpus:
    """Draws the sentences, trains the tokenizer, speaks the clips and stores their features."""
    extractor = WhisperM2MFeatureExtractor(chunk_length=recipe.window_seconds)
    sentences = split(Phrasebook.load(), seed=recipe.seed)
    clips = draw_clips(sentences.train, recipe.clips_per_template, random.Random(recipe.seed))
    spoken = {clip.sentence for clip in clips}
    tokenizer = train_tokenizer(
        (text for i in sorted(spoken) for text in sentences.train[i].texts.values()), recipe.vocab_size
    )
    log(f"{len(sentences.train)} sentences in {len(LANGUAGES)} languages, {len(clips)} clips")
    store = FeatureStore.build(
        folder / "features",
        clips,
        extractor,
        TRAIN_VARIANTS,
        recipe.seed,
        progress=lambda done, total: (
            log(f"spoken {done}/{total}") if done % 3200 == 0 or done == total else None
        ),
    )
    unseen = [
        Clip(i, language, sentence.texts[language])
        for i, sentence in enumerate(sentences.unseen)
        for language in LANGUAGES
    ]
    held_out = FeatureStore.build(folder / "features-unseen", unseen, extractor, TEST_VARIANTS, recipe.seed)
    return Corpus(sentences, tokenizer, extractor, store, held_out)


def draw_clips(sentences: tuple[Sentence, ...], per_template: int, rng: random.Random) -> list[Clip]:
    """As many clips of every template, so that those with few slots are not drowned.

    Sentence x language pairs in random order, each again in another voice where there are too few.
    """
    by_template: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, sentence in enumerate(sentences):
        by_template[sentence.template] += [(i, language) for language in LANGUAGES]
    clips = []
    for pairs in by_template.values():
        rng.shuffle(pairs)
        for n in range(per_template):
            i, language = pairs[n % len(pairs)]
            clips.append(Clip(i, language, sentences[i].texts[language]))
    rng.shuffle(clips)
    return clips
