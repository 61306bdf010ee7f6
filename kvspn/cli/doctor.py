"""`kvspn doctor`: what runs here, and why the rest does not."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kvspn


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which backends, CPU features, GPU and versions are here, and why something is missing."""
    report = _examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, reason in report["backends"].items():
        table.add_row(f"backend {name}", _state(reason))
    table.add_row("native torch ops", _state(report["torch_ops"]))
    table.add_row("C library", report["library"] or "not in this installation: CMake builds it from csrc")
    cpu, gpu = report["cpu"], report["gpu"]
    flags = [name for name, has in cpu["flags"].items() if has]
    table.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores; {', '.join(flags) or 'no AVX2 or later'}")
    table.add_row("native kernels", cpu["instruction_set"] or "none")
    devices = [f"{each['name']}, {each['capability']}, {each['gib']} GiB" for each in gpu["devices"]]
    table.add_row("GPU", "; ".join(devices) or "none that torch can use")
    table.add_row("CUDA", f"torch: {gpu['cuda'] or 'built without'}; nvcc: {gpu['nvcc'] or 'not found'}")
    for name, version in report["versions"].items():
        table.add_row(name, version or Text("not installed", style="yellow"))
    table.add_row(
        "espeak-ng", report["espeak_ng"] or Text("not installed: only training needs it", style="yellow")
    )
    table.add_row("bundled model", _state(report["model"]))
    Console().print(table)


def _state(reason: str | None) -> Text:
    return Text("ready", style="green") if reason is None else Text(f"missing: {reason}", style="yellow")


def _examine() -> dict[str, Any]:
    """Everything by name; for backends, torch ops and the model, None where ready, else why not. library: the
    folder of the C library that a wheel carries, with pkgconfig in it and ../include beside it.
    """
    from kvspn.assets import bundled_model, missing_part
    from kvspn.engines import backends
    from kvspn.measure import machine

    library = next(Path(kvspn.__file__).parent.glob("lib/libkvspn.so.*"), None)
    return {
        "backends": backends(),
        "torch_ops": _torch_ops_missing(),
        "library": str(library.parent) if library else None,
        "cpu": machine.cpu(),
        "gpu": machine.gpu(),
        "versions": machine.versions(),
        "espeak_ng": machine.program("espeak-ng"),
        "model": missing_part(bundled_model()),
    }


def _torch_ops_missing() -> str | None:
    if find_spec("kvspn._torch_ops"):
        return None
    return (
        "every op runs its reference, since the package was built where torch was not: an isolated build."
        " pip install --no-build-isolation builds them with the installed torch"
    )
