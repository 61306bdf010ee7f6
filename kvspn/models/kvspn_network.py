"""KVSPN, the key-value parasitic speculative network (arXiv 2508.11189), for training.

Each block attends by cross-model attention to the base decoder's own self-attention cache, the keys and
values of a group of layers flattened into one sequence. Nothing of the base model is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from kvspn.models.configuration import WhisperM2MConfig

KeyValue = tuple[Tensor, Tensor]  # each [B, H, T, D]


class CrossModelAttention(nn.Module):
    """Queries of the draft over keys and values of the base model."""

    def __init__(self, config: WhisperM2MConfig):
        super().__init__()
        self.kv_heads = config.decoder_attention_heads
        self.heads = config.kvspn_heads or self.kv_heads
        self.head_dim = config.d_model // self.kv_heads
        self.q_proj = nn.Linear(config.d_model, self.heads * self.head_dim)
        self.out_proj = nn.Linear(self.heads * self.head_dim, config.d_model)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, d], keys and values [B, H, N, D], mask [.., T, N] (True keeps) -> [B, T, d]."""
        batch, length, _ = x.shape
        shared = self.heads // self.kv_heads
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        keys, values = (part.repeat_interleave(shared, 1) if shared > 1 else part for part in (keys, values))
        # Not fused: on a CPU, forward and backward are faster so.
        scores = q @ keys.mT * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1).to(values.dtype) @ values
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, -1))


class KVSPNBlock(nn.Module):
    """Cross-model attention, optionally attention to the encoder's output, FFN; pre-norm residuals."""

    def __init__(self, config: WhisperM2MConfig):
        super().__init__()
        d = config.d_model
        self.attn_layer_norm = nn.LayerNorm(d)
        self.attn = CrossModelAttention(config)
        if config.kvspn_encoder_attention:
            self.encoder_attn_layer_norm = nn.LayerNorm(d)
            self.encoder_attn = CrossModelAttention(config)
        self.final_layer_norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.kvspn_ffn_dim)
        self.fc2 = nn.Linear(config.kvspn_ffn_dim, d)

    def forward(
        self, x: Tensor, self_kv: KeyValue, causal: Tensor, cross_kv: KeyValue, mask: Tensor | None
    ) -> Tensor:
        x = x + self.attn(self.attn_layer_norm(x), *self_kv, causal)
        if hasattr(self, "encoder_attn"):
            queries = self.encoder_attn_layer_norm(x).reshape(len(cross_kv[0]), -1, x.shape[-1])
            x = x + self.encoder_attn(queries, *cross_kv, mask).view_as(x)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class KVSPN(nn.Module):
    """The draft network: blocks over the groups of the base decoder's layers, and a draft head.

    The head is the base model's output embedding, or the rows of it that `draft_ids` (int64) names: a short
    list, at first the vocabulary's first tokens (the most frequent of a BPE) and the end token.
    """

    draft_ids: Tensor

    def __init__(self, config: WhisperM2MConfig):
        super().__init__()
        self.groups = config.kvspn_groups
        self.last_layer_only = config.kvspn_last_layer_only
        self.encoder_stride = config.kvspn_encoder_stride
        self.blocks = nn.ModuleList(KVSPNBlock(config) for _ in range(config.kvspn_blocks))
        self.layer_norm = nn.LayerNorm(config.d_model)
        size = config.kvspn_draft_vocab_size
        ids = None if size is None else torch.arange(size)
        if ids is not None and config.eos_token_id >= len(ids):
            ids[-1] = config.eos_token_id
        self.register_buffer("draft_ids", ids)

    def head_weight(self, embedding: Tensor) -> Tensor:
        """The draft head [V or short list, d], from the base model's output embedding [V, d]."""
        return embedding if self.draft_ids is None else embedding[self.draft_ids]

    @torch.no_grad()
    def start_from(self, decoder: WhisperDecoder) -> None:
        """Starts each block as a copy of its group's last layer, wherever the shapes agree.

        Its queries then already fit the keys that they meet.
        """
        for i, block in enumerate(self.blocks):
            layer = decoder.layers[self.group(i, len(decoder.layers)).stop - 1]
            pairs = [(block.attn, layer.self_attn), (block.attn_layer_norm, layer.self_attn_layer_norm)]
            pairs += [
                (getattr(block, name), getattr(layer, name)) for name in ("fc1", "fc2", "final_layer_norm")
            ]
            if hasattr(block, "encoder_attn"):
                pairs.append((block.encoder_attn, layer.encoder_attn))
                pairs.append((block.encoder_attn_layer_norm, layer.encoder_attn_layer_norm))
            for mine, theirs in pairs:
                source = dict(theirs.named_parameters())
                for name, weight in mine.named_parameters():
                    if source[name].shape == weight.shape:
                        weight.copy_(source[name])
        self.layer_norm.load_state_dict(decoder.layer_norm.state_dict())

    def group(self, block: int, layers: int) -> slice:
        """The base decoder's layers whose cache a block reads."""
        size = layers // self.groups
        first = block * self.groups // len(self.blocks) * size
        return slice(first + size - 1 if self.last_layer_only else first, first + size)

    def forward(
        self, x: Tensor, self_kv: list[KeyValue], cross_kv: list[KeyValue], encoder_mask: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced: row t attends to the base model's positions before t.

        Args:
            x: embeddings of the tokens [B * n, T, d], positions added; the n targets of an input follow each
                other and share its cross-attention keys and values.
            self_kv: of each base layer, keys and values [B * n, H, T, D].
            cross_kv: likewise [B, H, E, D].
            encoder_mask: [B, E], 1 keeps.
        """
        length = x.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
        before[0, 0] = True  # row 0 has no key yet: decoding never drafts from it; this only keeps it finite
        stride = self.encoder_stride
        mask = None if encoder_mask is None else encoder_mask[:, None, None, ::stride].bool()
        for i, block in enumerate(self.blocks):
            layers = self.group(i, len(self_kv))
            keys, values = (torch.cat(part, dim=2) for part in zip(*self_kv[layers], strict=True))
            causal = before.repeat(1, keys.shape[2] // length)
            cross_keys, cross_values = (part[:, :, ::stride] for part in cross_kv[layers.stop - 1])
            x = block(x, (keys, values), causal, (cross_keys, cross_values), mask)
        return self.layer_norm(x)
