"""From the start of a process to its text: ``python -m bench.start_up AUDIO --folder MODEL --file MODEL``.

`kvspn transcribe` with a model's folder and with the same in one file, the C program of examples/embed_c
where --program names it (built, it takes a wav), and `kvspn --help`: one after the other, round after round,
so that what else the machine does meets them alike. All texts must be one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.machine import machine


class Run(NamedTuple):
    """A process: seconds until it has ended, those of processors, MiB that it held at most, its output."""

    seconds: float
    cpu_seconds: float
    mib: float
    text: str


def run(command: Sequence[str | Path]) -> Run:
    begin = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {process.returncode}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, text)


def words(text: str) -> str:
    """The text alone: the C program puts times and language in front, and a line of figures behind."""
    lines = [re.sub(r"^[\d.]+-[\d.]+ \w+ ", "", line) for line in text.splitlines()]
    return " ".join(" ".join(line for line in lines if not re.match(r"\d+ tokens in ", line)).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("audio", type=Path, help="for the C program: a wav")
    parser.add_argument("--folder", required=True, help="the model as a folder, a name or a hub's id")
    parser.add_argument("--file", type=Path, required=True, help="the same, as `kvspn quantize` writes it")
    parser.add_argument("--formats", nargs=2, default=["int8", "int8"], metavar=("WEIGHTS", "ENCODER"))
    parser.add_argument("--program", type=Path, help="examples/embed_c, built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kvspn = [sys.executable, "-m", "kvspn"]
    weights, encoder = options.formats
    commands: dict[str, list[str | Path]] = {
        "kvspn --help": [*kvspn, "--help"],
        "kvspn transcribe, a folder": [
            *(*kvspn, "transcribe", options.audio, "--model", options.folder),
            *("--weights", weights, "--encoder-format", encoder),
        ],
        "kvspn transcribe, one file": [*kvspn, "transcribe", options.audio, "--model", options.file],
    }
    if options.program:
        commands["the C program, one file"] = [options.program, options.file, options.audio]
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(options.rounds + 1):  # The first reads the files from the disk.
        for name, command in commands.items():
            runs[name].append(run(command))
    texts = {words(one.text) for name, each in runs.items() if "help" not in name for one in each}
    if len(texts) != 1:
        raise SystemExit(f"the texts differ: {texts}")
    rows = [
        {
            "command": name,
            "seconds": round(median(one.seconds for one in each[1:]), 2),
            "spread": [round(pick(one.seconds for one in each[1:]), 2) for pick in (min, max)],
            "cpu_seconds": round(median(one.cpu_seconds for one in each[1:]), 2),
            "mib": round(max(one.mib for one in each)),
        }
        for name, each in runs.items()
    ]
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    if options.json:
        record = {
            "machine": machine("cpu"),
            "model": Path(options.folder).name,
            "formats": {"weights": weights, "encoder": encoder},
            "text": texts.pop(),
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
