"""whisperM2M and KVSPN as models: conversion, saving, training forward, generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperForConditionalGeneration,
    pipeline,
)

from kvspn.models import (
    WhisperM2MConfig,
    WhisperM2MForConditionalGeneration,
    WhisperM2MProcessor,
    convert_whisper,
    spread_layers,
)
from kvspn.models.modeling import SpeechEncoder
from support import tiny

VOCAB, START, EOS, WINDOW = 96, 80, 79, 40
LANGUAGES = {"<|en|>": 81, "<|de|>": 82, "<|zh|>": 83}


def make_whisper(decoder_layers: int = 6) -> WhisperForConditionalGeneration:
    return tiny.random_whisper(
        VOCAB,
        LANGUAGES,
        start=START,
        eos=EOS,
        tasks={"transcribe": 84, "translate": 85},
        no_timestamps=86,
        suppressed=list(range(START, 87)),
        decoder_layers=decoder_layers,
        source_positions=WINDOW // 2,
        target_positions=24,
    )


def make_m2m(layers: int = 6, **added) -> WhisperM2MForConditionalGeneration:
    fields = {
        "text_encoder_layers": 2,
        "text_encoder_ffn_dim": 48,
        "max_text_positions": 16,
        "kvspn_ffn_dim": 40,
        "kvspn_draft_trained": True,
        "target_languages": None,
    }
    return convert_whisper(make_whisper(layers), range(layers), **{**fields, **added}).eval()


def features(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 80, WINDOW)


def test_unpruned_conversion_equals_whisper():
    whisper = make_whisper()
    model = convert_whisper(whisper, range(6), text_encoder_layers=2, kvspn_blocks=3).eval()
    x, ids = features(), torch.randint(0, VOCAB, (2, 9))
    theirs = whisper(input_features=x, decoder_input_ids=ids)
    ours = model(input_features=x, decoder_input_ids=ids)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state)


def test_pruning_keeps_the_named_layers():
    whisper = make_whisper()
    model = convert_whisper(whisper, [0, 3, 5], kvspn_blocks=0, text_encoder_layers=0)
    for new, old in enumerate([0, 3, 5]):
        kept, source = (
            model.model.decoder.layers[new].state_dict(),
            whisper.model.decoder.layers[old].state_dict(),
        )
        assert all(torch.equal(kept[name], source[name]) for name in source)
    assert model.config.decoder_layers == 3
    assert model.generation_config.lang_to_id == LANGUAGES


def test_spread_layers():
    assert spread_layers(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert spread_layers(6, 6) == list(range(6))
    assert spread_layers(6, 1) == [0]
    with pytest.raises(ValueError, match="decoder layers to keep must be 1 to 6, got 7"):
        spread_layers(6, 7)


@pytest.mark.parametrize("layers", [[], [0, 0], [3, 1], [0, 6], [-1, 2]])
def test_conversion_refuses_bad_layers(layers):
    with pytest.raises(ValueError, match="layers must be ascending"):
        convert_whisper(make_whisper(), layers)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kvspn_groups", 4, "decoder_layers must be a multiple of kvspn_groups"),
        ("kvspn_blocks", 4, "kvspn_blocks must be a multiple of kvspn_groups"),
        ("kvspn_encoder_stride", 0, "kvspn_encoder_stride must be at least 1, got 0"),
        ("kvspn_heads", 3, "kvspn_heads must be a multiple of decoder_attention_heads"),
        ("activation_function", "relu", "activation_function must be 'gelu', got 'relu'"),
    ],
)
def test_config_refuses_what_does_not_fit(field, value, message):
    with pytest.raises(ValueError, match=message):
        WhisperM2MConfig(decoder_layers=6, decoder_attention_heads=2, **{field: value})


def test_default_config_is_the_papers():
    config = WhisperM2MConfig()
    assert (config.d_model, config.encoder_layers, config.decoder_layers, config.text_encoder_layers) == (
        1024,
        24,
        12,
        6,
    )
    assert (config.kvspn_blocks, config.kvspn_groups) == (3, 3)


def test_save_and_load(tmp_path: Path):
    model = make_m2m(kvspn_draft_vocab_size=30)
    assert model.kvspn.draft_ids.tolist() == [*range(29), EOS]
    model.kvspn.draft_ids.copy_(torch.arange(30) * 2)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert isinstance(AutoConfig.from_pretrained(tmp_path), WhisperM2MConfig)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert type(loaded) is WhisperM2MForConditionalGeneration
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "whisper_m2m"
    state = loaded.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    x = features()
    assert torch.equal(loaded.generate(x, language="en"), model.generate(x, language="en"))


def test_a_new_speech_encoder_has_whispers_positions():
    whisper = make_whisper()
    expected = whisper.model.encoder.embed_positions.weight
    assert expected.norm(dim=1).var() < 1e-6  # sinusoids
    assert torch.equal(SpeechEncoder(whisper.config).embed_positions.weight, expected)
    config = WhisperM2MConfig.from_dict({**whisper.config.to_dict(), "kvspn_blocks": 0})
    model = WhisperM2MForConditionalGeneration(config)
    assert torch.equal(model.model.encoder.embed_positions.weight, expected)


@torch.no_grad()
def test_encoder_in_two_parts():
    """Below and above any layer, and with padded states, it is the encoder."""
    encoder = make_m2m().model.encoder
    x = torch.randn(2, 80, WINDOW - 6)
    whole = encoder(x).last_hidden_state
    for layers in range(len(encoder.layers) + 1):
        states = encoder.below(x, layers)
        assert torch.equal(encoder.above(states, layers), whole)
        padded = F.pad(states, (0, 0, 0, 3), value=7.0)
        mask = F.pad(torch.ones(states.shape[:2]), (0, 3))
        torch.testing.assert_close(encoder.above(padded, layers, mask)[:, :-3], whole)


def test_short_windows_and_bad_features():
    model = make_m2m()
    assert model.encode(torch.randn(1, 80, WINDOW - 6)).shape == (1, WINDOW // 2 - 3, 32)
    for bad in (torch.randn(1, 79, WINDOW), torch.randn(1, 80, WINDOW + 2), torch.randn(1, 80, 0)):
        with pytest.raises(ValueError, match="input_features must"):
            model.encode(bad)
    with pytest.raises(ValueError, match="either input_features"):
        model.encode()
    with pytest.raises(ValueError, match="input_ids must have 1 to 16 tokens"):
        model.encode(input_ids=torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_sees_a_later_one(attention):
    model = make_m2m()
    model.set_attn_implementation(attention)
    tokens = torch.randint(VOCAB, (2, 9))
    changed = torch.cat([tokens[:, :5], (tokens[:, 5:] + 1) % VOCAB], 1)
    states = model.encode(features())
    before, after = (
        model(encoder_outputs=(states,), decoder_input_ids=each).logits for each in (tokens, changed)
    )
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_attention_implementations_agree():
    model, outputs = make_m2m(), []
    tokens = torch.randint(VOCAB, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.model.text_encoder.layers[0].self_attn.config._attn_implementation == attention
        outputs.append(model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens).logits)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_padded_source_text_changes_nothing():
    model = make_m2m()
    text, target = torch.randint(0, 70, (1, 6)), torch.randint(0, 70, (1, 5))
    alone = model(input_ids=text, decoder_input_ids=target).logits
    padded = torch.cat([text, torch.full((1, 4), EOS)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits, alone
    )


def greedy(
    model: WhisperM2MForConditionalGeneration, x: torch.Tensor, prompt: list[int], new: int
) -> list[int]:
    """Greedy decoding by full teacher-forced passes, with Whisper's suppressed tokens."""
    tokens = list(prompt)
    for _ in range(new):
        logits = model(input_features=x, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[START:87] = -torch.inf
        if len(tokens) == len(prompt):
            logits[EOS] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kvspn_heads": 4, "kvspn_blocks": 6},
        {"kvspn_encoder_attention": False},
        {"scale_embedding": True},
    ],
)
def test_generate_equals_teacher_forcing(fields):
    model, x = make_m2m(**fields), features(1)
    expected = greedy(model, x, [START, 81, 85, 82, 86], 12)
    for settings in ({}, {"draft": False}):
        found = model.generate(x, language="en", target_language="de", max_new_tokens=12, **settings)
        assert found[0].tolist() == expected
    assert model.generate(x, language="en", max_new_tokens=5)[0].tolist() == greedy(
        model, x, [START, 81, 84, 86], 5
    )


def test_given_drafts_of_an_earlier_output():
    """The same output in fewer steps; the guess may be wrong from its middle on."""
    model, x = make_m2m(), features(2)
    options = {"language": "en", "max_new_tokens": 12, "return_dict_in_generate": True}
    plain = model.generate(x, draft=False, **options)
    wrong = plain.sequences.clone()
    wrong[1, 4:] = 9
    guided = model.generate(x, draft_tokens=wrong, **options)
    assert torch.equal(guided.sequences, plain.sequences)
    assert guided.total.steps < plain.total.steps
    with pytest.raises(ValueError, match=r"^draft_tokens must hold 2 rows, got 1"):
        model.generate(x, draft_tokens=wrong[:1], **options)


def test_prompt_ids_come_before_whispers_prompt():
    model, x, context = make_m2m(), features(1), [87, 5, 6, 7]
    expected = greedy(model, x, [*context, START, 81, 84, 86], 6)
    found = model.generate(x, language="en", prompt_ids=torch.tensor(context), max_new_tokens=6)
    assert found[0].tolist() == expected
    with pytest.raises(ValueError, match="prompt_ids must hold at most 12 tokens, got 13"):
        model.generate(x, language="en", prompt_ids=[5] * 13)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kvspn_heads": 4},
        {"kvspn_groups": 1, "kvspn_blocks": 2},
        {"kvspn_encoder_attention": False},
        {"kvspn_last_layer_only": True},
        {"kvspn_encoder_stride": 4},
        {"kvspn_draft_vocab_size": 40},
    ],
)
def test_drafts_are_those_of_training(fields):
    """What the engine accepts at k = 1 is what the training pass of the same tokens predicts."""
    model, x = make_m2m(**fields), features(1)
    out = model.generate(x, language="en", max_new_tokens=18, return_dict_in_generate=True)
    tokens = torch.tensor([[START, 81, 84, 86, *out.sequences[0].tolist()]])
    _, draft = model.draft_logits(tokens, model.encode(x))
    vocabulary = torch.arange(VOCAB) if model.kvspn.draft_ids is None else model.kvspn.draft_ids
    suppressed = (vocabulary >= START) & (vocabulary < 87)
    choice = vocabulary[draft[0].masked_fill(suppressed, -torch.inf).argmax(-1)]
    accepted, steps, position = 0, 1, 4  # the first token, at position 4, comes from a plain step
    while position < tokens.shape[1] - 1:
        hit = int(choice[position]) == int(tokens[0, position + 1])
        accepted, steps, position = accepted + hit, steps + 1, position + 1 + hit
    assert (out.stats[0].accepted, out.stats[0].steps) == (accepted, steps)


@pytest.mark.parametrize("stride", [1, 4])
def test_targets_of_one_input_share_its_states(stride):
    """As if the states were repeated for each target; what a mask hides is as if it were not there."""
    model, x = make_m2m(kvspn_encoder_stride=stride), features(2)
    states, tokens = model.encode(x), torch.randint(0, 80, (6, 9))
    mask = torch.ones(states.shape[:2])
    mask[0, 8:] = 0
    shared = model.draft_logits(tokens, states, mask)
    cut = model.draft_logits(tokens[:3], states[:1, :8].repeat(3, 1, 1))
    repeated = model.draft_logits(tokens[3:], states[1:].repeat(3, 1, 1))
    for found, *expected in zip(shared, cut, repeated, strict=True):
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_start_from_copies_the_groups_last_layer():
    model = make_m2m(kvspn_ffn_dim=64)
    layer, block = model.model.decoder.layers[3], model.kvspn.blocks[1]
    assert torch.equal(block.attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(block.fc1.weight, layer.fc1.weight)


def test_encoder_outputs_of_different_lengths():
    """A list of the rows' own states, as if each were alone."""
    model = make_m2m()
    states = model.encode(features(2))
    rows = [states[0, :7], states[1]]
    together = model.generate(encoder_outputs=(rows,), language="en", return_dict_in_generate=True)
    for row, each in enumerate(rows):
        alone = model.generate(encoder_outputs=(each[None],), language="en")[0]
        assert torch.equal(together.sequences[row, : together.stats[row].tokens], alone)


def test_row_by_row():
    """A row's output does not depend on the batch it is in."""
    model, x = make_m2m(), features(3)
    together = model.generate(x, target_language="de", return_dict_in_generate=True)
    for row in range(3):
        alone = model.generate(x[row : row + 1], target_language="de", return_dict_in_generate=True)
        length = alone.sequences.shape[1]
        assert alone.languages[0] == together.languages[row]
        assert torch.equal(alone.sequences[0], together.sequences[row, :length])


def test_detection_is_the_likeliest_language():
    model, x = make_m2m(), features(3)
    logits = model(input_features=x, decoder_input_ids=torch.full((3, 1), START)).logits[:, -1]
    ids = torch.tensor(list(LANGUAGES.values()))
    expected = [list(LANGUAGES)[i][2:4] for i in logits[:, ids].argmax(-1).tolist()]
    assert model.generate(x, return_dict_in_generate=True).languages == expected


def test_text_input():
    model = make_m2m()
    text = torch.randint(0, 70, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    both = model.generate(input_ids=text, attention_mask=mask, language="en", target_language="zh")
    short = model.generate(input_ids=text[1:, :3], language="en", target_language="zh")
    assert torch.equal(both[1, : short.shape[1]], short[0])


class Collect:
    """A transformers streamer."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer():
    model, x, streamer = make_m2m(), features(1), Collect()
    out = model.generate(x, language="en", streamer=streamer)
    assert streamer.tokens == [START, 81, 84, 86, *out[0].tolist()]  # the prompt first, as in transformers
    assert streamer.ended
    with pytest.raises(ValueError, match="streamer takes a batch of one, got 2 rows"):
        model.generate(features(2), language="en", streamer=Collect())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "xx"}, "language must be one of de, en, zh, got 'xx'"),
        ({"target_language": "klingon"}, "target_language must be one of"),
        ({"language": ["en"]}, "language must be one for all or 2"),
        ({"task": "sing"}, "task must be one of transcribe, translate, got 'sing'"),
        ({"task": "transcribe", "target_language": "de"}, "target_language must be None"),
        ({"max_new_tokens": 25}, "max_new_tokens must be in 1..20, got 25"),
        ({"k": 0}, "k must be"),
        ({"backend": "abacus"}, "must be one of"),
    ],
)
def test_generate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_m2m().generate(features(2), **{"language": "en", **arguments})


def test_no_draft_network():
    model = make_m2m(kvspn_blocks=0, text_encoder_layers=0)
    assert model.generate(features(1), language="en").shape[0] == 1
    with pytest.raises(ValueError, match="no draft network"):
        model.draft_logits(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="no text encoder"):
        model.generate(input_ids=torch.zeros(1, 3, dtype=torch.long), language="en")


def test_speech_recognition_pipeline(tmp_path: Path):
    """transformers' own pipeline finds model, tokenizer and feature extractor in the folder."""
    folder = tiny.save_model(tmp_path)
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    samples = tiny.sound(1.0)
    found = recognise(samples, generate_kwargs={"language": "en", "target_language": "de"})
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is WhisperM2MProcessor
    features = processor(samples, sampling_rate=16_000).input_features
    expected = recognise.model.generate(features, language="en", target_language="de")
    assert found["text"] == processor.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_processor(tmp_path: Path):
    processor = WhisperM2MProcessor.from_pretrained(tiny.save_model(tmp_path))
    encoded = processor(text=["Wo ist der Bahnhof?", "Wo?"])
    assert encoded.input_ids.shape == encoded.attention_mask.shape
    assert encoded.attention_mask[1].sum() < encoded.attention_mask[0].sum()
    assert processor.tokenizer.decode(encoded.input_ids[0], skip_special_tokens=True) == "Wo ist der Bahnhof?"
    assert encoded.input_ids[0, -1] == processor.tokenizer.eos_token_id
    for bad in ({}, {"audio": tiny.sound(1.0), "text": "x"}, {"text": " "}, {"text": []}):
        with pytest.raises(ValueError, match=r"either audio or text|text must not be empty"):
            processor(**bad)
