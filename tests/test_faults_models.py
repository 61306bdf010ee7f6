"""Faults from the field in generate(): adapters, settings, budgets, streamers, NaN, threads, packing."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import peft
import pytest
import torch
from test_models import EOS, LANGUAGES, START, features, make_m2m
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, TextIteratorStreamer

from kvspn.decoding import decode
from kvspn.models import WhisperM2MForConditionalGeneration, packed
from kvspn.models.settings import HONOURED, WITHOUT_EFFECT, merge

EN = {"language": "en"}


def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every engine that is packed."""
    made: list[Any] = []
    pack = WhisperM2MForConditionalGeneration.engine

    def counted(self, *args, **kwargs):
        made.append(pack(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(WhisperM2MForConditionalGeneration, "engine", counted)
    return made


# Adapters and modules that are not plain


def adapted(model, config):
    """The model under PEFT, every parameter of its adapters random."""
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if any(word in name for word in ("lora_", "ia3_", "modules_to_save")):
            torch.nn.init.normal_(parameter, 1 if "ia3" in name or "magnitude" in name else 0, 0.4)
    return wrapped


TARGETS = r".*decoder.*(q_proj|v_proj|out_proj|fc1|fc2)"


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
        peft.LoraConfig(r=4, use_dora=True, target_modules=r".*(decoder|kvspn).*(q_proj|fc2)"),
        peft.LoraConfig(r=2, target_modules=["proj_out"]),
        peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["final_layer_norm"]),
        peft.IA3Config(target_modules=r".*decoder.*(k_proj|fc2)", feedforward_modules=r".*fc2"),
    ],
    ids=["LoRA", "DoRA", "LoRA of the head", "whole modules", "IA3"],
)
@pytest.mark.parametrize("draft", [False, True])
def test_adapters_count(config, draft):
    model, x = make_m2m(), features(1)
    before = model.generate(x, **EN, draft=draft)
    wrapped = adapted(model, copy.deepcopy(config))
    found = wrapped.generate(input_features=x, **EN, draft=draft)
    assert found.tolist() != before.tolist()
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(input_features=x, **EN, draft=draft), before)
    assert torch.equal(wrapped.merge_and_unload().generate(x, **EN, draft=draft), found)


def test_several_adapters_and_their_choice():
    model, x = make_m2m(), features(1)
    wrapped = adapted(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    first = wrapped.generate(input_features=x, **EN)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=9, target_modules=TARGETS))
    assert torch.equal(wrapped.generate(input_features=x, **EN), first)
    for name, parameter in wrapped.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, 0, 0.4)
    wrapped.set_adapter("second")
    second = wrapped.generate(input_features=x, **EN)
    wrapped.base_model.set_adapter(["default", "second"])
    both = wrapped.generate(input_features=x, **EN)
    assert len({tuple(each[0].tolist()) for each in (first, second, both)}) == 3
    for layer in wrapped.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("second", 0.0)
    assert torch.equal(wrapped.generate(input_features=x, **EN), first)
    wrapped.merge_adapter(["default"])  # merged by hand, in the model itself
    assert torch.equal(wrapped.generate(input_features=x, **EN), first)
    assert torch.equal(wrapped.merge_and_unload().generate(x, **EN), first)


def test_a_wrapper_for_sequences_generates():
    model, x = make_m2m(), features(1)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_2_SEQ_LM")
    wrapped = adapted(model, config)
    found = wrapped.generate(input_features=x, **EN)
    assert torch.equal(wrapped.merge_and_unload().generate(x, **EN), found)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(layer):
    layer.fc1 = Doubled(32, 64)


def hooked(layer):
    layer.fc1.register_forward_hook(lambda module, args, output: output * 2)


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, args: None)


def patched(layer):
    layer.self_attn.k_proj.forward = lambda x: x


def other_epsilon(layer):
    layer.final_layer_norm.eps = 1e-3


def another_attention(layer):
    layer.encoder_attn = torch.nn.MultiheadAttention(32, 2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replaced, "fc1 must be a plain layer .* got Doubled"),
        (hooked, "fc1 must have no forward hooks"),
        (hooked_before, "layers.2 must have no forward hooks"),
        (patched, "self_attn.k_proj must have no forward hooks"),
        (other_epsilon, "final_layer_norm must have eps 1e-05"),
        (another_attention, "encoder_attn must be a plain layer .* got MultiheadAttention"),
    ],
)
def test_what_is_not_plain_is_refused_by_name(change, name):
    model, x = make_m2m(), features(1)
    model.generate(x, **EN)
    change(model.model.decoder.layers[2])
    with pytest.raises(TypeError, match=rf"^model\.decoder\.layers\.2.*{name.removeprefix('layers.2')}"):
        model.generate(x, **EN)
    with pytest.raises(TypeError, match="to be packed into an engine"):
        model.engine(1, 20)


def test_a_hook_of_gradient_checkpointing_is_no_fault():
    model, x = make_m2m(), features(1)
    expected = model.generate(x, **EN)
    model.enable_input_require_grads()
    assert torch.equal(model.generate(x, **EN), expected)


# Settings


@pytest.mark.parametrize("where", ["argument", "generation_config", "model.generation_config"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 5),
        ("temperature", 0.5),
        ("top_k", 7),
        ("top_p", 0.5),
        ("no_repeat_ngram_size", 2),
        ("repetition_penalty", 1.5),
        ("min_new_tokens", 5),
        ("num_return_sequences", 2),
        ("bad_words_ids", [[3]]),
        ("stop_strings", "a"),
        ("forced_eos_token_id", 3),
        ("forced_decoder_ids", [[1, 5]]),
        ("a_word_of_tomorrow", 1),
    ],
)
def test_settings_that_are_not_honoured_are_refused(name, value, where):
    model = make_m2m()
    settings: dict[str, Any] = {name: value}
    if where == "generation_config":
        config = copy.deepcopy(model.generation_config)
        setattr(config, name, value)
        settings = {"generation_config": config}
    elif where == "model.generation_config":
        setattr(model.generation_config, name, value)
        settings = {}
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        model.generate(features(1), **EN, **settings)


def test_every_field_of_a_generation_config_is_known_or_refused():
    """Whatever transformers adds: a value that is not its default is honoured or refused."""
    defaults = GenerationConfig._get_default_generation_params()
    for name in vars(GenerationConfig()):
        config = GenerationConfig()
        setattr(config, name, 7.25)  # nobody's default
        if name in HONOURED | WITHOUT_EFFECT or name.startswith("_"):
            merge(config, None, {})
        else:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                merge(config, None, {})
            setattr(config, name, defaults.get(name))
            merge(config, None, {})


def test_sampling():
    """A seed's output is its own, with drafts and without, and not the greedy one."""
    model, x = make_m2m(), features(2)
    sampled = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    outputs = [model.generate(x, **EN, **sampled, seed=seed, draft=True) for seed in range(3)]
    for seed, output in enumerate(outputs):
        assert torch.equal(output, model.generate(x, **EN, **sampled, seed=seed, draft=False))
    assert len({str(output.tolist()) for output in outputs}) == 3
    hot = sampled | {"temperature": 50.0}
    by_default = model.generate(x, **EN, **hot)
    assert torch.equal(by_default, model.generate(x, **EN, **hot, top_k=50))  # as in transformers
    assert not torch.equal(by_default, model.generate(x, **EN, **hot, top_k=0))
    assert torch.equal(model.generate(x, **EN, max_new_tokens=8), model.generate(x, **EN, **hot, top_k=1))
    same = features(1).repeat(2, 1, 1)
    first, second = model.generate(same, **EN, **sampled).tolist()
    assert first != second
    for settings, message in (
        ({"do_sample": True, "temperature": 0}, "^temperature must be above 0 with do_sample=True, got 0"),
        ({"do_sample": True, "temperature": -1.0}, "^temperature must be 0 or a positive number, got -1"),
        ({"seed": 3}, "^seed must be left out without do_sample=True, got 3"),
        ({"do_sample": True, "seed": -3}, "^seed must be in 0"),
        ({"do_sample": True, "top_k": -3}, "^top_k must be in 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(x, **EN, **settings)
    with pytest.raises(TypeError, match=r"^do_sample must be"):
        model.generate(x, **EN, do_sample="yes")


def test_settings_that_ask_for_nothing():
    model, x = make_m2m(), features(1)
    expected = model.generate(x, **EN)
    nothing = {
        "num_beams": 1, "do_sample": False, "temperature": 0.0, "synced_gpus": False, "use_cache": True,
        "logits_processor": [], "stopping_criteria": None, "assistant_model": None, "is_multilingual": True,
    }  # fmt: skip
    assert torch.equal(model.generate(x, **EN, **nothing, labels=torch.zeros(1, 3)), expected)


@pytest.mark.parametrize("where", ["argument", "generation_config", "model.generation_config"])
def test_settings_that_are_honoured(where):
    model, x = make_m2m(), features(1)
    full = model.generate(x, **EN)[0].tolist()
    german = model.generate(x, language="de")[0].tolist()
    to_english = model.generate(x, language="de", target_language="en")[0].tolist()
    unlike = next(i for i in range(2, len(full)) if full[i] not in full[:i])

    def said(**settings):
        own = copy.deepcopy(model.generation_config)
        config = copy.deepcopy(own) if where == "generation_config" else model.generation_config
        if where == "argument":
            return model.generate(x, **{**EN, **settings})[0].tolist()
        for name, value in settings.items():
            setattr(config, name, value)
        given = {"generation_config": config} if where == "generation_config" else {}
        speaks = {} if {"language", "forced_decoder_ids"} & settings.keys() else EN
        try:
            return model.generate(x, **speaks, **given)[0].tolist()
        finally:
            model.generation_config = own

    assert said(max_new_tokens=3) == full[:3]
    assert said(max_length=9) == full[:5]  # the prompt has 4
    assert said(max_length=9, max_new_tokens=3) == full[:3]
    assert said(eos_token_id=full[unlike]) == full[: unlike + 1]
    assert said(eos_token_id=[EOS, full[unlike]]) == full[: unlike + 1]
    assert said(language="de") == said(language="<|de|>") == said(language="German") == german
    assert said(language="de", task="translate") == to_english
    assert said(suppress_tokens=[full[0]])[0] != full[0]
    assert said(begin_suppress_tokens=[full[0]])[0] != full[0]
    if where != "argument":
        assert said(forced_decoder_ids=[[1, LANGUAGES["<|de|>"]], [2, 85], [3, 86]]) == to_english
        assert said(forced_decoder_ids=[[1, LANGUAGES["<|de|>"]], [2, 84]]) == german


def test_an_argument_counts_before_a_configuration():
    model, x = make_m2m(), features(1)
    german = model.generate(x, language="de", max_new_tokens=6)
    translated = model.generate(x, language="de", target_language="zh", max_new_tokens=6)
    model.generation_config.update(language="en", task="transcribe", max_new_tokens=2)
    model.generation_config.language, model.generation_config.task = "en", "transcribe"
    assert model.generate(x).shape[1] == 2
    assert torch.equal(model.generate(x, language="de", max_length=10), german)
    found = model.generate(x, language="de", target_language="zh", max_new_tokens=6)
    assert torch.equal(found, translated)
    with pytest.raises(ValueError, match="forced_decoder_ids must agree with language 'en', got 'de'"):
        model.generate(x, language="en", forced_decoder_ids=[[1, LANGUAGES["<|de|>"]]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 4}, "max_length must be in 5"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an int"),
        ({"eos_token_id": [EOS, 96]}, "eos_token_id must hold token ids 0 to 95, got 96"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must hold token ids 0 to 95, got -1"),
        ({"generation_config": {"max_length": 4}}, "generation_config must be a GenerationConfig, got dict"),
        ({"language": 5}, "language must be one"),
        ({"input_features": features(1).numpy()}, "input_features must be a tensor, got ndarray"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make_m2m().generate(**{"input_features": features(1), **EN, **settings})


def test_source_text_past_the_vocabulary():
    with pytest.raises(ValueError, match="input_ids must hold token ids 0 to 95, got 96"):
        make_m2m().generate(input_ids=torch.tensor([[3, 96]]), **EN)


# A row's own limits and ends


def test_a_budget_counts_from_the_rows_own_prompt():
    model, x = make_m2m(), features(2)
    for choice in ({"draft": False}, {"k": 1}, {"k": "inf"}):  # "inf" steps over the limit of either
        both = model.generate(
            x, language="en", target_language=["en", "de"], max_new_tokens=6, **choice,
            return_dict_in_generate=True,
        )  # fmt: skip
        for row, target in enumerate(("en", "de")):
            alone = model.generate(
                x[row : row + 1], language="en", target_language=target, max_new_tokens=6, **choice,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert both.sequences[row, : both.stats[row].tokens].tolist() == alone.sequences[0].tolist()
            for figure in ("tokens", "steps", "drafted", "accepted"):
                assert getattr(both.stats[row], figure) == getattr(alone.stats[0], figure)


# Streamers


@pytest.mark.parametrize("draft", [False, True])
def test_a_streamer_may_skip_the_prompt(draft):
    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, ids)) + " "

    model, x = make_m2m(), features(1)
    for skip, prompt in ((True, []), (False, [START, 81, 84, 86])):
        streamer = TextIteratorStreamer(Words(), skip_prompt=skip)
        out = model.generate(x, **EN, streamer=streamer, draft=draft)
        assert "".join(streamer).split() == list(map(str, [*prompt, *out[0].tolist()]))


# NaN


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_refused_where_they_are(bad):
    model, x = make_m2m(), features(2)
    states = model.encode(x)
    x[1, 3, 5] = bad
    states[1, 2, 7] = bad
    with pytest.raises(ValueError, match=r"^input_features must be finite, got .* at \[1, 3, 5\]"):
        model.generate(x)
    with pytest.raises(ValueError, match=r"^encoder_states\[1\] must be finite, got .* at \[2, 7\]"):
        model.generate(encoder_outputs=(states,))


@pytest.mark.parametrize("settings", [{}, EN])
def test_weights_that_are_not_numbers_are_no_language_and_no_text(settings):
    model = make_m2m()
    torch.nn.init.constant_(model.model.decoder.layers[0].fc2.weight, torch.nan)
    with pytest.raises(ValueError, match=r"the logits of row 0 at position . must be numbers"):
        model.generate(features(1), **settings)


# Threads


def test_threads_share_a_model():
    """Each thread's texts are those that it would get alone, with the kept engine and with another."""
    model = make_m2m()
    clips = [features(1) for _ in range(3)]
    shared = model.engine(1, 20)
    expected = [model.generate(x).tolist() for x in clips]
    found: list[list[Any]] = [[] for _ in clips]

    def work(i):
        for engine in (shared, None) * 4:
            try:
                found[i].append(model.generate(clips[i], engine=engine).tolist())
            except Exception as error:  # a thread's own would only be printed
                found[i].append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(clips))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[each] * 8 for each in expected]


def test_an_utterance_is_decoded_under_the_lock():
    """A second thread waits until the first one's last token is read."""
    model = make_m2m()
    engine, (states,) = model.engine(1, 20), model.encode(features(1))
    order: list[str] = []

    def second():
        decode(engine, [states], [[START]], eos=-1, max_length=3, draft=False)
        order.append("second")

    thread = threading.Thread(target=second)

    def first(row, new):
        if not order:
            thread.start()
            thread.join(0.2)
        order.append("first")

    result = decode(engine, [states], [[START]], eos=-1, max_length=9, draft=False, streamer=first)
    thread.join()
    assert order == ["first"] * (len(result.sequences[0]) - 1) + ["second"]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_streamer_cannot_use_the_engine_that_feeds_it(at):
    """At the prompt, after the first token or later; the model answers as ever afterwards."""
    model, x = make_m2m(), features(1)
    expected = model.generate(x, **EN)
    said: list[int] = []

    class Asks:
        def put(self, ids):
            said.append(len(said))
            if len(said) == at + 1:
                model.generate(x, **EN)

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="engine must be free, got one that another call is using"):
        model.generate(x, **EN, streamer=Asks())
    assert len(said) == at + 1
    assert torch.equal(model.generate(x, **EN), expected)


# The kept engine


def test_weights_are_packed_once(monkeypatch):
    model, x, made = make_m2m(), features(2), packings(monkeypatch)
    for length in (20, 40, 30):
        model.generate(x[:, :, :length], **EN)
    assert len(made) == 1
    model.generate(x[:1], **EN)
    assert len(made) == 2


def by_an_optimizer(weight):
    with torch.no_grad():
        weight.add_(0.5)


def by_its_data(weight):
    weight.data.neg_()


def by_one_number_of_its_data(weight):
    weight.data[3, 5] += 0.25


def by_rows_in_another_order(weight):
    weight.data.copy_(weight.data.flip(0))


def by_new_memory(weight):
    weight.data = torch.randn_like(weight)


@pytest.mark.parametrize(
    "change",
    [by_an_optimizer, by_its_data, by_one_number_of_its_data, by_rows_in_another_order, by_new_memory],
)
def test_the_kept_engine_follows_the_weights(change, monkeypatch):
    model, x, made = make_m2m(), features(1), packings(monkeypatch)
    model.generate(x, **EN)
    change(model.model.decoder.layers[1].fc1.weight)
    found = model.generate(x, **EN)
    assert len(made) == 2
    assert torch.equal(model.generate(x, **EN, engine=model.engine(1, 20)), found)


def test_the_kept_engine_follows_dtype_and_inference_mode():
    model, x = make_m2m(), features(1)
    expected = model.generate(x, **EN)
    with torch.inference_mode():
        assert torch.equal(model.generate(x, **EN), expected)
        loaded = copy.deepcopy(model)
        assert torch.equal(loaded.generate(x, **EN), expected)
    half = model.to(torch.bfloat16)
    assert torch.equal(half.generate(x, **EN), half.generate(x, **EN, engine=half.engine(1, 20)))


def test_the_kept_engine_goes_with_its_model(tmp_path):
    """It is neither copied nor saved with the model, and freed with it."""
    model, x = make_m2m(), features(1)
    expected = model.generate(x, **EN)
    engine = weakref.ref(packed._kept[model].engine)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    assert other not in packed._kept
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.weight.neg_()
    other.generate(x, **EN)
    assert packed._kept[model].engine is engine()
    assert torch.equal(model.generate(x, **EN), expected)
    del model
    gc.collect()
    assert engine() is None


# transformers' Trainer


@pytest.mark.parametrize("length", [None, 9])
def test_trainer_predicts_with_generate(tmp_path, length):
    """Twice, since the Trainer writes transformers' defaults into the model's generation configuration."""
    model, x = make_m2m(), features(3)
    expected = model.generate(x, **({} if length is None else {"max_length": length}))

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            return {"input_features": x[row], "labels": torch.arange(5)}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        per_device_eval_batch_size=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        generation_max_length=length,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=Clips(), eval_dataset=Clips())
    # Two clips of the same loss, accumulated: their mean, not their sum.
    labels = torch.arange(5)[None]
    losses = [float(model(input_features=clip[None], labels=labels).loss) for clip in x]
    assert min(losses) <= trainer.train().training_loss <= max(losses)
    for _ in range(2):
        predictions = torch.from_numpy(trainer.predict(Clips()).predictions)
        for row, tokens in enumerate(expected):
            made = tokens[: int((tokens == EOS).int().argmax()) or len(tokens)]
            assert predictions[row, : len(made)].tolist() == made.tolist()
