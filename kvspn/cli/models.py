"""`kvspn models`: the models that are here, for --model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvspn.cli.common import print_json, print_table, silence_transformers


def models(
    given: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MODEL]...", help="Folders and .pt files to list too.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the models that are here, by the names that --model takes.

    The bundled miniature, those of installed packages, and the Whispers in a model hub's local cache. Only
    the headers of their files are read.
    """
    from kvspn.assets import bundled_model
    from kvspn.models.checkpoints.listing import models as listed

    silence_transformers()
    found = list(listed(given or [], bundled_model()))
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        [
            each.name,
            each.missing or each.format,
            *(
                ["", "", "", ""]
                if each.missing
                else [
                    f"{each.megabytes:,.1f}",
                    f"{each.encoder_layers} + {each.decoder_layers}",
                    f"{each.vocabulary:,}",
                    str(each.languages or "–"),
                ]
            ),
        ]
        for each in found
    ]
    print_table(["model", "format", "MB", "layers", "vocabulary", "languages"], rows, left=2)
