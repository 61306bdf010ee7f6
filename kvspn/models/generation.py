"""`generate()`: Whisper's interface on kvspn's speculative loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from kvspn.checks import finite, integer
from kvspn.decoding import DecodeStats, decode
from kvspn.engines import Engine, backends, default_backend, engine
from kvspn.models import prompts, segments, settings
from kvspn.models.languages import likely_languages
from kvspn.models.long_form import generate_long
from kvspn.models.packed import packed_engine
from kvspn.models.weights import decoder_weights, encoder_weights
from kvspn.ops import K_INF
from kvspn.weights.formats import quantise

if TYPE_CHECKING:
    from kvspn.engines.encoder import NativeEncoder


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    sequences: int64 [B, T], generated tokens with the end token, padded on the right; without the prompt.
    languages: the source language of each row, as given or detected.
    language_probabilities: of each row every language's, the likeliest first; None unless asked for.
    log_probs: of each row those of its tokens: the logarithms of their probabilities among what may be
        chosen, at temperature 1; None unless asked for.
    stats: figures of each row; `total` those of the batch.
    token_timestamps: fp32 [B, T], the seconds at which the tokens of `sequences` are said, and segments: of
        each row a list; None unless asked for (see `kvspn.models.segments`).
    """

    sequences: Tensor | None = None
    languages: list[str] | None = None
    language_probabilities: list[dict[str, float]] | None = None
    log_probs: list[list[float]] | None = None
    stats: list[DecodeStats] | None = None
    total: DecodeStats | None = None
    token_timestamps: Tensor | None = None
    segments: list[list[dict[str, Any]]] | None = None


class GenerationMixin:
    """Replaces Whisper's `generate`."""

    @property
    def drafts(self) -> bool:
        """Whether decoding drafts where it is not told: there is a draft network, and it has been trained."""
        return self.kvspn is not None and self.config.kvspn_draft_trained

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

    def speech_encoder(self, format: str) -> NativeEncoder:
        """This model's speech encoder with its present weights, as one call of the C++ library on the CPU.

        Args:
            format: "fp32", "bf16" or "int8" (see `kvspn.engines.encoder.NativeEncoder`).

        Raises:
            ValueError: encoder_format, where the model is on another device or the library is not built.
            TypeError: naming the module that is not plain (see `kvspn.models.weights.check_plain`).
        """
        missing = backends()["native"]
        if missing is not None:
            raise ValueError(f"encoder_format must be None here, got {format!r}: {missing}")
        if self.device.type != "cpu":
            raise ValueError(f"encoder_format must be None on {self.device}, got {format!r}: it is the CPU's")
        from kvspn.engines.encoder import NativeEncoder

        return NativeEncoder(
            encoder_weights(self),
            layers=self.config.encoder_layers,
            heads=self.config.encoder_attention_heads,
            format=format,
            output_positions=getattr(self.config, "encoder_output_positions", False),
        )

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Settles the generation configuration of `from_pretrained`."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        # Said outright, or transformers' pipeline fills in 5 beams of its own, which `generate` would refuse.
        self.generation_config.num_beams = self.generation_config.num_beams or 1

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
        prefix_ids: Tensor | Sequence[int] | None = None,
        return_timestamps: bool | None = None,
        return_token_timestamps: bool | None = None,
        return_segments: bool | None = None,
        language_probabilities: bool = False,
        log_probs: bool = False,
        k: int | float | str = 1,
        draft: bool | None = None,
        draft_tokens: Tensor | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        top_k: int | None = None,
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool | None = None,
        engine: Engine | None = None,
        backend: str | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> Tensor | GenerateOutput:
        """Transcribes or translates speech, or translates text. Several threads may share a model.

        Args:
            input_features: speech [B, mel bins, frames], with `return_timestamps` of any length (see
                `kvspn.models.long_form`), or
            input_ids: source text [B, T] (from the processor), with its `attention_mask`, or
            encoder_outputs: what `encode` made of either, as `(states,)` with states [B, E, d] without
                padding, or the rows' own, [E, d] each; one clip's may stand for several rows.
            attention_mask: [B, T] of `input_ids`, 1 keeps; for speech it changes no token, as in Whisper.
            language: the source language ("de", "<|de|>" or "German"), one for all rows or one a row; None
                takes it from the generation configuration, or else detects it. An English-only model takes
                none but English.
            task: "transcribe" or "translate"; by default "translate" where there is a target language.
            target_language: what to translate to, one for all rows or one a row; a row whose source it is, is
                transcribed. A Whisper translates to English alone.
            prompt_ids: [P], text that went before, from the processor's `get_prompt_ids`, as in Whisper.
            prefix_ids: [P], how the output begins, after the prompt; the sequences begin behind it. (See
                `kvspn.models.prompts.text_before` for both from text.)
            return_timestamps: whether the tokens tell the times of segments, by Whisper's grammar (see
                `kvspn.ops.rules.Timestamps`); every 20 ms has a token behind that of no timestamps. With a
                prefix the text begins at 0.00.
            return_token_timestamps: whether to tell when each token is said, by the attention of the passes
                that decode it, as transformers does. The `attention_mask` [B, frames] of speech, if it is
                given, says how much of a window is sound.
            return_segments: whether to tell the segments of the output. Either returns a GenerateOutput.
            language_probabilities: whether to say how likely each language was, where none is given: from the
                engine's pass that detects it.
            log_probs: whether to tell those of the tokens, without a second pass.
            k: a draft is accepted if among the base model's k likeliest tokens; 1 gives exactly the greedy
                output, "inf" accepts all.
            draft: False for plain greedy decoding; by default True where the model has a draft network that
                has been trained (a warning says that one has not). True uses an untrained one, too.
            draft_tokens: per row a guess of its output, such as the `sequences` [B, T] of an earlier call: up
                to 15 of its tokens are verified in a step, and where the two part it goes on where they meet
                again (see `kvspn.decoding.drafts`). With k = 1 the output stays the same.
            max_new_tokens: at most, each row after its own prompt; by default what the decoder's positions
                allow.
            do_sample: True draws each token from the softmax of logits / temperature, of the `top_k`
                likeliest that are not suppressed (there is no top_p). Drafts change nothing then either: with
                k = 1 the output is bit for bit that of `draft=False`.
            temperature: above 0, with `do_sample`; 1 by default.
            seed: 0 to 2^64 - 1, of the draws; 0 by default. The same seed gives the same output, on whatever
                backend but for rounding; rows of a batch differ.
            top_k: how many tokens a draw is among, and those as likely as the last of them, as in
                transformers; 0 for all. With `do_sample`; 50 by default, as there.
            streamer: a transformers streamer, such as TextStreamer, for a batch of one; it gets the prompt
                first, then each step's new tokens.
            generation_config: settings that count before those of the model's own generation configuration.
            return_dict_in_generate: a GenerateOutput instead of its `sequences`.
            engine: one from `self.engine`, to use again. By default the model keeps one with its present
                weights, active adapters merged (see `kvspn.models.packed`).
            backend: a name from `kvspn.engines.backends`; None is the fastest that is here.
            labels: not read; Seq2SeqTrainer hands them on.
            more: other fields of a generation configuration, such as `max_length` (the prompt included) or
                `eos_token_id` (one or several). What `kvspn.models.settings` does not name as honoured must
                be at its default, here and in both configurations.

        Returns: int64 [B, T] generated tokens without the prompt, padded on the right, or GenerateOutput.

        Raises ValueError or TypeError that name the argument.
        """
        said = settings.merge(
            self.generation_config,
            generation_config,
            {
                "language": language,
                "task": task,
                "max_new_tokens": max_new_tokens,
                "return_timestamps": return_timestamps,
                "do_sample": do_sample,
                "temperature": temperature,
                "seed": seed,
                "top_k": top_k,
                "return_dict_in_generate": return_dict_in_generate,
                **more,
            },
        )
        if draft is None and self.kvspn is not None and not self.drafts:
            warnings.warn(
                "the draft network is untrained (kvspn_draft_trained is false): decoding goes without it",
                stacklevel=3,  # past torch.no_grad
            )
        window = 2 * self.config.max_source_positions
        if isinstance(input_features, Tensor) and input_features.shape[-1] > window:
            for name, value in (
                *(("prompt_ids", prompt_ids), ("prefix_ids", prefix_ids), ("draft_tokens", draft_tokens)),
                *(("streamer", streamer), ("log_probs", log_probs or None)),
            ):
                if value is not None:
                    raise ValueError(f"{name} must be left out for speech of more than a window, got {name}")
            if not said.get("return_timestamps"):
                raise ValueError(
                    f"return_timestamps must be True for input_features of more than {window} frames, the "
                    f"model's window, got {input_features.shape[-1]}; a pipeline cuts it with chunk_length_s"
                )
            whole = generate_long(
                self,
                input_features,
                attention_mask,
                said,
                bool(return_token_timestamps),
                dict(
                    task=task,
                    target_language=target_language,
                    generation_config=generation_config,
                    k=k,
                    draft=draft,
                    max_new_tokens=max_new_tokens,
                    do_sample=do_sample,
                    temperature=temperature,
                    seed=seed,
                    top_k=top_k,
                    engine=engine,
                    backend=backend,
                    language_probabilities=language_probabilities,
                    **more,
                ),
            )
            sequences = self._padded(whole.pop("sequences"), said)
            if not (said.get("return_dict_in_generate") or return_segments or return_token_timestamps):
                return sequences
            return GenerateOutput(sequences=sequences, **whole)
        states = self._encode_rows(input_features, input_ids, attention_mask, encoder_outputs)
        batch = len(states)
        if streamer is not None and batch != 1:
            raise ValueError(f"streamer takes a batch of one, got {batch} rows")
        if target_language is not None and task is None:
            said.pop("task", None)  # the target, given here, counts before a configured task
        wanted = said.get("task")
        if wanted not in (None, *prompts.TASKS):
            raise ValueError(f"task must be one of {', '.join(prompts.TASKS)}, got {wanted!r}")
        if wanted == "translate" and target_language is None:
            target_language = "en"  # as in Whisper
        if wanted == "transcribe" and target_language is not None:
            raise ValueError(f"target_language must be None for task 'transcribe', got {target_language!r}")
        language_ids = prompts.language_ids(said)
        targets = prompts.languages("target_language", target_language, batch, language_ids)
        languages = prompts.languages("language", said.get("language"), batch, language_ids)
        start = said.get("decoder_start_token_id", self.config.decoder_start_token_id)
        context = self._text("prompt_ids", prompt_ids, self.config.max_target_positions // 2)
        prefix = self._text("prefix_ids", prefix_ids, self.config.max_target_positions // 2)
        rule = settings.sampling(said)
        eos = said.get("eos_token_id", self.config.eos_token_id)
        ends = settings.token_ids("eos_token_id", eos, self.config.vocab_size)
        timestamps = settings.timestamps(
            said, self.config.vocab_size, ends[0], len(prefix) and 1 + len(prefix)
        )
        if timestamps is not None:
            none = said["no_timestamps_token_id"]
            said["suppress_tokens"] = [*said.get("suppress_tokens", ()), none]
            prefix = [timestamps.begin, *prefix] if prefix else []
        mask, first_mask = (self._mask(name, said) for name in ("suppress_tokens", "begin_suppress_tokens"))
        if engine is None:
            engine = packed_engine(self, batch, max(map(len, states)), backend)
        taught = self.config.target_languages
        with engine.lock:  # through detection and decoding, which share the encoder's keys and values
            given: list[Tensor] | None = states
            likely = None
            if languages is None and not language_ids:
                languages = ["en"] * batch
            elif languages is None:
                likely = likely_languages(engine, states, start, language_ids)
                languages = [next(iter(row)) for row in likely]
                given = None  # the engine has them
            starts = [
                [
                    *(*context, start),
                    *prompts.after_start(
                        said, language_ids, source, target, wanted, taught, timestamps is not None
                    ),
                    *prefix,
                ]
                for source, target in zip(languages, targets or languages, strict=True)
            ]
            limits = self._limits(list(map(len, starts)), max_new_tokens, said)
            if streamer is not None:
                with engine.alone():
                    streamer.put(torch.tensor(starts))
            result = decode(
                engine,
                given,
                starts,
                eos=ends,
                max_length=limits,
                k=k,
                draft=self.drafts if draft is None else draft,
                draft_tokens=draft_tokens.tolist() if isinstance(draft_tokens, Tensor) else draft_tokens,
                mask=mask,
                begin_mask=first_mask,
                temperature=rule.temperature,
                seed=rule.seed,
                top_k=rule.top_k,
                timestamps=timestamps,
                log_probs=log_probs,
                cross_queries=bool(return_token_timestamps),
                streamer=None if streamer is None else lambda row, new: streamer.put(torch.tensor(new)),
            )
            times = None
            if return_token_timestamps:
                sound = [len(row) for row in states]
                if attention_mask is not None and input_features is not None:
                    sound = [max(1, int(frames) // 2) for frames in attention_mask.sum(-1)]
                heads = settings.alignment_heads(said, self.config)
                times = [
                    segments.token_times(
                        engine, row, result.sequences[row], len(starts[row]), heads, sound[row]
                    )
                    for row in range(batch)
                ]
            if streamer is not None:  # which may use the engine again
                streamer.end()
        rows = [
            torch.tensor(tokens[len(prompt) :])
            for tokens, prompt in zip(result.sequences, starts, strict=True)
        ]
        sequences = self._padded(rows, said)
        if not (said.get("return_dict_in_generate") or return_segments or return_token_timestamps):
            return sequences
        found = None
        if return_segments:
            found = [
                segments.segments(
                    *(result.sequences[row], len(starts[row]), ends, said["no_timestamps_token_id"] + 1),
                    len(states[row]) * segments.POSITION,
                    None if times is None else times[row],
                )
                for row in range(batch)
            ]
        return GenerateOutput(
            sequences=sequences,
            languages=languages,
            language_probabilities=likely if language_probabilities else None,
            log_probs=result.log_probs,
            stats=result.rows,
            total=result.total,
            token_timestamps=None if times is None else pad_sequence(times, batch_first=True).to(self.device),
            segments=found,
        )

    def _padded(self, rows: list[Tensor], said: Mapping[str, Any]) -> Tensor:
        """Token ids [T] of each row -> [B, T]."""
        pad = said.get("pad_token_id", self.config.pad_token_id)
        return pad_sequence(rows, batch_first=True, padding_value=pad).to(self.device)

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
            if not isinstance(input_features, Tensor):
                raise TypeError(f"input_features must be a tensor, got {type(input_features).__name__}")
            finite("input_features", input_features)
            return [self.encode(row[None])[0] for row in input_features]
        assert input_ids is not None
        settings.token_ids("input_ids", input_ids.flatten().tolist(), self.config.vocab_size)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return [
            self.encode(input_ids=row[None, each.bool()])[0]
            for row, each in zip(input_ids, kept, strict=True)
        ]

    def _text(self, name: str, given: Tensor | Sequence[int] | None, most: int) -> list[int]:
        """Token ids of a text as a list."""
        ids = [] if given is None else [int(token) for token in given]
        if len(ids) > most:
            raise ValueError(f"{name} must hold at most {most} tokens, got {len(ids)}")
        return settings.token_ids(name, ids, self.config.vocab_size)

    def _limits(self, prompts: list[int], max_new_tokens: int | None, said: Mapping[str, Any]) -> list[int]:
        """Tokens of each row at most, its prompt included, from the prompts' lengths."""
        positions = self.config.max_target_positions
        if max_new_tokens is not None:
            integer("max_new_tokens", max_new_tokens, 1, positions - max(prompts))
        if "max_new_tokens" in said:
            integer("max_new_tokens", said["max_new_tokens"], 1, K_INF)
            return [min(positions, prompt + said["max_new_tokens"]) for prompt in prompts]
        if "max_length" in said:
            integer("max_length", said["max_length"], max(prompts) + 1, K_INF)
        return [min(positions, said.get("max_length", positions))] * len(prompts)

    def _mask(self, name: str, said: Mapping[str, Any]) -> Tensor | None:
        """Additive float32 [V]: -inf at the tokens of a setting; None where there are none."""
        suppressed = settings.token_ids(name, said.get(name, ()), self.config.vocab_size)
        if not suppressed:
            return None
        mask = torch.zeros(self.config.vocab_size, device=self.device)
        mask[suppressed] = -torch.inf
        return mask
