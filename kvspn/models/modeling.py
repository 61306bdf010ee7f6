"""whisperM2M: Whisper with a text encoder beside the speech encoder and a KVSPN draft network.

The classes here hold the weights and the differentiable, teacher-forced forward pass. Decoding runs on an
engine (`kvspn.engines`) that is handed the weights: see `generation.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig, WhisperForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import (
    WhisperDecoder,
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperModel,
    WhisperPreTrainedModel,
    shift_tokens_right,
    sinusoids,
)

from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.generation import GenerationMixin
from kvspn.models.kvspn_network import KVSPN


class SpeechEncoder(WhisperEncoder):
    """Whisper's encoder, which also takes windows shorter than the full one."""

    def __init__(self, config: WhisperConfig):
        super().__init__(config)
        with torch.no_grad():  # transformers gives them to its own class only, a subclass keeps random ones
            self.embed_positions.weight.copy_(sinusoids(*self.embed_positions.weight.shape))

    def forward(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutput:
        """input_features [B, mel bins, frames] -> last_hidden_state [B, frames / 2, d]."""
        layers = len(self.layers)
        return BaseModelOutput(last_hidden_state=self.above(self.below(input_features, layers), layers))

    def below(self, input_features: Tensor, layers: int) -> Tensor:
        """input_features [B, mel bins, frames] -> the first `layers` layers' output [B, frames / 2, d]."""
        limit = 2 * self.max_source_positions
        if input_features.dim() != 3 or input_features.shape[1] != self.num_mel_bins:
            shape = tuple(input_features.shape)
            raise ValueError(f"input_features must be [batch, {self.num_mel_bins}, frames], got {shape}")
        if not 0 < input_features.shape[-1] <= limit:
            raise ValueError(f"input_features must have 1 to {limit} frames, got {input_features.shape[-1]}")
        x = F.gelu(self.conv1(input_features))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers[:layers]:
            x = layer(x, None)
        return x

    def above(self, x: Tensor, layers: int, attention_mask: Tensor | None = None) -> Tensor:
        """The output of `below` [B, E, d] and its mask [B, E] (1 keeps) -> last_hidden_state [B, E, d]."""
        mask = _additive(attention_mask, x.dtype)
        for layer in self.layers[layers:]:
            x = layer(x, mask)
        x = self.layer_norm(x)
        if getattr(self.config, "encoder_output_positions", False):
            x = x + self.embed_positions.weight[: x.shape[1]]
        return x


class TextEncoder(nn.Module):
    """Whisper encoder layers over source text (six in the paper); shares the decoder's embedding."""

    def __init__(self, config: WhisperM2MConfig):
        super().__init__()
        layer_config = copy.copy(config)
        layer_config.encoder_ffn_dim = config.text_encoder_ffn_dim
        self.max_positions = config.max_text_positions
        self.embed_positions = nn.Embedding(config.max_text_positions, config.d_model)
        self.layers = nn.ModuleList(
            WhisperEncoderLayer(layer_config) for _ in range(config.text_encoder_layers)
        )
        for layer in self.layers:
            layer.self_attn.config = config  # whose attention implementation may be set later
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout

    def forward(self, embedded: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """Token embeddings [B, T, d], attention_mask [B, T] (1 keeps) -> last_hidden_state [B, T, d]."""
        length = embedded.shape[1]
        if not 0 < length <= self.max_positions:
            raise ValueError(f"input_ids must have 1 to {self.max_positions} tokens a row, got {length}")
        x = F.dropout(embedded + self.embed_positions.weight[:length], self.dropout, self.training)
        mask = _additive(attention_mask, x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class Decoder(WhisperDecoder):
    """Whisper's decoder, teacher-forced, with a mask for padded encoder positions (padded source text)."""

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """input_ids [B * n, T], encoder_hidden_states [B, E, d], mask [B, E] -> [B * n, T, d].

        The n targets of an input follow each other and share its cross-attention keys and values. An empty
        `past_key_values` is filled with the layers' keys and values, which KVSPN trains on.
        """
        inputs = len(encoder_hidden_states)
        if len(input_ids) % inputs:
            raise ValueError(
                f"decoder_input_ids must have a multiple of the {inputs} rows of the encoder's states, "
                f"got {len(input_ids)}"
            )
        x = (
            self.embed_tokens(input_ids) * self.embed_scale
            + self.embed_positions.weight[: input_ids.shape[1]]
        )
        x = F.dropout(x, self.dropout, self.training)
        causal = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=past_key_values
        )
        mask = _additive(encoder_attention_mask, x.dtype)
        for layer in self.layers:
            attended, _ = layer.self_attn(
                layer.self_attn_layer_norm(x), attention_mask=causal, past_key_values=past_key_values
            )
            x = x + F.dropout(attended, self.dropout, self.training)
            queries = layer.encoder_attn_layer_norm(x).reshape(inputs, -1, x.shape[-1])
            attended, _ = layer.encoder_attn(
                queries,
                key_value_states=encoder_hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
            )
            x = x + F.dropout(attended.view_as(x), self.dropout, self.training)
            x = x + F.dropout(
                layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x)))), self.dropout, self.training
            )
        return self.layer_norm(x)


class WhisperM2MModel(WhisperModel):
    """Speech encoder, text encoder and decoder."""

    config_class = WhisperM2MConfig

    def __init__(self, config: WhisperM2MConfig):
        WhisperPreTrainedModel.__init__(self, config)
        self.encoder = SpeechEncoder(config)
        self.text_encoder = TextEncoder(config) if config.text_encoder_layers else None
        self.decoder = Decoder(config)
        self.post_init()


class WhisperM2MForConditionalGeneration(GenerationMixin, WhisperForConditionalGeneration):
    """Speech or text in one of the languages to text in any of them, drafted by KVSPN.

    `generate` is documented in `kvspn.models.generation`; `forward` is the teacher-forced pass for training.
    """

    config_class = WhisperM2MConfig
    accepts_loss_kwargs = False  # Trainer divides the loss by the accumulated steps itself

    def __init__(self, config: WhisperM2MConfig):
        WhisperPreTrainedModel.__init__(self, config)
        self.model = WhisperM2MModel(config)
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.max_target_positions = config.max_target_positions
        self.kvspn = KVSPN(config) if config.kvspn_blocks else None
        self.post_init()

    def encode(
        self,
        input_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Speech [B, mel bins, frames] or source text [B, T] (and its mask) -> encoder states [B, E, d]."""
        if (input_features is None) == (input_ids is None):
            raise ValueError("give either input_features (speech) or input_ids (source text)")
        if input_features is not None:
            return self.model.encoder(input_features.to(self.dtype)).last_hidden_state
        if self.model.text_encoder is None:
            raise ValueError("input_ids: this model has no text encoder (text_encoder_layers is 0)")
        embedded = self.model.decoder.embed_tokens(input_ids) * self.model.decoder.embed_scale
        return self.model.text_encoder(embedded, attention_mask).last_hidden_state

    def forward(
        self,
        input_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Teacher-forced logits.

        Args:
            input_features: speech [B, mel bins, frames], or
            input_ids: source text [B, T], with `attention_mask` [B, T] where it is padded, or
            encoder_outputs: `(states,)` from `encode`, with their `attention_mask` if made of padded text.
            decoder_input_ids: [B, T'], or `labels` [B, T'] (-100 is ignored), from which they are shifted.
            past_key_values: an empty cache to be filled with the decoder's keys and values.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels")
            decoder_input_ids = shift_tokens_right(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        if encoder_outputs is None:
            states = self.encode(input_features, input_ids, attention_mask)
        else:
            states = encoder_outputs[0]
        mask = None if input_features is not None else attention_mask
        hidden = self.model.decoder(decoder_input_ids, states, mask, past_key_values)
        logits = self.proj_out(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=states
        )

    def draft_logits(
        self, decoder_input_ids: Tensor, encoder_states: Tensor, encoder_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Base and draft logits of a teacher-forced pass, the base model frozen (KVSPN's training).

        decoder_input_ids [B * n, T], encoder_states [B, E, d], encoder_mask [B, E] ->
        [B * n, T, V] (base, detached) and [B * n, T, V or the short list] (draft).
        """
        base, draft = self.draft_hidden(decoder_input_ids, encoder_states, encoder_mask)
        assert self.kvspn is not None
        with torch.no_grad():
            logits = self.proj_out(base)
        return logits, F.linear(draft, self.kvspn.head_weight(self.proj_out.weight))

    def draft_hidden(
        self, decoder_input_ids: Tensor, encoder_states: Tensor, encoder_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the heads of base and draft read, of a teacher-forced pass, the base model frozen.

        Row t of the draft sees token t and the keys and values of tokens before t, as in decoding.

        decoder_input_ids [B * n, T], encoder_states [B, E, d], encoder_mask [B, E] ->
        [B * n, T, d] (base, detached) and [B * n, T, d] (draft).
        """
        if self.kvspn is None:
            raise ValueError("this model has no draft network (kvspn_blocks is 0)")
        decoder = self.model.decoder
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            base = decoder(decoder_input_ids, encoder_states, encoder_mask, cache)
            x = decoder.embed_tokens(decoder_input_ids) * decoder.embed_scale
            x = x + decoder.embed_positions.weight[: decoder_input_ids.shape[1]]
        keys, values, cross_keys, cross_values = (
            [getattr(layer, name) for layer in part.layers]
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
            for name in ("keys", "values")
        )
        hidden = self.kvspn(
            x,
            list(zip(keys, values, strict=True)),
            list(zip(cross_keys, cross_values, strict=True)),
            encoder_mask,
        )
        return base, hidden


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, T] of ones and zeros -> [B, 1, 1, T] of zeros and the dtype's least value."""
    if mask is None:
        return None
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
