"""csrc/cuda on the host, as ``KVSPN_CUDA=emulate python setup.py -q build_ext`` builds it."""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import kvspn

PATH = Path(__file__).parents[1] / "build" / "emulated" / "_cuda.so"
# What a test may set: the order of threads, the size of the device, the launch that fails (-1: none).
SETTINGS = ("seed", "multiprocessors", "shared_bytes", "failing_launch")


def load() -> None:
    """Put the module, if it is built, where kvspn.cuda looks for its own."""
    if PATH.exists():
        loader = ExtensionFileLoader("kvspn._cuda", str(PATH))
        module = module_from_spec(spec_from_loader("kvspn._cuda", loader))
        loader.exec_module(module)
        sys.modules["kvspn._cuda"] = kvspn._cuda = module


def setting(name: str) -> ctypes.c_int32:
    """One of SETTINGS, to read and change by its ``value``."""
    return ctypes.c_int32.in_dll(ctypes.CDLL(str(PATH)), f"kvspn_emulation_{name}")
