"""Sound to text by one file in C++, beside `kvspn.WhisperModel`; damaged files, and NumPy alone."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kvspn
from kvspn.cli import app
from kvspn.engines import backends
from kvspn.speech.translator import Translator
from support import tiny
from support.abi import INVALID, OK, Statistics, library

pytestmark = [
    pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built"),
    pytest.mark.filterwarnings("ignore:the text of"),
]
SECONDS = 7.3  # four windows of 2 s, at least


def quantize(folder: Path, file: Path, *options: str) -> Path:
    made = CliRunner().invoke(app, ["quantize", str(file), "--model", str(folder), *options])
    assert made.exit_code == 0, made.output
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return quantize(folder, folder.with_name("one.safetensors"), "--weights", "fp32")


def said(segments: Any) -> list[tuple[float, float, str, list[int]]]:
    return [(each.start, each.end, each.text, each.tokens) for each in segments]


@pytest.mark.parametrize(
    ("weights", "encoder", "language", "target", "timed"),
    [
        ("fp32", "fp32", None, None, True),
        ("fp32", "fp32", "zh", "en", False),
        ("int8", "bf16", "de", None, True),
        ("int8", "int8", None, "en", False),
    ],
)
def test_as_whisper_model(folder, tmp_path, weights, encoder, language, target, timed):
    """Text, times and figures, of several windows."""
    from kvspn import _native

    made = _native.Model(
        str(quantize(folder, tmp_path / "a", "--weights", weights, "--encoder-format", encoder)), threads=1
    )
    model = kvspn.WhisperModel(
        str(folder),
        "cpu",
        compute_type={"fp32": "float32", "int8": "int8"}[weights],
        backend="native",
        encoder_format=encoder,
    )
    samples = tiny.sound(SECONDS)
    expected, info = model.transcribe(
        samples,
        language,
        "translate" if target else "transcribe",
        temperature=0.0,
        condition_on_previous_text=False,
        without_timestamps=not timed,
    )
    with warnings.catch_warnings(record=True) as cut:
        warnings.simplefilter("always")
        expected = list(expected)
    found = made.transcribe(samples, language=language, target=target, without_timestamps=not timed)
    assert len(found) >= 4
    assert said(found) == said(expected)
    for name in ("avg_logprob", "no_speech_prob"):
        assert [getattr(each, name) for each in found] == pytest.approx(
            [getattr(each, name) for each in expected], abs=1e-3
        )
    assert sum(each.cut for each in found) == sum("is cut short" in str(each.message) for each in cut)
    assert {each.language for each in found} == {info.language}
    assert found[0].language_probability == pytest.approx(info.language_probability, abs=1e-3)
    assert said(
        made.transcribe(samples, language=info.language, target=target, without_timestamps=not timed)
    ) == (said(found))


def test_threads_and_what_was_heard_before_change_nothing(file):
    from kvspn import _native

    one, three = (_native.Model(str(file), threads=threads) for threads in (1, 3))
    long, short = tiny.sound(SECONDS), tiny.sound(0.9, seed=1)
    alone = said(one.transcribe(short))
    assert alone
    for model in (three, one):
        assert said(model.transcribe(long)) == said(one.transcribe(long))
        assert said(model.transcribe(short)) == alone
    assert one.transcribe(np.zeros(0, np.float32)) == []
    one.transcribe(tiny.sound(0.001))


def test_a_draft_network_and_targets(tmp_path):
    """A whisperM2M without timestamps: the same text as Python's translator, in fewer steps than tokens."""
    from kvspn import _native

    folder = tiny.save_model(tmp_path / "m2m", encoder_output_positions=True)
    model = _native.Model(str(quantize(folder, tmp_path / "a", "--weights", "fp32")), threads=1)
    translator = Translator.from_folder(folder, "native", encoder_format="fp32")
    samples = tiny.sound(1.7)
    for source, target in (("en", "de"), ("zh", "zh"), ("fr", "en")):
        expected = translator.translate(samples, target, source)
        [found] = model.transcribe(samples, language=source, target=target)
        assert found.text.strip() == expected.text
        assert (found.start, found.end) == (0, 1.7)


def test_english_only(tmp_path):
    from kvspn import _native

    model = tiny.whisper(tiny.tokenizer())
    model.generation_config.is_multilingual = False
    english = tmp_path / "english"
    model.save_pretrained(english)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (english / name).write_bytes((tiny.save_model(tmp_path / "m") / name).read_bytes())
    samples = tiny.sound(1.5)
    made = _native.Model(str(quantize(english, tmp_path / "a", "--weights", "fp32")), threads=1)
    expected = Translator.from_folder(english, "native", encoder_format="fp32").translate(samples)
    [found] = made.transcribe(samples)
    assert (found.text.strip(), found.language) == (expected.text, "en")
    with pytest.raises(ValueError, match="language must be the code of one that the model knows, got de"):
        made.transcribe(samples, language="de")


def test_wrong_arguments(file, tmp_path):
    from kvspn import _native

    model = _native.Model(str(file), threads=1)
    samples = tiny.sound(0.5)
    damaged = samples.copy()
    damaged[7] = np.nan
    for arguments, message in (
        ({"samples": damaged}, "samples must be finite, got nan at 7"),
        ({"samples": samples.astype(np.float64)}, "samples must be fp32"),
        ({"samples": samples[None]}, "samples must be fp32 and contiguous, of one dimension"),
        ({"samples": samples[::2]}, "samples must be fp32 and contiguous, of one dimension"),
        ({"language": "german"}, "language must be the code of one that the model knows, got german"),
        ({"target": "xx"}, "target must be the code of a language that the model knows, got xx"),
        (
            {"language": "de", "target": "fr"},
            "target must be the language spoken, de, or one that the model was taught .*, got fr",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.transcribe(**{"samples": samples, **arguments})
    for arguments, message in (
        ({"threads": 1025}, "threads must be 0 to 1024, got 1025"),
        ({"variant": "sse9"}, "variant must be amx"),
        ({"path": str(tmp_path / "none")}, "path must be a file that can be read, got .*none: No such file"),
        ({"path": str(tmp_path)}, "path must be a model's file, got"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.Model(**{"path": str(file), **arguments})


def rewrite(file: Path, to: Path, change: Callable[[dict[str, Any]], str | None]) -> Path:
    """The file with a changed header, or with the text that `change` returns in its place."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    text = change(header) or json.dumps(header)
    text += " " * (-len(text) % 8)
    to.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + size :])
    return to


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


META = "__metadata__"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(META, "no_speech"), "no_speech must be said in the file's metadata"),
        (put(META, "eos", value="x"), "eos must be 0 to"),
        (put(META, "start", value="99999"), "start must be 0 to"),
        (
            put(META, "encoder_format", value="2"),
            "format must be KVSPN_FP32, KVSPN_BF16 or KVSPN_INT8, got 2",
        ),
        (put(META, "heads", value="5"), "embed_tokens must be a multiple of 5 heads wide"),
        (put(META, "language.de", value="-1"), "language.de must be 0 to"),
        (without(META, "task.translate"), "task.transcribe and task.translate must be said"),
        (put("mask", "dtype", value="F64"), "mask must be F32, BF16"),
        (put("mask", "dtype", value="F16"), "mask must lie in"),
        (put("mask", "data_offsets", value=[0, 2**58]), "mask must lie in"),
        (put("mask", "data_offsets", value=[3]), "mask must lie in"),
        (put("mask", "shape", value=[2**40, 2**40]), "mask must have at most 2.40 elements"),
        (put("mask", "shape", value=[-1]), "the model's header must have whole numbers there"),
        (put("mask", "shape", value=[1] * 7), "mask must have at most 6 dimensions, got 7"),
        (without("vocabulary.ends"), "vocabulary.ends must be in the model's file, got none"),
        (without("encoder.conv2.bias"), "encoder.conv2.bias must be among the weights"),
        (without("norm.weight"), "norm.weight must be among the weights"),
        (lambda header: "[]", "the model's header must go on with {"),
        (lambda header: '{"a', "the model's header must have strings that end"),
        (lambda header: '{"a":{"dtype":"F32"', "the model's header must go on with }"),
        (lambda header: '{"a\\n":1}', "the model's header must have strings that end, without"),
        (lambda header: json.dumps(header)[:-1] + ', "mask": {}}', "mask must be F32"),
    ],
)
def test_damaged_headers(file, tmp_path, change, message):
    from kvspn import _native

    with pytest.raises(ValueError, match=message):
        _native.Model(str(rewrite(file, tmp_path / "a", change)), threads=1)


def test_cut_files(file, tmp_path):
    """Wherever a file ends too early, it is refused."""
    from kvspn import _native

    content, cut = file.read_bytes(), tmp_path / "a"
    for size in (0, 7, 8, 9, 500, 5000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="must "):
            _native.Model(str(cut), threads=1)


def test_every_byte_becomes_text(file, tmp_path):
    """As Python has it, whatever bytes the tokens are: cut, overlong, surrogates, beyond U+10FFFF."""
    from kvspn import _native

    content = bytearray(file.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    first, end = (8 + size + offset for offset in header["vocabulary.bytes"]["data_offsets"])
    begin, last = (8 + size + offset for offset in header["vocabulary.ends"]["data_offsets"])
    eos, samples = int(header[META]["eos"]), tiny.sound(3)
    heard = _native.Model(str(file), threads=1).transcribe(samples, language="de")
    used = {token for segment in heard for token in segment.tokens if token < eos}
    # Eight bytes for each token that comes, none for the others.
    ends = np.cumsum([8 * (token in used) for token in range((last - begin) // 4)], dtype=np.int32)
    assert ends[-1] <= end - first
    content[begin:last] = ends.tobytes()
    pieces = [
        bytes.fromhex(each)
        for each in ["41", "20", "ff", "c0af", "e08080", "eda080", "edbfbf", "f4908080", "f08fbfbf"]
    ]
    pieces += ["é".encode(), "你".encode(), "🙂".encode(), "🙂".encode()[:3], "你".encode()[1:]]
    random = np.random.default_rng(0)
    for _ in range(5):
        bytes_ = b"".join(pieces[i] for i in random.integers(0, len(pieces), end - first))[: end - first]
        content[first:end] = bytes_
        (tmp_path / "a").write_bytes(content)
        found = _native.Model(str(tmp_path / "a"), threads=1).transcribe(samples, language="de")
        for segment in found:
            spoken = b"".join(bytes_[ends[i] - 8 : ends[i]] for i in segment.tokens if i < eos)
            assert segment.text == spoken.decode(errors="replace")
        assert [segment.tokens for segment in found] == [segment.tokens for segment in heard]


def test_without_torch(file, tmp_path):
    """NumPy alone, and what it imports: neither torch nor transformers."""
    np.save(tmp_path / "a.npy", tiny.sound(1))
    code = (
        "import sys, numpy\nfrom kvspn import _native\n"
        f"model = _native.Model({str(file)!r}, threads=1)\n"
        f"print([s.text for s in model.transcribe(numpy.load({str(tmp_path / 'a.npy')!r}))])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TranscribeParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("without_timestamps", ctypes.c_int32),
        ("language", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("on_segment", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)),
        ("context", ctypes.c_void_p),
        ("statistics", ctypes.POINTER(Statistics)),
    )


def test_the_c_abi(file):
    """A callback stops it; a model is busy meanwhile; statistics; null pointers."""
    from kvspn import _native

    lib = library(_native.__file__)
    lib.kvspn_model_close.argtypes = [ctypes.c_void_p]
    lib.kvspn_transcribe.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    model = ctypes.c_void_p()
    assert lib.kvspn_model_open(str(file).encode(), None, ctypes.byref(model)) == OK
    samples = tiny.sound(SECONDS)
    seen = []
    total = Statistics(ctypes.sizeof(Statistics))
    on_segment = TranscribeParams._fields_[4][1]

    def call(params, count=None, of=model):
        size = len(samples) if count is None else count
        return lib.kvspn_transcribe(of, samples.ctypes.data, size, ctypes.byref(params) if params else None)

    def note(context, segment):
        seen.append((total.tokens, call(params), lib.kvspn_last_error()))
        return len(seen) == 2

    params = TranscribeParams(ctypes.sizeof(TranscribeParams), on_segment=on_segment(note))
    params.statistics = ctypes.pointer(total)
    assert call(params) == OK
    assert len(seen) == 2
    assert [each[1:] for each in seen] == [(4, b"model must be free, got one that another call is using")] * 2
    assert 0 < seen[0][0] <= seen[1][0] == total.tokens
    assert (total.struct_size, total.drafted) == (ctypes.sizeof(Statistics), 0)
    assert total.steps == total.tokens
    nothing = TranscribeParams(ctypes.sizeof(TranscribeParams))
    for arguments, message in (
        ({"params": None}, b"params must be given, got a null pointer"),
        ({"params": nothing}, b"on_segment must be given, got a null pointer"),
        ({"params": params, "count": -1}, b"count must be at least 0, got -1"),
        ({"params": params, "of": None}, b"model must be given, got a null pointer"),
    ):
        assert call(**arguments) == INVALID
        assert lib.kvspn_last_error() == message
    lib.kvspn_model_close(model)
    lib.kvspn_model_close(None)
    assert lib.kvspn_model_open(None, None, ctypes.byref(model)) == INVALID
    assert lib.kvspn_last_error() == b"path must be given, got a null pointer"


def test_quantize_refuses_an_encoder_format(folder, tmp_path):
    result = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "a"), "--model", str(folder), "--encoder-format", "int4"]
    )
    assert result.exit_code != 0
    assert "--encoder-format must be one of fp32, bf16, int8, got int4" in result.output
