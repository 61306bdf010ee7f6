"""Whisper's tasks, prompts and language probabilities, by transformers' own on the same random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from kvspn.cli import app
from kvspn.models.languages import likely_languages
from kvspn.models.prompts import text_before
from kvspn.speech.translator import Translator
from support import tiny


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def theirs(whisper: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()


@pytest.fixture
def translator(whisper: Path) -> Translator:
    return Translator.from_folder(whisper)


def features(translator: Translator, *seeds: int) -> torch.Tensor:
    sounds = [tiny.sound(2, seed) for seed in seeds or (0,)]
    return translator.processor(sounds, sampling_rate=16_000).input_features


def prompts(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the engine is started with."""
    found: list[list[int]] = []
    start = type(translator.engine).start

    def noted(self: Any, states: Any, given: Any, **options: Any) -> None:
        found.extend(map(list, given))
        start(self, states, given, **options)

    monkeypatch.setattr(type(translator.engine), "start", noted)
    return found


def special(translator: Translator, *words: str) -> list[int]:
    return [translator.processor.tokenizer.get_vocab()[f"<|{word}|>"] for word in words]


def test_languages_and_their_probabilities_are_the_models(
    translator: Translator, theirs: WhisperForConditionalGeneration
) -> None:
    x = features(translator, 0, 1, 2)
    options = {"return_dict_in_generate": True, "language_probabilities": True}
    found = translator.model.generate(x, **options)
    ids = translator.model.generation_config.lang_to_id
    start = torch.full((3, 1), theirs.config.decoder_start_token_id)
    logits = theirs(input_features=x, decoder_input_ids=start).logits[:, -1]
    expected = logits[:, list(ids.values())].softmax(-1)
    for row, probabilities in enumerate(found.language_probabilities):
        listed = torch.tensor([probabilities[word.strip("<|>")] for word in ids])
        torch.testing.assert_close(listed, expected[row], rtol=1e-4, atol=1e-6)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert found.languages[row] == next(iter(probabilities))
    given = translator.model.generate(x, language="de", **options)
    assert given.language_probabilities is None


def test_probabilities_in_every_format(
    translator: Translator, theirs: WhisperForConditionalGeneration
) -> None:
    ids = translator.windows.languages
    states = translator.model.encode(features(translator))[0]
    start = translator.model.config.decoder_start_token_id
    exact = theirs(encoder_outputs=(states[None],), decoder_input_ids=torch.tensor([[start]])).logits[0, 0]
    exact = exact[list(ids.values())].softmax(0)
    for weights, error in (("fp32", 1e-5), ("bf16", 0.1), ("fp16", 0.02), ("int8", 0.1)):
        e = translator.model.engine(1, len(states), weights=weights)
        (likely,) = likely_languages(e, [states], start, ids)
        found = torch.tensor([likely[code] for code in ids])
        assert 0 < (found - exact).abs().max() < error


def test_the_prompts_of_a_whisper(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's token is in none; asked to translate, it takes English, too."""
    noted = prompts(translator, monkeypatch)
    for options, words in (
        ({"target": "german", "source": "de"}, ("de", "transcribe")),
        ({"target": "en", "source": "German"}, ("de", "translate")),
        ({"task": "translate", "source": "de"}, ("de", "translate")),
        ({"task": "translate", "source": "en"}, ("en", "translate")),
        ({"target": "en", "source": "en"}, ("en", "transcribe")),
        ({"task": "transcribe", "source": "fr"}, ("fr", "transcribe")),
        ({"source": "fr"}, ("fr", "transcribe")),
    ):
        noted.clear()
        translator.translate(tiny.sound(1), **options)
        assert noted == [special(translator, "startoftranscript", *words, "notimestamps")]


def test_the_prompts_of_a_whisper_m2m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's: the target follows the task. What it was not taught is refused."""
    translator = Translator.from_folder(tiny.save_model(tmp_path / "all"))
    noted = prompts(translator, monkeypatch)
    translator.translate(tiny.sound(1), "zh", "de")
    translator.translate(tiny.sound(1), source="de", task="translate")
    translator.translate(tiny.sound(1), "de", "de")
    starts = [
        special(translator, "startoftranscript", "de", *words, "notimestamps")
        for words in (("translate", "zh"), ("translate", "en"), ("transcribe",))
    ]
    assert noted == starts
    some = Translator.from_folder(tiny.save_model(tmp_path / "some", target_languages=["zh", "fr"]))
    assert some.translate(tiny.sound(1), "fr", "de").target == "fr"
    assert some.translate(tiny.sound(1), "it", "it").target == "it"
    with pytest.raises(ValueError, match="must be zh, fr or the language spoken, got 'en' for speech in de"):
        some.translate(tiny.sound(1), "en", "de")


def test_a_target_that_was_never_taught(translator: Translator) -> None:
    message = (
        "target_language must be en, the one that a Whisper translates to, or the language spoken, got 'zh'"
    )
    with pytest.raises(ValueError, match=message):
        translator.translate(tiny.sound(1), "zh", "de")
    x = features(translator)
    spoken = translator.model.generate(x, return_dict_in_generate=True).languages[0]
    other = next(code for code in translator.languages if code not in (spoken, "en"))
    with pytest.raises(ValueError, match=f"got '{other}' for speech in {spoken}"):
        translator.model.generate(x, target_language=other)


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_a_prompt_gives_what_transformers_gives(
    translator: Translator, theirs: WhisperForConditionalGeneration, task: str
) -> None:
    x = features(translator)
    prompt = torch.tensor([*special(translator, "startofprev"), 7, 8, 9])
    theirs.generation_config.prev_sot_token_id = int(prompt[0])
    options = {"language": "fr", "task": task, "prompt_ids": prompt, "max_new_tokens": 6}
    expected = theirs.generate(x, num_beams=1, **options)[0].tolist()
    ours = translator.model.generate(x, **options)[0].tolist()
    assert ours == expected
    assert ours != translator.model.generate(x, language="fr", task=task, max_new_tokens=6)[0].tolist()


def test_what_stands_before_a_text() -> None:
    """As OpenAI's decoding and faster-whisper 1.2 have it, for 16 positions: seven tokens at most."""
    words = tiny.tokenizer()
    before = words.get_vocab()["<|startofprev|>"]

    def encode(text: str) -> list[int]:
        return words.encode(f" {text}", add_special_tokens=False)

    long = "Wo ist der Bahnhof? Où est la gare? Dov'è la stazione?"
    assert len(encode(long)) > 7
    assert text_before(words, 16, None, None, None) == ([], [])
    assert text_before(words, 16, "  ", "", None) == ([], [])
    assert text_before(words, 16, long, None, None) == ([before, *encode(long)[-7:]], [])
    assert text_before(words, 16, None, long, None) == ([before, *encode(long)[:7]], [])
    assert text_before(words, 16, None, None, long) == ([], encode(long)[:7])
    assert text_before(words, 16, None, "gare", long) == ([], encode(long)[:7])
    gare = encode("gare")
    assert text_before(words, 16, long, "gare", None) == ([before, *gare, *encode(long)[len(gare) - 7 :]], [])
    assert text_before(words, 16, "Wo", long, None) == ([before, *encode(long)[:7]], [])


def test_a_prefix_is_what_the_text_goes_on_from(translator: Translator) -> None:
    """The sequences of a run, given back as its prefix, go on where they end."""
    x = features(translator)
    whole = translator.model.generate(x, language="de", max_new_tokens=6)[0].tolist()
    translator.model.generation_config.begin_suppress_tokens = []
    rest = translator.model.generate(x, language="de", prefix_ids=whole[:3], max_new_tokens=3)[0].tolist()
    assert rest == whole[3:]
    with pytest.raises(ValueError, match="prefix_ids must hold at most 8 tokens, got 9"):
        translator.model.generate(x, language="de", prefix_ids=[5] * 9)
    with pytest.raises(ValueError, match="prefix_ids must hold token ids 0 to 419, got 420"):
        translator.model.generate(x, language="de", prefix_ids=[420])


def test_prompts_of_several_chunks(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt stands before every chunk, the prefix in the first alone."""
    noted = prompts(translator, monkeypatch)
    result = translator.translate(tiny.sound(5), source="de", prompt="Wo", prefix="gare")
    context, prefix = text_before(translator.processor.tokenizer, 16, "Wo", None, "gare")
    start = [*context, *special(translator, "startoftranscript", "de", "transcribe", "notimestamps")]
    assert noted == [[*start, *prefix], *[start] * (len(result.chunks) - 1)]
    assert len(result.chunks) >= 3


def test_suppressed_tokens_are_never_chosen(translator: Translator) -> None:
    x, model = features(translator), translator.model
    first = int(model.generate(x, language="de", max_new_tokens=1)[0, 0])
    again = model.generate(x, language="de", max_new_tokens=4, suppress_tokens=[first])[0].tolist()
    assert first not in again
    begun = model.generate(x, language="de", max_new_tokens=4, begin_suppress_tokens=[first])[0].tolist()
    assert begun[0] != first
    assert begun[0] == again[0]


def kvspn_(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_tasks_on_the_command_line(whisper: Path, tmp_path: Path) -> None:
    soundfile.write(clip := tmp_path / "clip.wav", tiny.sound(1), 16_000)

    def run(command: str, *options: str) -> tuple[int, str, str]:
        result = kvspn_(command, clip, "--model", whisper, *options)
        return result.exit_code, result.stdout, result.stderr

    code, text, _ = run("translate", "--from", "german", "--output", "json")
    document = json.loads(text)[0]
    assert (code, document["source"], document["target"]) == (0, "de", "en")
    assert document["language_probabilities"] == []
    assert run("translate", "--to", "en", "--from", "de")[1] == f"{document['text']}\n"
    _, text, _ = run("transcribe", "--output", "json")
    document = json.loads(text)[0]
    (likely,) = document["language_probabilities"]
    assert next(iter(likely)) == document["source"] == document["target"]
    assert 0.9 < sum(likely.values()) < 1.01
    assert run("transcribe", "--prompt", "Wo", "--hotwords", "gare", "--prefix", "Où")[0] == 0
    for command, options, message in (
        ("transcribe", ("--output", "doc"), "doc"),
        (
            "transcribe",
            ("--output", "srt"),
            "--output must be txt or json for this model, which has no timest",
        ),
        (
            "translate",
            ("--to", "zh", "--from", "de"),
            "--to must be en, the one that a Whisper translates to",
        ),
    ):
        code, text, error = run(command, *options)
        assert code
        assert not text
        assert message in error
        assert len(error.splitlines()) == 1
