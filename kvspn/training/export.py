"""What the recipe ships: fp16 weights, and spoken test sets in voices that training never hears."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch

from kvspn.atomic import atomic
from kvspn.models import WhisperM2MForConditionalGeneration
from kvspn.training.corpus import LANGUAGES, Sentence
from kvspn.training.prepare import Corpus
from kvspn.training.speech import SAMPLING_RATE, TEST_VARIANTS, Voice, augment, synthesize


def export_model(trained: Path, corpus: Corpus, folder: Path) -> None:
    """The trained model in fp16 (safetensors), with its tokenizer and feature extractor."""
    model = WhisperM2MForConditionalGeneration.from_pretrained(trained, dtype=torch.float16)
    with atomic(folder) as part:
        model.save_pretrained(part)
        corpus.tokenizer.save_pretrained(part)
        corpus.extractor.save_pretrained(part)


def export_speech(corpus: Corpus, folder: Path, seed: int) -> None:
    """Speaks the test sets: `unseen` and `hard` in all languages, with noise; `demo` a clean clip each."""
    rng = random.Random(seed + 1)
    split, limit = corpus.split, corpus.extractor.n_samples
    for name, sentences in (("unseen", split.unseen), ("hard", split.hard)):
        pairs = [(sentence, language) for sentence in sentences for language in LANGUAGES]
        _speak(folder / name, pairs, rng, limit, noisy=True)
    # The demo's sentences are the first of the unseen set, another one for each language.
    _speak(folder / "demo", list(zip(split.unseen, LANGUAGES, strict=False)), rng, limit, noisy=False)


def _speak(
    folder: Path, pairs: Sequence[tuple[Sentence, str]], rng: random.Random, limit: int, noisy: bool
) -> None:
    manifest: list[dict[str, object]] = []
    with atomic(folder) as part:
        part.mkdir()
        for sentence, language in pairs:
            while True:  # another voice, where this one speaks too slowly for the window
                voice = Voice.draw(language, TEST_VARIANTS, rng)
                samples, _ = synthesize(sentence.texts[language], voice)
                samples = augment(samples, rng) if noisy else samples
                if len(samples) <= limit:
                    break
            name = f"{len(manifest):03d}-{language}"
            soundfile.write(part / f"{name}.ogg", samples, SAMPLING_RATE, format="OGG", subtype="VORBIS")
            manifest.append(
                {
                    "id": name,
                    "language": language,
                    "audio": f"{name}.ogg",
                    "voice": voice.name,
                    "template": sentence.template,
                    "texts": dict(sentence.texts),
                }
            )
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        (part / "manifest.json").write_text(text + "\n", "utf-8")
