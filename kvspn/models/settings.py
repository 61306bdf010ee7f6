"""What transformers can ask of `generate`: every setting is honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

from transformers import GenerationConfig, WhisperConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from kvspn.checks import boolean, integer
from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, Timestamps, check_rule

HONOURED = frozenset(
    {
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "do_sample",
        "eos_token_id",
        "is_multilingual",
        "lang_to_id",
        "language",
        "max_initial_timestamp_index",
        "max_length",
        "max_new_tokens",
        "no_timestamps_token_id",
        "pad_token_id",
        "return_dict_in_generate",
        "return_timestamps",
        "seed",
        "suppress_tokens",
        "task",
        "task_to_id",
        "temperature",
        "top_k",
    }
)

# They change no token: speed, names, Whisper's own bookkeeping.
WITHOUT_EFFECT = frozenset(
    {
        "alignment_heads",
        "bos_token_id",
        "disable_compile",
        "median_filter_width",
        "prev_sot_token_id",
        "transformers_version",
        "use_cache",
    }
)

_DEFAULTS = GenerationConfig._get_default_generation_params()
_NEUTRAL = {name: (value,) for name, value in _DEFAULTS.items()} | {"min_new_tokens": (0,)}
_TOP_K = 50  # what transformers draws among where nobody says


def merge(
    own: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of one call: an argument counts before `given`, that before the model's `own`.

    `forced_decoder_ids`, the old form of language and task, becomes these. What is at its default, None,
    False or empty, asks for nothing.

    Raises:
        TypeError, ValueError: naming the setting that `generate` does not honour.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(given).__name__}")
    layers = [
        _fields(own),
        {} if given is None else _fields(given),
        {name: value for name, value in arguments.items() if value is not None},
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        forced = layer.pop("forced_decoder_ids", None)
        for name, value in _forced(forced or (), {**merged, **layer}):
            said = layer.setdefault(name, value)
            if {code(each) for each in ([said] if isinstance(said, str) else said)} != {value}:
                raise ValueError(f"forced_decoder_ids must agree with {name} {said!r}, got {value!r}")
        if layer.keys() & {"max_length", "max_new_tokens"}:  # two words for one limit
            merged.pop("max_length", None)
            merged.pop("max_new_tokens", None)
        merged |= layer
    for name, value in merged.items():
        if name not in HONOURED | WITHOUT_EFFECT and not _asks_for_nothing(name, value):
            neutral = " or ".join(repr(each) for each in _NEUTRAL.get(name, ()) if each is not None)
            wanted = f"{neutral} or left out" if neutral else "left out"
            raise ValueError(f"{name} must be {wanted}, as generate() does not honour it, got {short(value)}")
    return merged


def sampling(said: Mapping[str, Any]) -> Rule:
    """What tokens are chosen by. As in Whisper, a temperature of 0 is greedy decoding, as is 1 by itself.

    Raises:
        TypeError, ValueError: naming do_sample, temperature, seed or top_k.
    """
    temperature, sampled = said.get("temperature", 1.0), said.get("do_sample", False)
    seed, top_k = said.get("seed", 0), said.get("top_k", _TOP_K)
    boolean("do_sample", sampled)
    integer("top_k", top_k, 0, K_INF)
    check_rule("", Rule(temperature, seed))
    if sampled and not temperature:
        raise ValueError("temperature must be above 0 with do_sample=True, got 0")
    if not sampled and temperature not in (0, 1):
        raise ValueError(f"temperature must be 0 or 1 without do_sample=True, got {temperature}")
    if not sampled and "seed" in said:
        raise ValueError(f"seed must be left out without do_sample=True, got {seed}")
    if not sampled and top_k not in (0, _TOP_K):
        raise ValueError(f"top_k must be left out without do_sample=True, got {top_k}")
    return Rule(float(temperature), seed, None, top_k) if sampled else Rule()


def timestamps(said: Mapping[str, Any], vocab_size: int, end: int, prefix: int) -> Timestamps | None:
    """The grammar of timestamps where `return_timestamps` asks for them: their tokens follow that of none.

    Args:
        end: the end-of-text token.
        prefix: tokens of the text that are given with the prompt.

    Raises:
        TypeError, ValueError: naming return_timestamps, also for a model that has no timestamps.
    """
    boolean("return_timestamps", said.get("return_timestamps", False))
    if not said.get("return_timestamps"):
        return None
    begin = said["no_timestamps_token_id"] + 1
    if not end < begin < vocab_size:
        raise ValueError("return_timestamps must be False: the model's vocabulary has no timestamps")
    return Timestamps(begin, end, said.get("max_initial_timestamp_index"), prefix)


def alignment_heads(said: Mapping[str, Any], config: WhisperConfig) -> list[tuple[int, int]]:
    """Layer and head of cross-attention that follow the speech; where the model names none, those of the
    upper half of its layers, as in OpenAI's Whisper."""
    upper = range(config.decoder_layers // 2, config.decoder_layers)
    every = [(layer, head) for layer in upper for head in range(config.decoder_attention_heads)]
    return [(layer, head) for layer, head in said.get("alignment_heads") or every]


def code(language: str) -> str:
    """The code of a language or task, however it is written: "de", "<|de|>" or "German" -> "de"."""
    word = language.removeprefix("<|").removesuffix("|>").lower()
    return TO_LANGUAGE_CODE.get(word, word)


def token_ids(name: str, value: int | Sequence[int], vocab_size: int) -> list[int]:
    """One token id or several, as a list.

    Raises:
        ValueError: naming the setting, for what is no token of the vocabulary.
    """
    ids = [value] if isinstance(value, int) else list(value)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold token ids 0 to {vocab_size - 1}, got {token!r}")
    return ids


def _fields(config: GenerationConfig) -> dict[str, Any]:
    """What is set in a configuration."""
    found = {
        name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")
    }
    filled = {name for name, value in _DEFAULTS.items() if value is not None} <= found.keys()
    if filled and found["max_length"] == _DEFAULTS["max_length"]:
        # transformers' pipeline and Seq2SeqTrainer write every default into the configuration; nobody asked
        # for the 20 tokens among them.
        del found["max_length"]
    return found


def _forced(ids: Sequence[Sequence[int | None]], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a position in Whisper's prompt and a token id -> ("language", "de"), ("task", "translate")."""
    words = [
        ("language", {token: word for word, token in (known.get("lang_to_id") or {}).items()}),
        ("task", {token: word for word, token in (known.get("task_to_id") or {}).items()}),
        ("no_timestamps_token_id", {known.get("no_timestamps_token_id"): ""}),
    ]
    if known.get("is_multilingual") is False:  # whose prompt has the last of them alone
        del words[:2]
    by_position = dict(enumerate(words, 1))
    found = []
    for position, token in ids:
        name, by_id = by_position.get(position or 0, ("", {}))
        if token is not None and token not in by_id:
            raise ValueError(
                "forced_decoder_ids must be Whisper's prompt, [1, a language], [2, a task] and "
                f"[3, no timestamps], got {short(list(ids))}"
            )
        if token is not None and name in ("language", "task"):
            found.append((name, code(by_id[token])))
    return found


def _asks_for_nothing(name: str, value: object) -> bool:
    if isinstance(value, (bool, int, float, str)):
        return value is False or value in _NEUTRAL.get(name, ())
    return isinstance(value, (list, tuple, dict, set)) and not value
