"""Live speech: what updates of a stream cost, decoded by the last hypothesis and anew, on the same windows.

    python -m bench.stream clips.jsonl --model whisper-base [--split eval] [--seconds 30] [--every 1 0.5]
        [--draft FOLDER] [--weights int8] [--encoder-format int8] [--json stream.json]

A language's clips are joined, half a second of silence after each. Every window is decoded twice, in turn
first anew and first by the hypothesis; tokens and their mean log-probability must be the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.machine import machine
from kvspn.speech.audio import SAMPLING_RATE, load_audio
from kvspn.speech.manifest import Recording, read_recordings
from kvspn.speech.stream import Stream
from kvspn.speech.translator import Translator
from kvspn.speech.windows import Heard, Windows


class Twice:
    """Windows that decode each of theirs anew, too; `pairs` are what both made of it, in `seconds`."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self.pairs: list[tuple[Heard, Heard]] = []
        self.seconds: list[tuple[float, float]] = []
        self.encoding: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._windows, name)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        states = self._windows.encode(features)
        self.encoding.append(time.perf_counter() - begin)
        return states

    def hear(self, states: list[torch.Tensor], *arguments: Any, **named: Any) -> list[Heard]:
        made: dict[bool, Heard] = {}
        seconds: dict[bool, float] = {}
        for given in (True, False) if len(self.pairs) % 2 else (False, True):
            own = [each.clone() for each in states]  # whose keys and values no engine has yet
            said = named if given else named | {"draft_tokens": None}
            begin = time.perf_counter()
            (made[given],) = self._windows.hear(own, *arguments, **said)
            seconds[given] = time.perf_counter() - begin
        self.pairs.append((made[False], made[True]))
        self.seconds.append((seconds[False], seconds[True]))
        return [made[True]]


def joined(clips: list[Recording], seconds: float) -> np.ndarray:
    """The first seconds of the clips, with pauses."""
    parts: list[np.ndarray] = []
    for clip in clips:
        parts += [load_audio(clip.audio), np.zeros(SAMPLING_RATE // 2, np.float32)]
        if sum(map(len, parts)) >= seconds * SAMPLING_RATE:
            break
    return np.concatenate(parts)[: round(seconds * SAMPLING_RATE)]


def measure(windows: Windows, sound: np.ndarray, language: str, every: float) -> dict[str, Any]:
    twice = Twice(windows)
    stream = Stream(twice, language)  # type: ignore[arg-type]
    size = round(every * SAMPLING_RATE)
    stable = "".join(stream.feed(sound[i : i + size]).stable for i in range(0, len(sound), size))
    stable += stream.finish().stable
    pairs = twice.pairs
    for anew, given in pairs:
        assert (anew.tokens, anew.avg_logprob) == (given.tokens, given.avg_logprob)
    passes = [sum(pair[i].stats.steps for pair in pairs) for i in (0, 1)]
    return {
        "language": language,
        "every_s": every,
        "updates": len(pairs),
        "identical": len(pairs),
        "tokens_an_update": round(sum(pair[0].stats.tokens for pair in pairs) / len(pairs), 2),
        "passes_an_update": [round(each / len(pairs), 2) for each in passes],
        "fewer_passes": round(passes[0] / passes[1], 2),
        "decode_s_an_update": [round(sum(each[i] for each in twice.seconds) / len(pairs), 4) for i in (0, 1)],
        "decode_ratio_median": round(median(anew / given for anew, given in twice.seconds), 2),
        "encode_s_an_update": round(sum(twice.encoding) / len(pairs), 4),
        "text": stable.strip(),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all languages together, by the time from update to update."""
    found = []
    for every in sorted({row["every_s"] for row in rows}):
        some = [row for row in rows if row["every_s"] == every]
        updates = sum(row["updates"] for row in some)

        def mean(name: str, i: int, some: list[dict[str, Any]] = some, updates: int = updates) -> float:
            return sum(row[name][i] * row["updates"] for row in some) / updates

        passes, seconds = (
            [mean(name, i) for i in (0, 1)] for name in ("passes_an_update", "decode_s_an_update")
        )
        found.append(
            {
                "every_s": every,
                "updates": updates,
                "identical": sum(row["identical"] for row in some),
                "passes_an_update": [round(each, 2) for each in passes],
                "fewer_passes": round(passes[0] / passes[1], 2),
                "fewer_passes_median_language": round(median(row["fewer_passes"] for row in some), 2),
                "decode_s_an_update": [round(each, 4) for each in seconds],
                "decode_ratio": round(seconds[0] / seconds[1], 2),
                "encode_s_an_update": round(
                    sum(row["encode_s_an_update"] * row["updates"] for row in some) / updates, 4
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", required=True, help="as of kvspn transcribe")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--encoder-format")
    parser.add_argument("--split")
    parser.add_argument("--seconds", type=float, default=30, help="of each language")
    parser.add_argument(
        "--every", type=float, nargs="+", default=[1.0, 0.5], help="seconds from update to update"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    translator = Translator.from_folder(
        options.model,
        weights=options.weights,
        draft=options.draft,
        encoder_format=options.encoder_format,
    )
    clips = read_recordings(options.manifest, options.split, texts=False)
    rows = []
    for language in sorted({clip.language for clip in clips}):
        sound = joined([clip for clip in clips if clip.language == language], options.seconds)
        for every in options.every:
            rows.append(measure(translator.windows, sound, language, every))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    record = {
        "machine": machine("cpu"),
        "model": Path(options.model).name,
        "draft": options.draft and options.draft.name,
        "weights": options.weights,
        "encoder_format": options.encoder_format,
        "seconds_a_language": options.seconds,
        "intervals": summary(rows),
        "rows": rows,
    }
    print(json.dumps(record["intervals"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
