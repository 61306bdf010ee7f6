"""The command line, one file per command. What a command needs is imported when it runs: help is quick."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvspn import __version__
from kvspn.cli.bench import bench
from kvspn.cli.common import prepare_streams, print_error
from kvspn.cli.convert import convert
from kvspn.cli.demo import demo
from kvspn.cli.doctor import doctor
from kvspn.cli.evaluate import evaluate
from kvspn.cli.export_kernels import export_kernels
from kvspn.cli.models import models
from kvspn.cli.plan import plan
from kvspn.cli.profile import profile
from kvspn.cli.quantize import quantize
from kvspn.cli.train import app as train
from kvspn.cli.transcribe import transcribe
from kvspn.cli.translate import translate


class OneLineErrors(TyperGroup):
    """Whatever is wrong with the input ends in one line on stderr and a non-zero exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        warnings.formatwarning = lambda message, *rest, **more: f"kvspn: {message}\n"
        prepare_streams()
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            if message := error.format_message().rstrip("."):  # none where only the help was shown
                print_error(message + hint)
            code = error.exit_code
        except BrokenPipeError:  # who read the output has gone, as `head` does; nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except (ValueError, OSError) as error:
            print_error(_by_option(str(error)))
            code = 1
        sys.exit(code)


# What the library calls an argument, and the option that gave it.
_OPTIONS = {
    "name": "--backend",
    "weights": "--weights",
    "kv": "--kv",
    "shape": "--shape",
    "length": "--length",
    "lengths": "--lengths",
    "target": "--target",
    "target_language": "--to",
    "language": "--from",
    "formats": "--weights",
    "peers": "--peers",
    "audio": "--audio",
    "cache": "--cache",
    "dry": "--dry",
}


def _by_option(message: str) -> str:
    """ "weights must be ..." -> "--weights must be ...": on the command line nobody knows the parameters."""
    name, must, rest = message.partition(" must ")
    return f"{_OPTIONS.get(name, name)}{must}{rest}"


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: kvspn demo",
)
for command in (transcribe, translate, demo, evaluate):
    app.command(rich_help_panel="Use a model")(command)
app.add_typer(train, name="train", rich_help_panel="Make a model")
app.command(rich_help_panel="Make a model")(convert)
app.command(rich_help_panel="Make a model")(quantize)
app.command("export-kernels", rich_help_panel="Make a model")(export_kernels)
app.command(rich_help_panel="This machine")(doctor)
app.command(rich_help_panel="This machine")(models)
app.command(rich_help_panel="This machine")(plan)
app.command(rich_help_panel="This machine")(bench)
app.command(rich_help_panel="This machine")(profile)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvspn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Speech translation with whisperM2M and its draft network KVSPN.

    Speech in one of six languages goes in, text in any of them comes out. KVSPN guesses each next token from
    the model's own key-value cache, and the model checks the guess in the same step: with --k 1 the text is
    exactly the model's own, in fewer steps.
    """
