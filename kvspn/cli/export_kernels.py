"""`kvspn export-kernels`: the Triton kernels as binaries for a runtime without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvspn.cli.common import FORMATS


def export_kernels(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.", show_default=False)],
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="cuda:80, cuda:90, cuda:100, cuda:120 or hip:gfx942; no GPU is needed."
        ),
    ] = "cuda:90",
    weights: Annotated[str, typer.Option(metavar="FORMAT", help=f"{FORMATS}.")] = "fp16",
) -> None:
    """Compile the Triton kernels at the whisperM2M shape: cubin or hsaco files, and a C header.

    The header lists each kernel's file, symbol, arguments, grid, threads and shared memory.
    """
    try:
        from kvspn.triton_kernels import aot, launch
    except ImportError as error:
        raise ValueError(f"the Triton kernels are not here ({error})") from error
    if launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    aot.parse_target(target)
    made = aot.export(target, folder, weights)
    typer.echo(f"{len(made)} kernels for {target} and kvspn_kernels.h in {folder}")
