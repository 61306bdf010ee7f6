"""Without Python: the library is built and installed by CMake, and a C program translates with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from typer.testing import CliRunner

from kvspn.assets import read_manifest
from kvspn.cli import app
from kvspn.engines import backends
from kvspn.speech.audio import SAMPLING_RATE, load_audio
from kvspn.speech.translator import Translator

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not here"),
    pytest.mark.xdist_group("embed"),  # one build for all
]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository: lib/ with the stress test, the installed prefix/."""
    folder = tmp_path_factory.mktemp("embed")
    run("cmake", "-S", ROOT / "csrc", "-B", folder / "lib", "-DKVSPN_TESTS=ON")
    run("cmake", "--build", folder / "lib", "--parallel", os.environ.get("OMP_NUM_THREADS", "1"))
    run("cmake", "--install", folder / "lib", "--prefix", folder / "prefix")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="ELF tools")
def test_exports_the_abi_alone(build):
    [library] = build.glob("prefix/lib*/libkvspn.so")
    symbols = [
        line.split()[-1].partition("@@") for line in run("nm", "-D", "--defined-only", library).splitlines()
    ]
    exported = {name for name, _, version in symbols if version}
    header = (build / "prefix" / "include" / "kvspn.h").read_text()
    assert exported == {name for name in exported if f"{name}(" in header}
    assert {"kvspn_engine_create", "kvspn_engine_generate"} <= exported
    assert {version for _, _, version in symbols if version} == {"KVSPN_2"}
    assert "libkvspn.so.2" in run("readelf", "-d", library)


def test_pkg_config_finds_it(build):
    [folder] = build.glob("prefix/lib*/pkgconfig")
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "kvspn"],
        env={**os.environ, "PKG_CONFIG_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    include, lib, library = found.split()
    assert Path(include.removeprefix("-I"), "kvspn.h").is_file()
    assert Path(lib.removeprefix("-L"), "libkvspn.so").is_file()
    assert library == "-lkvspn"


def test_threads_memory_and_allocations(build):
    """Engines on several threads at once; no allocation in a step; flat memory over many generations."""
    out = run(build / "lib" / "kvspn_stress", 10_000)
    assert "threads on one engine: " in out
    assert "\n10000 generations: resident memory grew by " in out


@pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")
@pytest.mark.parametrize("weights", ["fp32", "fp8", "int8/int4"])
def test_a_c_program_transcribes(build, tmp_path, weights):
    """The same text as Python's, on bundled clips; and a line for what is no model or no wav."""
    run(
        "cmake",
        *("-S", ROOT / "examples" / "embed_c", "-B", build / "example"),
        f"-Dkvspn_ROOT={build / 'prefix'}",
    )
    run("cmake", "--build", build / "example")
    program = build / "example" / "transcribe"
    model = tmp_path / "mini.safetensors"
    assert CliRunner().invoke(app, ["quantize", str(model), "--weights", weights]).exit_code == 0
    translator = Translator.from_folder(backend="native", weights=weights, encoder_format="fp32")
    for clip, target in zip(read_manifest("demo")[:3], ("zh", "en", "de"), strict=True):
        wav = tmp_path / f"{clip.id}.wav"
        soundfile.write(wav, load_audio(clip.audio), SAMPLING_RATE, "PCM_16")
        expected = translator.translate(load_audio(wav), target, clip.language)
        [line] = run(program, model, wav, clip.language, target).splitlines()
        assert line.split(" ", 2)[1:] == [clip.language, expected.text]
    for arguments, message in (
        ([wav, wav], "must be a safetensors file, which begins with"),
        ([model, model], "must be a wav of 16 bits, mono at 16 kHz"),
        ([model, wav, "xx"], "language must be the code of one that the model knows, got xx"),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_quantize_refuses(tmp_path):
    for arguments, message in (
        (["missing/mini.safetensors"], "no such folder"),
        ([str(tmp_path / "mini.safetensors"), "--weights", "int3"], "weights must be one of"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kvspn", "quantize", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
