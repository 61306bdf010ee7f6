"""What a draft network brings to batches of 1 to 32 rows, each of which accepts and rolls back on its own.

    python -m bench.batches [--model FOLDER --draft FOLDER --clips clips.jsonl --split eval]
        [--weights int8/int4] [--batches 1 2 4 8 16 32] [--rounds 3] [--json batches.json]

The same clips in batches of every size, plain and with drafts in turn; by default the miniature and its own
clips. Every row's tokens, and so its acceptance, must be what they are alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine
from kvspn.assets import read_manifest
from kvspn.decoding import DecodeStats
from kvspn.engines import Engine
from kvspn.speech.audio import load_audio
from kvspn.speech.manifest import read_recordings
from kvspn.speech.translator import Translator


def rows(
    translator: Translator, clips: Path | None, split: str | None, count: int
) -> list[tuple[Tensor, str, str | None]]:
    """Encoder states, language spoken and target of each row."""
    if clips is not None:
        found = read_recordings(clips, split, texts=False)
        some = found[:: max(1, len(found) // count)][:count]
        return [(_encode(translator, clip.audio), clip.language, None) for clip in some]
    demo = [(_encode(translator, clip.audio), clip) for clip in read_manifest("demo")]
    pairs = [(states, clip.language, target) for states, clip in demo for target in clip.texts]
    return [pairs[i % len(pairs)] for i in range(count)]


def _encode(translator: Translator, audio: Path) -> Tensor:
    windows = translator.windows
    return windows.encode(windows.features(load_audio(audio)))


class Busy:
    """The processor's time in an engine's steps: other programs do not lengthen it as they do the clock's."""

    def __init__(self, engine: Engine) -> None:
        self._step, self._seconds = engine.step, 0.0
        engine.step = self._timed  # type: ignore[assignment]

    def _timed(self, *arguments: Any) -> None:
        begin = time.process_time()
        self._step(*arguments)
        self._seconds += time.process_time() - begin

    def taken(self) -> float:
        """Since the last time that it was asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def measure(
    translator: Translator, given: list[tuple[Tensor, str, str | None]], batch: int, rounds: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """A row of the record, and every clip's tokens."""
    model = translator.model
    engine = model.engine(
        batch, model.config.max_source_positions, "native", translator.weights, translator.kv
    )
    steps = Busy(engine)
    made: dict[bool, list[Any]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for i in range(rounds):
        for draft in (True, False) if i % 2 else (False, True):
            made[draft] = [
                model.generate(
                    encoder_outputs=([states for states, *_ in some],),
                    language=[language for _, language, _ in some],
                    target_language=None
                    if some[0][2] is None
                    else [target or spoken for _, spoken, target in some],
                    draft=draft,
                    return_dict_in_generate=True,
                    engine=engine,
                )
                for some in (given[first : first + batch] for first in range(0, len(given), batch))
            ]
            seconds[draft].append(steps.taken())
    tokens = {
        draft: [
            _text(row.tolist(), stats)
            for each in outputs
            for row, stats in zip(each.sequences, each.stats, strict=True)
        ]
        for draft, outputs in made.items()
    }
    assert tokens[True] == tokens[False]
    stats = {
        draft: DecodeStats.total((each.total for each in outputs), 0.0) for draft, outputs in made.items()
    }
    # A batch is done when its last row is.
    passes = {
        draft: sum(max(row.steps for row in each.stats) for each in outputs)
        for draft, outputs in made.items()
    }
    ratios = sorted(plain / drafted for plain, drafted in zip(seconds[False], seconds[True], strict=True))
    record = {
        "batch": batch,
        "rows": len(given),
        "identical": len(tokens[True]),
        "tokens": stats[True].tokens,
        "acceptance": round(stats[True].acceptance, 4),
        "tokens_per_row_and_step": round(stats[True].tokens_per_step, 3),
        "passes": [passes[False], passes[True]],
        "fewer_passes": round(passes[False] / passes[True], 3),
        "cpu_ms_a_token": [
            round(1e3 * median(seconds[draft]) / stats[draft].tokens, 3) for draft in (False, True)
        ],
        "times_as_fast_cpu": round(median(ratios), 3),
        "times_as_fast_cpu_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    return record, tokens[True]


def _text(row: list[int], stats: DecodeStats) -> list[int]:
    return row[: stats.tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="as of kvspn transcribe; by default the miniature")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--clips", type=Path, help="a manifest, with --model")
    parser.add_argument("--split")
    parser.add_argument("--weights")
    parser.add_argument("--encoder-format")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.model is None) != (options.clips is None):
        parser.error("--clips must be given with --model, and with it alone")
    translator = Translator.from_folder(
        options.model, "native", options.weights, None, options.draft, options.encoder_format
    )
    given = rows(translator, options.clips, options.split, max(options.batches))
    found = []
    alone = None
    for batch in options.batches:
        record, tokens = measure(translator, given, batch, options.rounds)
        alone = alone or tokens
        assert tokens == alone, "a row's tokens depend on what shares its batch"
        found.append(record)
        print(json.dumps(record), flush=True)
    if options.json:
        document = {
            "machine": machine("cpu"),
            "model": Path(options.model).name if options.model else "miniature",
            "draft_windows": options.draft
            and json.loads((options.draft / "config.json").read_text("utf-8"))["training"]["windows"],
            "weights": options.weights,
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "rows": found,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
