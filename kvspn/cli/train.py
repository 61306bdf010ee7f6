"""`kvspn train`: the recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a model from nothing by the project's recipe.",
)


@app.callback()
def _train() -> None:
    """Keeps `mini` a subcommand while it is the only one."""


@app.command()
def mini(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where data, checkpoints and the finished model go."),
    ] = Path("runs/mini"),
    ablations: Annotated[
        bool,
        typer.Option("--ablations", help="Then train KVSPN's ablations too, each in a folder of its own."),
    ] = False,
) -> None:
    """Train the miniature that ships with kvspn, in six languages.

    About two hours on 2 CPU cores, minutes on a GPU. Run it again after an interruption: it goes on from the
    last checkpoint. It needs the train extra (in the repository: pip install
    '.[train]') and the program espeak-ng.
    """
    try:
        from kvspn.training.mini import train_ablations, train_mini
    except ImportError as error:
        from kvspn.measure.machine import TRAINING_PACKAGES

        raise typer.TyperException(
            f"training needs {error.name}: pip install {' '.join(TRAINING_PACKAGES)}"
        ) from error
    if shutil.which("espeak-ng") is None:
        raise typer.TyperException("training needs espeak-ng (Debian, Ubuntu: apt-get install espeak-ng)")
    folder = train_mini(out, log=typer.echo)
    typer.echo(f"Done. Try it: kvspn translate AUDIO --to de --model {folder}")
    for ablation in train_ablations(out, log=typer.echo) if ablations else ():
        typer.echo(f"Ablation: kvspn evaluate --set unseen --k 1 --model {ablation}")
