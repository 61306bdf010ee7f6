"""Checkpoints that a resumed run may trust: each has a seal, written last, with a checksum of every file."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvspn.atomic import atomic, flush

SEAL = "seal.json"


class Sealing(TrainerCallback):
    """Seals every checkpoint that Trainer has written."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()  # each process writes a file of its own
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        flush(checkpoint)
        checksums = _checksums(checkpoint)
        with atomic(checkpoint / SEAL) as part:
            part.write_text(json.dumps(checksums))


def last_whole(folder: Path) -> Path | None:
    """The last of Trainer's checkpoints in `folder` whose files are as they were sealed; None for none.

    Later ones are damaged, or were being written when the run was interrupted: they are removed, each with a
    warning, since Trainer would count them among those that it keeps.
    """
    found = [each for each in folder.glob("checkpoint-*") if each.name.partition("-")[2].isdecimal()]
    for checkpoint in sorted(found, key=lambda each: int(each.name.partition("-")[2]), reverse=True):
        try:
            if json.loads((checkpoint / SEAL).read_text()) == _checksums(checkpoint):
                return checkpoint
        except (OSError, ValueError):  # no seal, or half of one
            pass
        logging.getLogger(__name__).warning("%s is damaged or unfinished: passed over", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _checksums(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(SEAL))
    return {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in files}
