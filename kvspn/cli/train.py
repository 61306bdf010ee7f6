"""`kvspn train`: the recipes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvspn.cli.common import Threads, model_folder, print_table, print_warning, silence_transformers
from kvspn.cli.listen import AUDIO

if TYPE_CHECKING:
    import numpy as np

    from kvspn.training.draft.recipe import DraftRecipe
    from kvspn.training.draft.training import Judged
    from kvspn.training.draft.windows import Clip

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a draft network for a Whisper, or the miniature from nothing.",
)


@contextmanager
def _packages() -> Iterator[None]:
    """Imports what training needs, or says which package is missing."""
    try:
        yield
    except ImportError as error:
        from kvspn.measure.machine import TRAINING_PACKAGES

        raise typer.TyperException(
            f"training needs {error.name}: pip install {' '.join(TRAINING_PACKAGES)}"
        ) from error


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
    with _packages():
        from kvspn.training.mini import train_ablations, train_mini
    if shutil.which("espeak-ng") is None:
        raise typer.TyperException("training needs espeak-ng (Debian, Ubuntu: apt-get install espeak-ng)")
    folder = train_mini(out, log=typer.echo)
    typer.echo(f"Done. Try it: kvspn translate AUDIO --to de --model {folder}")
    for ablation in train_ablations(out, log=typer.echo) if ablations else ():
        typer.echo(f"Ablation: kvspn evaluate --set unseen --k 1 --model {ablation}")


@app.command()
def draft(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            callback=model_folder,
            help="Any Whisper, as kvspn transcribe takes it.",
            show_default=False,
        ),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            "--audio",
            metavar="MANIFEST|FOLDER",
            help="Speech, which needs no text: JSON lines with path and language of each clip, on request "
            "speaker and seconds; or a folder of audio files, whose languages are detected.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the draft network goes.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="FOLDER",
            help="Where encoder states, outputs and checkpoints go.",
            show_default="--out, with .cache at its end",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="A TOML file with fields of the recipe (docs/training.md).",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Of a manifest: only clips of this split, or folder."),
    ] = None,
    languages: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE", help="Of a manifest: only clips in these languages."),
    ] = None,
    threads: Threads = None,
    dry: Annotated[
        str | None,
        typer.Option(
            "--dry",
            metavar="SIZE",
            help="Train nothing: two steps on a random model of this size, tiny to large-v3, to see what "
            "they take here. Only --recipe counts beside it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a draft network for a Whisper, from speech alone.

    The model itself says what it hears, and the draft network learns to guess it. Run it again after an
    interruption: it goes on where it was. Several GPUs: accelerate launch -m kvspn train draft ...

    Example: kvspn train draft --model whisper-base --audio clips.jsonl --out draft
    """
    given = {"--model": model, "--audio": audio, "--out": out}
    others = {"--cache": cache, "--split": split, "--language": languages}
    if dry is not None:
        for name, value in (given | others).items():
            if value:
                raise typer.BadParameter(f"{name} must be left out with --dry, got {value}")
    with _packages():
        from kvspn.training.draft.recipe import DraftRecipe
        from kvspn.training.draft.training import train_draft
    import torch

    from kvspn.speech.audio import AudioError, load_audio
    from kvspn.speech.manifest import ManifestError

    try:
        chosen = DraftRecipe() if recipe is None else DraftRecipe.read(recipe)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--recipe {error}") from error
    if threads is not None:
        torch.set_num_threads(threads)
    silence_transformers()
    if dry is not None:
        _dry(dry, chosen)
        return
    if model is None or audio is None or out is None:
        missing = next(name for name, value in given.items() if value is None)
        raise typer.BadParameter(f"{missing} must be given")
    if out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise typer.BadParameter(f"--out must be a new folder, or one of a draft network, got {out}")
    try:
        files, clips = _clips(audio, split, languages or [])
    except ManifestError as error:
        raise typer.BadParameter(f"--audio {error}") from error

    def load(number: int) -> np.ndarray | None:
        try:
            return load_audio(files[number], on_loss=print_warning)
        except AudioError as error:
            print_warning(f"{error}: its window is left out")
            return None

    judged = train_draft(
        model, clips, load, out, cache or out.with_name(f"{out.name}.cache"), chosen, typer.echo
    )
    if judged:
        _print_judged(judged)
        typer.echo(f"Done. Try it: kvspn transcribe AUDIO --model {model} --draft {out}")


def _dry(size: str, recipe: DraftRecipe) -> None:
    from kvspn.training.draft.dry import dry_run

    found = dry_run(size, recipe)
    typer.echo(
        f"{size}: {found.base:,} parameters, {found.draft:,} in the draft network, a file of "
        f"{found.saved / 1e6:.1f} MB; {found.states / 1e6:.1f} MB of cache a window; "
        f"a step of {recipe.batch} x {recipe.targets} outputs {found.seconds:.1f} s, "
        f"{found.peak / 1e9:.1f} GB of memory at most"
    )


def _clips(audio: Path, split: str | None, languages: list[str]) -> tuple[list[Path], list[Clip]]:
    """The files, and what is known of each; how long one is, is read where a manifest does not say it."""
    from kvspn.speech.audio import SAMPLING_RATE, AudioError, load_audio
    from kvspn.speech.manifest import Recording, read_recordings
    from kvspn.training.draft.windows import Clip

    if not audio.exists():
        raise typer.BadParameter(f"--audio must be a manifest or a folder, got {audio}: no such file")
    found: list[tuple[Path, str, str | None, Recording | None]] = []
    if audio.is_dir():
        for name, given in (("--split", split), ("--language", languages)):
            if given:
                raise typer.BadParameter(f"{name} must be left out with a folder, which knows none")
        files = sorted(path for path in audio.rglob("*") if path.suffix[1:].lower() in AUDIO)
        if not files:
            raise typer.BadParameter(
                f"--audio must hold audio files ({', '.join(sorted(AUDIO))}), got {audio}"
            )
        found = [(path, str(path.relative_to(audio)), None, None) for path in files]
    else:
        found = [
            (each.audio, each.name, each.language, each)
            for each in read_recordings(audio, split, languages, texts=False)
        ]
    paths, clips = [], []
    for path, name, language, recording in found:
        seconds = None if recording is None else recording.seconds
        if seconds is None:
            try:
                seconds = len(load_audio(path, on_loss=print_warning)) / SAMPLING_RATE
            except AudioError as error:
                print_warning(f"{error}: it is left out")
                continue
        paths.append(path)
        clips.append(Clip(name, language, None if recording is None else recording.speaker, seconds))
    return paths, clips


def _print_judged(judged: list[Judged]) -> None:
    rows = []
    for each in judged:
        kind = f"{each.task}{', with times' * each.timed}"
        stats = each.stats
        rows.append(
            [
                each.language,
                kind,
                f"{stats.tokens:,}",
                f"{stats.acceptance:.1%}",
                f"{stats.tokens_per_step:.2f}",
                f"{each.identical} of {each.outputs}",
            ]
        )
    print_table(("held out", "what", "tokens", "accepted", "tokens/step", "identical"), rows, left=2)
