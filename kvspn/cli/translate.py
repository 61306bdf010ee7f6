"""`kvspn translate`: audio files to text in another language."""

from __future__ import annotations

from typing import Annotated

import typer

from kvspn.cli.common import KV, Backend, Draft, EncoderFormat, K, Model, Threads, Weights
from kvspn.cli.listen import (
    As,
    Audio,
    Folder,
    Hotwords,
    NoDraft,
    Prefix,
    Prompt,
    Source,
    Strict,
    Words,
    listen,
)
from kvspn.cli.live import Every, Raw


def translate(
    audio: Audio,
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="LANGUAGE",
            help="A language that the model was taught: en, de, german, ...; a Whisper: en.",
            show_default="en",
        ),
    ] = None,
    source: Source = "auto",
    prompt: Prompt = None,
    hotwords: Hotwords = None,
    prefix: Prefix = None,
    k: K = "1",
    words: Words = False,
    no_draft: NoDraft = False,
    model: Model = None,
    draft: Draft = None,
    backend: Backend = None,
    weights: Weights = None,
    kv: KV = None,
    encoder_format: EncoderFormat = None,
    threads: Threads = None,
    strict: Strict = False,
    output: As = None,
    folder: Folder = None,
    live: Every = None,
    raw: Raw = None,
) -> None:
    """Translate speech to text in another language.

    To the language that is spoken, this transcribes. A file that fails stops no other; the exit status is the
    number of those that did, 100 at most.

    Example: kvspn translate talk.mp3 --to de
    """
    listen(
        audio,
        target,
        "translate" if target is None else None,
        source,
        output,
        folder,
        prompt=prompt,
        hotwords=hotwords,
        prefix=prefix,
        k=k,
        no_draft=no_draft,
        words=words,
        model=model,
        draft=draft,
        backend=backend,
        weights=weights,
        kv=kv,
        encoder_format=encoder_format,
        threads=threads,
        strict=strict,
        live=live,
        raw=raw,
    )
