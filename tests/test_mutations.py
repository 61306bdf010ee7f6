"""The faults of tests/mutations fit the source as it is; whether tests see them is tried by hand."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FAULTS = tomllib.loads((ROOT / "tests/mutations/mutations.toml").read_text("utf-8"))["mutation"]


def test_faults_of_the_mutation_runner_fit_the_source() -> None:
    found = {
        fault["name"]: (ROOT / fault["file"]).read_text("utf-8").count(fault["before"]) for fault in FAULTS
    }
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert all(fault["before"] != fault["after"] for fault in FAULTS)
    assert all((ROOT / fault["tests"].split()[0]).is_file() for fault in FAULTS)
