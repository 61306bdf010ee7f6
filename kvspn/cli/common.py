"""What several commands share: options, opening a model, and error lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from kvspn.translator import Translator


def parse_k(text: str) -> int | str:
    """ "3" -> 3, "inf" -> "inf"; BadParameter for anything else."""
    if text == "inf":
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise typer.BadParameter(f"must be a whole number from 1, or inf; got {text!r}")
    return int(text)


Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What decodes: native or reference (kvspn doctor lists them).",
        show_default="the fastest that is here",
    ),
]

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help="The decoder's weights: fp32, bf16, fp16, int8, int4; int8/int4: the draft network's in int4.",
        show_default="fp32",
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

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="A whisperM2M model folder. By default the miniature that ships with kvspn.",
        show_default=False,
    ),
]
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
    line = " ".join(str(error).split())
    typer.echo(f"{typer.style('kvspn:', fg='red', bold=True)} {line}", err=True)


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Keeps what C libraries say off the terminal: libmpg123 comments on every flaw of an mp3."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def silence_transformers() -> None:
    """Keeps its notes and loading bars off the terminal: what matters in them is reported as errors here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_translator(
    model: Path | None, backend: str | None, weights: str | None = None, kv: str | None = None
) -> Translator:
    """The model of the --model option, with a note on the terminal while it loads."""
    with Console(stderr=True).status("Loading the model"):
        from kvspn.translator import Translator

        silence_transformers()
        return Translator.from_folder(model, backend, weights, kv)
