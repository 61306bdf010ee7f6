"""The file that whisper.cpp is given: read back by its own description of the format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from kvspn.models.folder import open_model
from kvspn.speech.peers import as_whisper
from kvspn.speech.peers.ggml import write
from support.tiny import save_whisper


def test_a_file_of_whisper_cpp_holds_the_model(tmp_path: Path) -> None:
    model, processor = open_model(save_whisper(tmp_path / "whisper", timestamps=True), torch.float32)
    whisper = as_whisper(model)
    write(whisper, processor, tmp_path / "ggml.bin")
    content = (tmp_path / "ggml.bin").read_bytes()
    at = 0

    def numbers(count: int) -> tuple[int, ...]:
        nonlocal at
        at += 4 * count
        return struct.unpack_from(f"<{count}i", content, at - 4 * count)

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return content[at - size : at]

    config = model.config
    assert numbers(1) == (0x67676D6C,)
    sizes = (config.vocab_size, config.max_source_positions, config.d_model, config.encoder_attention_heads)
    sizes += (config.encoder_layers, config.max_target_positions, config.d_model)
    assert numbers(11) == (*sizes, config.decoder_attention_heads, config.decoder_layers, 80, 1)
    mel, bins = numbers(2)
    filters = np.frombuffer(take(4 * mel * bins), np.float32).reshape(mel, bins)
    assert np.array_equal(filters, processor.feature_extractor.mel_filters.T.astype(np.float32))
    words = [take(numbers(1)[0]) for _ in range(numbers(1)[0])]
    assert len(words) == config.eos_token_id
    text = "Wo ist der Bahnhof? 车站在哪里？"
    tokens = processor.tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(words[token] for token in tokens).decode() == text
    found = {}
    while at < len(content):
        dimensions, length, half = numbers(3)
        shape = numbers(dimensions)[::-1]
        name = take(length).decode()
        assert half == (dimensions == 2 and "positional" not in name and "bias" not in name) | (
            dimensions == 3
        )
        dtype = np.dtype(np.float16 if half else np.float32)
        found[name] = np.frombuffer(take(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    decoder, encoder = whisper.model.decoder, whisper.model.encoder
    for name, weight in (
        ("encoder.conv1.bias", encoder.conv1.bias[:, None]),
        ("encoder.conv2.weight", encoder.conv2.weight.half()),
        ("encoder.positional_embedding", encoder.embed_positions.weight),
        ("encoder.ln_post.weight", encoder.layer_norm.weight),
        ("encoder.blocks.0.attn_ln.bias", encoder.layers[0].self_attn_layer_norm.bias),
        ("decoder.token_embedding.weight", decoder.embed_tokens.weight.half()),
        ("decoder.blocks.2.cross_attn.key.weight", decoder.layers[2].encoder_attn.k_proj.weight.half()),
        ("decoder.blocks.2.cross_attn_ln.weight", decoder.layers[2].encoder_attn_layer_norm.weight),
        ("decoder.blocks.0.attn.out.bias", decoder.layers[0].self_attn.out_proj.bias),
        ("decoder.blocks.3.mlp.2.weight", decoder.layers[3].fc2.weight.half()),
        ("decoder.blocks.3.mlp_ln.weight", decoder.layers[3].final_layer_norm.weight),
        ("decoder.ln.bias", decoder.layer_norm.bias),
    ):
        assert np.array_equal(found[name], weight.detach().numpy()), name
    assert len(found) == len(whisper.model.state_dict())
