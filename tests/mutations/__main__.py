"""Do the tests notice? ``python -m tests.mutations [WORD]`` plants one fault after another, and runs tests.

By hand, where acceptance, masks, stops, the plan or their tests change. Each fault of mutations.toml, or
those with WORD in their names, is planted in a scratch copy of the tree, built again where C++ changed; then
the tests that should notice it run. It is killed when they fail; the exit status is 1 where one survives, or
no longer fits the source. The copy keeps its build, so that a fault of C++ costs a file and a link.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
HOMES = {"kvspn/triton_kernels": "triton_kernels", "kvspn/measure/records": "bench/results"}
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")


def run(command: str, copy: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command of this Python in the copy, whose kvspn it imports."""
    environment = (
        os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | more
    )
    return subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=copy, env=environment, capture_output=True, text=True
    )


def build(kind: str | None, copy: Path) -> None:
    """Compiles the native engine in place, or the emulated CUDA one; nothing for Python."""
    if kind is None:
        return
    options = "" if kind == "emulate" else " --inplace"
    done = run(f"setup.py -q build_ext{options}", copy, KVSPN_CUDA="emulate" if kind == "emulate" else "0")
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def verdict(mutation: Mapping[str, str], copy: Path) -> str:
    """Plants one fault and takes it out again: "killed", "SURVIVED" or what does not fit."""
    file, kind = copy / mutation["file"], mutation.get("build")
    source = file.read_text()
    if source.count(mutation["before"]) != 1:
        return f"DOES NOT FIT: {source.count(mutation['before'])} times in {mutation['file']}"
    file.write_text(source.replace(mutation["before"], mutation["after"]))
    try:
        build(kind, copy)
        done = run(f"-m pytest -q -x -p no:cacheprovider {mutation['tests']}", copy)
    finally:
        file.write_text(source)
    # 1: tests failed; less than 0: the process ended in a crash; 5: no test was selected.
    if done.returncode == 1 or done.returncode < 0:
        return "killed"
    return {0: "SURVIVED", 5: "NO TEST SELECTED"}.get(done.returncode, f"PYTEST: {done.stdout[-500:]}")


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [
        mutation
        for mutation in tomllib.loads((Path(__file__).parent / "mutations.toml").read_text())["mutation"]
        if word in mutation["name"]
    ]
    left = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kvspn"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for home, package in HOMES.items():  # An installation that is editable would have the tree's own.
            (copy / home).symlink_to(copy / package)
        for kind in sorted({mutation["build"] for mutation in chosen if "build" in mutation}):
            build(kind, copy)
        for mutation in chosen:
            found = verdict(mutation, copy)
            left += found != "killed"
            print(f"{found:9} {mutation['name']}", flush=True)
    print(f"{len(chosen) - left} of {len(chosen)} killed")
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
