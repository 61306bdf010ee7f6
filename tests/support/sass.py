"""Reads SASS, the machine code of NVIDIA's GPUs: which loads are under way together.

A warp issues in order and stops at the first instruction that needs a load's result. So loads that lie
between two such stops cost one trip to memory together, and a load whose result is used before the next one
is issued costs a trip of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_WIDTH = {"64": 2, "128": 4}


@dataclass(frozen=True)
class Batch:
    """Loads of one kind that a warp has under way before it uses the first of them."""

    kind: str
    count: int
    first: int  # number of the instruction that begins it
    used: int  # and of the one that waits for it


def kind_of(opcode: str) -> str | None:
    """What a load is for, as csrc/cuda/device.h tells the compiler; None for what is no load from memory.

    weights and keys, values are those that leave no trace in the L1 cache; fresh: what other blocks wrote.
    """
    parts = opcode.split(".")
    if parts[0] not in ("LDG", "LD"):
        return None
    wide = " wide" if "128" in parts else ""
    if "NA" in parts:
        return "weights" if "CONSTANT" in parts else "kv"
    return f"{'fresh' if 'STRONG' in parts else 'plain'}{wide}"


def instructions(sass: str) -> list[tuple[str, str]]:
    """(opcode, operands) in the program's order."""
    return [(match[3], match[4]) for match in _INSTRUCTION.finditer(sass)]


def innermost_loops(sass: str) -> list[list[str]]:
    """The opcodes of each loop that has no other one in it."""
    found = list(_INSTRUCTION.finditer(sass))
    place = {int(match[1], 16): number for number, match in enumerate(found)}
    loops = []
    for number, match in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", match[4]) if match[3].startswith("BRA") else None
        start = place.get(int(target[1], 16)) if target else None
        if start is not None and start <= number:
            loops.append((start, number))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[match[3] for match in found[start : end + 1]] for start, end in inner]


def batches(sass: str) -> list[Batch]:
    """Every load belongs to one batch: it ends when a result of it is used."""
    waiting: dict[int, int] = {}  # register -> which batch's
    open_: dict[str, list[int]] = {}  # kind -> [number of its batch, loads, first instruction]
    found: list[Batch] = []
    made = at = 0

    def close(number: int, at: int) -> None:
        for kind, (own, count, first) in list(open_.items()):
            if own == number:
                found.append(Batch(kind, count, first, at))
                del open_[kind]
        for register in [register for register, owner in waiting.items() if owner == number]:
            del waiting[register]

    for at, (opcode, operands) in enumerate(instructions(sass)):
        kind = kind_of(opcode)
        registers = [(int(match[1]), 2 if match[2] else 1) for match in _REGISTER.finditer(operands)]
        read = registers[1:] if kind else registers
        for register, width in read:
            for each in range(register, register + width):
                if each in waiting:
                    close(waiting[each], at)
        if kind and registers:
            if kind not in open_:
                made += 1
                open_[kind] = [made, 0, at]
            open_[kind][1] += 1
            width = next((_WIDTH[part] for part in opcode.split(".") if part in _WIDTH), 1)
            for each in range(registers[0][0], registers[0][0] + width):
                waiting[each] = open_[kind][0]
    for number in [own for own, _, _ in open_.values()]:
        close(number, at)
    return sorted(found, key=lambda batch: batch.first)
