"""Times of words beside faster-whisper's, on the same recordings.

    python -m bench.words clips.jsonl --model whisper-base --ctranslate2 FOLDER [--split eval] [--every 4]
        [--json words.json]

faster-whisper finds them in a second pass over the text; kvspn in the passes that decoded it. Clips where
both hear the same words are compared.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from kvspn.measure.machine import cpu, versions
from kvspn.speech.audio import load_audio
from kvspn.speech.manifest import read_recordings
from kvspn.speech.segments import Word
from kvspn.speech.whisper_model import WhisperModel


def hear(model: Any, samples: np.ndarray, language: str) -> list[Word]:
    segments, _ = model.transcribe(
        samples, language=language, beam_size=1, temperature=0.0, word_timestamps=True
    )
    return [word for segment in segments for word in segment.words]


def compare(ours: list[list[Word]], theirs: list[list[Word]]) -> dict[str, Any]:
    """Of clips with the same words, how far apart their times are, in seconds."""
    texts = [[[word.word for word in clip] for clip in side] for side in (ours, theirs)]
    same = [(a, b) for a, b, x, y in zip(ours, theirs, *texts, strict=True) if x == y]
    found: dict[str, Any] = {"clips": len(ours), "clips_compared": len(same)}
    found["words"] = sum(len(clip) for clip, _ in same)
    for name in ("start", "end"):
        apart = np.array(
            [
                abs(getattr(one, name) - getattr(other, name))
                for pair in same
                for one, other in zip(*pair, strict=True)
            ]
        )
        found[name] = {
            "median": round(float(np.median(apart)), 3),
            "within_0.02": round(float((apart < 0.025).mean()), 4),
            "within_0.1": round(float((apart < 0.105).mean()), 4),
            "largest": round(float(apart.max()), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", required=True, help="as of kvspn transcribe")
    parser.add_argument("--ctranslate2", type=Path, required=True, help="the same Whisper for faster-whisper")
    parser.add_argument("--split")
    parser.add_argument("--every", type=int, default=1, help="take each n-th clip")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from faster_whisper import WhisperModel as FasterWhisper

    clips = read_recordings(options.manifest, options.split, texts=False)[:: options.every]
    models = (
        WhisperModel(options.model, device="cpu"),
        FasterWhisper(str(options.ctranslate2), device="cpu", compute_type="float32"),
    )
    heard: tuple[list[list[Word]], ...] = ([], [])
    for clip in clips:
        samples = load_audio(clip.audio)
        for model, words in zip(models, heard, strict=True):
            words.append(hear(model, samples, clip.language))
    found = {"date": date.today().isoformat(), "versions": versions(), "cpu": cpu(), **compare(*heard)}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
