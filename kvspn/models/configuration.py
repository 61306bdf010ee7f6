"""Configuration of whisperM2M and its draft network KVSPN (arXiv 2508.11189, section 2)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import WhisperConfig


@strict
class WhisperM2MConfig(WhisperConfig):
    """WhisperConfig, plus a text encoder and the draft network; the defaults are the paper's whisperM2M.

    Args:
        encoder_output_positions: whether the speech encoder adds its position embeddings to its output too:
            states trained to tell sounds alone no longer know where they are.
        text_encoder_layers: layers of the text encoder; 0 for none (speech input only).
        text_encoder_ffn_dim: FFN width of the text encoder.
        max_text_positions: longest source text in tokens.
        training_domain: the speech that the model was trained on, in a few words, where that is too narrow
            for other recordings: the command line says so at its first use on one.
        target_languages: codes of the languages that the model was taught to translate to with the paper's
            prompt, in which the target follows the task; None for all that it knows. An empty list is a
            Whisper: it transcribes, or translates to English with Whisper's own prompt.
        kvspn_blocks: blocks of the draft network; 0 for none (plain greedy decoding only).
        kvspn_groups: consecutive groups that the decoder's layers are split into; must divide
            `decoder_layers` and `kvspn_blocks`. Block i reads group i * groups // blocks.
        kvspn_heads: query heads of a block, a multiple of `decoder_attention_heads`, since it reads the base
            model's keys and values; None for as many. (The paper is silent.)
        kvspn_ffn_dim: FFN width of a block. (The paper is silent.)
        kvspn_encoder_attention: whether a block also attends to the encoder's output, through the
            cross-attention keys and values of its group's last layer. (The paper is silent.)
        kvspn_last_layer_only: a block reads only its group's last layer instead of the flattened group
            (an ablation).
        kvspn_encoder_stride: a block attends to every n-th of the encoder's positions, which its neighbours
            resemble, and reads as much less.
        kvspn_draft_vocab_size: tokens in the draft's short list; None to draft from the whole vocabulary.
        kvspn_draft_trained: whether the draft network has been trained. One that has not is left out of
            decoding: its guesses cost time and are hardly ever right.
    """

    model_type = "whisper_m2m"

    d_model: int = 1024
    encoder_layers: int = 24
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 4096
    encoder_output_positions: bool = False
    text_encoder_layers: int = 6
    text_encoder_ffn_dim: int = 4096
    max_text_positions: int = 448
    training_domain: str | None = None
    target_languages: list[str] | None = None
    kvspn_blocks: int = 3
    kvspn_groups: int = 3
    kvspn_heads: int | None = None
    kvspn_ffn_dim: int = 4096
    kvspn_encoder_attention: bool = True
    kvspn_last_layer_only: bool = False
    kvspn_encoder_stride: int = 1
    kvspn_draft_vocab_size: int | None = None
    kvspn_draft_trained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # By this name transformers' pipeline tells a Whisper, cuts long audio and joins the texts. The
        # class keeps its own, which is saved and which the Auto classes go by.
        self.model_type = "whisper"
        if self.activation_function != "gelu":
            raise ValueError(f"activation_function must be 'gelu', got {self.activation_function!r}")
        if not self.kvspn_blocks:
            return
        if self.kvspn_encoder_stride < 1:
            raise ValueError(f"kvspn_encoder_stride must be at least 1, got {self.kvspn_encoder_stride}")
        heads = self.decoder_attention_heads
        for name, value, divisor, what in (
            ("decoder_layers", self.decoder_layers, self.kvspn_groups, "kvspn_groups"),
            ("kvspn_blocks", self.kvspn_blocks, self.kvspn_groups, "kvspn_groups"),
            ("kvspn_heads", self.kvspn_heads or heads, heads, "decoder_attention_heads"),
        ):
            if value < 1 or divisor < 1 or value % divisor:
                raise ValueError(f"{name} must be a multiple of {what} ({divisor}), got {value}")
