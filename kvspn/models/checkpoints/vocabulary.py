"""What a Whisper's tokenizer says of its prompt: special tokens, languages, tasks, what is no speech."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from kvspn.models.prompts import TASKS
from kvspn.models.validation import ModelError, reason

END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # one token's names, by the age of a tokenizer
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, the last tokens of a vocabulary; many a tokenizer leaves them out
ENGLISH_ONLY = 51_864
"""The vocabulary of OpenAI's English-only models: GPT-2's, a token shorter than the multilingual one."""

# Annotations of what is no speech ("[music]", "♪"), by OpenAI's list: suppressed by default.
_SYMBOLS = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』']
_SYMBOLS += ["<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("']
_SYMBOLS += ["((", "))", "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
_NOTES = [*"♩♪♫♬♭♮♯"]  # of several tokens each, of which the first alone is suppressed


def read_tokenizer(folder: Path, vocab_size: int, wanted: str) -> WhisperTokenizer:
    """The tokenizer of a folder, which must be that of a Whisper with so large a vocabulary.

    Args:
        wanted: what the error says to put where there is no tokenizer.

    Raises:
        ModelError: there is none, it cannot be read, or it does not fit the vocabulary.
    """
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"no tokenizer in {folder}: {wanted}")
    try:
        tokenizer = WhisperTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END),
        )
    except Exception as error:
        raise ModelError(f"the tokenizer cannot be read: {reason(error)}") from error
    check_vocabulary(tokenizer, vocab_size)
    # WhisperTokenizer counts times from the last token that it knows as special.
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    if special and tokenizer.all_special_tokens[-1] != special[-1]:
        tokenizer.add_special_tokens({"extra_special_tokens": special})
    return tokenizer


def check_vocabulary(tokenizer: WhisperTokenizer, vocab_size: int) -> None:
    """Raises ModelError for a tokenizer that is not a Whisper's, or that of another vocabulary."""
    tokens = tokenizer.get_vocab()
    for token in (END, START, NO_TIMESTAMPS):
        if token not in tokens:
            raise ModelError(f"the tokenizer must be a Whisper's, and has no {token}")
    size = max(tokens.values()) + 1
    fits = f"the tokenizer must fit the vocabulary of {vocab_size} tokens"
    if size > vocab_size:
        raise ModelError(f"{fits}, got one of {size}")
    last = tokens[NO_TIMESTAMPS] + TIMESTAMPS
    if size < vocab_size and last != vocab_size - 1:
        raise ModelError(f"{fits}, got one of {last + 1}, timestamps included")


def generation_settings(tokenizer: WhisperTokenizer, vocab_size: int) -> dict[str, Any]:
    """The generation configuration that OpenAI's code would use, built from the tokenizer alone."""
    tokens = tokenizer.get_vocab()
    languages = {f"<|{code}|>": tokens[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in tokens}
    multilingual = vocab_size != ENGLISH_ONLY and bool(languages)
    found = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": tokens[NO_TIMESTAMPS],
        "prev_sot_token_id": tokens.get("<|startofprev|>"),
        "decoder_start_token_id": tokens[START],
        "suppress_tokens": not_speech(tokenizer),
        "begin_suppress_tokens": [
            *tokenizer.encode(" ", add_special_tokens=False)[:1],
            tokens[END],
        ],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokens[END]),
    }
    if multilingual:
        tasks = {task: tokens[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in tokens}
        found |= {"lang_to_id": languages, "task_to_id": tasks}
    return found


def not_speech(tokenizer: WhisperTokenizer) -> list[int]:
    """The tokens that OpenAI's decoding suppresses by default: annotations, and `prompt_tokens`."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    # A hyphen or an apostrophe may stand between words, but not begin one.
    found = {*encode(" -")[:1], *encode(" '")[:1]}
    for symbol in (*_SYMBOLS, *_NOTES):
        for ids in (encode(symbol), encode(f" {symbol}")):
            if len(ids) == 1 or symbol in _NOTES:
                found.add(ids[0])
    return sorted(found.union(prompt_tokens(tokenizer)))


def prompt_tokens(tokenizer: WhisperTokenizer) -> list[int]:
    """The prompt's own tokens, of which none belongs in a text."""
    words = (
        START,
        *(f"<|{task}|>" for task in TASKS),
        *("<|startofprev|>", "<|startoflm|>", *NO_SPEECH),
    )
    tokens: Mapping[str, int] = tokenizer.get_vocab()
    return sorted(tokens[token] for token in words if token in tokens)


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of each of the first tokens of a byte-level tokenizer; none for special ones."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    special = tokenizer.added_tokens_decoder
    pieces = (None if i in special else tokenizer.convert_ids_to_tokens(i) for i in range(size))
    return [bytes(alphabet[char] for char in piece or "") for piece in pieces]
