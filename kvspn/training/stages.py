"""The training stages. Each leaves its model in a folder, whole, and is skipped where that is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
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

from kvspn.atomic import atomic
from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.conversion import convert_whisper, spread_layers
from kvspn.models.modeling import Decoder, SpeechEncoder, WhisperM2MForConditionalGeneration
from kvspn.training.corpus import LANGUAGES
from kvspn.training.data import IGNORE, Collator, alphabet
from kvspn.training.losses import accuracy, cross_entropy, ctc, distillation
from kvspn.training.outputs import Outputs, greedy_outputs
from kvspn.training.prepare import Corpus
from kvspn.training.recipe import Recipe, Stage
from kvspn.training.states import StateStore
from kvspn.training.tokenizer import SPECIAL_TOKENS
from kvspn.training.trainer import Batch, Losses, fit
from kvspn.weights.formats import round_to_int8


def train_encoder(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """The speech encoder of a small Whisper, from nothing, by CTC.

    Into phonemes above its lower layers, and into the word pieces of six languages above all.
    """
    result = folder / "encoder"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    config = parent_config(recipe, corpus.tokenizer)
    config.encoder_output_positions = False  # sounds alone matter to CTC
    encoder = SpeechEncoder(config)
    collators = _collators(recipe, corpus, targets=0)
    width, blank = recipe.d_model, corpus.tokenizer.eos_token_id
    encoder.ctc_heads = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(width),
            "phonemes": nn.Linear(width, 1 + len(collators[0].alphabet)),
            "pieces": nn.Linear(width, len(corpus.tokenizer)),
        }
    )

    def losses(encoder: SpeechEncoder, batch: Batch) -> dict[str, Tensor]:
        heads, lengths = encoder.ctc_heads, batch["feature_lengths"] // 2
        sounds = encoder.below(batch["input_features"], recipe.phoneme_layers)
        words = encoder.above(sounds, recipe.phoneme_layers)
        return {
            "phonemes": ctc(heads["phonemes"](heads["norm"](sounds)), lengths, batch["phonemes"]),
            "pieces": ctc(heads["pieces"](words), lengths, batch["pieces"], blank),
        }

    _run(encoder, folder / "encoder-checkpoints", recipe, recipe.encoder, collators, losses)
    del encoder.ctc_heads
    with atomic(result) as part:
        encoder.save_pretrained(part)
    return result


def train_parent(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """A small Whisper: the encoder, frozen, and a decoder that learns to transcribe all languages."""
    result = folder / "parent"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    model = WhisperForConditionalGeneration(parent_config(recipe, corpus.tokenizer))
    model.generation_config = generation_config(corpus.tokenizer)
    model.model.encoder = SpeechEncoder.from_pretrained(folder / "encoder", config=model.config)
    model.model.decoder = Decoder(model.config)
    model.tie_weights()
    model.model.encoder.requires_grad_(False)
    encoded = _encode(folder / "states", recipe, corpus, model.model.encoder, recipe.phoneme_layers)

    def losses(model: WhisperForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        states, mask = _speech(model, batch, recipe.phoneme_layers)
        hidden = model.model.decoder(batch["decoder_input_ids"], states, mask)
        logits = model.proj_out(hidden)
        return {
            "transcription": cross_entropy(logits, batch["labels"], smoothing=0.05),
            "_accuracy": accuracy(logits, batch["labels"]),
        }

    collators = _collators(recipe, corpus, 0, encoded)
    _run(model, folder / "parent-checkpoints", recipe, recipe.parent, collators, losses)
    return _save(model, corpus, result)


def train_base(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """The parent, pruned and with a text encoder, on all directions: ST + MT + distillation.

    The layers of the speech encoder that hear sounds stay as they are, those above learn too.
    """
    result = folder / "base"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    parent = WhisperForConditionalGeneration.from_pretrained(folder / "parent")
    model = convert_whisper(
        parent,
        spread_layers(recipe.parent_decoder_layers, recipe.decoder_layers),
        text_encoder_layers=recipe.text_encoder_layers,
        text_encoder_ffn_dim=recipe.ffn_dim,
        max_text_positions=recipe.max_target_positions,
        training_domain="one phrasebook, spoken by one synthesiser",
        target_languages=None,
        kvspn_blocks=0,
    )
    encoder = model.model.encoder
    encoder.requires_grad_(False)
    encoder.layers[recipe.phoneme_layers :].requires_grad_(True)
    encoder.layer_norm.requires_grad_(True)
    encoded = _encode(folder / "states", recipe, corpus, encoder, recipe.phoneme_layers)
    collators = _collators(recipe, corpus, recipe.targets, encoded)
    losses = _translation_losses(recipe)
    _run(model, folder / "base-checkpoints", recipe, recipe.base, collators, losses)
    return _save(model, corpus, result)


def adapt_encoder(folder: Path, recipe: Recipe, corpus: Corpus) -> Path:
    """The same with the speech encoder in the loop, by LoRA.

    The decoder's matrices are rounded as int8 weights hold them, and stay so: the rest makes up for it.
    """
    result = folder / "adapted"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    model = WhisperM2MForConditionalGeneration.from_pretrained(folder / "base")
    model.model.encoder.requires_grad_(False)
    for matrix in round_to_int8(model.model.decoder):
        matrix.requires_grad_(False)
    lora = LoraModel(
        model.model.encoder,
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=2 * recipe.lora_rank,
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
        "default",
    )
    collators = _collators(recipe, corpus, recipe.targets)
    losses = _translation_losses(recipe)
    _run(model, folder / "adapted-checkpoints", recipe, recipe.adapt, collators, losses)
    lora.merge_and_unload()
    return _save(model, corpus, result)


def _translation_losses(recipe: Recipe) -> Losses:
    """Speech translation + text translation + distillation from the text to the speech distribution."""

    def losses(model: WhisperM2MForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        inputs, labels = batch["decoder_input_ids"], batch["labels"]

        def decode(states: Tensor, mask: Tensor | None) -> Tensor:
            return model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=inputs).logits

        mask = batch["attention_mask"]
        text = decode(model.encode(input_ids=batch["input_ids"], attention_mask=mask), mask)
        speech = decode(*_speech(model, batch, recipe.phoneme_layers))
        return {
            "speech": cross_entropy(speech, labels),
            "text": cross_entropy(text, labels),
            "distillation": recipe.distillation * distillation(speech, text, labels, trust=True),
            "_accuracy": accuracy(speech, labels),
            "_text_accuracy": accuracy(text, labels),
        }

    return losses


def _speech(
    model: WhisperForConditionalGeneration, batch: Batch, layers: int
) -> tuple[Tensor, Tensor | None]:
    """Encoder states [B, E, d] and their mask [B, E]: of those stored above `layers`, or of the features."""
    encoder = model.model.encoder
    if "speech_states" in batch:
        mask = batch["speech_mask"]
        return encoder.above(batch["speech_states"], layers, mask), mask
    return encoder(batch["input_features"]).last_hidden_state, None


def train_draft(
    folder: Path, recipe: Recipe, corpus: Corpus, name: str = "draft", **kvspn: bool | int
) -> Path:
    """KVSPN alone, on the frozen base model's distribution over what the base model itself says.

    `kvspn`: fields of the config, for ablations.
    """
    result = folder / name
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    base = WhisperM2MForConditionalGeneration.from_pretrained(folder / "adapted")
    settings = base.config.to_dict() | kvspn
    settings |= {
        "kvspn_blocks": recipe.kvspn_blocks,
        "kvspn_groups": recipe.kvspn_blocks,
        "kvspn_ffn_dim": recipe.ffn_dim,
    }
    model = WhisperM2MForConditionalGeneration(WhisperM2MConfig.from_dict(settings))
    model.load_state_dict(base.state_dict(), strict=False)
    model.generation_config = base.generation_config
    draft = model.kvspn
    assert draft is not None
    draft.start_from(model.model.decoder)
    model.requires_grad_(False)
    draft.requires_grad_(True)
    layers = recipe.encoder_layers
    encoder = model.model.encoder
    encoded = _encode(folder / "draft-states", recipe, corpus, encoder, layers, recipe.draft_clips)
    outputs = [
        greedy_outputs(folder / f"outputs-{part}.json", base.eval(), states, store.languages)
        for part, states, store in zip(_SETS, encoded, (corpus.store, corpus.held_out), strict=True)
    ]

    def losses(model: WhisperM2MForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
        model.model.eval()  # no dropout in the frozen base
        inputs = batch["decoder_input_ids"]
        with torch.no_grad():
            states, mask = _speech(model, batch, layers)
        base_logits, draft_logits = model.draft_logits(inputs, states, mask)
        if draft.draft_ids is not None:
            base_logits = base_logits[..., draft.draft_ids]
        kept = batch["labels"][:, 1:]  # row 0 is the prompt's first token, from which nothing is drafted
        base_logits, draft_logits = base_logits[:, 1:], draft_logits[:, 1:]
        agreed = base_logits.argmax(-1) == draft_logits.argmax(-1)
        return {
            "draft": distillation(draft_logits, base_logits, kept),
            "_agreement": agreed[kept != IGNORE].float().mean(),
        }

    collators = _collators(recipe, corpus, recipe.draft_targets, encoded, outputs)
    _run(model, folder / f"{name}-checkpoints", recipe, recipe.draft, collators, losses)
    model.config.kvspn_draft_trained = True
    return _save(model, corpus, result)


_SETS = ("train", "held-out")


def _encode(
    folder: Path,
    recipe: Recipe,
    corpus: Corpus,
    encoder: SpeechEncoder,
    layers: int,
    most: int | None = None,
) -> list[StateStore]:
    """What the encoder's first `layers` layers hear in the first training clips and in the held-out ones."""
    encoder.eval()
    return [
        StateStore.build(folder / name, store, encoder, layers, recipe.window, recipe.seed, count)
        for name, store, count in zip(_SETS, (corpus.store, corpus.held_out), (most, None), strict=True)
    ]


def _collators(
    recipe: Recipe,
    corpus: Corpus,
    targets: int,
    encoded: Sequence[StateStore | None] = (None, None),
    outputs: Sequence[Outputs | None] = (None, None),
) -> tuple[Collator, Collator]:
    """For training and for the held-out set."""
    classes = alphabet(corpus.store.phonemes)
    training, held_out = (
        Collator(
            store,
            sentences,
            corpus.tokenizer,
            classes,
            recipe.window,
            targets,
            random.Random(recipe.seed),
            states,
            said,
        )
        for store, sentences, states, said in (
            (corpus.store, corpus.split.train, encoded[0], outputs[0]),
            (corpus.held_out, corpus.split.unseen, encoded[1], outputs[1]),
        )
    )
    return training, held_out


def _run(
    model: PreTrainedModel,
    folder: Path,
    recipe: Recipe,
    stage: Stage,
    collators: tuple[Collator, Collator],
    losses: Losses,
) -> None:
    model.set_attn_implementation("eager")  # forward and backward, faster than fused on a CPU
    training, held_out = collators
    clips = held_out.dataset
    batches = [
        held_out([clips[i] for i in range(first, min(first + stage.batch, len(clips)))])
        for first in range(0, len(clips), stage.batch)
    ]
    fit(model, folder, training.dataset, training, losses, batches, **asdict(stage), seed=recipe.seed)


def _save(model: PreTrainedModel, corpus: Corpus, folder: Path) -> Path:
    with atomic(folder) as part:
        corpus.tokenizer.save_pretrained(part)
        corpus.extractor.save_pretrained(part)
        model.save_pretrained(part)
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
        init_std=recipe.init_std,
        encoder_output_positions=True,
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
