"""Ahead-of-time compilation, on any machine: the kernels of the whisperM2M step, recorded and compiled.

    python -m kvspn.triton_kernels.aot          every target; fails where registers spill

What is compiled is what an engine launches: the step runs once on tensors without data, and every launch
of another kernel, type or constant is one entry. Pointers must be aligned to 16 bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvspn.measure.shapes import SHAPES
from kvspn.ops.decoder_step import Caches, StepRule, StepState, step
from kvspn.triton_kernels import configurations
from kvspn.triton_kernels.compact_kv import launch_compact_kv
from kvspn.triton_kernels.decoder_step import LAUNCHERS
from kvspn.triton_kernels.launch import INTERPRETED, Launch, recording
from kvspn.weights.formats import quantise

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Compiled(NamedTuple):
    """One kernel: its binary and what a launch of it needs. ``arguments``: (C type, name) in order."""

    name: str
    symbol: str
    binary: bytes
    grid: tuple[int, ...]
    threads: int
    shared: int
    arguments: tuple[tuple[str, str], ...]
    registers: int
    spills: int  # bytes a thread


def parse_target(name: str) -> GPUTarget:
    """ "cuda:90" or "hip:gfx942".

    Raises:
        ValueError: not of TARGETS.
    """
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    backend, _, arch = name.partition(":")
    return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


def record(target: str, fmt: str) -> list[Launch]:
    """The distinct launches of a drafted step of one row at the whisperM2M shape, in a weight format."""
    shape = SHAPES["whisperM2M"]
    with torch.device("meta"):
        weights = quantise(shape.weights(), fmt)
        dtype = weights.embed_tokens.dtype
        cache = (2, 1, shape.heads)
        kv = torch.empty(shape.layers, *cache, 448, shape.head_dim, dtype=dtype)
        cross = torch.empty(shape.layers, *cache, shape.encoder_positions, shape.head_dim, dtype=dtype)
        lengths = torch.empty(1, dtype=torch.int32)
        tokens, stats = torch.empty(1, 448, dtype=torch.int32), torch.empty(1, 3, dtype=torch.int32)
        finished, mask = torch.empty(1, dtype=torch.bool), torch.empty(shape.vocabulary)
    name = target.partition(":")[2]
    token = configurations.target.set(name if name.startswith("gfx") else f"sm_{name}")
    try:
        with recording() as launches:
            state = StepState(Caches(kv, lengths, cross, lengths), tokens, finished, stats)
            step(LAUNCHERS, weights, state, StepRule(mask, 2, 1, 448))
            launch_compact_kv(kv, lengths, tokens[:, :2], lengths)
    finally:
        configurations.target.reset(token)
    distinct = {}
    for each in launches:
        signature, constants, attributes = specialise(each)
        distinct.setdefault((each.kernel, *map(str, (signature, constants, attributes))), each)
    return list(distinct.values())


def specialise(each: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and alignments, as Triton's own launcher would find them."""
    names = each.kernel.arg_names
    plain = {parameter.name for parameter in each.kernel.params if parameter.do_not_specialize}
    values = dict(zip(names, each.args, strict=False)) | each.options
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        signature[name] = "constexpr"
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif (
            value is None
            or each.kernel.params[i].is_constexpr
            or (isinstance(value, int) and value == 1 and name not in plain)
        ):
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name not in plain:
                attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def settings(each: Launch) -> dict[str, Any]:
    """The compiler's, of a launch's options."""
    return {name: value for name, value in each.options.items() if name in _OPTIONS}


def compile_launch(each: Launch, target: str) -> Compiled:
    """Compile one recorded launch for a target."""
    signature, constants, attributes = specialise(each)
    gpu = parse_target(target)
    made = triton.compile(ASTSource(each.kernel, signature, constants, attributes), gpu, settings(each))
    c_types = {"fp32": "float", "i32": "int32_t"}
    arguments = tuple(
        ("pointer" if kind.startswith("*") else c_types[kind], name)
        for name, kind in signature.items()
        if kind != "constexpr"
    )
    binary = made.asm["cubin" if gpu.backend == "cuda" else "hsaco"]
    registers, spills = _cubin_usage(binary) if gpu.backend == "cuda" else _amdgcn_usage(made.asm["amdgcn"])
    threads = made.metadata.num_warps * gpu.warp_size
    symbol = made.metadata.name
    return Compiled(
        "", symbol, binary, each.grid, threads, made.metadata.shared, arguments, registers, spills
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a thread."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(program), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amdgcn_usage(text: str) -> tuple[int, int]:
    """Vector registers, and bytes of private memory, of a lane."""
    found = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return found["vgpr_count"], found["private_segment_fixed_size"]


def build(target: str, formats: Iterable[str]) -> list[Compiled]:
    """Every kernel of the step in these weight formats, named kernel_format_number."""
    made = []
    for fmt in formats:
        for number, each in enumerate(record(target, fmt)):
            name = f"{each.kernel.fn.__name__.removesuffix('_kernel')}_{fmt}_{number}"
            made.append(compile_launch(each, target)._replace(name=name))
    return made


def export(target: str, folder: Path, fmt: str) -> list[Compiled]:
    """Write the binaries and kvspn_kernels.h, with what another runtime needs to launch them."""
    made = build(target, [fmt])
    ending = "cubin" if target.startswith("cuda") else "hsaco"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"/* KVSPN's Triton kernels at the whisperM2M shape, {fmt}, for {target}.",
        " *",
        " * Arguments of a launch, in order, then two null pointers (Triton's scratch buffers). Pointers are",
        " * to device memory, aligned to 16 bytes. The grid is that of one row and one draft. */",
        "#pragma once",
        "#include <stdint.h>",
        "",
        "struct kvspn_kernel {",
        "    const char *name, *file, *symbol, *arguments;",
        "    unsigned grid[3], threads, shared_bytes;",
        "};",
        "",
        "static const struct kvspn_kernel kvspn_kernels[] = {",
    ]
    for each in made:
        (folder / f"{each.name}.{ending}").write_bytes(each.binary)
        arguments = ", ".join(f"{kind} {name}" for kind, name in each.arguments)
        grid = ", ".join(map(str, (*each.grid, 1, 1)[:3]))
        lines += [
            f'    {{"{each.name}", "{each.name}.{ending}", "{each.symbol}",',
            f'     "{arguments}",',
            f"     {{{grid}}}, {each.threads}, {each.shared}}},",
        ]
    (folder / "kvspn_kernels.h").write_text("\n".join([*lines, "};", ""]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel; fail where registers spill.")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--weights", action="append", help="weight formats; default: fp16 and int8")
    options = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    spilled = False
    print(f"{'target':11} {'kernel':34} {'registers':>9} {'spills':>6} {'shared':>6} {'threads':>7}")
    for target in options.target or TARGETS:
        for each in build(target, options.weights or ["fp16", "int8"]):
            figures = f"{each.registers:9} {each.spills:6} {each.shared:6} {each.threads:7}"
            print(f"{target:11} {each.name:34} {figures}", flush=True)
            spilled |= each.spills > 0
    if spilled:
        sys.exit("some kernels spill registers")


if __name__ == "__main__":
    main()
