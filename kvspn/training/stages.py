"""The training stages: parent, base and draft. Each saves its model and is skipped where that is there."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.conversion import convert_whisper, spread_layers
from kvspn.models.modeling import SpeechEncoder, WhisperM2MForConditionalGeneration
from kvspn.training.corpus import LANGUAGES
from kvspn.training.data import IGNORE, ClipDataset, Collator, alphabet
from kvspn.training.losses import accuracy, cross_entropy, ctc, distillation
from kvspn.training.prepare import Corpus
from kvspn.training.recipe import Recipe, Stage
from kvspn.training.tokenizer import SPECIAL_TOKENS
from kvspn.training.trainer import Batch, Losses, fit


def train_parent(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """A small Whisper, from nothing, on transcription in all languages: cross-entropy + CTC."""
    result = folder / "parent"
    if (result / "config.json").exists():
        return result
    torch.manual_seed(recipe.seed)
    model = WhisperForConditionalGeneration(parent_config(recipe, corpus.tokenizer))
    model.generation_config = generation_config(corpus.tokenizer)
    model.model.encoder = SpeechEncoder(
        model.config
    )  # the same weights; takes short windows, which train faster
    collators = _collators(recipe, corpus, targets=0)
    model.ctc_head = nn.Linear(recipe.d_model, 1 + len(collators[0].alphabet))

    def losses(model: WhisperForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        out = model(input_features=batch["input_features"], decoder_input_ids=batch["decoder_input_ids"])
        characters = model.ctc_head(out.encoder_last_hidden_state)
        return {
            "transcription": cross_entropy(out.logits, batch["labels"], smoothing=0.05),
            "ctc": recipe.ctc * ctc(characters, batch["feature_lengths"] // 2, batch["characters"]),
            "_accuracy": accuracy(out.logits, batch["labels"]),
        }

    _run(model, folder / "parent-checkpoints", recipe, recipe.parent, collators, losses)
    del model.ctc_head
    return _save(model, corpus, result)


def train_base(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """The parent, pruned and with a text encoder, on all directions: ST + MT + distillation, LoRA encoder."""
    result = folder / "base"
    if (result / "config.json").exists():
        return result
    torch.manual_seed(recipe.seed)
    parent = WhisperForConditionalGeneration.from_pretrained(folder / "parent")
    model = convert_whisper(
        parent,
        spread_layers(recipe.parent_decoder_layers, recipe.decoder_layers),
        text_encoder_layers=recipe.text_encoder_layers,
        text_encoder_ffn_dim=recipe.ffn_dim,
        max_text_positions=recipe.max_target_positions,
        kvspn_blocks=0,
    )
    model.model.encoder.requires_grad_(False)
    lora = LoraModel(
        model.model.encoder,
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=2 * recipe.lora_rank,
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
        "default",
    )

    losses = _translation_losses(recipe)
    _run(model, folder / "base-checkpoints", recipe, recipe.base, _collators(recipe, corpus), losses)
    lora.merge_and_unload()
    return _save(model, corpus, result)


def train_decoder(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """The base model with its speech encoder frozen, which makes room for several targets of every clip."""
    result = folder / "decoder"
    if (result / "config.json").exists():
        return result
    torch.manual_seed(recipe.seed)
    model = WhisperM2MForConditionalGeneration.from_pretrained(folder / "base")
    model.model.encoder.requires_grad_(False)
    collators = _collators(recipe, corpus, recipe.targets)
    losses = _translation_losses(recipe)
    _run(model, folder / "decoder-checkpoints", recipe, recipe.decoder, collators, losses)
    return _save(model, corpus, result)


def _translation_losses(recipe: Recipe) -> Losses:
    """Speech translation + text translation + distillation from the text to the speech distribution."""

    def losses(model: WhisperM2MForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        inputs, labels = batch["decoder_input_ids"], batch["labels"]
        targets = len(labels) // len(batch["input_features"])

        def decode(states: Tensor, mask: Tensor | None = None) -> Tensor:
            states = states.repeat_interleave(targets, 0)
            mask = None if mask is None else mask.repeat_interleave(targets, 0)
            return model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=inputs).logits

        mask = batch["attention_mask"]
        text = decode(model.encode(input_ids=batch["input_ids"], attention_mask=mask), mask)
        speech = decode(model.encode(batch["input_features"]))
        return {
            "speech": cross_entropy(speech, labels),
            "text": cross_entropy(text, labels),
            "distillation": recipe.distillation * distillation(speech, text, labels, trust=True),
            "_accuracy": accuracy(speech, labels),
            "_text_accuracy": accuracy(text, labels),
        }

    return losses


def train_draft(folder: Path, recipe: Recipe, corpus: Corpus, name: str = "draft", **kvspn: bool) -> Path:
    """KVSPN alone, on the frozen base model's distribution. `kvspn`: fields of the config, for ablations."""
    result = folder / name
    if (result / "config.json").exists():
        return result
    torch.manual_seed(recipe.seed)
    base = WhisperM2MForConditionalGeneration.from_pretrained(folder / "decoder")
    settings = base.config.to_dict() | {"kvspn_blocks": 3, "kvspn_ffn_dim": recipe.ffn_dim} | kvspn
    model = WhisperM2MForConditionalGeneration(WhisperM2MConfig.from_dict(settings))
    model.load_state_dict(base.state_dict(), strict=False)
    model.generation_config = base.generation_config
    draft = model.kvspn
    assert draft is not None
    draft.start_from(model.model.decoder)
    model.requires_grad_(False)
    draft.requires_grad_(True)

    def losses(model: WhisperM2MForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        model.model.eval()  # no dropout in the frozen base
        with torch.no_grad():
            states = model.encode(batch["input_features"])
        base_logits, draft_logits = model.draft_logits(batch["decoder_input_ids"], states)
        if draft.draft_ids is not None:
            base_logits = base_logits[..., draft.draft_ids]
        kept = batch["labels"][:, 1:]  # row 0 is the prompt's first token, from which nothing is drafted
        base_logits, draft_logits = base_logits[:, 1:], draft_logits[:, 1:]
        agreed = base_logits.argmax(-1) == draft_logits.argmax(-1)
        return {
            "draft": distillation(draft_logits, base_logits, kept),
            "_agreement": agreed[kept != IGNORE].float().mean(),
        }

    _run(model, folder / f"{name}-checkpoints", recipe, recipe.draft, _collators(recipe, corpus), losses)
    return _save(model, corpus, result)


def _collators(recipe: Recipe, corpus: Corpus, targets: int = 1) -> tuple[Collator, Collator]:
    """For training and for the held-out set."""
    classes = alphabet(corpus.split.train)
    training, held_out = (
        Collator(
            store,
            sentences,
            corpus.tokenizer,
            classes,
            recipe.window,
            targets,
            random.Random(recipe.seed),
        )
        for store, sentences in (
            (corpus.store, corpus.split.train),
            (corpus.held_out, corpus.split.unseen),
        )
    )
    return training, held_out


def _run(
    model: nn.Module,
    folder: Path,
    recipe: Recipe,
    stage: Stage,
    collators: tuple[Collator, Collator],
    losses: Losses,
) -> None:
    training, held_out = collators
    clips = ClipDataset(held_out.store)
    batches = [
        held_out([clips[i] for i in range(first, min(first + stage.batch, len(clips)))])
        for first in range(0, len(clips), stage.batch)
    ]
    fit(
        model,
        folder,
        ClipDataset(training.store),
        training,
        losses,
        batches,
        **asdict(stage),
        seed=recipe.seed,
    )


def _save(model: PreTrainedModel, corpus: Corpus, folder: Path) -> Path:
    """config.json is written last by name, so a folder that has one is taken as complete."""
    corpus.tokenizer.save_pretrained(folder)
    corpus.extractor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def parent_config(recipe: Recipe, tokenizer: WhisperTokenizer) -> WhisperConfig:
    """A Whisper as wide as the miniature, with the deeper decoder that is pruned later."""
    eos = tokenizer.eos_token_id
    return WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=recipe.d_model,
        encoder_layers=recipe.encoder_layers,
        encoder_attention_heads=recipe.heads,
        encoder_ffn_dim=recipe.ffn_dim,
        decoder_layers=recipe.parent_decoder_layers,
        decoder_attention_heads=recipe.heads,
        decoder_ffn_dim=recipe.ffn_dim,
        max_source_positions=recipe.window // 2,
        max_target_positions=recipe.max_target_positions,
        dropout=recipe.dropout,
        pad_token_id=eos,
        bos_token_id=eos,
        eos_token_id=eos,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """Whisper's own fields: languages, tasks and suppressed tokens by id."""
    ids = tokenizer.convert_tokens_to_ids
    eos = tokenizer.eos_token_id
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        decoder_start_token_id=ids("<|startoftranscript|>"),
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        suppress_tokens=[ids(token) for token in SPECIAL_TOKENS[1:]],
        begin_suppress_tokens=[ids("Ġ"), eos],
    )
