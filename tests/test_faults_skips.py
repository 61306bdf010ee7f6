"""No test is skipped in CI without a reason that is listed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import pytest

def test_runs():
    pass

@pytest.mark.skipif(True, reason={reason!r})
def test_is_skipped():
    pass
"""


@pytest.mark.parametrize(
    ("reason", "ci", "status"),
    [
        ("no CUDA device", "true", 0),
        ("cmake is not here", "true", 1),
        ("cmake is not here", "", 0),
    ],
)
def test_an_unlisted_reason_fails_the_run_in_ci(tmp_path: Path, reason: str, ci: str, status: int) -> None:
    (tmp_path / "test_module.py").write_text(MODULE.format(reason=reason))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugins = ["-p", "support.skips", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, str(tmp_path)],
        env={**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert ("does not allow" in done.stdout and reason in done.stdout) == bool(status)
