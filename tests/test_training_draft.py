"""`kvspn train draft` on a tiny random Whisper and a few seconds of noise."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("babel")
pytest.importorskip("accelerate")

from kvspn.models.folder import open_model, open_whisper
from kvspn.speech.manifest import read_recordings
from kvspn.speech.translator import Translator
from kvspn.training.data import IGNORE
from kvspn.training.draft import dry, outputs, training
from kvspn.training.draft.outputs import Output, Shards, Speaker
from kvspn.training.draft.recipe import DraftRecipe
from kvspn.training.draft.training import Learner, WindowCollator, add_network, judge, simulate, train_draft
from kvspn.training.draft.windows import Clip, Piece, plan_windows, split_clips, window_samples
from kvspn.training.optimizer import MuonAdamW
from support.commands import assert_one_line, kvspn_
from support.tiny import save_whisper, sound

RECIPE = DraftRecipe(
    held_out_windows=2, held_out=0.2, draft_vocabulary=256, steps=6, batch=2, evaluate_every=2
)
SPOKEN = [("de", "a"), ("de", "a"), ("fr", "b"), ("en", None), ("en", None), ("it", None)]
CLIPS = [Clip(f"{i}.wav", language, speaker, 0.5 + i / 10) for i, (language, speaker) in enumerate(SPOKEN)]


def load(number: int) -> np.ndarray:
    return sound(CLIPS[number].seconds, number)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("base") / "whisper", timestamps=True)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def trained(whisper: Path, lines: list[str]) -> Path:
    """A folder with a draft network that was trained without an interruption, and its cache."""
    folder = whisper.parent / "trained"
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        train_draft(whisper, CLIPS, load, folder / "draft", folder / "cache", RECIPE, lines.append)
    return folder


def small_shards(patch: pytest.MonkeyPatch) -> None:
    for module in (outputs, training):
        patch.setattr(module, "SHARD", 2)


# -- windows


def test_windows_hold_every_clip_once() -> None:
    rng = random.Random(0)
    clips = [Clip(str(i), rng.choice(["de", "en", None]), None, rng.uniform(0.2, 9)) for i in range(300)]
    clips[7] = Clip("7", "de", None, 71.0)
    for joined in (0.0, 0.5, 1.0):
        recipe = DraftRecipe(joined=joined)
        windows = plan_windows(clips, range(300), 30, recipe)
        assert windows == plan_windows(clips, range(300), 30, recipe)
        assert sorted(piece.clip for window in windows for piece in window if not piece.start) == [
            *range(300)
        ]
        cut = sorted((piece.start, piece.end) for [piece, *_] in windows if piece.clip == 7)
        assert cut == [(0, 30), (30, 60), (60, 90)]
        for window in windows:
            assert sum(clips[piece.clip].seconds for piece in window if piece.clip != 7) <= 30
            assert len({clips[piece.clip].language for piece in window}) == 1
            assert len(window) == 1 or clips[window[0].clip].language is not None
        several = sum(len(window) > 1 for window in windows)
        assert (several > 0) == (joined > 0)
    assert windows != plan_windows(clips, range(300), 30, dataclasses.replace(recipe, seed=1))


def test_a_speaker_is_heard_in_training_or_held_out() -> None:
    rng = random.Random(0)
    clips = [Clip(str(i), "en", rng.choice([None, *"abcdefghij"]), rng.uniform(1, 9)) for i in range(400)]
    train, held_out = split_clips(clips, 0.2, 0)
    assert sorted(train + held_out) == [*range(400)]
    heard, kept = ({clips[i].speaker for i in side} - {None} for side in (train, held_out))
    assert heard and kept and not heard & kept
    share = sum(clips[i].seconds for i in held_out) / sum(clip.seconds for clip in clips)
    assert 0.12 < share <= 0.2
    assert split_clips(clips, 0.2, 1) != (train, held_out)
    # One of two speakers, however much that is.
    assert split_clips([Clip("0", "en", "a", 9), Clip("1", "en", "b", 2)], 0.01, 0) == ([0], [1])
    with pytest.raises(ValueError, match="audio must be of at least two speakers, or files"):
        split_clips([Clip("0", "en", "a", 9), Clip("1", "en", "a", 2)], 0.2, 0)


def test_samples_of_a_window() -> None:
    whole = window_samples([Piece(0, 0, None), Piece(1, 0, None)], CLIPS, load)
    assert whole is not None
    np.testing.assert_array_equal(whole, np.concatenate([load(0), load(1)]))
    part = window_samples([Piece(5, 0.25, 0.75)], CLIPS, load)
    np.testing.assert_array_equal(part, load(5)[4_000:12_000])
    assert window_samples([Piece(0, 0, None)], CLIPS, lambda number: None) is None
    with pytest.raises(ValueError, match=r"0.wav: seconds must be the length of its audio, 1.00, got 0.50"):
        window_samples([Piece(0, 0, None)], CLIPS, lambda number: load(5))


# -- the recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", "step is no field of a recipe, which are seed, windows"),
        ("steps = 0", r"steps must be in 1\.\.\d+, got 0"),
        ("steps = 1.5", "steps must be an int, got float"),
        ("windows = -1", "windows must be in 1"),
        ("joined = 1.5", "joined must be a number from 0 to 1, got 1.5"),
        ("learning_rate = 0", "learning_rate must be a number from 1e-09 to 1, got 0"),
        ('translate = "yes"', "translate must be a bool, got str"),
        ('loss = "mse"', "loss must be one of distillation, cross_entropy, got 'mse'"),
        ("weights = 8", "weights must be the name of a format, got 8"),
        ("steps = ", "Invalid value"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        DraftRecipe.read(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("steps = 7\nencoder_attention = false\n")
    assert DraftRecipe.read(tmp_path / "recipe.toml") == DraftRecipe(steps=7, encoder_attention=False)


# -- learning


def test_steps_as_decoding_takes_them() -> None:
    assert simulate([[True, False, True, True], [], [False, True]]) == (2 + 2, 3)
    assert simulate([[False] * 5, [True] * 5]) == (5 + 3, 3)


def batch_of(shards: Shards, recipe: DraftRecipe) -> dict[str, torch.Tensor]:
    return WindowCollator(shards, recipe.targets, 0)([{"clip": i} for i in range(len(shards))])


def test_the_network_learns_what_the_base_says(whisper: Path, trained: Path) -> None:
    shards = Shards(sorted((trained / "cache" / "train").iterdir()))
    assert {each.task for said in shards.outputs for each in said} == {"transcribe", "translate"}
    for loss in ("distillation", "cross_entropy"):
        model, _ = open_whisper(whisper)
        add_network(model, RECIPE, shards.outputs)
        learner = Learner(model, loss)
        before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
        optimizer = MuonAdamW(learner.named_parameters(), 1e-2)
        batch = batch_of(shards, RECIPE)
        agreement = []
        for _ in range(16):
            parts = learner(**batch)
            parts[loss].backward()
            optimizer.step()
            optimizer.zero_grad()
            agreement.append(float(parts["_agreement"]))
        assert agreement[0] < 0.2 and agreement[-1] > 0.2, agreement
        for name, weight in model.model.state_dict().items():
            assert torch.equal(weight, before[name]), name
        assert not any(name.startswith("model") for name in learner.state_dict())


def test_what_is_simulated_is_what_decoding_takes(whisper: Path, trained: Path) -> None:
    """Of outputs without timestamps, whose grammar only decoding has."""
    recipe = dataclasses.replace(RECIPE, timestamps=False, targets=1)
    model, processor = open_model(whisper, torch.float32, draft=trained / "draft")
    shards = Shards(sorted((trained / "cache" / "train").iterdir()))
    shards.outputs = [[each for each in said if not each.timed] for said in shards.outputs]
    judged = judge(model, processor, shards, recipe)
    learner = Learner(model, "distillation").eval()
    steps = accepted = tokens = 0
    for window, said in enumerate(shards.outputs):
        for output in said:
            shards.outputs[window] = [output]
            found = learner(**WindowCollator(shards, 1, 0)([{"clip": window}]))
            tokens += len(output.tokens)
            taken = round(len(output.tokens) / float(found["_tokens_per_step"]))
            steps += taken
            accepted += round(taken * float(found["_acceptance"]))
        shards.outputs[window] = said
    assert 0 < accepted == sum(each.accepted for each in judged)
    assert (steps, tokens) == tuple(sum(getattr(each, x) for each in judged) for x in ("steps", "tokens"))
    assert all(each.identical == each.outputs for each in judged)


def test_labels_begin_behind_the_prompt() -> None:
    class Two(Shards):
        def __init__(self) -> None:
            self.outputs = [[Output("de", "transcribe", False, [5, 6, 7], [8, 9, 3])] for _ in range(2)]

        def states(self, window: int) -> np.ndarray:
            return np.full((4, 2), window, np.float16)

    batch = WindowCollator(Two(), 2, 0)([{"clip": 1}, {"clip": 0}])
    assert batch["states"][:, 0, 0].tolist() == [1, 0]
    assert batch["decoder_input_ids"].tolist() == [[5, 6, 7, 8, 9]] * 4
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 8, 9, 3]] * 4


def test_the_draft_vocabulary_is_what_the_base_said_most(whisper: Path) -> None:
    model, _ = open_whisper(whisper)
    said = [[Output("de", "transcribe", False, [], [400, 399, 400, 7])]]
    add_network(model, DraftRecipe(draft_vocabulary=5), said)
    assert model.kvspn is not None
    end = model.config.eos_token_id
    assert model.kvspn.draft_ids.tolist() == sorted({0, 7, 399, 400, end})
    add_network(model, DraftRecipe(draft_vocabulary=9999), said)
    assert model.kvspn.draft_ids is None
    with pytest.raises(ValueError, match="decoder_layers must be a multiple of kvspn_groups"):
        add_network(model, DraftRecipe(groups=3), said)


# -- all of it


def test_progress_and_what_is_saved(whisper: Path, trained: Path, lines: list[str]) -> None:
    assert lines[0] == "held-out: 1 of 1 windows of 6 clips"
    told = [line for line in lines if "accepted" in line]
    assert [line.partition(":")[0] for line in told] == [f"step {i} of 6" for i in (2, 4, 6)]
    said = json.loads((trained / "draft" / "config.json").read_text())["training"]
    assert said["recipe"] == dataclasses.asdict(RECIPE)
    assert said["held_out_windows"] == 1
    for kind in said["held_out"]:
        assert kind["identical"] == kind["outputs"] > 0
        assert kind["steps"] + kind["accepted"] >= kind["tokens"]
    plain, drafting = (Translator.from_folder(whisper, draft=each) for each in (None, trained / "draft"))
    expected, found = (each.translate(sound(3), source="de") for each in (plain, drafting))
    assert (found.tokens, found.segments) == (expected.tokens, expected.segments)
    assert found.total.accepted > 0


class Interruption(BaseException):
    """As Ctrl-C."""


def interrupt(patch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """The so many-th call, and what comes after, never returns."""
    before: Callable[..., object] = getattr(owner, name)
    left = [calls]

    def call(*arguments: object, **named: object) -> object:
        left[0] -= 1
        if left[0] <= 0:
            raise Interruption
        return before(*arguments, **named)

    patch.setattr(owner, name, call)


def test_an_interrupted_run_goes_on_with_nothing_lost(whisper: Path, trained: Path, tmp_path: Path) -> None:
    heard: list[int] = []

    def listen(number: int) -> np.ndarray:
        heard.append(number)
        return load(number)

    for owner, name, calls in ((Speaker, "hear", 4), (Speaker, "hear", 3), (Learner, "forward", 9)):
        with pytest.MonkeyPatch.context() as patch:
            small_shards(patch)
            interrupt(patch, owner, name, calls)
            with pytest.raises(Interruption):
                train_draft(whisper, CLIPS, listen, tmp_path / "draft", tmp_path / "cache", RECIPE)
        assert not (tmp_path / "draft").exists()
        assert not list((tmp_path / "cache").rglob("*.part"))
    assert list((tmp_path / "cache" / "checkpoints").glob("*/checkpoint-4/seal.json"))
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        train_draft(whisper, CLIPS, listen, tmp_path / "draft", tmp_path / "cache", RECIPE)
    # What was heard is heard again only where its shard was not whole: two windows of one clip.
    assert len(heard) <= len(CLIPS) + 2 * 2
    for file in ("model.safetensors", "config.json"):
        found, expected = ((each / "draft" / file).read_bytes() for each in (tmp_path, trained))
        assert found == expected, file


def test_a_cache_of_something_else_is_refused(whisper: Path, trained: Path, tmp_path: Path) -> None:
    cases: Sequence[tuple[str, Path, Sequence[Clip], DraftRecipe]] = (
        ("model", save_whisper(tmp_path / "other", 2, timestamps=True), CLIPS, RECIPE),
        ("audio", whisper, CLIPS[:-1], RECIPE),
        ("translate", whisper, CLIPS, dataclasses.replace(RECIPE, translate=False)),
    )
    for name, model, clips, recipe in cases:
        with pytest.raises(ValueError, match=f"cache must be of the same {name}, got .*cache"):
            train_draft(model, clips, load, tmp_path / "draft", trained / "cache", recipe)


def test_a_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(
        dry._SIZES, "base", (32, 1, 2, 2, {"vocab_size": 600, "eos_token_id": 500, "pad_token_id": 0})
    )
    (tmp_path / "recipe.toml").write_text("batch = 1")
    result = kvspn_("train", "draft", "--dry", "base", "--recipe", tmp_path / "recipe.toml")
    assert result.exit_code == 0, result.output
    assert "25,600 in the draft network" in result.stdout
    assert_one_line(kvspn_("train", "draft", "--dry", "huge"), "--dry must be one of tiny, base", "'huge'")
    mixed = kvspn_("train", "draft", "--dry", "base", "--out", "x")
    assert_one_line(mixed, "--out must be left out with --dry")


def test_from_a_folder_of_audio(whisper: Path, tmp_path: Path) -> None:
    """Languages are detected; what is no audio is told and left out."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", load(number), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 1\nbatch = 2\nheld_out_windows = 1\ndraft_vocabulary = 64\ntimestamps = false")
    out = tmp_path / "draft"
    command = ("train", "draft", "--model", whisper, "--audio", tmp_path, "--out", out, "--recipe", recipe)
    result = kvspn_(*command)
    assert result.exit_code == 0, result.output
    assert "broken.wav" in result.stderr and "it is left out" in result.stderr
    assert "held-out: 1 of 1 windows of 3 clips" in result.stdout
    assert f"--draft {out}" in result.stdout
    assert open_model(whisper, draft=out)[0].drafts


def test_a_manifest_needs_no_text(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", load(0), 16_000)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text('{"path": "a.wav", "language": "de", "speaker": "x", "seconds": 0.5}\n')
    (clip,) = read_recordings(manifest, texts=False)
    assert (clip.text, clip.speaker, clip.seconds) == ("", "x", 0.5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"seconds": 0}, "line 1: seconds must be a positive number, got 0"),
        ({"speaker": 7}, "line 1: speaker must be a text, got 7"),
        ({"path": "b.wav"}, "b.wav: no such file"),
        ({"language": None}, "line 1: language must be a text, got null"),
    ],
)
def test_errors_of_manifests(whisper: Path, tmp_path: Path, entry: dict[str, object], message: str) -> None:
    soundfile.write(tmp_path / "a.wav", load(0), 16_000)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(json.dumps({"path": "a.wav", "language": "de"} | entry))
    command = ("train", "draft", "--model", whisper, "--audio", manifest, "--out", tmp_path / "draft")
    assert_one_line(kvspn_(*command), "--audio", message)


def test_errors_of_options(whisper: Path, tmp_path: Path) -> None:
    def run(*more: object, audio: Path = tmp_path, model: Path = whisper, out: str = "draft") -> object:
        return kvspn_(*("train", "draft", "--model", model, "--audio", audio, "--out", tmp_path / out, *more))

    assert_one_line(kvspn_("train", "draft", "--model", whisper, "--out", "x"), "--audio must be given")
    assert_one_line(run(), "--audio must hold audio files (aac, aiff,")
    assert_one_line(run(audio=tmp_path / "none"), "--audio must be a manifest or a folder", "no such file")
    assert_one_line(run("--recipe", tmp_path / "none.toml"), "--recipe", "none.toml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert_one_line(run(out="full"), "--out must be a new folder, or one of a draft network")
    soundfile.write(tmp_path / "a.wav", load(0), 16_000)
    assert_one_line(run("--split", "train"), "--split must be left out with a folder")
    alone = run()
    assert_one_line(alone, "--audio must be of at least two speakers, or files where none is known")
