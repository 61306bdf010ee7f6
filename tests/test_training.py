"""The corpus, the losses and the recipe, the latter whole at a tiny size."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

pytest.importorskip("babel")
pytest.importorskip("peft")

from kvspn.models import WhisperM2MForConditionalGeneration
from kvspn.training.corpus import LANGUAGES, Phrasebook, Template, split
from kvspn.training.data import IGNORE, alphabet, pad, prompt_tokens
from kvspn.training.losses import accuracy, cross_entropy, ctc, distillation
from kvspn.training.mini import train_mini
from kvspn.training.optimizer import MuonAdamW
from kvspn.training.prepare import draw_clips, make_data
from kvspn.training.recipe import Recipe, Stage
from kvspn.training.speech import SAMPLING_RATE, TEST_VARIANTS, TRAIN_VARIANTS, Voice, augment, synthesize
from kvspn.training.states import StateStore
from kvspn.training.store import log_mel, pad_features
from kvspn.training.tokenizer import SPECIAL_TOKENS, train_tokenizer
from kvspn.training.trainer import fit
from kvspn.weights.formats import round_to_int8

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")


@pytest.fixture(scope="module")
def book() -> Phrasebook:
    return Phrasebook.load()


@pytest.fixture(scope="module")
def corpus(book):
    return split(book)


def test_phrasebook_is_large_and_well_formed(book, corpus):
    assert len(book.templates) >= 250
    assert len({template.id for template in book.templates}) == len(book.templates)
    assert len(corpus.train) >= 10_000
    assert len(corpus.unseen) == len(corpus.hard) == 30
    for sentence in (*corpus.train[:2000], *corpus.unseen, *corpus.hard):
        assert set(sentence.texts) == set(LANGUAGES)
        for language, text in sentence.texts.items():
            assert text == text.strip() and "{" not in text and "  " not in text, text
            assert text[-1] in ("。？！" if language == "zh" else ".?!"), text
            first = next(char for char in text if char.isalnum())
            assert not first.islower(), text
        assert bool(re.search(r"[¿¡]", sentence.texts["es"])) == (sentence.texts["es"][-1] in "?!")


def test_split_keeps_test_sentences_out_of_training(corpus):
    train = {text for sentence in corpus.train for text in sentence.texts.values()}
    for sentence in (*corpus.unseen, *corpus.hard):
        assert train.isdisjoint(sentence.texts.values()), sentence
    templates = {sentence.template for sentence in corpus.train}
    assert templates.issuperset(sentence.template for sentence in corpus.unseen)
    assert templates.isdisjoint(sentence.template for sentence in corpus.hard)


def test_split_is_deterministic(book, corpus):
    assert split(book) == corpus


def test_articles_and_elision(book):
    countries = {item["en"]["the"]: item for item in book.lexicon["country"]}
    assert countries["Japan"]["fr"] == {
        "the": "le Japon",
        "in": "au Japon",
        "to": "au Japon",
        "from": "du Japon",
    }
    assert countries["Spain"]["fr"]["from"] == "d'Espagne"
    assert countries["Italy"]["it"]["from"] == "dall'Italia"
    assert countries["China"]["it"]["from"] == "dalla Cina"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"de": "Ohne."}, "the de text has other slots"),
        (dict.fromkeys(LANGUAGES, "A {nothing}."), "no list named 'nothing'"),
        (dict.fromkeys(LANGUAGES, "A {city.of}."), None),
        (dict.fromkeys(LANGUAGES, "A {weekday.under}."), "has no en form 'under'"),
    ],
)
def test_malformed_templates(book, texts, message):
    template = Template("x", {**dict.fromkeys(LANGUAGES, "In {city}."), **texts})
    if message is None:
        Phrasebook([template], book.lexicon)
    else:
        with pytest.raises(ValueError, match=message):
            Phrasebook([template], book.lexicon)


def test_clips_are_balanced(corpus):
    clips = draw_clips(corpus.train, 12, random.Random(0))
    counts: dict[str, int] = {}
    for clip in clips:
        sentence = corpus.train[clip.sentence]
        counts[sentence.template] = counts.get(sentence.template, 0) + 1
        assert clip.text == sentence.texts[clip.language]
    assert set(counts.values()) == {12}


def test_tokenizer_round_trip(corpus, tmp_path):
    texts = [text for sentence in corpus.train[:300] for text in sentence.texts.values()]
    tokenizer = train_tokenizer(texts, 1200)
    assert len(tokenizer) == 1200
    for text in texts[:60]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    tokenizer.set_prefix_tokens(language="de", task="transcribe")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Ja").input_ids)[:4] == prompt_tokens("de", "de")
    assert start == 1200 - len(SPECIAL_TOKENS) + 1
    assert prompt_tokens("de", "fr")[2:4] == ["<|translate|>", "<|fr|>"]


def test_losses_against_their_definitions():
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, 4, 0]])
    kept = labels != IGNORE
    p, q = teacher.softmax(-1)[kept], student.softmax(-1)[kept]
    loss = distillation(student, teacher, labels)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    right = p.gather(1, labels[kept][:, None])[:, 0]
    trusted = (right * (p * (p / q).log()).sum(-1)).mean()
    torch.testing.assert_close(distillation(student, teacher, labels, trust=True), trusted)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad[0, 1].abs().sum() == 0
    expected = -student.log_softmax(-1)[kept].gather(1, labels[kept][:, None]).mean()
    torch.testing.assert_close(cross_entropy(student, labels), expected)
    assert accuracy(F.one_hot(labels.clamp(0), 5), labels) == 1


def test_ctc_against_enumeration():
    """Three frames, one character: the sum over all paths that collapse to it."""
    logits = torch.randn(1, 3, 3)
    log_probs = logits.log_softmax(-1)[0]
    paths = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]
    total = sum(math.exp(sum(log_probs[t, c].item() for t, c in enumerate(path))) for path in paths)
    loss = ctc(logits, torch.tensor([3]), torch.tensor([[1, IGNORE]]))
    assert loss.item() == pytest.approx(-math.log(total), rel=1e-5)
    last = ctc(logits.roll(-1, -1), torch.tensor([3]), torch.tensor([[0, IGNORE]]), blank=2)
    assert last.item() == pytest.approx(loss.item(), rel=1e-5)


def test_alphabet():
    assert alphabet(["ba", "ca"]) == {"a": 1, "b": 2, "c": 3}


def test_pad():
    assert pad([[1], [2, 3]], 9).tolist() == [[1, 9], [2, 3]]


def test_stored_features_are_the_extractors():
    """Cut, stored and padded again, they equal what the extractor gives for the whole window."""
    extractor = WhisperFeatureExtractor(chunk_length=2)
    rng = np.random.default_rng(0)
    clips = [0.1 * rng.standard_normal(length).astype(np.float32) for length in (9000, 32000, 160)]
    whole = extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features
    padded = pad_features(log_mel(clips, extractor), 200)
    assert np.abs(padded - whole).max() < 2e-3  # float16


def test_test_voices_are_kept_out():
    assert not set(TRAIN_VARIANTS) & set(TEST_VARIANTS)
    rng = random.Random(0)
    assert {Voice.draw("de", TEST_VARIANTS, rng).name for _ in range(50)} == {"de+m7", "de+f4"}


@needs_espeak
@pytest.mark.parametrize("language", LANGUAGES)
def test_speech(corpus, language):
    rng = random.Random(1)
    samples, phonemes = synthesize(corpus.train[0].texts[language], Voice.draw(language, TRAIN_VARIANTS, rng))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert 0.5 < len(samples) / SAMPLING_RATE < 8
    assert len(phonemes) > 5 and not re.search(r"[\s()ˈ]", phonemes)
    louder = augment(samples, rng)
    assert louder.dtype == np.float32 and np.isfinite(louder).all() and np.abs(louder).max() <= 1
    assert len(louder) >= len(samples)


@pytest.mark.parametrize(("program", "message"), [(None, "is not installed"), ("false", "failed on 'Hello'")])
def test_speech_without_espeak(monkeypatch, program, message):
    found = shutil.which(program) if program else None
    monkeypatch.setattr(shutil, "which", lambda name: found)
    with pytest.raises(RuntimeError, match=message):
        synthesize("Hello", Voice("en-us", 150, 50))


@needs_espeak
def test_phonemes():
    """Of the language, not of the spelling; pauses and stress left out."""
    assert synthesize("Two, too!", Voice("en-us+m1", 170, 50)).phonemes == "tuːtuː"
    assert synthesize("你好", Voice("cmn-latn-pinyin+f1", 170, 50)).phonemes == "niɜχɑu2"


@needs_espeak
def test_whole_recipe_resumes_after_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every stage at a tiny size; done stages are skipped, an unfinished one goes on from its checkpoint."""
    rename, interrupted = Path.replace, []

    def interrupt(part: Path, whole: Path) -> Path:
        if whole.name in ("features", "encoder", "outputs-train.json", "draft", "demo"):
            if whole not in interrupted:
                interrupted.append(whole)
                raise KeyboardInterrupt
            assert not whole.exists()
        return rename(part, whole)

    monkeypatch.setattr(Path, "replace", interrupt)
    stage = Stage(steps=2, batch=4, learning_rate=1e-3)
    recipe = Recipe(
        clips_per_template=1,
        vocab_size=500,
        d_model=32,
        heads=2,
        ffn_dim=48,
        encoder_layers=2,
        phoneme_layers=1,
        parent_decoder_layers=4,
        decoder_layers=2,
        text_encoder_layers=1,
        draft_clips=24,
        encoder=stage,
        parent=stage,
        base=stage,
        adapt=stage,
        draft=stage,
    )
    mini = None
    while mini is None:
        with contextlib.suppress(KeyboardInterrupt):
            mini = train_mini(tmp_path, recipe, log=lambda line: None)
    assert len(interrupted) == 5
    model = WhisperM2MForConditionalGeneration.from_pretrained(mini)
    assert model.dtype == torch.float16
    assert model.kvspn is not None and len(model.kvspn.blocks) == 2
    assert model.config.kvspn_draft_trained
    parent, based = (
        WhisperForConditionalGeneration.from_pretrained(tmp_path / name).model.encoder.layers
        for name in ("parent", "base")
    )
    same = [torch.equal(old.fc1.weight, new.fc1.weight) for old, new in zip(parent, based, strict=True)]
    assert same == [True, False], "the base learns the encoder's upper layers alone"
    base = WhisperM2MForConditionalGeneration.from_pretrained(tmp_path / "adapted")
    assert not any("lora" in name for name in base.state_dict())
    rounded = copy.deepcopy(base)
    round_to_int8(rounded.model.decoder)
    for name, weight in base.named_parameters():
        torch.testing.assert_close(rounded.get_parameter(name), weight, rtol=1e-5, atol=1e-7)
    outputs = json.loads((tmp_path / "outputs-held-out.json").read_text())
    corpus = make_data(tmp_path, recipe, log=lambda line: None)
    assert len(outputs) == len(corpus.held_out)
    assert len(json.loads((tmp_path / "outputs-train.json").read_text())) == 24 < len(corpus.store)
    stored = StateStore(tmp_path / "draft-states" / "held-out").states(1).astype(np.float32)
    states = base.eval().model.encoder.above(torch.from_numpy(stored)[None], recipe.encoder_layers)
    said = base.generate(
        encoder_outputs=(states,),
        language=corpus.held_out.languages[1],
        target_language="fr",
        max_new_tokens=64,
    )
    assert said[0].tolist() == outputs[1][LANGUAGES.index("fr")]
    shared = [name for name in base.state_dict() if not name.startswith("kvspn")]
    trained = WhisperM2MForConditionalGeneration.from_pretrained(tmp_path / "draft").state_dict()
    assert all(torch.equal(base.state_dict()[name], trained[name]) for name in shared), (
        "the base was not frozen"
    )
    manifest = json.loads((tmp_path / "speech" / "demo" / "manifest.json").read_text("utf-8"))
    assert [entry["language"] for entry in manifest] == list(LANGUAGES)
    assert len(list((tmp_path / "speech" / "unseen").glob("*.ogg"))) == 30 * len(LANGUAGES)
    stamp = (tmp_path / "parent" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "draft")
    train_mini(
        tmp_path,
        dataclasses.replace(recipe, draft=dataclasses.replace(stage, steps=3)),
        log=lambda line: None,
    )
    assert (tmp_path / "parent" / "model.safetensors").stat().st_mtime_ns == stamp
    state = json.loads((tmp_path / "draft-checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "layers": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)]),
            "head": nn.Linear(4, 5),
        }
    )


def test_losses_are_computed_in_bfloat16(tmp_path: Path):
    """Whatever part of the model they call, in training and in evaluation."""
    network, seen = small_network(), []

    def losses(network: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = network["head"](network["embedding"](batch["tokens"]))
        seen.append((network.training, logits.dtype))
        return {"loss": F.cross_entropy(logits.float(), batch["tokens"])}

    tokens = torch.arange(5)
    fit(
        network,
        tmp_path,
        [{"input_ids": [0]}] * 2,
        lambda items: {"tokens": tokens},
        losses,
        [{"tokens": tokens}],
        steps=1,
        batch=2,
        learning_rate=1e-3,
        seed=0,
    )
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}


def train_a_step(network: nn.Module, optimizer: MuonAdamW) -> None:
    x = network["embedding"](torch.arange(5))
    for layer in network["layers"]:
        x = layer(x).tanh()
    optimizer.zero_grad()
    F.cross_entropy(network["head"](x), torch.arange(5)).backward()
    optimizer.step()


def test_optimizer_goes_on_where_it_was():
    networks = [small_network() for _ in range(2)]
    optimizers = [MuonAdamW(network.named_parameters(), 0.01) for network in networks]
    for network, optimizer in zip(networks, optimizers, strict=True):
        train_a_step(network, optimizer)
    resumed = small_network()
    resumed.load_state_dict(networks[1].state_dict())
    optimizers[1] = MuonAdamW(resumed.named_parameters(), 0.5)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train_a_step(networks[0], optimizers[0])
    train_a_step(resumed, optimizers[1])
    for name, expected in networks[0].named_parameters():
        assert torch.equal(resumed.get_parameter(name), expected), name


def test_muon_takes_the_matrices_of_the_layers():
    """Its steps have 0.2 of the learning rate as RMS, AdamW's first one all of it; what is frozen stays."""
    network = small_network()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    network["head"].bias.requires_grad_(False)
    optimizer = MuonAdamW(network.named_parameters(), 0.01)
    muon, adamw = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    assert (muon, adamw) == (2 * 24, 20 + 6 + 4 + 20)
    train_a_step(network, optimizer)
    for name, parameter in network.named_parameters():
        step = (parameter.detach() - before[name]).square().mean().sqrt()
        of_muon = name in ("layers.0.weight", "layers.1.weight")
        expected = 0.002 if of_muon else 0 if name == "head.bias" else 0.01
        assert float(step) == pytest.approx(expected, rel=0.4 if of_muon else 0.02), name
