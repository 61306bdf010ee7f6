"""whisper.cpp, by pywhispercpp, with a file of the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pywhispercpp.model import Model

from kvspn.speech.peers import Recogniser
from kvspn.speech.peers.ggml import write

FORMATS = ("fp16",)  # in fp32 it has no convolution


def prepare(whisper: Any, processor: Any, fmt: str, task: str) -> Recogniser:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ggml-model.bin"
        write(whisper, processor, file)
        model = Model(str(file), n_threads=torch.get_num_threads(), redirect_whispercpp_logs_to=None)

    def recognise(samples: np.ndarray, language: str) -> list[int]:
        # One temperature: what is decoded first, stands, as in plain greedy decoding. Tokens: the text's.
        segments = model.transcribe(
            samples,
            language=language,
            translate=task == "translate",
            no_context=True,
            single_segment=True,
            no_timestamps=True,
            suppress_nst=True,
            temperature=0.0,
            temperature_inc=0.0,
            print_progress=False,
        )
        text = "".join(segment.text for segment in segments)
        tokens: list[int] = processor.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    return recognise
