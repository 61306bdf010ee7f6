"""`kvspn convert`: a Whisper to an untrained whisperM2M."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvspn.cli.common import model_folder, silence_transformers


def _parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"must be whole numbers with commas, got {text!r}") from error


def convert(
    whisper: Annotated[
        Path,
        typer.Argument(
            metavar="WHISPER",
            callback=model_folder,
            help="A Whisper: a folder, a .pt file, a model hub's id, or a name of kvspn models.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write; must not exist yet.", show_default=False),
    ],
    decoder_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep N decoder layers, evenly spread.",
            show_default="12, or all where fewer",
        ),
    ] = None,
    layers: Annotated[
        Any,
        typer.Option(
            metavar="I,I,...",
            parser=_parse_layers,
            help="Keep these decoder layers, from 0.",
            show_default=False,
        ),
    ] = None,
    text_encoder_layers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Layers of the added text encoder; 0 for none.")
    ] = 6,
    kvspn_blocks: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Blocks of the draft network; 0 for none.",
            show_default="one for each group",
        ),
    ] = None,
    kvspn_groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Groups of decoder layers whose cache the blocks read.",
            show_default="3, or the most below that fit the layers kept",
        ),
    ] = None,
    kvspn_heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Heads of a block.", show_default="the decoder's"),
    ] = None,
    kvspn_ffn_dim: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="FFN width of a block.", show_default="the decoder's"),
    ] = None,
    no_kvspn_encoder_attention: Annotated[
        bool,
        typer.Option(
            "--no-kvspn-encoder-attention",
            help="Blocks read the decoder's cache alone, not the encoder's output.",
        ),
    ] = False,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Draft from N tokens only: the first ones and the end token.",
            show_default="the whole vocabulary",
        ),
    ] = None,
) -> None:
    """Make a whisperM2M of any Whisper: prune its decoder, add a text encoder and KVSPN.

    Encoder, tokenizer and preprocessor stay as they are. What is added starts at random: train it before use.
    Until it is taught other targets (`target_languages` of config.json), it translates to English alone.
    """
    from kvspn.atomic import atomic
    from kvspn.models import WhisperM2MFeatureExtractor, convert_whisper, spread_layers
    from kvspn.models.conversion import fitting_groups
    from kvspn.models.folder import open_whisper

    silence_transformers()
    if layers is not None and decoder_layers is not None:
        raise ValueError("give either --decoder-layers or --layers, not both")
    if out.exists():
        raise ValueError(f"{out}: exists already; name a new folder")
    source, processor = open_whisper(whisper)
    if not source.generation_config.is_multilingual:
        raise ValueError(
            f"{whisper}: names no languages: an English-only model, which cannot learn to translate"
        )
    config = source.config
    if layers is None:
        layers = spread_layers(config.decoder_layers, decoder_layers or min(12, config.decoder_layers))
    if draft_vocab is not None and draft_vocab > config.vocab_size:
        raise ValueError(
            f"--draft-vocab must be at most the vocabulary's {config.vocab_size}, got {draft_vocab}"
        )
    groups = kvspn_groups or fitting_groups(len(layers), kvspn_blocks)
    blocks = groups if kvspn_blocks is None else kvspn_blocks
    heads = config.decoder_attention_heads
    for option, found, divisor, what in (
        ("the decoder layers that are kept", len(layers), groups, "--kvspn-groups"),
        ("--kvspn-blocks", blocks, groups, "--kvspn-groups"),
        ("--kvspn-heads", kvspn_heads or heads, heads, "the decoder's"),
    ):
        if blocks and found % divisor:
            raise ValueError(f"{option} must be a multiple of {what} ({divisor}), got {found}")
    model = convert_whisper(
        source,
        layers,
        text_encoder_layers=text_encoder_layers,
        text_encoder_ffn_dim=config.encoder_ffn_dim,
        max_text_positions=config.max_target_positions,
        kvspn_blocks=blocks,
        kvspn_groups=groups,
        kvspn_heads=kvspn_heads,
        kvspn_ffn_dim=kvspn_ffn_dim or config.decoder_ffn_dim,
        kvspn_encoder_attention=not no_kvspn_encoder_attention,
        kvspn_draft_vocab_size=draft_vocab,
    )
    with atomic(out) as folder:
        model.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        features = processor.feature_extractor.to_dict()
        WhisperM2MFeatureExtractor.from_dict(features).save_pretrained(folder)
    typer.echo(f"Decoder layers kept: {', '.join(map(str, layers))} (of {config.decoder_layers})")
    typer.echo(f"Parameters: {source.num_parameters():,} before, {model.num_parameters():,} after")
    parts = {"text encoder": model.model.text_encoder, "KVSPN": model.kvspn}
    for name, part in parts.items():
        if part is not None:
            count = sum(weight.numel() for weight in part.parameters())
            typer.echo(f"Added, untrained: {name}, {count:,} parameters")
    if model.kvspn is not None:
        typer.echo(f"KVSPN: {blocks} blocks over {groups} groups of {len(layers) // groups} decoder layers")
    typer.echo(f"Written to {out}")
