"""How often a decoder step allocates memory, counted by glibc's own tracer (mtrace) in a process of its own.

The tracer must be there from a process's start, and slows it: hence the child, in which a decoder as deep as
the one in question, but narrow, takes its steps. Python's small objects come from its own pools and do not
count.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_TRACER = "libc_malloc_debug.so.0"
_VERSION = b"GLIBC_2.2.5"  # of the tracer's symbols, which need it named


def count(
    layers: int, groups: int, backend: str, weights: str, kv: str | None = None
) -> tuple[int | None, int | None]:
    """Allocations of a plain step and of a KVSPN step; None where there is no such tracer.

    Args:
        layers, groups: of the decoder.
        backend, weights, kv: one of kvspn's, a weight format and a cache format that it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_PRELOAD": _TRACER, "MALLOC_TRACE": f"{folder}/trace"}
        command = [sys.executable, "-m", "kvspn.measure.allocations", str(layers), str(groups), backend]
        command += [weights] if kv is None else [weights, kv]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        return None, None
    plain, kvspn = map(int, child.stdout.split())
    return plain, kvspn


def _tracer() -> Callable[[Callable[[], object]], int]:
    libc = ctypes.CDLL(None)
    libc.dlvsym.restype = ctypes.c_void_p
    start, stop = (
        ctypes.CFUNCTYPE(None)(libc.dlvsym(None, name, _VERSION)) for name in (b"mtrace", b"muntrace")
    )
    trace = Path(os.environ["MALLOC_TRACE"])

    def traced(call: Callable[[], object]) -> int:
        start()
        call()
        stop()
        # "@ caller + address size" is an allocation, ">" what realloc returned.
        return sum(line.startswith("@") and (" + " in line or " > " in line) for line in trace.open())

    if traced(lambda: bytearray(1 << 20)) != 1:
        raise RuntimeError(f"{_TRACER} does not trace here")
    return traced


def _main(layers: int, groups: int, backend: str, weights: str, kv: str | None = None) -> None:
    from kvspn.measure.shapes import Shape, start
    from kvspn.weights.formats import quantise

    shape = Shape(layers, groups, heads=2, ffn=128, vocabulary=256, encoder_positions=32, length=8)
    engine = start(backend, quantise(shape.weights(), weights), shape, kv=kv)
    traced = _tracer()
    for draft in (False, True):
        for _ in range(2):  # the first one may settle what the second finds ready
            engine.lengths.fill_(shape.length)
            allocations = traced(lambda: engine.step(1, draft))  # noqa: B023
        print(allocations)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
