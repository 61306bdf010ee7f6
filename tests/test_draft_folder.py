"""A draft network in a folder of its own: what it fits, what it does not, and that it changes no text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from kvspn import WhisperModel
from kvspn.models.conversion import convert_whisper
from kvspn.models.draft_folder import join_draft, save_draft
from kvspn.models.folder import ModelError, open_model, open_whisper
from kvspn.speech.translator import Translator
from support.checkpoints import save_ctranslate2, save_openai, to_pickle
from support.commands import assert_one_line, kvspn_
from support.tiny import save_model, save_whisper, sound


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("draft") / "whisper", timestamps=True)


@pytest.fixture(scope="module")
def draft(whisper: Path) -> Path:
    """An untrained one, saved as if it were trained: with k = 1 no guess changes a text."""
    model, _ = open_whisper(whisper)
    torch.manual_seed(1)
    with_draft = convert_whisper(
        model, range(4), text_encoder_layers=0, kvspn_ffn_dim=64, kvspn_draft_vocab_size=400
    )
    save_draft(with_draft, whisper.parent / "draft", {"steps": 7})
    return whisper.parent / "draft"


def test_a_folder_holds_fp16_weights_and_says_what_they_are(draft: Path) -> None:
    said = json.loads((draft / "config.json").read_text())
    assert said["model_type"] == "kvspn"
    assert said["training"] == {"steps": 7}
    assert said["kvspn_draft_vocab_size"] == 400
    assert {len(each) for each in said["base"].values()} == {64}
    weights = load_file(draft / "model.safetensors")
    assert {each.dtype for name, each in weights.items() if name != "draft_ids"} == {torch.float16}


@pytest.mark.parametrize("k", [1, "inf"])
def test_decoding_with_it_equals_decoding_without(whisper: Path, draft: Path, k: int | str) -> None:
    plain, drafting = (Translator.from_folder(whisper, draft=each) for each in (None, draft))
    assert drafting.model.drafts and not plain.model.drafts
    samples = sound(3)
    for task in ("transcribe", "translate"):
        expected = plain.translate(samples, source="de", task=task)
        found = drafting.translate(samples, source="de", task=task, k=k)
        assert expected.total.drafted == 0 < found.total.drafted
        same = (found.tokens, found.segments) == (expected.tokens, expected.segments)
        assert same == (k == 1)  # accepting every guess shows that they are guesses


def test_whisper_model_takes_it(whisper: Path, draft: Path) -> None:
    expected, found = (
        list(WhisperModel(str(whisper), draft=each).transcribe(sound(3), language="en")[0])
        for each in (None, draft)
    )
    assert found == expected != []
    with pytest.raises(ModelError, match="nowhere"):
        WhisperModel(str(whisper), draft="nowhere")


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "CTranslate2, fp16": lambda whisper, to: save_ctranslate2(to, whisper, "float16"),
    "CTranslate2, int8": lambda whisper, to: save_ctranslate2(to, whisper, "int8_float32"),
    "OpenAI": lambda whisper, to: save_openai(to.with_suffix(".pt"), whisper).parent,
    "pytorch_model.bin": lambda whisper, to: to_pickle(shutil.copytree(whisper, to)) or to,
}


@pytest.mark.parametrize("form", FORMS)
def test_it_joins_any_format_of_its_base(whisper: Path, draft: Path, tmp_path: Path, form: str) -> None:
    folder = FORMS[form](whisper, tmp_path / "other")
    if form == "OpenAI":
        shutil.copy(whisper / "tokenizer.json", folder)
        shutil.copy(whisper / "preprocessor_config.json", folder)
    model, _ = open_model(folder, draft=draft)
    assert model.drafts


def test_it_is_saved_with_its_base(whisper: Path, draft: Path, tmp_path: Path) -> None:
    model, processor = open_model(whisper, draft=draft)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again, _ = open_model(tmp_path / "whole")
    assert again.drafts
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_another_base_is_refused(whisper: Path, draft: Path, tmp_path: Path) -> None:
    for folder in (save_whisper(tmp_path / "smaller", 2, timestamps=True), save_model(tmp_path / "m2m")):
        with pytest.raises(ModelError, match="base must be the fingerprint of this model"):
            open_model(folder, draft=draft)
    model, _ = open_whisper(whisper)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 5] += 0.1
    with pytest.raises(ModelError, match="got that of another one"):
        join_draft(model, draft)
    assert model.kvspn is None


def spoil(name: str) -> Callable[[Path], None]:
    def config(folder: Path, **fields: object) -> None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | fields))

    def weights(folder: Path, **tensors: torch.Tensor | None) -> None:
        state = load_file(folder / "model.safetensors") | tensors
        kept = {each: weight for each, weight in state.items() if weight is not None}
        save_file(kept, folder / "model.safetensors")

    return {
        "no configuration": lambda folder: (folder / "config.json").unlink(),
        "half a configuration": lambda folder: (folder / "config.json").write_text('{"model_type": "kv'),
        "another kind": lambda folder: config(folder, model_type="whisper"),
        "no base": lambda folder: config(folder, base=None),
        "no groups": lambda folder: config(folder, kvspn_groups=3),
        "a wide block": lambda folder: config(folder, kvspn_ffn_dim=96),
        "text for a number": lambda folder: config(folder, kvspn_ffn_dim="wide"),
        "no blocks": lambda folder: config(folder, kvspn_blocks=0),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "half the weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99),
        "a missing tensor": lambda folder: weights(folder, **{"layer_norm.bias": None}),
        "whole numbers": lambda folder: weights(folder, **{"layer_norm.bias": torch.ones(32).int()}),
        "NaN": lambda folder: weights(folder, **{"layer_norm.bias": torch.full((32,), torch.nan)}),
        "an unknown token": lambda folder: weights(folder, draft_ids=torch.arange(400) + 9999),
    }[name]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no configuration", "no draft network, as kvspn train draft writes it: config.json is missing"),
        ("half a configuration", "config.json: Unterminated string"),
        ("another kind", "model_type must be 'kvspn', got 'whisper'"),
        ("no base", "base must be the fingerprint of this model"),
        ("no groups", "decoder_layers must be a multiple of kvspn_groups"),
        ("a wide block", r"blocks.0.fc1.bias must be \[96\], as config.json says, got \[64\]"),
        ("text for a number", "kvspn_ffn_dim must be a number, true, false or null, got 'wide'"),
        ("no blocks", "kvspn_blocks must be at least 1, got 0"),
        ("no weights", "model.safetensors is missing"),
        ("half the weights", "cannot be read: SafetensorError"),
        ("a missing tensor", r"layer_norm.bias must be \[32\], as config.json says, got absent"),
        ("whole numbers", "layer_norm.bias must not be torch.int32"),
        ("NaN", "the weights hold NaN or infinity, in kvspn.layer_norm.bias"),
        ("an unknown token", "kvspn.draft_ids must be a token id from 0 to"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    whisper: Path, draft: Path, tmp_path: Path, fault: str, message: str
) -> None:
    folder = shutil.copytree(draft, tmp_path / "damaged")
    spoil(fault)(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(whisper, draft=folder)
    assert str(caught.value).startswith(f"{folder}: ")


def test_on_the_command_line(whisper: Path, draft: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, sound(2), 16_000)
    arguments = ("transcribe", clip, "--from", "en", "--model", whisper, "--output", "json")
    plain, drafting = (kvspn_(*arguments, *more) for more in ((), ("--draft", draft)))
    assert plain.exit_code == drafting.exit_code == 0, drafting.output
    (expected,), (found,) = json.loads(plain.stdout), json.loads(drafting.stdout)
    assert found["segments"] == expected["segments"] != []
    assert expected["stats"]["drafted"] == 0 < found["stats"]["drafted"]


def test_errors_on_the_command_line(whisper: Path, draft: Path, tmp_path: Path, clip: Path) -> None:
    missing = kvspn_("transcribe", clip, "--model", whisper, "--draft", tmp_path / "nowhere")
    assert_one_line(missing, "--draft must be a folder that kvspn train draft wrote", "nowhere")
    empty = kvspn_("translate", clip, "--model", whisper, "--draft", tmp_path)
    assert_one_line(empty, str(tmp_path), "config.json is missing")
    other = kvspn_("transcribe", clip, "--draft", draft)  # the miniature
    assert_one_line(other, "base must be the fingerprint of this model")
    assert_one_line(kvspn_("bench", "--draft", draft), "--draft must be given with --model")
