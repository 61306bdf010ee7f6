"""What stands before a text: languages, tasks and Whisper's prompt, and text that went before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvspn.models.settings import code

TASKS = ("transcribe", "translate")


def language_ids(said: Mapping[str, Any]) -> dict[str, int]:
    """The token of each language by its code, of a generation configuration; none for an English-only model.

    Raises ValueError where it does not say what the prompt is made of.
    """
    multilingual = said.get("is_multilingual", True) is not False
    for name in (*(("lang_to_id", "task_to_id") if multilingual else ()), "no_timestamps_token_id"):
        if not said.get(name):
            raise ValueError(
                f"generation_config has no {name}: the model's languages and tasks are not known"
            )
    return {code(token): i for token, i in said["lang_to_id"].items()} if multilingual else {}


def languages(
    name: str, given: str | Sequence[str] | None, batch: int, known: Mapping[str, int]
) -> list[str] | None:
    """One code a row, from one for all rows or one a row; None where none is given.

    A model that knows no languages, an English-only one, takes English.
    """
    if given is None:
        return None
    rows = list(given) if isinstance(given, (list, tuple)) else [given] * batch
    if len(rows) != batch:
        raise ValueError(f"{name} must be one for all or {batch}, one a row, got {len(rows)}")
    for language in rows:
        if not isinstance(language, str) or code(language) not in (known or ("en",)):
            what = f"one of {', '.join(sorted(known))}" if known else "en, since the model is English-only"
            raise ValueError(f"{name} must be {what}, got {language!r}")
    return [code(language) for language in rows]


def check_target(target: str, source: str | None, taught: Sequence[str] | None) -> None:
    """Raises ValueError for a target language that the model was never taught to translate to.

    Args:
        source: the language spoken, to which any model transcribes; None where it is not known yet.
        taught: `target_languages` of the model's configuration.
    """
    if taught is None or target in (source, *(taught or ("en",))):
        return
    known = ", ".join(taught) if taught else "en, the one that a Whisper translates to,"
    spoken = "" if source is None else f" for speech in {source}"
    raise ValueError(
        f"target_language must be {known} or the language spoken, got {target!r}{spoken}: "
        "this model was never taught to translate to it"
    )


def after_start(
    said: Mapping[str, Any],
    known: Mapping[str, int],
    source: str,
    target: str,
    task: str | None,
    taught: Sequence[str] | None,
    timed: bool,
) -> list[int]:
    """The prompt after the start token: language, task, and unless it is `timed`, that no timestamps are
    wanted.

    To translate, the target language follows the task in the paper's prompt (arXiv 2508.11189, section 2). A
    Whisper (`taught` is empty) has its own, of the task alone; asked for it by name, it takes English speech,
    too.

    Raises ValueError for a target that the model was never taught.
    """
    end = [] if timed else [said["no_timestamps_token_id"]]
    if not known:
        return end
    check_target(target, source, taught)
    tasks = said["task_to_id"]
    if taught is not None and not taught:
        translated = target != source or task == "translate"
        return [known[source], tasks["translate" if translated else "transcribe"], *end]
    if target == source:
        return [known[source], tasks["transcribe"], *end]
    return [known[source], tasks["translate"], known[target], *end]


def text_before(
    tokenizer: Any,
    positions: int,
    prompt: str | Sequence[int] | None,
    hotwords: str | None,
    prefix: str | None,
) -> tuple[list[int], list[int]]:
    """What `generate` takes as `prompt_ids` and `prefix_ids`, as OpenAI's code and faster-whisper make them.

    Args:
        positions: of the decoder. The last `positions` / 2 - 1 tokens of the prompt are kept, the first as
            many of a prefix, and of hotwords, which leave the prompt less.
        prompt: text that went before, such as names in their spelling; or its tokens.
        hotwords: words to expect, before the prompt; without effect beside a prefix.
        prefix: how the text begins.
    """
    most = positions // 2 - 1

    def encode(text: str | None) -> list[int]:
        words = (text or "").strip()
        return tokenizer.encode(f" {words}", add_special_tokens=False) if words else []

    words = [] if prefix else encode(hotwords)[:most]
    before = encode(prompt) if prompt is None or isinstance(prompt, str) else prompt
    context = [*words, *before[-(most - len(words)) :]] if len(words) < most else words
    if context:
        context.insert(0, tokenizer.get_vocab()["<|startofprev|>"])
    return context, encode(prefix)[:most]
