"""Translator: chunks, streaming, languages on a tiny random model; every way its folder can be unusable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvspn import assets
from kvspn.decoding import DecodeStats
from kvspn.models.folder import ModelError
from kvspn.speech.translator import Translator, _TextStream
from support.tiny import TEXTS, save_model, sound, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    return Translator.from_folder(folder)


def chunk_texts(translator: Translator, tokens: list[int], chunks: list[DecodeStats]) -> list[str]:
    ends = np.cumsum([chunk.tokens for chunk in chunks])
    return [
        translator.decode(tokens[end - chunk.tokens : end]).strip()
        for end, chunk in zip(ends, chunks, strict=True)
    ]


@pytest.mark.parametrize(("target", "separator"), [("de", " "), ("zh", "")])
def test_long_audio_goes_by_chunks_and_streams(translator: Translator, target: str, separator: str) -> None:
    pieces: list[str] = []
    done: list[tuple[int, int]] = []
    result = translator.translate(
        sound(5), target, "en", on_text=pieces.append, on_chunk=lambda *counts: done.append(counts)
    )
    assert len(result.chunks) >= 3
    assert done == [(i + 1, len(result.chunks)) for i in range(len(result.chunks))]
    assert len(pieces) > len(result.chunks)
    assert "".join(pieces) == result.text
    assert result.text == separator.join(filter(None, chunk_texts(translator, result.tokens, result.chunks)))
    assert (result.source, result.target) == ("en", target)
    assert result.total.tokens == len(result.tokens) == sum(chunk.tokens for chunk in result.chunks)
    assert result.total.seconds > 0


def test_k_1_is_greedy_and_clips_do_not_touch_each_other(translator: Translator) -> None:
    first = translator.translate(sound(3, seed=1), "fr", "it")
    other = translator.translate(sound(3, seed=2), "fr", "it")
    greedy = translator.translate(sound(3, seed=1), "fr", "it", draft=False)
    assert first.tokens == greedy.tokens != other.tokens
    assert greedy.total.drafted == 0 < first.total.drafted
    everything = translator.translate(sound(3, seed=1), "fr", "it", k="inf")
    assert everything.total.acceptance == 1


def test_the_language_is_detected_in_each_chunk(translator: Translator) -> None:
    detected = translator.translate(sound(5), "de")
    assert set(detected.sources) <= set(translator.languages)
    assert len(detected.sources) == len(detected.chunks)
    assert translator.translate(sound(5), "de", detected.source).tokens == detected.tokens


def test_a_model_without_draft_network_decodes_greedily(tmp_path: Path) -> None:
    result = Translator.from_folder(save_model(tmp_path, kvspn_blocks=0)).translate(sound(1), "de")
    assert result.total.drafted == 0 < result.total.tokens


@pytest.mark.parametrize("text", ["龘龘", "a 龘 b", "Où est-ce ?", TEXTS["zh"], "", " "])
def test_streamed_characters_are_whole(text: str) -> None:
    words = tokenizer()
    pieces: list[str] = []
    stream = _TextStream(
        lambda ids: words.decode(ids, skip_special_tokens=True), pieces.append, lambda _: "+"
    )
    for token in words(f" {text} ", add_special_tokens=False).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == (f"+{text.strip()}" if text.strip() else "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "xx"}, "unknown language 'xx': this model knows de, en, es, fr, it, zh"),
        ({"source": "Germanic"}, "unknown language 'Germanic'"),
        ({"k": 0}, "k must be"),
        ({"samples": np.zeros(9999, np.float32)}, "only silence"),
        ({"samples": np.full(9999, np.nan, np.float32)}, "finite"),
    ],
)
def test_bad_arguments(translator: Translator, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translator.translate(**{"samples": sound(1), "target": "de", **arguments})


def damage(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / name)


def edit(**fields: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def drop_tensor(file: Path) -> None:
    weights = load_file(file)
    del weights["kvspn.blocks.0.fc1.weight"]
    save_file(weights, file, {"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        *(
            (damage(files[0], Path.unlink), f"the {part} is missing \\({files[0]}\\)")
            for part, files in assets.PARTS.items()
        ),
        (damage("config.json", lambda file: file.write_text("{")), "cannot be read"),
        (damage("config.json", edit(model_type="bert")), "model type 'bert', must be 'whisper_m2m'"),
        (damage("config.json", edit(kvspn_groups=3)), "multiple of kvspn_groups"),
        (
            damage("config.json", edit(d_model=64)),
            "config.json: d_model must be 32, as in the weights, got 64",
        ),
        (damage("model.safetensors", truncate), "cannot be read"),
        (damage("model.safetensors", drop_tensor), "lack 1 tensors, such as kvspn.blocks.0.fc1.weight"),
        (damage("tokenizer.json", truncate), "cannot be read"),
        (damage("generation_config.json", edit(lang_to_id=None)), "names no languages"),
        (damage("preprocessor_config.json", edit(chunk_length=30, n_samples=480000)), "3000 frames"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(save_model(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        Translator.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        Translator.from_folder(tmp_path / "nowhere")


def test_the_bundled_model_is_the_default_and_its_fp16_becomes_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    save_model(tmp_path / "mini", dtype="float16")
    weights = load_file(tmp_path / "mini" / "model.safetensors")
    save_file(
        {name: w.half() for name, w in weights.items()},
        tmp_path / "mini" / "model.safetensors",
        {"format": "pt"},
    )
    assert Translator.from_folder().model.dtype == torch.float32
