"""Builds csrc with ninja: the module kvspn._native, and its ops as torch loads them, for each kind of device.

A wheel also carries the C library, its header and a file for pkg-config, in kvspn/lib and kvspn/include.

csrc/CMakeLists.txt builds the library without Python from the same files, with the same flags: keep them so.
Metadata lives in pyproject.toml. KVSPN_SANITIZE=address,undefined (or thread) builds with sanitizers.
KVSPN_CUDA=auto builds for CUDA too where nvcc and a GPU are, 1 in any case, 0 never; KVSPN_CUDA_ARCHS narrows
the architectures down. KVSPN_CUDA=emulate builds what the tests load, csrc/cuda on the host, nothing else.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CUDA = os.environ.get("KVSPN_CUDA", "auto")
EMULATE = CUDA == "emulate"
CUDA_ARCHS = os.environ.get("KVSPN_CUDA_ARCHS", "80 90a 100a 120").split()
SANITIZE = os.environ.get("KVSPN_SANITIZE")
COMPILER = os.environ.get("CXX", "c++")
PYTHON_HEADERS = sysconfig.get_paths()["include"]
TORCH = find_spec("torch") is not None  # An isolated build has none, and leaves the torch ops out.
ABI = re.findall(r"define KVSPN_ABI_VERSION (\d+)", (CSRC / "include" / "kvspn.h").read_text())[0]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
LIBRARY = f"libkvspn.so.{ABI}"
ISA = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512vnni": f"{AVX512} -mavx512vnni",
    "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    "amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}


def _set(source: Path) -> str:
    """The instruction set that a source is named after, as "avx2" of encoder_avx2.cpp."""
    return source.stem.removeprefix("encoder_")


def cuda() -> tuple[bool, str]:
    """Whether to build for CUDA devices, and why."""
    if CUDA not in ("auto", "0", "1", "emulate"):
        raise SystemExit(f"KVSPN_CUDA must be auto, 1, 0 or emulate, got {CUDA}")
    if CUDA in ("0", "emulate"):
        return EMULATE, f"KVSPN_CUDA={CUDA}"
    if not shutil.which("nvcc"):
        if CUDA == "1":
            raise SystemExit("KVSPN_CUDA=1 needs nvcc in the PATH, and it is not there")
        return False, "no nvcc in the PATH"
    if CUDA == "auto" and not Path("/dev/nvidia0").exists():
        return False, "no GPU here (KVSPN_CUDA=1 builds all the same)"
    return True, f"with nvcc, for sm_{', sm_'.join(CUDA_ARCHS)}"


NO_TORCH = "the build sees no torch (pip install --no-build-isolation lets it see the installed one)"
MODULES = ["kvspn._native"] + ["kvspn._torch_ops"] * TORCH
MODULES += ["kvspn._torch_ops_cuda"] * (TORCH and cuda()[0])
# Packages whose files lie outside of kvspn/.
HOMES = {"kvspn.triton_kernels": "triton_kernels", "kvspn.measure.records": "bench/results"}


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; what did not change is not compiled again."""

    def run(self) -> None:
        missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
        programs = [word for word in COMPILER.split() if not word.startswith("-")]  # "ccache c++ -m64"
        missing += [
            f"the program {name} (or CXX names another)" for name in programs if not shutil.which(name)
        ]
        missing += ["Python's headers"] * (not Path(PYTHON_HEADERS, "Python.h").exists())
        if missing:
            print(f"kvspn: only the reference runs: the build lacks {', '.join(missing)}", file=sys.stderr)
            return
        if not TORCH:
            print(f"kvspn: the torch ops are not built: {NO_TORCH}", file=sys.stderr)
        print(f"kvspn: the CUDA backend is {'' if cuda()[0] else 'not '}built: {cuda()[1]}", file=sys.stderr)
        super().run()

    def build_extensions(self) -> None:
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_rules())
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "--quiet"], check=True)
        for extension in self.extensions if not EMULATE else ():
            module = Path(self.get_ext_fullpath(extension.name))
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{extension.name.rpartition('.')[2]}.so", module)
        if not (self.inplace or EMULATE or SANITIZE):
            _copy_library(folder / LIBRARY, Path(self.get_ext_fullpath("kvspn._native")).parent)


def _copy_library(built: Path, package: Path) -> None:
    """The C library for programs without Python, as CMake installs it, less the links: a wheel holds none."""
    version = re.findall(r'__version__ = "([^"]+)"', (ROOT / "kvspn" / "__init__.py").read_text())[0]
    words = {"up": "../..", "include": "include", "lib": "lib", "version": version, "libs": f"-l:{LIBRARY}"}
    described = re.sub(r"@(\w+)@", lambda word: words[word[1]], (CSRC / "kvspn.pc.in").read_text())
    (package / "lib" / "pkgconfig").mkdir(parents=True, exist_ok=True)
    (package / "include").mkdir(exist_ok=True)
    shutil.copy2(built, package / "lib")
    shutil.copy2(CSRC / "include" / "kvspn.h", package / "include")
    (package / "lib" / "pkgconfig" / "kvspn.pc").write_text(described)


def _rules() -> str:
    """build.ninja."""
    import pybind11

    # Calls: GCC takes five times as long to write each check out. -g1: line numbers, for reports.
    calls = "-fno-omit-frame-pointer -g1 --param asan-instrumentation-with-call-threshold=0"
    checks = f" -fsanitize={SANITIZE} {calls}" if SANITIZE else ""
    x86 = platform.machine() in ("x86_64", "AMD64")
    # -ffp-contract, -fmad: a sum is the same wherever it is inlined.
    # -O1: with the sanitizers' checks, -O3 compiles for minutes more.
    common = f"-std=c++17 {'-O1' if SANITIZE else '-O3'} -I{CSRC} -I{CSRC / 'include'}"
    targets = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS)
    lines = [
        f"cxx = {COMPILER}",
        f"flags = {common} -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra "
        # GCC's own vector headers; vectors never cross a call.
        f"-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi -Wno-unknown-warning-option{checks}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",  # the compiler's report on registers and spills stays beside the object
        f"  command = nvcc {common} {targets} -fmad=false -lineinfo -Xptxas=-v --threads 2 "
        "-Xcompiler=-fPIC,-fvisibility=hidden $extra -MMD -MF $out.d -c $in -o $out > $out.report 2>&1 || "
        "{ cat $out.report; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared{checks} -pthread $in $extra -o $out",
        "rule nvlink",
        "  command = nvcc -shared -cudart=static -Xcompiler=-pthread $in $extra -o $out",
    ]

    def build(output: str, rule: str, inputs: object, extra: str = "") -> str:
        lines.extend([f"build {output}: {rule} {inputs}", f"  extra = {extra}"])
        return output

    def compile_all(folder: str, rule: str, sources: Iterable[Path], extra: str = "") -> list[str]:
        return [
            build(f"{folder}{source.parent.name}-{source.stem}.o", rule, source, ISA.get(_set(source), extra))
            for source in sorted(sources)
        ]

    backends = CSRC / "common" / "backend.cpp"
    host = {*CSRC.glob("common/*.cpp"), *CSRC.glob("cpu/*.cpp")} - {backends}
    objects = compile_all("", "compile", (file for file in host if x86 or _set(file) not in ISA))
    without = [*objects, build("common-backend.o", "compile", backends)]
    python = f"-I{PYTHON_HEADERS} -I{pybind11.get_include()}"
    module, torch_ops = CSRC / "bindings" / "module.cpp", CSRC / "bindings" / "torch_ops.cpp"
    exports = f"-Wl,--version-script={CSRC / 'exports.map'},-soname,{LIBRARY},-z,defs"
    build(LIBRARY, "link", " ".join(without), exports)
    stable = linked = ""
    if TORCH:
        import torch

        installed = Path(torch.__file__).parent
        # TORCH_TARGET_VERSION: the oldest torch whose stable ABI it must run with.
        stable = f"-std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {installed / 'include'}"
        # libtorch leads to libtorch_cuda, where torch has one.
        linked = f"-L{installed / 'lib'} -ltorch_cpu -Xlinker --no-as-needed -ltorch"
        ops = build("torch_ops.o", "compile", torch_ops, stable)
        build("_torch_ops.so", "link", " ".join([ops, *without]), linked)

    # With CUDA: for devices, or what the tests run on the host.
    folder, link, defines = "", "nvlink", "-DKVSPN_WITH_CUDA"
    device = {*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")}
    if EMULATE:
        folder, link, defines = "emulated/", "link", f"{defines} -DKVSPN_EMULATE -Wno-unknown-pragmas"
        compiled = compile_all(folder, "compile", device, f"{defines} -x c++")
    else:
        compiled = compile_all(folder, "nvcc", device - {CSRC / "cuda" / "emulation.cpp"}, defines)
    whole = [*objects, *compiled, build(f"{folder}with-cuda-backend.o", "compile", backends, defines)]
    if not cuda()[0]:
        link, defines, whole = "link", "", without
    made = build(f"{folder}module.o", "compile", module, f"{python} {defines}")
    wanted = [build(f"{folder}_native.so", link, " ".join([made, *whole]))]
    if TORCH and cuda()[0]:
        ops = build(f"{folder}torch_ops_cuda.o", "compile", torch_ops, f"{stable} {defines}")
        wanted.append(build(f"{folder}_torch_ops_cuda.so", link, " ".join([ops, *whole]), linked))
    if not EMULATE:
        wanted += ["_torch_ops.so"] * TORCH + [LIBRARY] * (not SANITIZE)
    return "\n".join([*lines, f"default {' '.join(wanted)}", ""])


setup(
    packages=[*find_packages(include=["kvspn", "kvspn.*"]), *HOMES],
    package_dir=HOMES,
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
)
