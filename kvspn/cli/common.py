"""What several commands share: options, opening a model, and error lines."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kvspn.speech.translator import Translator
    from kvspn.weights import DecoderWeights


def parse_k(text: str) -> int | str:
    """ "3" -> 3, "inf" -> "inf"; BadParameter for anything else."""
    if text == "inf":
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise typer.BadParameter(f"must be a whole number from 1, or inf; got {text!r}")
    return int(text)


def whole_numbers(option: str, text: str, highest: int) -> list[int]:
    """ "4,1" -> [1, 4]; BadParameter for anything but whole numbers from 1 to the highest."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= highest:
            raise typer.BadParameter(f"{option} must be whole numbers from 1 to {highest}; got {part!r}")
    return sorted({int(part) for part in parts})


# A package's name, "whisper-base", or a model hub's id, "openai/whisper-base" (kvspn.models.checkpoints).
_MODEL_ID = re.compile(r"whisper-[\w.-]+|[\w.-]+/[\w.-]+")


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, title: str = ""
) -> None:
    """A table on stdout, of which nothing is cut off.

    In a pipe it is as wide as it must be. In a narrower terminal it comes in parts, one below the other, each
    with the first columns in front.

    Args:
        left: how many columns, from the first, are aligned to the left and stand in front of every part.
    """
    widths = [max(map(cell_len, cells)) for cells in zip(headings, *rows, strict=True)]
    console = Console(width=None if sys.stdout.isatty() else sum(widths) + 2 * len(widths))
    front, parts = list(range(left)), [list[int]()]
    for column in range(left, len(headings)):
        taken = [*front, *parts[-1], column]
        if parts[-1] and sum(widths[i] + 2 for i in taken) - 2 > console.width:
            parts.append([])
        parts[-1].append(column)
    for part in parts:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in (*front, *part):
            table.add_column(
                Text(headings[column]), justify="left" if column < left else "right", no_wrap=True
            )
        for row in rows:
            table.add_row(*(Text(row[column]) for column in (*front, *part)))
        console.print(table)


def span(interval: Sequence[float] | None, digits: int = 2) -> str:
    """ "[1.20, 1.30]", or nothing where there is no interval."""
    return "" if interval is None else f"[{', '.join(f'{end:.{digits}f}' for end in interval)}]"


def write_json(file: Path, document: object) -> None:
    """Indented, a list of numbers on one line."""
    text = json.dumps(document, indent=2)
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(text + "\n", "utf-8")


Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What decodes: native or reference (kvspn doctor lists them).",
        show_default="the fastest that is here",
    ),
]


def known_encoder_format(name: str | None) -> str | None:
    """BadParameter unless it is a format of the speech encoder."""
    if name not in (None, *_ENCODER_FORMATS):
        known = ", ".join(_ENCODER_FORMATS)
        raise typer.BadParameter(f"--encoder-format must be one of {known}, got {name}")
    return name


_ENCODER_FORMATS = ("fp32", "bf16", "int8")  # kvspn.engines.encoder.FORMATS, which needs torch
FORMATS = (
    "fp32, bf16, fp16, fp8, int8, int4"  # kvspn.weights.formats, which help does without: it needs torch
)

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help=f"The decoder's weights: {FORMATS}; int8/int4: the draft network's in int4.",
        show_default="fp32",
    ),
]

EncoderFormat = Annotated[
    str | None,
    typer.Option(
        "--encoder-format",
        metavar="FORMAT",
        callback=known_encoder_format,
        help="The speech encoder on the CPU by the C++ library: fp32, bf16 or int8.",
        show_default="torch's, fp32",
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads on the CPU; the engine takes no more than the process has cores.",
        show_default="the cores that the process may use",
    ),
]

KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="FORMAT",
        help="The decoder's caches of keys and values: int8, half the bytes of bf16.",
        show_default="that of the embeddings",
    ),
]


def model_folder(model: Path | None) -> Path | None:
    """Checked before torch is imported, which takes its time: what is neither here nor a hub's id is none."""
    if model is not None and not model.exists() and not _MODEL_ID.fullmatch(str(model)):
        raise typer.BadParameter(f"{model}: no such model folder")
    return model


Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        callback=model_folder,
        help="A whisperM2M, or any Whisper: a folder of Hugging Face's or CTranslate2's, OpenAI's .pt, "
        "a hub's id, a name of kvspn models; for speech also the one file of kvspn quantize. "
        "By default the miniature that ships with kvspn.",
        show_default=False,
    ),
]


def draft_folder(draft: Path | None) -> Path | None:
    """Checked before torch is imported."""
    if draft is not None and not draft.is_dir():
        raise typer.BadParameter(f"--draft must be a folder that kvspn train draft wrote, got {draft}")
    return draft


Draft = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        metavar="FOLDER",
        callback=draft_folder,
        help="A draft network that kvspn train draft made for --model: the same text in fewer steps.",
        show_default="the model's own",
    ),
]


class Task(str, Enum):
    """Whisper's tasks."""

    TRANSCRIBE = "transcribe"
    TRANSLATE = "translate"


K = Annotated[
    Any,
    typer.Option(
        "--k",
        metavar="K",
        parser=parse_k,
        help="A guess is accepted if it is among the model's K likeliest tokens: 1 never changes the text, "
        "more is faster and looser, inf accepts every guess.",
    ),
]


def print_error(error: object) -> None:
    """One line on stderr."""
    _print_line(error, "red")


def print_warning(warning: object) -> None:
    """One line on stderr, in another colour."""
    _print_line(warning, "yellow")


def _print_line(text: object, colour: str) -> None:
    line = " ".join(str(text).split())
    typer.echo(f"{typer.style('kvspn:', fg=colour, bold=True)} {line}", err=True)


def print_json(document: object) -> None:
    """Indented; escaped where stdout's encoding, or a file name that is not UTF-8, leaves no other way."""
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    typer.echo(text)


def prepare_streams() -> None:
    """Lets output survive closed streams, every encoding, and file names that are in none."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a file opened later would take its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error("kvspn.escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kvspn.escape")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file name as they are, other characters that the encoding lacks as \\uXXXX."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def silence_transformers() -> None:
    """Keeps its notes and loading bars off the terminal: what matters in them is reported as errors here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_translator(
    model: Path | None,
    backend: str | None,
    weights: str | None = None,
    kv: str | None = None,
    draft: Path | None = None,
    threads: int | None = None,
    encoder_format: str | None = None,
) -> Translator:
    """The model of the --model and --draft options, with a note on the terminal while it loads."""
    with Console(stderr=True).status("Loading the model"):
        import torch

        from kvspn.speech.translator import Translator

        silence_transformers()
        if threads is not None:
            torch.set_num_threads(threads)
        return Translator.from_folder(model, backend, weights, kv, draft, encoder_format)


def check_backend(name: str) -> None:
    """BadParameter unless a backend is here."""
    from kvspn.engines import backends

    found = backends()
    if (missing := found.get(name, "no such backend")) is not None:
        ready = ", ".join(other for other, reason in found.items() if reason is None)
        raise typer.BadParameter(f"--backend must be of {ready}; got {name}: {missing}")


def open_decoder(folder: Path, draft: Path | None = None) -> tuple[DecoderWeights, int]:
    """A model's decoder and draft network in fp32, and how many positions its encoder has."""
    import torch

    from kvspn.models.folder import open_model
    from kvspn.models.weights import decoder_weights

    silence_transformers()
    model, _ = open_model(folder, torch.float32, draft)
    return decoder_weights(model), model.config.max_source_positions
