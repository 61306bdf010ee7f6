"""Builds csrc with ninja: the module kvspn._native, and kvspn._torch_ops, which torch loads.

csrc/CMakeLists.txt builds the library without Python from the same files, with the same flags: keep them so.
Metadata lives in pyproject.toml. KVSPN_SANITIZE=address,undefined (or thread) builds with sanitizers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
ISA = {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512vnni": f"{AVX512} -mavx512vnni"}
TORCH = find_spec("torch") is not None  # an isolated build has none, and leaves the torch ops out
MODULES = ["kvspn._native", "kvspn._torch_ops"] if TORCH else ["kvspn._native"]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; what did not change is not compiled again."""

    def run(self) -> None:
        missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
        if missing:
            print(f"kvspn: the native backend is not built: {' and '.join(missing)} missing", file=sys.stderr)
            return
        super().run()

    def build_extensions(self) -> None:
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self._rules())
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "--quiet"], check=True)
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name))
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{extension.name.rpartition('.')[2]}.so", module)

    def _rules(self) -> str:
        import pybind11

        sanitize = os.environ.get("KVSPN_SANITIZE")
        checks = f" -fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
        x86 = platform.machine() in ("x86_64", "AMD64")
        lines = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"flags = -std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra "
            # GCC's own vector headers; vectors never cross a call.
            f"-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi "
            f"-I{CSRC} -I{CSRC / 'include'}{checks}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared{checks} -pthread $in $extra -o $out",
        ]
        objects = []
        for source in sorted([*CSRC.glob("core/*.cpp"), *CSRC.glob("cpu/*.cpp")]):
            extra = ISA.get(source.stem, "") if x86 else ""
            objects.append(f"{source.parent.name}-{source.stem}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  extra = {extra}"]
        lines += [
            f"build module.o: compile {CSRC / 'bindings' / 'module.cpp'}",
            f"  extra = -I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}",
            f"build _native.so: link module.o {' '.join(objects)}",
        ]
        if TORCH:
            import torch

            installed = Path(torch.__file__).parent
            # TORCH_TARGET_VERSION: the oldest torch whose stable ABI it must run with.
            stable = f"-std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {installed / 'include'}"
            lines += [
                f"build torch_ops.o: compile {CSRC / 'bindings' / 'torch_ops.cpp'}",
                f"  extra = {stable}",
                f"build _torch_ops.so: link torch_ops.o {' '.join(objects)}",
                f"  extra = -L{installed / 'lib'} -ltorch_cpu -ltorch",
            ]
        lines.append("")
        return "\n".join(lines)


setup(
    packages=find_packages(include=["kvspn", "kvspn.*"]),
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
)
