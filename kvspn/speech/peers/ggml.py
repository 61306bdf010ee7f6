"""A Whisper as whisper.cpp reads it: one file of the ggml format, matrices in fp16.

Little-endian: the magic number; eleven int32 of sizes, the last 1 for fp16; the mel filters as int32 rows,
columns, fp32; the vocabulary as int32 count, each word with its int32 length; then each tensor: int32
dimensions, length of its name, 1 for fp16, the dimensions from the last to the first, name, data.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvspn.models.checkpoints.vocabulary import token_bytes

_MAGIC = 0x67676D6C

# Of a name in transformers' Whisper a part, and what OpenAI and whisper.cpp call it.
_NAMES = {
    "embed_tokens": "token_embedding",
    "embed_positions.weight": "positional_embedding",
    "layers.": "blocks.",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "self_attn.": "attn.",
    "encoder_attn.": "cross_attn.",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "decoder.layer_norm": "decoder.ln",
    "encoder.layer_norm": "encoder.ln_post",
}


def write(whisper: Any, processor: Any, file: Path) -> None:
    """Writes a Whisper of transformers' with its processor; positions, norms and biases stay in fp32."""
    config, extractor = whisper.config, processor.feature_extractor
    sizes = (
        *(config.vocab_size, config.max_source_positions, config.d_model, config.encoder_attention_heads),
        *(config.encoder_layers, config.max_target_positions, config.d_model),
        *(config.decoder_attention_heads, config.decoder_layers, config.num_mel_bins, 1),
    )
    filters = np.ascontiguousarray(np.asarray(extractor.mel_filters, np.float32).T)
    with file.open("wb") as out:
        out.write(struct.pack("<12i", _MAGIC, *sizes))
        out.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
        words = token_bytes(processor.tokenizer, config.eos_token_id)  # of text
        out.write(struct.pack("<i", len(words)))
        for word in words:
            out.write(struct.pack("<i", len(word)) + word)
        for name, tensor in whisper.model.state_dict().items():
            _write(out, name, tensor)


def _write(out: BinaryIO, name: str, tensor: Tensor) -> None:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    if "conv" in name and name.endswith("bias"):
        tensor = tensor[:, None]
    small = tensor.dim() < 2 or name.endswith(("bias", "positional_embedding"))
    stored = tensor.detach().cpu().to(torch.float32 if small else torch.float16)
    label = name.encode()
    out.write(struct.pack("<3i", stored.dim(), len(label), stored.dtype == torch.float16))
    out.write(struct.pack(f"<{stored.dim()}i", *reversed(stored.shape)) + label)
    out.write(stored.contiguous().numpy().tobytes())
