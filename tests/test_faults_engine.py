"""Faults of the engine: entered twice, forked, given more threads than there are, absurd sizes."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from ctypes import byref, c_int32
from pathlib import Path

import numpy as np
import pytest
import torch

from kvspn.engines import backends, engine
from kvspn.weights.decoder import named_tensors
from kvspn.weights.random import random_decoder
from support import abi

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def lib():
    from kvspn import _native

    return abi.library(_native.__file__)


def begun(**sizes):
    e = engine("native", random_decoder(), batch=1, capacity=12, cross_capacity=6, **sizes)
    e.start([torch.ones(4, 16)], [[1, 2]], eos=-1, max_length=12)
    return e


def test_one_engine_in_many_threads(monkeypatch):
    """A call is made, or refused as a whole: the tokens are those of one thread."""
    expected = begun()
    while not expected.finished.all():
        expected.step()
    for attempt in range(5):
        e, wrong = begun(), []

        def work(e=e, wrong=wrong):
            while not e.finished.all():
                try:
                    e.step()
                except RuntimeError as error:
                    if not str(error).startswith("engine must be free, got one that another call is using"):
                        wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong, attempt
        assert torch.equal(e.tokens, expected.tokens)


@pytest.mark.parametrize("call", ["start", "step", "run"])
def test_a_call_meanwhile_is_refused(call):
    """From within a call, so that no race decides: it names the engine and changes nothing."""
    e = begun()
    arguments = {
        "start": (([torch.ones(4, 16)], [[3]]), {"eos": -1, "max_length": 12}),
        "step": ((), {}),
        "run": ((), {"steps": 2}),
    }
    inner, errors = e._step, []

    def step(*given):
        with pytest.raises(RuntimeError, match=r"^engine must be free, got one that another call is using"):
            getattr(e, call)(*arguments[call][0], **arguments[call][1])
        errors.append(call)
        inner(*given)

    e._step = step
    e.step()
    assert errors == [call]
    assert e.stats[0, 0] == 1


def test_the_callback_may_call_the_engine(lib):
    """on_step stands between two steps: it may read, roll back and bind; and what it binds goes on."""
    status, made = abi.create(lib, abi.random_weights())
    assert status == abi.OK
    values, other = abi.arrays(), abi.arrays()
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    assert lib.kvspn_engine_encode(made, 0, byref(states)) == abi.OK
    assert lib.kvspn_engine_prefill(made, 0, 2) == abi.OK
    seen = []

    def on_step(context):
        seen.append(abi.statistics(lib, made, 0)["steps"])
        if len(seen) == 3:
            other["finished"][:] = True
            assert lib.kvspn_engine_bind(made, byref(abi.batch(other))) == abi.OK
        return 0

    assert lib.kvspn_engine_generate(made, byref(abi.generate(on_step=on_step))) == abi.OK
    assert seen == [1, 2, 3]
    assert not values["finished"][0]
    lib.kvspn_engine_destroy(made)


@needs_fork
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("use", [True, False], ids=["uses", "ends"])
def test_a_forked_child(monkeypatch, set_threads, threads, use):
    """It goes on with its copy of the engine, starting the threads again; and it ends."""
    monkeypatch.setattr("kvspn.engines.native.default_threads", lambda: threads)
    set_threads(threads)
    e = begun()
    set_threads(1)  # torch's own threads play no part
    e.run(steps=2)
    child = os.fork()
    if not child:
        code = 1
        try:
            if use:
                e.run(steps=20)
                code = 0 if e.finished.all() else 2
            else:
                code = 0
            del e
        finally:
            os._exit(code)
    deadline = threading.Timer(60, os.kill, (child, 9))
    deadline.start()
    assert os.waitpid(child, 0)[1] == 0
    deadline.cancel()
    e.run(steps=20)
    assert e.finished.all()


def test_threads_by_default(lib):
    """As many as the process may use cores: those of its affinity, of which a child may have fewer."""
    most = lib.kvspn_default_threads()
    assert 1 <= most <= len(os.sched_getaffinity(0))
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from kvspn import _native; print(_native.default_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b\n", {}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "cpu.max": "100000 50000", "a/cpu.max": "9 1"}, 2),
        ("0::/a\n", {"a/cpu.max": "20000 100000"}, 1),
        ("0::/../gone\n", {"cpu.max": "400000 100000"}, 4),
        (
            "3:memory:/x\n2:cpu,cpuacct:/y\n",
            {"cpu/y/cpu.cfs_quota_us": "250000", "cpu/y/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("2:cpuset:/y\n1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
        ("nonsense\n1:cpu\n", {}, 0),
    ],
)
def test_cores_that_control_groups_grant(tmp_path, program, groups, files, cores):
    """Whole ones, at least 1; what is above a group limits it, too; 0 is no limit."""
    (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    done = subprocess.run([program, tmp_path / "groups", tmp_path / "mount"], capture_output=True, text=True)
    assert done.stdout == f"{cores}\n", done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """csrc/tests/cores.cpp, compiled."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("cores") / "cores"
    sources = [ROOT / "csrc" / "tests" / "cores.cpp", ROOT / "csrc" / "common" / "cores.cpp"]
    subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", made], check=True)
    return made


MANY_THREADS = """
import resource
from support import abi
from kvspn import _native
lib, weights = abi.library(_native.__file__), abi.random_weights()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(abi.create(lib, weights, abi.params(threads=1024))[0], lib.kvspn_last_error().decode())
print(abi.create(lib, weights, abi.params(threads=3))[0])
"""


def test_more_threads_than_the_system_grants():
    """A status, not the end of the process; those that had started are gone again."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_THREADS],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("1 threads must be no more than the system grants, "), done.stderr
    assert second == "0"


ABSURD = (-1, -(2**63), 2**63 - 1, 2**31, 2**61, 2**62)


@pytest.mark.parametrize("size", ABSURD)
def test_sizes_that_would_wrap(lib, size):
    """Bounded before they are multiplied, whatever tensor and dimension they are in."""
    weights = abi.random_weights()
    tensors = [abi.Tensor.of(name, array) for name, array in weights.items()]
    head = next(tensor for tensor in tensors if tensor.name == b"head.weight")
    head.dtype, head.shape[1], head.strides[0] = 6, 8, 8  # int4
    scale = abi.Tensor.of("head.scale", np.ones((29, 1), np.float32))
    scale.shape[1] = size
    tensors.append(scale)
    made = ctypes.c_void_p()
    array = (abi.Tensor * len(tensors))(*tensors)
    assert lib.kvspn_engine_create(byref(abi.params()), array, len(tensors), byref(made)) == abi.INVALID
    assert b"head.scale must" in lib.kvspn_last_error()

    q, kv = np.ones((1, 2, 3, 4), np.float32), np.ones((2, 2, 1, 2, 5, 4), np.float32)
    lengths, out = np.array([3], np.int32), np.zeros((1, 3, 8), np.float32)
    for name, tensor in (("q", q), ("kv", kv), ("lengths", lengths), ("out", out)):
        for dimension in range(tensor.ndim):
            given = abi.attention(q, kv, lengths, out)
            getattr(given, name).shape[dimension] = size
            assert lib.kvspn_flat_kv_attention(byref(given)) == abi.INVALID, (name, dimension)
            assert b" must " in lib.kvspn_last_error()
            if size == -1:
                continue
            given = abi.attention(q, kv, lengths, out)
            getattr(given, name).strides[dimension] = size
            if size != 2**31:
                assert lib.kvspn_flat_kv_attention(byref(given)) == abi.INVALID, (name, dimension)
                assert b" must " in lib.kvspn_last_error()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 3), "first must be 0 to 2, got 3"),  # two are in the cache
        ((-1, 4, 3), "first must be 0 to 2, got -1"),
        ((2, 1, 0), "first must be 0 to 1, got 2"),
        ((1, 13, 3), "count must be 0 to 12, got 13"),
        ((1, 4, 0), "position must be 1 to 3, got 0"),
        ((1, 4, 4), "position must be 1 to 3, got 4"),
        ((1, 4, 3, np.zeros(28, np.float32)), "logits must have shape"),
        ((1, 4, 3, np.zeros(58, np.float32)[::2]), "logits must be contiguous"),
        ((1, 4, 3, np.zeros(29, np.int32)), "logits must be fp32"),
    ],
)
def test_prefill_from_refuses(lib, arguments, message):
    *places, logits = arguments if len(arguments) == 4 else (*arguments, np.zeros(29, np.float32))
    status, made = abi.create(lib, abi.random_weights())
    assert status == abi.OK
    values = abi.arrays()
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    assert lib.kvspn_engine_encode(made, 0, byref(states)) == abi.OK
    assert lib.kvspn_engine_prefill(made, 0, 2) == abi.OK
    before = {name: value.tobytes() for name, value in values.items()}
    given = abi.Tensor.of("logits", logits)
    assert lib.kvspn_engine_prefill_from(made, 0, *places, byref(given)) == abi.INVALID
    assert lib.kvspn_last_error().decode().startswith(message)
    assert all(value.tobytes() == before[name] for name, value in values.items())
    assert lib.kvspn_engine_prefill_from(made, 0, 1, 4, 7, None) == abi.OK  # a position that nothing reads
    assert values["lengths"][0] == 4
    lib.kvspn_engine_destroy(made)


@pytest.mark.parametrize("length", [2**31 - 1, -(2**31), -1, 12, 13, 11, 1])
def test_progress_looks_at_its_own_tokens_alone(lib, length):
    """Whatever the caller's lengths hold: of 12 tokens there are never more than 12."""
    status, made = abi.create(lib, abi.random_weights())
    assert status == abi.OK
    values = abi.arrays()
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    assert lib.kvspn_engine_encode(made, 0, byref(states)) == abi.OK
    assert lib.kvspn_engine_prefill(made, 0, 2) == abi.OK
    values["lengths"][0] = length
    tokens, count = (c_int32 * 12)(), c_int32()
    assert lib.kvspn_engine_progress(made, 0, tokens, 12, byref(count)) == abi.OK
    assert count.value == max(min(length, 11) - 2, 0)
    lib.kvspn_engine_destroy(made)


def test_a_mask_of_another_length():
    e = begun()
    with pytest.raises(ValueError, match=r"^mask must be fp32 and contiguous, \[29\], got another tensor"):
        e._made.choose(mask=torch.zeros(1))


def test_no_token_in_the_c_abi(lib):
    """A status of its own; the row is finished with -1, and the error names it."""
    weights = abi.random_weights()
    weights["embed_tokens"][7] = np.nan
    status, made = abi.create(lib, weights)
    assert status == abi.OK
    values = abi.arrays()
    values["tokens"][0, 2] = 7
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    assert lib.kvspn_engine_encode(made, 0, byref(states)) == abi.OK
    assert lib.kvspn_engine_prefill(made, 0, 2) == abi.OK
    assert lib.kvspn_engine_step(made, byref(abi.step())) == abi.NO_TOKEN
    assert lib.kvspn_last_error().startswith(b"the logits of row 0 at position 2 must be numbers")
    assert (values["tokens"][0, 3], values["lengths"][0], values["finished"][0]) == (-1, 3, True)
    nan = abi.Tensor.of("states", np.full((4, 16), np.nan, np.float32))
    assert lib.kvspn_engine_encode(made, 0, byref(nan)) == abi.INVALID
    assert lib.kvspn_last_error() == b"states must be finite, got NaN or infinity"
    lib.kvspn_engine_destroy(made)


def test_strides_of_a_draft_vocabulary():
    """Token ids in steps of three, as a view: the drafts are those of the ids side by side."""
    weights = random_decoder(vocabulary=60, short_list=20)
    named = {name: tensor.numpy() for name, tensor in named_tensors(weights)}
    apart = np.repeat(named["draft_ids"], 3)[::3]
    apart.base[1::3] = 0
    assert apart.strides == (12,)
    found = []
    for ids in (named["draft_ids"], apart):
        from kvspn import _native

        sizes = {"layers": 2, "heads": 2, "blocks": 1, "groups": 1, "last_layer_only": False, "threads": 1}
        made, values = _native.Engine(named | {"draft_ids": ids}, **sizes), abi.arrays()
        made.bind(**values)
        made.encode(0, np.ones((4, 16), np.float32))
        made.prefill(0, 2)
        made.run(k=2**31 - 1, eos=-1, max_length=12, draft=True, steps=20)
        found.append(values["tokens"].tolist())
    assert found[0] == found[1]


def test_statistics_of_every_row_are_in_the_sum(lib):
    status, made = abi.create(lib, abi.random_weights())
    assert status == abi.OK
    values = abi.arrays(rows=3)
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    for row in range(3):
        assert lib.kvspn_engine_encode(made, row, byref(states)) == abi.OK
        assert lib.kvspn_engine_prefill(made, row, row + 1) == abi.OK
    assert lib.kvspn_engine_generate(made, byref(abi.generate())) == abi.OK
    each = [abi.statistics(lib, made, row) for row in range(3)]
    assert all(one["steps"] and one["drafted"] for one in each)
    for name, total in abi.statistics(lib, made, -1).items():
        assert total == sum(one[name] for one in each), name
    lib.kvspn_engine_destroy(made)


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, -(2**31) - 1])
def test_integers_that_would_wrap(number):
    """In torch.ops itself, which nothing in Python checks beforehand."""
    kv, new = torch.zeros(2, 2, 1, 1, 4, 4), torch.ones(1, 1, 1, 4)
    lengths = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"layer must fit into 32 bits, got {number}"):
        torch.ops.kvspn.append_kv(kv, new, new, lengths, number)
    assert not kv.any()
    tokens, finished = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.bool)
    stats, draft = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32)
    for k, eos, length, name in ((number, -1, 8, "k"), (1, number, 8, "eos"), (1, -1, number, "max_length")):
        with pytest.raises(RuntimeError, match=rf"{name} must fit into 32 bits, got {number}"):
            torch.ops.kvspn.accept_and_rollback(
                tokens, lengths, finished, stats, draft, lengths[:, None], draft, k, eos, length
            )
