"""Damage to a model's folder, at random."""

from __future__ import annotations

import json
import random
from pathlib import Path

ODD = (None, [], {}, "", "x", -1, 0, 1, 2**31, 10**12, 1e308, True, [None], [[1]], {"a": 1}, [1, 2], "0")
HARMLESS = {"_name_or_path", "architectures", "transformers_version"}
OTHER = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")


def vary(folder: Path, rng: random.Random) -> str:
    """Damages one file of a folder: a field's value, a field that is missing, bytes, or an end too early."""
    file = folder / rng.choice(
        ("config.json", "generation_config.json", "preprocessor_config.json") * 3 + OTHER
    )
    if file.suffix != ".json" or rng.random() < 0.1:
        content = bytearray(file.read_bytes())
        cut = rng.randrange(len(content))
        if rng.random() < 0.5:
            del content[cut:]
        else:
            content[cut] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        return f"{file.name}: bytes at {cut}"
    fields = json.loads(file.read_text())
    field = rng.choice(sorted(set(fields) - HARMLESS))
    if rng.random() < 0.15:
        del fields[field]
        file.write_text(json.dumps(fields))
        return f"{file.name}: no {field}"
    old = fields[field]
    if isinstance(old, (list, dict)) and old and rng.random() < 0.5:
        key = rng.choice(list(old) if isinstance(old, dict) else range(len(old)))
        old[key] = rng.choice(ODD)
    else:
        fields[field] = rng.choice(ODD)
    file.write_text(json.dumps(fields))
    return f"{file.name}: {field} = {fields[field]!r:.80}"
