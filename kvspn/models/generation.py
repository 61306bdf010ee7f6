"""`generate()`: Whisper's interface on kvspn's speculative loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from kvspn.decoding import DecodeResult, DecodeStats, decode
from kvspn.engines import Engine, default_backend, engine
from kvspn.models.weights import decoder_weights
from kvspn.weights.formats import quantise

TASKS = ("transcribe", "translate")


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    sequences: int64 [B, T], generated tokens with the end token, padded on the right; without the prompt.
    languages: the source language of each row, as given or detected.
    stats: figures of each row; `total` those of the batch.
    """

    sequences: Tensor | None = None
    languages: list[str] | None = None
    stats: list[DecodeStats] | None = None
    total: DecodeStats | None = None


class GenerationMixin:
    """Replaces Whisper's `generate`."""

    def engine(
        self,
        batch: int,
        cross_capacity: int,
        backend: str | None = None,
        weights: str | None = None,
        kv: str | None = None,
    ) -> Engine:
        """An engine with this model's present weights; may be handed to `generate` again and again.

        Args:
            batch: rows decoded together.
            cross_capacity: encoder positions that a row may hold.
            backend: a name from `kvspn.engines.backends`; None is the fastest that is here.
            weights: "bf16", "int8/int4", ... (see `kvspn.weights.formats.quantise`); None leaves them.
            kv: "int8" for int8 caches; None for those of the embeddings' dtype.
        """
        named = decoder_weights(self)
        return engine(
            backend or default_backend(self.device),
            named if weights is None else quantise(named, weights),
            batch=batch,
            capacity=self.config.max_target_positions,
            cross_capacity=cross_capacity,
            kv=kv,
        )

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Sequence[Tensor | Sequence[Tensor]] | None = None,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        target_language: str | Sequence[str] | None = None,
        prompt_ids: Tensor | Sequence[int] | None = None,
        k: int | float | str = 1,
        draft: bool | None = None,
        max_new_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool = False,
        engine: Engine | None = None,
        backend: str | None = None,
    ) -> Tensor | GenerateOutput:
        """Transcribes or translates speech, or translates text.

        Args:
            input_features: speech [B, mel bins, frames], or
            input_ids: source text [B, T] (from the processor), with its `attention_mask`, or
            encoder_outputs: what `encode` made of either, as `(states,)` with states [B, E, d] without
                padding, or the rows' own, [E, d] each; one clip's may stand for several rows.
            language: the source language ("de" or "<|de|>"), one for all rows or one a row; None detects it.
            task: "transcribe" or "translate"; by default "translate" where there is a target language.
            target_language: what to translate to, one for all rows or one a row; a row whose source it is, is
                transcribed.
            prompt_ids: [P], text that went before, from the processor's `get_prompt_ids`, as in Whisper.
            k: a draft is accepted if among the base model's k likeliest tokens; 1 gives exactly the greedy
                output, "inf" accepts all.
            draft: False for plain greedy decoding; by default True where the model has a draft network.
            max_new_tokens: at most; by default what the decoder's positions allow.
            streamer: a transformers streamer, such as TextStreamer, for a batch of one.
            generation_config: Whisper's ids of languages, tasks and suppressed tokens; by default the
                model's. Its sampling and beam settings have no meaning here.
            return_dict_in_generate: a GenerateOutput instead of its `sequences`.
            engine: one from `self.engine`, to use again; else made for this call on `backend`.
            backend: a name from `kvspn.engines.backends`; None is the fastest that is here.

        Returns: int64 [B, T] generated tokens without the prompt, padded on the right, or GenerateOutput.

        Raises ValueError or TypeError that name the argument.
        """
        ids = generation_config if hasattr(generation_config, "lang_to_id") else self.generation_config
        states = self._encode_rows(input_features, input_ids, attention_mask, encoder_outputs)
        batch = len(states)
        if streamer is not None and batch != 1:
            raise ValueError(f"streamer takes a batch of one, got {batch} rows")
        if task not in (None, *TASKS):
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if task == "translate" and target_language is None:
            target_language = "en"  # as in Whisper
        if task == "transcribe" and target_language is not None:
            raise ValueError(f"target_language must be None for task 'transcribe', got {target_language!r}")
        language_ids = _language_ids(ids)
        targets = _languages("target_language", target_language, batch, language_ids)
        languages = _languages("language", language, batch, language_ids)
        if engine is None:
            engine = self.engine(batch, max(map(len, states)), backend)
        mask = _mask(self.config.vocab_size, ids.suppress_tokens, self.device)
        languages = languages or self._detect(engine, states, language_ids)
        context = [] if prompt_ids is None else [int(token) for token in prompt_ids]
        if len(context) > self.config.max_target_positions // 2:
            limit = self.config.max_target_positions // 2
            raise ValueError(f"prompt_ids must hold at most {limit} tokens, got {len(context)}")
        prompts = [
            context + self._prompt(ids, language_ids, source, target)
            for source, target in zip(languages, targets or languages, strict=True)
        ]
        result = decode(
            engine,
            states,
            prompts,
            eos=self.config.eos_token_id,
            max_length=self._max_length(max(map(len, prompts)), max_new_tokens, generation_config),
            k=k,
            draft=self.kvspn is not None if draft is None else draft,
            mask=mask,
            begin_mask=_mask(self.config.vocab_size, ids.begin_suppress_tokens, self.device),
            streamer=None if streamer is None else lambda row, new: streamer.put(torch.tensor(new)),
        )
        if streamer is not None:
            streamer.end()
        return self._output(result, prompts, languages, return_dict_in_generate)

    def _encode_rows(
        self,
        input_features: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        encoder_outputs: Sequence[Tensor | Sequence[Tensor]] | None,
    ) -> list[Tensor]:
        """Encoder states [E, d] of each row, each computed on its own, so that no row depends on another."""
        if sum(given is not None for given in (input_features, input_ids, encoder_outputs)) != 1:
            raise ValueError(
                "give one of input_features (speech), input_ids (source text) and encoder_outputs"
            )
        if encoder_outputs is not None:
            return list(encoder_outputs[0])
        if input_features is not None:
            return [self.encode(row[None])[0] for row in input_features]
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return [
            self.encode(input_ids=row[None, each.bool()])[0]
            for row, each in zip(input_ids, kept, strict=True)
        ]

    def _detect(self, engine: Engine, states: list[Tensor], language_ids: dict[str, int]) -> list[str]:
        """The likeliest language token after the start token, as Whisper does it."""
        mask = torch.full((self.config.vocab_size,), -torch.inf, device=self.device)
        mask[list(language_ids.values())] = 0
        start = self.config.decoder_start_token_id
        found = decode(engine, states, [[start]] * len(states), eos=-1, max_length=2, draft=False, mask=mask)
        by_id = {token: code for code, token in language_ids.items()}
        return [by_id[tokens[-1]] for tokens in found.sequences]

    def _prompt(
        self, ids: GenerationConfig, language_ids: dict[str, int], source: str, target: str
    ) -> list[int]:
        """Whisper's prompt; to translate, the target language follows the task."""
        if target == source:
            task = [ids.task_to_id["transcribe"]]
        else:
            task = [ids.task_to_id["translate"], language_ids[target]]
        start = self.config.decoder_start_token_id
        return [start, language_ids[source], *task, ids.no_timestamps_token_id]

    def _max_length(self, prompt: int, max_new_tokens: int | None, given: GenerationConfig | None) -> int:
        limit = self.config.max_target_positions
        if max_new_tokens is None:
            wished = getattr(given, "max_new_tokens", None)
            return limit if wished is None else min(limit, prompt + wished)
        if not 1 <= max_new_tokens <= limit - prompt:
            raise ValueError(f"max_new_tokens must be 1 to {limit - prompt}, got {max_new_tokens}")
        return prompt + max_new_tokens

    def _output(
        self, result: DecodeResult, prompts: list[list[int]], languages: list[str], as_dict: bool
    ) -> Tensor | GenerateOutput:
        rows = [
            torch.tensor(tokens[len(prompt) :])
            for tokens, prompt in zip(result.sequences, prompts, strict=True)
        ]
        sequences = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.config.pad_token_id
        )
        sequences = sequences.to(self.device)
        if not as_dict:
            return sequences
        return GenerateOutput(sequences=sequences, languages=languages, stats=result.rows, total=result.total)


def _code(language: str) -> str:
    return language.removeprefix("<|").removesuffix("|>")


def _language_ids(ids: Any) -> dict[str, int]:
    found = getattr(ids, "lang_to_id", None)
    if not found:
        raise ValueError("generation_config has no lang_to_id: the model's languages are not known")
    return {_code(token): i for token, i in found.items()}


def _languages(
    name: str, given: str | Sequence[str] | None, batch: int, known: dict[str, int]
) -> list[str] | None:
    """One code a row, from one for all rows or one a row; None where none is given."""
    if given is None:
        return None
    rows = [given] * batch if isinstance(given, str) else given
    if len(rows) != batch:
        raise ValueError(f"{name} must be one for all or {batch}, one a row, got {len(rows)}")
    for language in rows:
        if _code(language) not in known:
            raise ValueError(f"{name} must be one of {', '.join(sorted(known))}, got {language!r}")
    return [_code(language) for language in rows]


def _mask(vocab_size: int, suppressed: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Additive float32 [V]: -inf at the suppressed tokens; None where there are none."""
    if not suppressed:
        return None
    mask = torch.zeros(vocab_size, device=device)
    mask[list(suppressed)] = -torch.inf
    return mask
