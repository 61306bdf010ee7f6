"""csrc/cuda on the host, as ``KVSPN_CUDA=emulate python setup.py -q build_ext`` builds it."""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace

import torch

from kvspn.engines.cuda import CudaEngine
from kvspn.ops._library import implement
from kvspn.ops.decoder_step import composed, step

PATH = Path(__file__).parents[2] / "build" / "native" / "emulated" / "_native.so"
OPS_PATH = PATH.with_name("_torch_ops_cuda.so")
# Those that csrc/cuda has as single kernels.
OPS = (
    "flat_kv_attention",
    "fused_linear",
    "lm_head_verify",
    "append_kv",
    "accept_and_rollback",
    "compact_kv",
)
# What a test may set: the order of threads, the size of the device, the launch that fails (-1: none), the
# number of the present device. `launched_on`, to read: that of the last launch.
SETTINGS = ("seed", "multiprocessors", "shared_bytes", "failing_launch", "device")


def load() -> None:
    """The module, if it is built, for CudaEngine in place of its own."""
    if PATH.exists():
        loader = ExtensionFileLoader("emulated._native", str(PATH))
        module = module_from_spec(spec_from_loader("emulated._native", loader))
        loader.exec_module(module)
        CudaEngine.module = module


def ops() -> SimpleNamespace:
    """The kernels of single ops, under their contracts; each is ``torch.ops.kvspn_emulated.<op>`` too."""

    def none(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("not for tensors on this device")

    public = SimpleNamespace(**{name: implement(name, "kvspn_emulated", none) for name in OPS})
    torch.ops.load_library(str(OPS_PATH))
    kernel = composed(functools.partial(step, torch.ops.kvspn_emulated))
    public.decoder_step = implement("decoder_step", "kvspn_emulated", kernel)
    return public


def stream() -> int:
    """A new stream of the module."""
    make = ctypes.CDLL(str(PATH)).kvspn_emulation_stream
    make.restype = ctypes.c_void_p
    return int(make())


def streams_used() -> set[int]:
    """Those of the module that launches, copies and memsets were put on, or that were waited for, since this
    was last asked; 0 is the default stream."""
    found = (ctypes.c_void_p * 100)()
    count = ctypes.CDLL(str(PATH)).kvspn_emulation_used(found, len(found))
    return {value or 0 for value in found[:count]}


def setting(name: str, path: Path = PATH) -> ctypes.c_int32:
    """One of SETTINGS of a module, to read and change by its ``value``."""
    return ctypes.c_int32.in_dll(ctypes.CDLL(str(path)), f"kvspn_emulation_{name}")
