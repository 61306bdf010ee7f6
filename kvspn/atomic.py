"""Files and folders that are whole or not there: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to, which then takes the name of `path`.

    What ends early, by an exception, a kill or the end of the power, leaves no `path`, or the old one as it
    was; a folder that is replaced may be missing then, but is never half of either. Folders above are made.
    """
    part = path.with_name(f"{path.name}.part")
    _remove(part)  # what an interrupted write has left
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        flush(part)
        if part.is_dir():
            _remove(path)  # A rename replaces a file, but no folder that holds something.
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        _remove(part)
        raise


def flush(path: Path) -> None:
    """Returns when a file, or a folder and all that it holds, is on the disk."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
