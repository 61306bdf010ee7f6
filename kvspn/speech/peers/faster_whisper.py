"""faster-whisper: CTranslate2's Whisper, converted from transformers' by its own converter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from faster_whisper import WhisperModel

from kvspn.speech.peers import Recogniser

FORMATS = ("fp32", "int8")


def prepare(whisper: Any, processor: Any, fmt: str, task: str) -> Recogniser:
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "ctranslate2", Path(folder) / "transformers"
        whisper.save_pretrained(ours)
        processor.tokenizer.save_pretrained(ours)
        processor.feature_extractor.save_pretrained(ours)
        files = ["tokenizer.json", "preprocessor_config.json"]
        TransformersConverter(str(ours), copy_files=files).convert(str(theirs))
        model = WhisperModel(
            str(theirs),
            device="cpu",
            compute_type={"fp32": "float32", "int8": "int8"}[fmt],
            cpu_threads=torch.get_num_threads(),
        )

    def recognise(samples: np.ndarray, language: str) -> list[int]:
        # One temperature and no thresholds: what is decoded first, stands, as in plain greedy decoding.
        segments, _ = model.transcribe(
            samples,
            language=language,
            task=task,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        return [token for segment in segments for token in segment.tokens]

    return recognise
