"""A Whisper tokenizer trained on the phrasebook: byte-level BPE and Whisper's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in WHISPER_LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
"""In Whisper's order, which its tokenizer relies on; after the text tokens. There are no timestamps."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> WhisperTokenizer:
    """Byte-level BPE of `vocab_size` tokens, special ones included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: keeps Chinese, which has no spaces, from whole sentences as tokens
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    vocab |= {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return WhisperTokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
