"""The Triton engine in the interpreter against the reference, and what its kernels compile to.

The ops' own tests (test_ops_*.py) run on its kernels too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvspn.assets import read_manifest
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, Timestamps
from kvspn.speech.audio import load_audio
from kvspn.speech.translator import Translator
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder
from support.caches import contents, poison, random_states, tokens_of

_HERE = all(map(find_spec, ("triton", "kvspn.triton_kernels")))
needs_triton = pytest.mark.skipif(not _HERE, reason="triton is not installed")
interpreted = pytest.mark.skipif(not _HERE or torch.cuda.is_available(), reason="needs triton, and no GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "flattened": {"layers": 4, "blocks": 2},
    "ablations": {"layers": 4, "blocks": 2, "last_layer_only": True, "encoder_attention": False},
    "strided": {"layers": 4, "blocks": 2, "encoder_stride": 3},
    "odd": {"heads": 3, "head_dim": 5, "ffn": 37, "vocabulary": 301, "draft_heads": 6},
    "short list": {"vocabulary": 150, "short_list": 70},
    "fp8": {"quantised": "fp8", "vocabulary": 67},
    "int8": {"quantised": "int8", "vocabulary": 67},
    "int4": {"quantised": "int4", "vocabulary": 67},
}


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    """conftest.py has defined the kernels for the interpreter; the backend is ready where it is wanted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def decode(
    backend: str,
    weights: DecoderWeights,
    rows: list[int],
    k: int = 1,
    draft: bool = True,
    kv: str | None = None,
    rules: Sequence[Rule] = (Rule(),) * 3,
):
    """Of three utterances those in `rows`, together, in buffers full of NaN: tokens, statistics, caches."""
    states = random_states(weights, (7, 1, 11))
    prompts = [[1, 2, 3], [4], list(range(5, 9))]
    e = engine(backend, weights, batch=len(rows), capacity=12, cross_capacity=13, kv=kv)
    poison(e.cache)
    rules = [rules[r] for r in rows]
    e.start([states[r] for r in rows], [prompts[r] for r in rows], eos=0, max_length=12, rules=rules)
    for _ in range(3):
        e.step(k, draft)
    return tokens_of(e), e.stats.tolist(), contents(e.cache)


@interpreted
@pytest.mark.parametrize(("shape", "kv"), [*((shape, None) for shape in SHAPES), ("flattened", "int8")])
def test_equals_the_reference(shape, kv):
    """The same tokens and statistics, and a cache within fp32's rounding, or a step of int8."""
    weights = random_decoder(**SHAPES[shape])
    k = K_INF if shape == "odd" else 2
    expected, stats, caches = decode("reference", weights, [0, 1, 2], k, kv=kv)
    tokens, found_stats, found = decode("triton", weights, [0, 1, 2], k, kv=kv)
    assert tokens == expected
    assert found_stats == stats
    for one, other in zip(found, caches, strict=True):
        step = other.abs().max() / 127 if kv else 0
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 + float(step))


@interpreted
@pytest.mark.parametrize(("dtype", "kv"), [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, "int8")])
def test_row_invariance_bit_for_bit(dtype, kv):
    """A row's cache does not depend on drafts or on the other rows."""
    weights = random_decoder(dtype=dtype)
    tokens, _, caches = decode("triton", weights, [0, 1, 2], draft=False, kv=kv)
    drafted, _, found = decode("triton", weights, [0, 1, 2], kv=kv)
    for row in range(3):
        shared = min(len(tokens[row]), len(drafted[row]))
        assert drafted[row][:shared] == tokens[row][:shared]
        assert torch.equal(found[row][..., : shared - 1, :], caches[row][..., : shared - 1, :])
    alone, _, found = decode("triton", weights, [2], draft=False, kv=kv)
    assert alone == [tokens[2]]
    assert torch.equal(found[0], caches[2])


@interpreted
def test_drafts_change_no_draw():
    """With top_k and timestamps: as without drafts, and on the reference."""
    weights = random_decoder(layers=2, blocks=1, vocabulary=60)
    rules = [Rule(), Rule(), Rule(1.0, 3, Timestamps(40, 0), 4)]
    ((plain,), _, _) = decode("triton", weights, [2], draft=False, rules=rules)
    ((drafted,), _, _) = decode("triton", weights, [2], rules=rules)
    ((expected,), _, _) = decode("reference", weights, [2], rules=rules)
    assert drafted == expected
    assert drafted[: len(plain)] == plain


@interpreted
def test_finished_rows_stay_untouched():
    weights = random_decoder()
    e = engine("triton", weights, batch=2, capacity=9, cross_capacity=4)
    e.start(torch.randn(2, 3, 16), [[1, 2, 3], [4]], eos=-1, max_length=3)
    state = [getattr(e, name) for name in ("tokens", "lengths", "finished", "stats")] + [e.cache.kv[:, :, 0]]
    addresses, before = [each.data_ptr() for each in state], [each.clone() for each in state]
    e.step()
    for each, old in zip(state[:4], before[:4], strict=True):
        assert torch.equal(each[0], old[0])
    assert torch.equal(state[4].nan_to_num(7), before[4].nan_to_num(7))
    assert e.lengths[1] > 0
    assert [each.data_ptr() for each in state] == addresses


@interpreted
@pytest.mark.parametrize("op", ["append_kv", "flat_kv_attention", "lm_head_verify", "accept_and_rollback"])
def test_opcheck(op):
    from test_ops_contract import int8_sample, sample

    for arguments in filter(None, (sample(op), int8_sample(op))):
        torch.library.opcheck(getattr(torch.ops.kvspn_triton, op).default, (), arguments)


@interpreted
def test_errors_are_the_contracts():
    from kvspn import triton_kernels

    with pytest.raises(ValueError, match=r"^lengths must have shape \[B=1\], got \[2\]"):
        triton_kernels.append_kv(
            torch.zeros(1, 2, 1, 1, 4, 2), *torch.zeros(2, 1, 1, 1, 2), torch.zeros(2, dtype=torch.int32), 0
        )


@interpreted
def test_the_miniature_translates():
    """The bundled model and a clip of speech: the reference's first tokens, with drafts and without."""
    clip = min(read_manifest("demo"), key=lambda each: each.audio.stat().st_size)
    samples = load_audio(clip.audio)
    found = {}
    for backend, draft in (("reference", False), ("triton", True)):
        translator = Translator.from_folder(backend=backend)
        features = translator.processor(samples, sampling_rate=16000).input_features
        found[backend] = translator.model.generate(
            features,
            language=clip.language,
            target_language="it",
            max_new_tokens=6,
            draft=draft,
            engine=translator.engine,
        ).tolist()
    assert found["triton"] == found["reference"]


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process without the interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)


@needs_triton
def test_export(tmp_path: Path):
    """Binaries and a header that C compiles, one entry for each."""
    done = compiled("kvspn", "export-kernels", "--target", "cuda:90", str(tmp_path))
    assert done.returncode == 0, done.stderr
    header = (tmp_path / "kvspn_kernels.h").read_text()
    files = re.findall(r'"(\w+\.cubin)"', header)
    assert sorted(files) == sorted(path.name for path in tmp_path.glob("*.cubin"))
    names = (
        "append_kv compact_kv attention_split attention_combine fused_linear vocabulary accept_and_rollback"
    )
    assert {re.sub(r"_fp16_\d+\.cubin", "", name) for name in files} >= set(names.split())
    compiler, root = shutil.which("cc"), Path(find_spec("triton").origin).parent
    if compiler:  # the example needs a GPU to run, and finds its kernel in the header before it asks for one
        example, program = Path(__file__).parents[1] / "examples/launch_cubin.c", tmp_path / "example"
        headers = [f"-I{folder}" for folder in (tmp_path, root / "backends/nvidia/include")]
        subprocess.run([compiler, "-Wall", "-Werror", *headers, example, "-ldl", "-o", program], check=True)
        ran = subprocess.run([program, tmp_path], capture_output=True, text=True)
        if ran.returncode:
            assert "usage" not in ran.stderr
        else:
            assert ran.stdout == "tokens 3 5 7 9, length 3\n"


@needs_triton
def test_an_unknown_target(tmp_path: Path):
    done = compiled("kvspn", "export-kernels", "--target", "cuda:75", str(tmp_path))
    assert done.returncode == 1
    assert "--target must be one of cuda:80" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = backends()["triton"]
    assert reason is not None
    assert reason.startswith(("no GPU; TRITON_INTERPRET=1", "triton is not installed"))


def test_import_leaves_triton_alone():
    """Importing kvspn and asking for the backends loads no Triton of its own accord."""
    code = "import sys, kvspn.engines; kvspn.engines.backends(); print('kvspn.triton_kernels' in sys.modules)"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


ROUNDED = """
import torch
import triton
from triton.compiler import ASTSource
from kvspn.triton_kernels import aot
from kvspn.triton_kernels.append_kv import launch_append_kv
from kvspn.triton_kernels.launch import recording
with torch.device("meta"), recording() as launches:
    k, kv = torch.empty(1, 2, 1, 64), torch.empty(3, 2, 1, 2, 9, 64, dtype=torch.int8)
    launch_append_kv(kv, k, k, torch.empty(1, dtype=torch.int32), 1, None, torch.empty(3, 2, 1, 2, 9))
(append,) = launches
source, target = ASTSource(append.kernel, *aot.specialise(append)), aot.parse_target("cuda:90")
made = triton.compile(source, target, aot.settings(append))
print(made.asm["ptx"].count("fma."))
"""


@needs_triton
def test_an_int8_cache_is_rounded_as_the_reference_rounds_it():
    """No product is fused into the sum that rounds it: that one would be rounded once, and not twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ROUNDED], env=environment, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
