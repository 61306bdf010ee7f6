"""What a build carries."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_of_modules_is_a_package():
    """A folder without __init__.py works in a checkout, but setup.py does not find it for a wheel."""
    folders = {path.parent for path in (ROOT / "kvspn").glob("**/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_library_has_the_version_of_its_abi():
    """The symbols' version, which the linker takes from exports.map, is that of the header."""
    header = (ROOT / "csrc" / "include" / "kvspn.h").read_text()
    abi = header.partition("#define KVSPN_ABI_VERSION ")[2].split()[0]
    assert (ROOT / "csrc" / "exports.map").read_text().startswith(f"KVSPN_{abi} {{")
