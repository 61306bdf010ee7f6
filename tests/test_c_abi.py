"""The C ABI, called as a C program would: whatever it is handed, it answers with a status and a text."""

import ctypes
import random
from ctypes import byref, c_int32, c_uint32, c_void_p

import numpy as np
import pytest

from kvspn.engines import backends
from support.abi import (
    BATCH,
    COUNTS,
    INVALID,
    NO_TOKEN,
    OK,
    RUN,
    SCALES,
    AppendParams,
    AttentionParams,
    EngineParams,
    GenerateParams,
    LinearParams,
    Rule,
    Stage,
    Statistics,
    StepParams,
    Stream,
    Tensor,
    arrays,
    attention,
    batch,
    create,
    generate,
    library,
    params,
    random_weights,
    statistics,
    step,
)

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


@pytest.fixture(scope="module")
def lib():
    from kvspn import _native

    return library(_native.__file__)


@pytest.fixture
def weights():
    return random_weights()


@pytest.fixture(params=[False, True], ids=["", "int8"])
def started(lib, weights, request):
    """An engine with one utterance of three prompt tokens, and its batch."""
    status, engine = create(lib, weights)
    assert status == OK
    values = arrays(request.param)
    assert lib.kvspn_engine_bind(engine, byref(batch(values))) == OK
    states = np.random.default_rng(0).standard_normal((4, 16), np.float32)
    assert lib.kvspn_engine_encode(engine, 0, byref(Tensor.of("states", states))) == OK
    assert lib.kvspn_engine_prefill(engine, 0, 2) == OK
    yield engine, values
    lib.kvspn_engine_destroy(engine)


def test_generate_is_step_after_step(lib, started):
    engine, values = started
    while not values["finished"][0]:
        assert lib.kvspn_engine_step(engine, byref(step())) == OK
    tokens, stats = values["tokens"].copy(), values["stats"].copy()
    assert statistics(lib, engine, 0) == dict(zip(COUNTS, (9, *stats[0]), strict=True))
    assert statistics(lib, engine, -1) == statistics(lib, engine, 0)

    values["stats"][:] = 0
    values["tokens"][0, 3:] = 0
    assert lib.kvspn_engine_rollback(engine, 0, 2) == OK
    assert (values["lengths"][0], values["finished"][0]) == (2, False)
    calls = []
    assert lib.kvspn_engine_generate(engine, byref(generate(on_step=lambda _: calls.append(1) or 0))) == OK
    assert np.array_equal(values["tokens"], tokens)
    assert np.array_equal(values["stats"], stats)
    assert len(calls) == stats[0, 0]


def test_generate_stops(lib, started):
    """By max_steps, by the callback, and not at all where every row is finished."""
    engine, values = started
    assert lib.kvspn_engine_generate(engine, byref(generate(max_steps=2))) == OK
    assert statistics(lib, engine, 0)["steps"] == 2
    assert lib.kvspn_engine_generate(engine, byref(generate(on_step=lambda _: 1))) == OK
    assert statistics(lib, engine, 0)["steps"] == 3
    assert not values["finished"][0]
    values["finished"][0] = True
    assert lib.kvspn_engine_generate(engine, byref(generate())) == OK
    assert statistics(lib, engine, 0)["steps"] == 3


def test_a_profiled_step_counts_its_stages(lib, started):
    """Room for fewer stages, or for none, changes neither their number nor the step."""
    engine, values = started
    lib.kvspn_engine_profile.argtypes = [c_void_p, c_void_p, c_void_p, c_int32, c_void_p]
    counts, planned, count = [], (Stage * 200)(), c_int32()
    lib.kvspn_engine_plan.argtypes = lib.kvspn_engine_profile.argtypes
    assert lib.kvspn_engine_plan(engine, byref(step()), planned, 200, byref(count)) == OK
    assert values["stats"][0, 0] == 0
    plan = [(stage.name, stage.bytes) for stage in planned[: count.value]]
    assert all(size > 0 for name, size in plan if name not in (b"draft.embed", b"embed", b"accept"))
    for capacity in (0, 2, 200):
        room = (Stage * capacity)()
        count = c_int32()
        assert lib.kvspn_engine_profile(engine, byref(step()), room, capacity, byref(count)) == OK
        assert all(stage.name for stage in room[: count.value])
        assert not any(stage.name for stage in room[count.value :])
        counts.append(count.value)
    assert counts[0] == counts[1] == counts[2] == len(plan)
    assert [stage.name for stage in room[: len(plan)]] == [name for name, _ in plan]
    assert values["stats"][0, 0] == 3
    for bad in ((None, 2, byref(count)), (room, -1, byref(count)), (room, 2, None)):
        assert lib.kvspn_engine_profile(engine, byref(step()), *bad) == INVALID
    assert values["stats"][0, 0] == 3


def test_the_first_mask_is_for_the_first_token(lib, started):
    engine, values = started
    mask = np.full(29, -np.inf, np.float32)
    mask[17] = 0
    assert lib.kvspn_engine_generate(engine, byref(generate(first_mask=mask))) == OK
    assert values["tokens"][0, 3] == 17
    assert set(values["tokens"][0, 4:]) != {17}
    assert statistics(lib, engine, 0)["drafted"] == statistics(lib, engine, 0)["steps"]


def test_a_rule_of_a_row(lib, started):
    """The same seed gives the same tokens, with drafts and without; zero is greedy again."""
    engine, values = started
    log_probs = np.full(values["tokens"].shape, np.nan, np.float32)

    def tokens(temperature, seed, draft, top_k=0):
        rule = Rule(ctypes.sizeof(Rule), temperature, seed)
        rule.top_k = top_k
        assert lib.kvspn_engine_set_rule(engine, 0, byref(rule)) == OK
        settings = generate(draft=draft)
        settings.step.log_probs = ctypes.pointer(Tensor.of("log_probs", log_probs))
        assert lib.kvspn_engine_generate(engine, byref(settings)) == OK
        assert lib.kvspn_engine_rollback(engine, 0, 2) == OK
        return values["tokens"][0].tolist(), log_probs[0, 3:].tolist()

    greedy = tokens(0, 0, 1)
    sampled = [tokens(1.5, seed, 1) for seed in (1, 2, 1 << 32)]
    assert sampled == [tokens(1.5, seed, 0) for seed in (1, 2, 1 << 32)]
    assert len({str(each) for each in [greedy, *sampled]}) == 4
    assert tokens(0, 1, 0) == greedy
    assert tokens(1.5, 1, 1, top_k=1) == tokens(1.5, 2, 0, top_k=1) == greedy
    for early in (Rule.timestamps.offset, Rule.top_k.offset):  # A caller that knows of no top_k has none.
        rule = Rule(early, 1.5, 1)
        rule.top_k = 1
        assert lib.kvspn_engine_set_rule(engine, 0, byref(rule)) == OK
        assert lib.kvspn_engine_generate(engine, byref(generate(draft=1))) == OK
        assert lib.kvspn_engine_rollback(engine, 0, 2) == OK
        assert values["tokens"][0].tolist() == sampled[0][0]
    for temperature, top_k in ((0, 1), (1, -1)):
        rule = Rule(ctypes.sizeof(Rule), temperature, 0)
        rule.top_k = top_k
        assert lib.kvspn_engine_set_rule(engine, 0, byref(rule)) == INVALID
        assert b"top_k must be 0, or at a temperature a positive number" in lib.kvspn_last_error()
    assert np.isnan(log_probs[0, :3]).all()
    for wrong in (-1, np.nan, np.inf):
        assert lib.kvspn_engine_set_rule(engine, 0, byref(Rule(ctypes.sizeof(Rule), wrong, 0))) == INVALID
        assert b"temperature must be 0 or a positive number" in lib.kvspn_last_error()
    assert lib.kvspn_engine_set_rule(engine, 1, byref(Rule(ctypes.sizeof(Rule), 1, 0))) == INVALID
    settings = step()
    settings.log_probs = ctypes.pointer(Tensor.of("log_probs", log_probs[:, :-1].copy()))
    assert lib.kvspn_engine_step(engine, byref(settings)) == INVALID
    assert b"log_probs must have shape" in lib.kvspn_last_error()


def test_reset_forgets(lib, started):
    engine, values = started
    assert lib.kvspn_engine_generate(engine, byref(generate(max_steps=2))) == OK
    assert lib.kvspn_engine_reset(engine) == OK
    for name in ("lengths", "cross_lengths", "stats"):
        assert not values[name].any()
    assert values["finished"].all()
    assert statistics(lib, engine, -1) == dict.fromkeys(COUNTS, 0)


def test_refused_calls_change_nothing(lib, started):
    engine, values = started
    before = {name: value.copy() for name, value in values.items()}
    short = generate()
    short.step.struct_size = 4
    for name, arguments, message in (
        ("set_stream", (1,), b"stream must be a null pointer on the CPU, got one"),
        ("generate", (byref(generate(max_steps=-1)),), b"max_steps must be at least 0, got -1"),
        ("generate", (byref(generate(k=0)),), b"k must be at least 1, got 0"),
        ("generate", (byref(short),), b"params->step->struct_size must be"),
        ("rollback", (0, 3), b"length must be 0 to 2, got 3"),
        ("rollback", (0, -1), b"length must be 0 to 2, got -1"),
        ("rollback", (1, 0), b"row must be 0 to 0, got 1"),
        ("read_statistics", (-2, byref(Statistics(40))), b"row must be 0 to 0, got -2"),
        ("read_statistics", (0, byref(Statistics(8))), b"statistics->struct_size must be 40 to 4096, got 8"),
    ):
        assert getattr(lib, f"kvspn_engine_{name}")(engine, *arguments) == INVALID
        assert message in lib.kvspn_last_error()
    for name, value in values.items():
        assert np.array_equal(value, before[name], equal_nan=value.dtype == np.float32), name


def test_a_whole_life(lib, weights):
    assert lib.kvspn_abi_version() == 2
    assert lib.kvspn_instruction_set() in (b"avx512vnni", b"avx512", b"avx2", b"portable")
    status, engine = create(lib, weights)
    assert (status, lib.kvspn_last_error()) == (OK, b"")
    assert lib.kvspn_engine_set_stream(engine, None) == OK
    values = arrays()
    assert lib.kvspn_engine_bind(engine, byref(batch(values))) == OK
    states = np.random.default_rng(0).standard_normal((4, 16), np.float32)
    assert lib.kvspn_engine_encode(engine, 0, byref(Tensor.of("states", states))) == OK
    assert lib.kvspn_engine_prefill(engine, 0, 2) == OK
    while not values["finished"][0]:
        assert lib.kvspn_engine_step(engine, byref(step())) == OK
    assert values["lengths"][0] == 11
    assert values["stats"][0, 0] >= 5
    lib.kvspn_engine_destroy(engine)


def test_null_pointers(lib, weights):
    lib.kvspn_engine_destroy(None)
    assert lib.kvspn_engine_create(None, None, 0, byref(c_void_p())) == INVALID
    assert b"params must be given, got a null pointer" in lib.kvspn_last_error()
    assert lib.kvspn_engine_create(byref(params()), None, 3, byref(c_void_p())) == INVALID
    assert lib.kvspn_engine_create(byref(params()), None, 0, None) == INVALID
    assert lib.kvspn_engine_set_stream(None, None) == INVALID
    calls = (
        ("bind", (None,)),
        ("encode", (0, None)),
        ("prefill", (0, 1)),
        ("step", (None,)),
        ("generate", (None,)),
        ("rollback", (0, 0)),
        ("reset", ()),
        ("read_statistics", (0, None)),
    )
    for name, arguments in calls:
        assert getattr(lib, f"kvspn_engine_{name}")(None, *arguments) == INVALID
        assert lib.kvspn_last_error()
    status, engine = create(lib, weights)
    assert status == OK
    for name, arguments in calls:
        if None not in arguments:
            continue
        assert getattr(lib, f"kvspn_engine_{name}")(engine, *arguments) == INVALID
        assert b"null pointer" in lib.kvspn_last_error()
    unbound = (
        ("prefill", (0, 1)),
        ("step", (byref(step()),)),
        ("generate", (byref(generate()),)),
        ("rollback", (0, 0)),
        ("reset", ()),
        ("read_statistics", (-1, byref(Statistics(ctypes.sizeof(Statistics))))),
    )
    for name, arguments in unbound:
        assert getattr(lib, f"kvspn_engine_{name}")(engine, *arguments) == INVALID
        assert b"a batch must be bound first" in lib.kvspn_last_error()
    lib.kvspn_engine_destroy(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, b"layers must be at least 1, got 0"),
        ({"layers": 3}, b"layers.2.self_norm.weight must be among the weights"),
        ({"heads": 3}, b"embed_tokens must be a multiple of 3 heads wide, got 16"),
        ({"blocks": -1}, b"blocks must be at least 0, got -1"),
        ({"groups": 0}, b"groups must divide the layers and the blocks, got 0"),
        ({"encoder_stride": -1}, b"encoder_stride must be at least 0, got -1"),
        ({"threads": -1}, b"threads must be 0 to 1024, got -1"),
    ],
)
def test_wrong_params(lib, weights, fields, message):
    assert create(lib, weights, params(**fields))[0] == INVALID
    assert message in lib.kvspn_last_error()


def test_fuzzed_tensors_and_numbers(lib, weights):
    """Shapes, dtypes, strides, pointers and numbers at random: never a crash, a text for every error."""
    rng = random.Random(0)
    status, engine = create(lib, weights)
    assert status == OK
    refused = 0
    for _ in range(600):
        int8 = rng.random() < 0.5
        values = arrays(int8)
        given = batch(values)
        name = rng.choice(BATCH + SCALES * int8)
        tensor = getattr(given, name) if name in BATCH else getattr(given, name).contents
        kind = rng.choice(("dtype", "ndim", "shape", "strides", "data", "struct_size", "scales"))
        if kind == "struct_size":
            given.struct_size = rng.choice((0, 4, 10_000))
        elif kind == "scales":  # missing, or too many
            name = rng.choice(SCALES)
            setattr(given, name, None if int8 else ctypes.pointer(Tensor.of(name, values["kv"][..., 0])))
        elif kind == "data":
            tensor.data = None
        elif kind == "dtype":
            tensor.dtype = rng.choice([d for d in (-1, 0, 3, 4, 5, 6, 1 << 30) if d != tensor.dtype])
        elif kind == "ndim":
            tensor.ndim = rng.choice([n for n in (-1, 0, 1, 2, 6, 7, 1 << 30) if n != tensor.ndim])
        elif kind == "shape":  # smaller or absurd: a larger true size cannot be told from the outside
            tensor.shape[rng.randrange(tensor.ndim)] = rng.choice((-1, 0, -(1 << 60)))
        else:
            tensor.strides[tensor.ndim - 1] = rng.choice((-1, 0, 2, 1 << 40))
        status = lib.kvspn_engine_bind(engine, byref(given))
        assert status in (OK, INVALID)
        if status == INVALID:
            refused += 1
            assert b"must " in lib.kvspn_last_error()
    assert refused > 450
    numbers = (-(1 << 31), -2, -1, 0, 1, 2, 11, 12, 13, 29, (1 << 31) - 1)
    for n in range(600):
        if n % 300 == 0:
            values = arrays(int8=n > 0)
            assert lib.kvspn_engine_bind(engine, byref(batch(values))) == OK
        values["lengths"][0], values["cross_lengths"][0] = rng.choice(numbers), rng.choice(numbers)
        values["tokens"][:] = rng.choice(numbers)
        values["finished"][0] = False
        fields = {name: rng.choice(numbers) for name in ("k", "eos", "max_length", "draft")}
        answers = (OK, INVALID, NO_TOKEN)  # the cache holds NaN where the lengths are wrong
        assert lib.kvspn_engine_step(engine, byref(step(**fields))) in answers
        given = generate(max_steps=rng.choice(numbers), **fields)
        assert lib.kvspn_engine_generate(engine, byref(given)) in answers
        found = Statistics(ctypes.sizeof(Statistics))
        assert lib.kvspn_engine_read_statistics(engine, rng.choice(numbers), byref(found)) in (OK, INVALID)
        logits = Tensor.of("logits", np.zeros(29, np.float32))
        places = [rng.choice(numbers) for _ in range(4)]
        answers = (OK, INVALID)
        assert lib.kvspn_engine_prefill_from(engine, *places, byref(logits)) in answers
        for name in ("prefill", "rollback"):
            call = getattr(lib, f"kvspn_engine_{name}")
            assert call(engine, rng.choice(numbers), rng.choice(numbers)) in (OK, INVALID)
    lib.kvspn_engine_destroy(engine)


def test_fuzzed_weights(lib, weights):
    """A weight that is missing, of another shape or without data is refused by name."""
    rng = random.Random(1)
    for name in rng.sample(sorted(weights), 12):
        rest = {key: value for key, value in weights.items() if key != name}
        if not name.endswith((".bias", "embed_tokens", "embed_positions")):
            assert create(lib, rest)[0] == INVALID, name
            assert name.rsplit(".", 1)[0].encode() in lib.kvspn_last_error()
        for wrong in (weights[name][..., :-1], weights[name].astype(np.int32), weights[name][None]):
            assert create(lib, rest | {name: wrong})[0] == INVALID, name
            assert lib.kvspn_last_error()


def test_attention_in_parts_and_fuzzed(lib):
    """The parts together are the whole, of strided tensors too; bad tensors are refused by name."""
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 5, 6, 4), np.float32)[:, :3].transpose(0, 2, 1, 3)  # [B, Hq, Q, D]
    kv = generator.standard_normal((2, 2, 2, 3, 14, 4), np.float32)[..., ::2, :]
    lengths = np.array([7, 2], np.int32)
    whole, parted = np.full((2, 3, 24), np.nan, np.float32), np.full((2, 3, 24), np.nan, np.float32)
    assert lib.kvspn_flat_kv_attention(byref(attention(q, kv, lengths, whole))) == OK
    seen = []

    def run(context, parts, work, argument):
        seen.append(parts)
        for part in reversed(range(parts)):
            work(argument, part)

    threads = Stream(None, None, None, RUN(run), 5)
    assert lib.kvspn_flat_kv_attention(byref(attention(q, kv, lengths, parted, threads))) == OK
    assert seen == [5]
    assert np.array_equal(whole, parted)
    for wrong, words in (
        (Stream(None, None, None, RUN(run), 0), b"stream.threads must be at least 1, got 0"),
        (Stream(1, None, None, RUN(run), 1), b"stream.handle must be a null pointer on the CPU, got one"),
    ):
        assert lib.kvspn_flat_kv_attention(byref(attention(q, kv, lengths, parted, wrong))) == INVALID
        assert words in lib.kvspn_last_error()
    keys = kv[:, :, 1, 1, :2].transpose(1, 0, 2, 3).reshape(2, 4, 4)  # of row 1, head 1: K and V
    scores = np.exp(keys[0] @ q[1, 2, 0] * 0.5)
    np.testing.assert_allclose(whole[1, 0, 8:12], scores / scores.sum() @ keys[1], rtol=1e-5)
    int8 = (kv * 9).astype(np.int8)
    scale = np.full((2, 2, 2, 3, 16), 1 / 9, np.float32)[..., 1:-1:2]
    assert lib.kvspn_flat_kv_attention(byref(attention(q, int8, lengths, parted, kv_scale=scale))) == INVALID
    assert b"kv_scale must be contiguous in its last dimension, got stride 2" in lib.kvspn_last_error()
    scale = scale.copy()
    assert lib.kvspn_flat_kv_attention(byref(attention(q, int8, lengths, parted, kv_scale=scale))) == OK
    wide = np.full_like(whole, np.nan)
    assert lib.kvspn_flat_kv_attention(byref(attention(q, int8 / np.float32(9), lengths, wide))) == OK
    np.testing.assert_allclose(parted, wide, rtol=1e-4, atol=1e-5)
    rng = random.Random(2)
    for _ in range(400):
        scaled = rng.random() < 0.5
        given = attention(q, int8 if scaled else kv, lengths, parted, kv_scale=scale if scaled else None)
        name = rng.choice(("q", "kv", "lengths", "out", *["kv_scale"] * scaled))
        tensor = given.kv_scale.contents if name == "kv_scale" else getattr(given, name)
        kind = rng.choice(("dtype", "ndim", "shape", "data", "scale", "scales"))
        if kind == "dtype":
            tensor.dtype = rng.choice([d for d in (-1, 1, 3, 4, 5, 6, 7, 1 << 30) if d != tensor.dtype])
        elif kind == "ndim":
            tensor.ndim = rng.choice([n for n in (-1, 0, 1, 2, 7, 1 << 30) if n != tensor.ndim])
        elif kind == "shape":
            tensor.shape[rng.randrange(tensor.ndim)] = rng.choice((-1, 0, -(1 << 60)))
        elif kind == "data":
            tensor.data = None
        elif kind == "scales":
            given.kv_scale = None if scaled else ctypes.pointer(Tensor.of("kv_scale", scale))
        else:
            given.scale = rng.choice((np.nan, np.inf))
        status = lib.kvspn_flat_kv_attention(byref(given))
        assert status in (OK, INVALID)
        assert status == INVALID or kind == "shape"  # fewer layers, positions or queries are fine
        assert b"must " in lib.kvspn_last_error() or status == OK


def edition(struct: ctypes.Structure, size: int, **fields: int) -> ctypes.Array:
    """The struct as a caller of another version has it: `size` bytes, 0 past what this one knows."""
    for name, value in fields.items():
        setattr(struct, name, value)
    struct.struct_size = size
    other = (ctypes.c_char * max(size, 4))()
    ctypes.memmove(other, byref(struct), min(size, ctypes.sizeof(struct)))
    return other


FIRST_ENGINE, FIRST_ATTENTION = EngineParams.device.offset, AttentionParams.device.offset


def test_struct_size_of_the_first_edition(lib, weights):
    """Its callers go on: what their structs lack, a device for one, is as if it were 0."""
    status, engine = create(lib, weights, edition(params(device=7), FIRST_ENGINE))
    assert status == OK, lib.kvspn_last_error()
    lib.kvspn_engine_destroy(engine)
    assert create(lib, weights, params(device=7))[0] == INVALID
    assert b"device must be a kvspn_device that the library is built for, got 7" in lib.kvspn_last_error()

    q, kv = np.ones((1, 1, 1, 4), np.float32), np.ones((1, 2, 1, 1, 3, 4), np.float32)
    out = np.full((1, 1, 4), np.nan, np.float32)
    given = attention(q, kv, np.array([2], np.int32), out)
    given.device = 7
    assert lib.kvspn_flat_kv_attention(byref(given)) == INVALID
    assert b"device must be a kvspn_device that the library is built for, got 7" in lib.kvspn_last_error()
    assert lib.kvspn_flat_kv_attention(edition(given, FIRST_ATTENTION)) == OK
    assert (out == 1).all()


def test_struct_size_of_a_first_edition_step_in_a_generation(lib, started):
    engine, values = started
    known, missing = generate(max_steps=2, k=0), ctypes.sizeof(StepParams) - StepParams.draft_tokens.offset
    known.step.struct_size = StepParams.draft_tokens.offset
    first = bytes(known)
    behind = GenerateParams.first_mask.offset
    shorter = ctypes.create_string_buffer(first[: behind - missing] + first[behind:])
    ctypes.memmove(shorter, byref(c_uint32(len(first) - missing)), 4)
    assert lib.kvspn_engine_generate(engine, shorter) == INVALID
    assert b"k must be at least 1, got 0" in lib.kvspn_last_error()
    ctypes.memmove(byref(shorter, GenerateParams.step.offset + StepParams.k.offset), byref(c_int32(1)), 4)
    assert lib.kvspn_engine_generate(engine, shorter) == OK
    assert (values["stats"][0, 0], statistics(lib, engine, 0)["steps"]) == (2, 2)


def test_given_drafts_of_one_step(lib, started):
    """What greedy decoding says, found by it and then given: one step makes all of it."""
    engine, values = started
    assert lib.kvspn_engine_generate(engine, byref(generate(max_steps=4, draft=0))) == OK
    tokens = values["tokens"].copy()
    guess = np.ascontiguousarray(tokens[:, 3:7])
    for wrong, message in (
        (step(draft=1), b"draft must be 0 with draft_tokens, got 1"),
        (generate(draft=0, max_steps=2), b"draft_tokens must be null but for one step, got"),
    ):
        inner = getattr(wrong, "step", wrong)
        inner.draft_tokens = ctypes.pointer(Tensor.of("draft_tokens", guess))
        call = lib.kvspn_engine_generate if inner is not wrong else lib.kvspn_engine_step
        assert call(engine, byref(wrong)) == INVALID
        assert message in lib.kvspn_last_error()
    many = step(draft=0)
    many.draft_tokens = ctypes.pointer(Tensor.of("draft_tokens", np.zeros((1, 16), np.int32)))
    assert lib.kvspn_engine_step(engine, byref(many)) == INVALID
    assert b"draft_tokens must hold 0 to 15 of a row, got 16" in lib.kvspn_last_error()

    assert lib.kvspn_engine_rollback(engine, 0, 2) == OK
    values["stats"][:] = 0
    given = step(draft=0)
    given.draft_tokens = ctypes.pointer(Tensor.of("draft_tokens", guess))
    assert lib.kvspn_engine_step(engine, byref(given)) == OK
    assert np.array_equal(values["tokens"][:, :7], tokens[:, :7])
    assert values["stats"].tolist() == [[1, 4, 4]]
    assert values["lengths"][0] == 7


def test_struct_size_of_a_later_edition(lib, weights, started):
    """Its callers go on as long as they set nothing that this version does not know."""
    size = ctypes.sizeof(EngineParams) + 24
    longer = edition(params(), size)
    status, engine = create(lib, weights, longer)
    assert status == OK
    lib.kvspn_engine_destroy(engine)
    longer[size - 5] = 1
    assert create(lib, weights, longer)[0] == INVALID
    assert b"params must be 0 in what this version does not know" in lib.kvspn_last_error()
    for wrong in (0, FIRST_ENGINE - 1, 5000):
        assert create(lib, weights, edition(params(), wrong))[0] == INVALID
        assert b"params->struct_size must be 32 to 4096, got %d" % wrong in lib.kvspn_last_error()

    # The step in the midst of a generation's parameters is of that edition too.
    engine, _ = started
    known, grown = generate(max_steps=1, k=0), 16
    known.step.struct_size += grown
    behind = GenerateParams.first_mask.offset
    bytes_ = bytes(known)
    later = ctypes.create_string_buffer(bytes_[:behind] + bytes(grown) + bytes_[behind:])
    ctypes.memmove(later, byref(c_uint32(len(bytes_) + grown)), 4)
    assert lib.kvspn_engine_generate(engine, later) == INVALID
    assert b"k must be at least 1, got 0" in lib.kvspn_last_error()
    ctypes.memmove(byref(later, GenerateParams.step.offset + StepParams.k.offset), byref(c_int32(1)), 4)
    assert lib.kvspn_engine_generate(engine, later) == OK
    assert statistics(lib, engine, 0)["steps"] == 1
    later[behind] = 1
    assert lib.kvspn_engine_generate(engine, later) == INVALID
    assert b"params->step must be 0 in what this version does not know" in lib.kvspn_last_error()


def test_ops_on_the_calling_thread(lib):
    """Without a stream; one of a device is refused, and nothing is written."""
    generator = np.random.default_rng(0)
    x, weight, bias = (generator.standard_normal(shape, np.float32) for shape in ((3, 20), (1700, 20), 1700))
    out = np.full((3, 1700), np.nan, np.float32)
    given = {"x": x, "weight": weight, "out": out, "bias": bias}
    linear = LinearParams(ctypes.sizeof(LinearParams), eps=1e-5)
    for name, array in given.items():
        setattr(linear, name, Tensor.of(name, array))
    assert lib.kvspn_fused_linear(byref(linear)) == OK
    np.testing.assert_allclose(out, x @ weight.T + bias, rtol=1e-4, atol=1e-5)

    kv, lengths = np.zeros((2, 2, 1, 2, 5, 4), np.float32), np.array([3], np.int32)
    k, v = (generator.standard_normal((1, 2, 1, 4), np.float32) for _ in "kv")
    append = AppendParams(ctypes.sizeof(AppendParams), layer=1)
    for name, array in {"kv": kv, "k": k, "v": v, "lengths": lengths}.items():
        setattr(append, name, Tensor.of(name, array))
    append.stream = ctypes.pointer(Stream(handle=1))
    assert lib.kvspn_append_kv(byref(append)) == INVALID
    assert b"stream.handle must be a null pointer on the CPU, got one" in lib.kvspn_last_error()
    assert not kv.any()
    append.stream = None
    assert lib.kvspn_append_kv(byref(append)) == OK
    assert np.array_equal(kv[1, 0, 0, :, 3], k[0, :, 0]) and np.array_equal(kv[1, 1, 0, :, 3], v[0, :, 0])
    assert np.count_nonzero(kv) == 16
