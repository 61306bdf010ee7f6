"""Model folders that do not fit: one line for what is wrong, before anything of their size is built."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kvspn.assets import bundled_model
from kvspn.cli import app
from kvspn.models import (
    WhisperM2MConfig,
    WhisperM2MForConditionalGeneration,
    convert_whisper,
)
from kvspn.models.conversion import fitting_groups
from kvspn.models.folder import ModelError, open_model
from kvspn.speech.translator import Translator
from support import tiny
from support.damage import vary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), kvspn_draft_vocab_size=300)


@pytest.fixture(scope="module")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    root = tmp_path_factory.mktemp("whispers")

    def folder(decoder_layers: int) -> Path:
        path = root / str(decoder_layers)
        return path if path.exists() else tiny.save_whisper(path, decoder_layers)

    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(folder, torch.float32)
    said = str(caught.value)
    assert said.startswith(f"{folder}: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decoder_layers", 1_000_000, "must be 4, as in the weights, got 1000000"),
        ("encoder_layers", 1_000_000, "must be 1, as in the weights"),
        ("text_encoder_layers", 10**9, "must be 1, as in the weights"),
        ("kvspn_blocks", 10**9, "must be 2, as in the weights"),
        ("kvspn_blocks", 0, "must be 2, as in the weights"),
        ("vocab_size", 10**12, "must be 420, as in the weights"),
        ("max_source_positions", 10**12, "must be 100, as in the weights"),
        ("decoder_ffn_dim", 10**12, "must be 64, as in the weights"),
        ("kvspn_ffn_dim", 1, "must be 64, as in the weights"),
        ("kvspn_draft_vocab_size", None, "must be 300, as in the weights, got None"),
        ("encoder_attention_heads", 0, "must be a divisor of d_model (32), got 0"),
        ("decoder_attention_heads", 3, "must be a divisor of d_model (32), got 3"),
        ("eos_token_id", [1, 2], "must be a token id from 0 to 419, got [1, 2]"),
        ("eos_token_id", None, "must be a token id from 0 to 419, got None"),
        ("pad_token_id", 420, "must be a token id from 0 to 419, got 420"),
        ("decoder_start_token_id", -1, "must be a token id from 0 to 419, got -1"),
    ],
)
def test_a_configuration_that_is_not_the_weights(
    copy: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, message: str
) -> None:
    monkeypatch.setattr(WhisperM2MForConditionalGeneration, "__init__", lambda *_: pytest.fail("was built"))
    edit(copy / "config.json", **{field: value})
    refused(copy, f"config.json: {field} {message}")


TOKEN = "must be a token id from 0 to 419"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_multilingual", False, "names no languages: an English-only model"),
        ("lang_to_id", None, "names no languages"),
        ("lang_to_id", [5], "names no languages"),
        ("lang_to_id", {"<|en|>": 420}, f"lang_to_id['<|en|>'] {TOKEN}, got 420"),
        ("lang_to_id", {"<|en|>": "5"}, f"lang_to_id['<|en|>'] {TOKEN}, got '5'"),
        ("task_to_id", None, "task_to_id must be"),
        ("task_to_id", {"transcribe": 5}, f"task_to_id['translate'] {TOKEN}, got None"),
        ("no_timestamps_token_id", None, f"no_timestamps_token_id {TOKEN}, got None"),
        ("no_timestamps_token_id", True, f"no_timestamps_token_id {TOKEN}, got True"),
        ("suppress_tokens", [1, 60_000], f"suppress_tokens {TOKEN}, got 60000"),
        ("suppress_tokens", [-1], f"suppress_tokens {TOKEN}, got -1"),
        ("suppress_tokens", {"1": 2}, "suppress_tokens must be a list of token ids"),
        ("begin_suppress_tokens", [None], f"begin_suppress_tokens {TOKEN}, got None"),
        ("eos_token_id", [1, 420], f"eos_token_id {TOKEN}, got 420"),
        ("length_penalty", 0.6, "generation_config.json: length_penalty must be 1.0 or left out"),
        ("no_repeat_ngram_size", 3, "no_repeat_ngram_size must be 0 or left out, as generate() does not"),
    ],
)
def test_a_generation_configuration_that_cannot_be_used(
    copy: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    """`convert` refuses it of a Whisper as `translate` of a model, and writes nothing.

    What an old Whisper's does not say is known from the tokenizer.
    """
    edit(copy / "generation_config.json", **{field: value})
    refused(copy, message)
    if value is None:
        return
    shutil.copy(copy / "generation_config.json", tiny.save_whisper(tmp_path / "whisper"))
    result = kvspn_("convert", tmp_path / "whisper", tmp_path / "out")
    assert result.exit_code == 1
    assert message in one_line(result.stderr)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature_size", 0, "must be a whole number from 1, got 0"),
        ("feature_size", 10**9, "must be 80, as the model takes it"),
        ("sampling_rate", 8000, "must be 16000, as the model takes it, got 8000"),
        ("hop_length", 0, "must be a whole number from 1, got 0"),
        ("n_fft", 10**12, "must be at most the window's 32000 samples"),
        ("chunk_length", "2", "must be a whole number from 1, got '2'"),
    ],
)
def test_a_preprocessor_that_is_not_the_models(copy: Path, field: str, value: object, message: str) -> None:
    edit(copy / "preprocessor_config.json", **{field: value})
    refused(copy, f"preprocessor_config.json: {field} {message}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers(copy: Path, value: float) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.decoder.layers.2.fc1.weight"][3, 4] = value
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "the weights hold NaN or infinity, in model.decoder.layers.2.fc1.weight")


def test_a_draft_vocabulary_past_the_vocabulary(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["kvspn.draft_ids"][7] = 420
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "kvspn.draft_ids must be a token id from 0 to 419, got 420")


def test_weights_in_several_files(copy: Path) -> None:
    """They open like one, and a million layers are still refused by their headers alone."""
    whole, _ = open_model(copy, torch.float32)
    (copy / "model.safetensors").unlink()
    whole.save_pretrained(copy, max_shard_size="40KB")
    assert len(list(copy.glob("*.safetensors"))) > 3
    split, _ = open_model(copy, torch.float32)
    for name, weight in whole.state_dict().items():
        assert torch.equal(split.state_dict()[name], weight)
    edit(copy / "config.json", decoder_layers=1_000_000)
    refused(copy, "decoder_layers must be 4")
    next(copy.glob("*.safetensors")).unlink()
    refused(copy, "is missing, which model.safetensors.index.json names")


@pytest.mark.parametrize("part", range(10))
def test_no_variant_of_a_folder_ends_in_a_traceback(model: Path, tmp_path: Path, part: int) -> None:
    """200 damaged folders: each is refused in one line, or translates."""
    samples, failed = tiny.sound(1.0), []
    for seed in range(20 * part, 20 * part + 20):
        folder = tmp_path / str(seed)
        shutil.copytree(model, folder)
        what = vary(folder, random.Random(seed))
        try:
            translator = Translator.from_folder(folder, backend="reference")
            translator.translate(samples, *translator.languages[-2:])
        except ModelError as error:
            if not str(error).startswith(f"{folder}: ") or "\n" in str(error):
                failed.append(f"{seed}, {what}: {error}")
        except Exception as error:
            failed.append(f"{seed}, {what}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def kvspn_(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


# Published Whispers: distil 2, tiny and turbo 4, base 6, small 12, medium 24, large 32; and odd ones.
@pytest.mark.parametrize(
    ("layers", "kept", "groups"),
    [(1, 1, 1), (2, 2, 2), (4, 4, 2), (5, 5, 1), (6, 6, 3), (7, 7, 1), (12, 12, 3), (24, 12, 3), (32, 12, 3)],
)
def test_every_depth_converts(
    whispers: Callable[[int], Path], tmp_path: Path, layers: int, kept: int, groups: int
) -> None:
    result = kvspn_("convert", whispers(layers), tmp_path / "out", "--text-encoder-layers", 0)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{groups} blocks over {groups} groups of {kept // groups} decoder layers" in result.stdout
    converted, _ = open_model(tmp_path / "out", torch.float32)
    config = converted.config
    assert (config.decoder_layers, config.kvspn_groups, config.kvspn_blocks) == (kept, groups, groups)
    assert not config.kvspn_draft_trained
    features = torch.randn(1, 80, 200)
    greedy = converted.generate(features, language="en", draft=False)
    assert torch.equal(converted.generate(features, language="en", draft=True), greedy)


def test_groups_fit_the_blocks_too() -> None:
    assert [fitting_groups(6, blocks) for blocks in (None, 0, 1, 2, 3, 4, 5, 6)] == [3, 3, 1, 2, 3, 2, 1, 3]
    whisper = tiny.whisper(tiny.tokenizer(), 4)
    config = convert_whisper(whisper, range(4), kvspn_groups=4, kvspn_blocks=8, text_encoder_layers=0).config
    assert (config.kvspn_groups, config.kvspn_blocks) == (4, 8)


def test_convert_leaves_nothing_half_written(
    whispers: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whisper = whispers(4)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("transformers.WhisperFeatureExtractor.save_pretrained", fail)
    result = kvspn_("convert", whisper, tmp_path / "out", "--text-encoder-layers", 0)
    assert (result.exit_code, one_line(result.stderr)) == (1, "kvspn: the disk is full")
    assert not list(tmp_path.iterdir())


def test_quantize_onto_a_folder(model: Path, tmp_path: Path) -> None:
    result = kvspn_("quantize", tmp_path, "--model", model)
    assert result.exit_code == 1
    assert one_line(result.stderr) == f"kvspn: {tmp_path}: is a folder; name the file to write"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("untrained"), kvspn_draft_trained=False)


def test_an_untrained_draft_network_is_not_used(untrained: Path) -> None:
    """And one warning says so; asked for by name, it is."""
    converted, processor = open_model(untrained, torch.float32)
    inputs = processor(tiny.sound(1.0), sampling_rate=16_000)
    settings = {**inputs, "language": "en", "return_dict_in_generate": True}
    with pytest.warns(UserWarning, match="the draft network is untrained"):
        assert converted.generate(**settings).total.drafted == 0
    assert converted.generate(**settings, draft=True).total.drafted > 0
    assert converted.generate(**settings, draft=False).total.drafted == 0
    converted.config.kvspn_draft_trained = True
    assert converted.generate(**settings).total.drafted > 0


def test_the_command_line_says_that_the_draft_network_is_untrained(untrained: Path, tmp_path: Path) -> None:
    soundfile.write(clip := tmp_path / "clip.wav", tiny.sound(1.0), 16_000)
    with pytest.warns(UserWarning, match="the draft network is untrained"):
        result = kvspn_("translate", clip, "--to", "de", "--model", untrained, "--output", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["stats"]["drafted"] == 0


def test_one_file_without_an_untrained_draft_network(untrained: Path, tmp_path: Path) -> None:
    result = kvspn_("quantize", tmp_path / "one.safetensors", "--model", untrained)
    assert result.exit_code == 0, result.output
    assert "Without the draft network, which is untrained" in result.stdout
    with safe_open(tmp_path / "one.safetensors", "np") as file:
        assert file.metadata()["blocks"] == "0"
        assert not any("block" in name or "draft" in name for name in file.keys())  # noqa: SIM118


def test_the_miniature_knows_that_it_is_trained() -> None:
    assert WhisperM2MConfig.from_pretrained(bundled_model()).kvspn_draft_trained
    assert not WhisperM2MConfig().kvspn_draft_trained
