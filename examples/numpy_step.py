"""Decoding with NumPy alone, no torch: python examples/numpy_step.py mini.safetensors STATES.npy es en

The file is one that `kvspn quantize` writes. It is mapped, not read: the engine packs its weights from the
map. STATES.npy holds what the speech encoder made, float32 [positions, width]; without it they are random,
and so is the text. Prints the tokens, and how many steps they took.

pip install numpy and pip install --no-deps kvspn (or its folder) are all that it needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvspn import _native

# bf16 and fp8 have no names in NumPy: their bits are uint16 and uint8 here, which the engine takes for them.
DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "I8": "i1",
    "U8": "u1",
    "I32": "<i4",
    "BOOL": "?",
}


def open_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file as read-only views of the mapped file, and its metadata."""
    mapped = np.memmap(path, np.uint8, "r")
    size = int(mapped[:8].view("<u8")[0])
    header: dict[str, Any] = json.loads(mapped[8 : 8 + size].tobytes())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = mapped[first:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def main(path: Path, states: np.ndarray | None, source: str, target: str) -> list[int]:
    """Translates one utterance's encoder states; the tokens, prompt excluded."""
    tensors, numbers = open_file(path)
    layers, heads = int(numbers["layers"]), int(numbers["heads"])
    width = tensors["embed_tokens"].shape[1]
    capacity = len(tensors["embed_positions"])
    if states is None:
        states = np.random.default_rng(0).standard_normal((50, width), np.float32)
    engine = _native.Engine(
        tensors,
        layers=layers,
        heads=heads,
        blocks=int(numbers["blocks"]),
        groups=int(numbers["groups"]),
        last_layer_only=bool(int(numbers["last_layer_only"])),
        encoder_stride=int(numbers["encoder_stride"]),
        threads=1,
    )
    # Row 0 of a batch of one: the engine writes all of these in place.
    kv = np.zeros((layers, 2, 1, heads, capacity, width // heads), np.float32)
    cross_kv = np.zeros((layers, 2, 1, heads, len(states), width // heads), np.float32)
    tokens, lengths = np.zeros((1, capacity), np.int32), np.zeros(1, np.int32)
    finished, stats = np.zeros(1, np.bool_), np.zeros((1, 3), np.int32)
    engine.bind(
        kv=kv,
        lengths=lengths,
        tokens=tokens,
        finished=finished,
        stats=stats,
        cross_kv=cross_kv,
        cross_lengths=np.zeros(1, np.int32),
    )
    task = ["task.transcribe"] if source == target else ["task.translate", f"language.{target}"]
    prompt = [int(numbers[name]) for name in ("start", f"language.{source}", *task, "no_timestamps")]
    engine.encode(0, states)
    tokens[0, : len(prompt)] = prompt
    finished[0] = False
    engine.prefill(0, len(prompt) - 1)
    stops: dict[str, Any] = {"k": 1, "eos": int(numbers["eos"]), "max_length": capacity}
    engine.choose(mask=tensors["mask"], first_mask=tensors["first_mask"])
    engine.run(**stops, draft=int(numbers["blocks"]) > 0, steps=capacity)
    made: list[int] = tokens[0, len(prompt) : lengths[0] + 1].tolist()
    print(
        f"{made}\n{len(made)} tokens in {stats[0, 0]} steps, {stats[0, 2]} of {stats[0, 1]} drafts accepted"
    )
    return made


if __name__ == "__main__":
    file, *rest = sys.argv[1:]
    given = np.load(rest.pop(0)) if rest and rest[0].endswith(".npy") else None
    main(Path(file), given, *(rest or ["es", "en"]))
