"""Tiny random models, and sounds, for tests of what runs on whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from kvspn.models import WhisperM2MFeatureExtractor, convert_whisper
from kvspn.speech.audio import SAMPLING_RATE
from kvspn.training.tokenizer import SPECIAL_TOKENS, train_tokenizer

LANGUAGES = ("en", "zh", "de", "es", "fr", "it")
WINDOW_SECONDS = 2
TEXTS = {
    "en": "Where is the station?",
    "zh": "车站在哪里?",
    "de": "Wo ist der Bahnhof?",
    "es": "¿Dónde está la estación?",
    "fr": "Où est la gare ?",
    "it": "Dov'è la stazione?",
}


def tokenizer() -> WhisperTokenizer:
    """Trained on TEXTS alone."""
    return train_tokenizer(TEXTS.values(), 420)


def random_whisper(
    vocab_size: int,
    languages: dict[str, int],
    *,
    start: int,
    eos: int,
    tasks: dict[str, int],
    no_timestamps: int,
    suppressed: list[int],
    decoder_layers: int,
    source_positions: int,
    target_positions: int,
) -> WhisperForConditionalGeneration:
    """A random Whisper, 32 wide; `languages` by token ("<|en|>"), ids as in its generation config."""
    shared = {"pad_token_id": eos, "bos_token_id": eos, "eos_token_id": eos, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=decoder_layers,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=source_positions,
        max_target_positions=target_positions,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.4,  # so that the output depends on the input
        **shared,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id=tasks,
        no_timestamps_token_id=no_timestamps,
        suppress_tokens=suppressed,
        begin_suppress_tokens=[eos],
        **shared,
    )
    return model


def whisper(
    tokenizer: WhisperTokenizer, decoder_layers: int = 4, target_positions: int = 16
) -> WhisperForConditionalGeneration:
    """A random Whisper for the tokenizer, with a window of 2 s."""
    torch.manual_seed(0)
    ids = tokenizer.convert_tokens_to_ids
    return random_whisper(
        len(tokenizer),
        {f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        start=ids("<|startoftranscript|>"),
        eos=tokenizer.eos_token_id,
        tasks={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps=ids("<|notimestamps|>"),
        suppressed=[ids(token) for token in SPECIAL_TOKENS[1:]],
        decoder_layers=decoder_layers,
        source_positions=50 * WINDOW_SECONDS,
        target_positions=target_positions,
    )


def save_whisper(folder: Path, decoder_layers: int = 4, timestamps: bool = False) -> Path:
    """A random Whisper's folder; `timestamps`: one every 20 ms in its vocabulary, and 64 positions."""
    words = tokenizer()
    if timestamps:
        words.add_tokens([f"<|{i / 50:.2f}|>" for i in range(50 * WINDOW_SECONDS + 1)])
    whisper(words, decoder_layers, 64 if timestamps else 16).save_pretrained(folder)
    words.save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=WINDOW_SECONDS).save_pretrained(folder)
    return folder


def save_model(folder: Path, **config: object) -> Path:
    """A random whisperM2M's folder; `config` are fields of its configuration."""
    words = tokenizer()
    settings: dict[str, object] = {
        "text_encoder_layers": 1,
        "text_encoder_ffn_dim": 64,
        "max_text_positions": 16,
        "kvspn_blocks": 2,
        "kvspn_groups": 2,
        "kvspn_ffn_dim": 64,
        "kvspn_draft_trained": True,
        "target_languages": None,
    }
    convert_whisper(whisper(words), range(4), **{**settings, **config}).save_pretrained(folder)
    words.save_pretrained(folder)
    WhisperM2MFeatureExtractor(chunk_length=WINDOW_SECONDS).save_pretrained(folder)
    return folder


def damaged(path: Path) -> Path:
    """An mp3 of noise in which an eighth of the bytes is not what it was."""
    soundfile.write(path, sound(3), SAMPLING_RATE)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    random = np.random.default_rng(0)
    content[random.integers(0, len(content), len(content) // 8)] = 7
    path.write_bytes(content.tobytes())
    return path


def sound(seconds: float, seed: int = 0, rate: int = SAMPLING_RATE) -> np.ndarray:
    """Noise in place of speech: float32 [N], about -10 dB of full scale."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
