"""`kvspn quantize`: a model as one file for programs without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvspn.cli.common import FORMATS, Model, known_encoder_format, silence_transformers


def quantize(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The safetensors file to write.", show_default=False),
    ],
    model: Model = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="FORMAT",
            help=f"The decoder's: {FORMATS}, or two as base/draft.",
        ),
    ] = "int8",
    encoder_format: Annotated[
        str,
        typer.Option(
            "--encoder-format",
            metavar="FORMAT",
            callback=known_encoder_format,
            help="What the speech encoder is computed in: fp32, bf16 or int8.",
        ),
    ] = "fp32",
) -> None:
    """Write a model as one file for C, C++ and NumPy: all that turns sound into text.

    `examples/embed_c` shows a program that needs nothing but it and the library.
    """
    import torch

    from kvspn.assets import bundled_model
    from kvspn.models.folder import open_model
    from kvspn.models.one_file import export

    silence_transformers()
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name the file to write")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: no such folder")
    opened, processor = open_model(model or bundled_model(), torch.float32)
    export(opened, processor, out, weights, encoder_format)
    if opened.kvspn is not None and not opened.drafts:
        typer.echo("Without the draft network, which is untrained")
    typer.echo(f"Written to {out}: {weights}, {out.stat().st_size / 1e6:.1f} MB")
