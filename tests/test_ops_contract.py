"""What every op owes its callers: clear refusals, opcheck, and a place in a compiled graph."""

import inspect
import re
from importlib.util import find_spec

import pytest
import torch

from kvspn import ops
from kvspn.ops.append_kv import quantise
from kvspn.ops.rules import Rule, Timestamps, pack_rules
from kvspn.weights.random import random_decoder

INF = torch.inf


def i32(*shape, high=3):
    return torch.randint(0, high, shape, dtype=torch.int32)


RULES = pack_rules([Rule(timestamps=Timestamps(5, 4)), Rule(0.5, 7), Rule(2.0, 2**63, None, 3)], [1, 2, 3])
SCORES = torch.zeros(3, 2, 3)


def sample(op, dtype=torch.float32):
    """A valid call of each op, by argument name."""
    cache = torch.randn(2, 2, 3, 2, 6, 4).to(dtype)  # L=2, B=3, H=2, S=6, D=4
    if op == "append_kv":
        k, v = torch.randn(2, 3, 2, 2, 4).to(dtype)
        finished = torch.tensor([False, True, False])
        return {"kv": cache, "k": k, "v": v, "lengths": i32(3), "layer": 1, "finished": finished}
    if op == "flat_kv_attention":
        q, tail = torch.randn(3, 2, 2, 4).to(dtype), torch.randn(2, 3, 2, 5, 4).to(dtype)
        arguments = {"q": q, "kv": cache, "lengths": i32(3), "causal": True, "scale": 0.5}
        return arguments | {"tail": tail, "tail_lengths": i32(3)}
    norm = {"norm_weight": torch.rand(8).to(dtype), "norm_bias": torch.rand(8).to(dtype), "eps": 1e-5}
    if op == "fused_linear":
        arguments = {"x": torch.randn(3, 2, 8).to(dtype), "weight": torch.randn(5, 8).to(dtype)}
        arguments |= {"bias": torch.randn(5).to(dtype), **norm, "gelu": True}
        return arguments | {"residual": torch.randn(3, 2, 5).to(dtype), "scale": None}
    if op == "lm_head_verify":
        arguments = {"x": torch.randn(3, 2, 8).to(dtype), "weight": torch.randn(7, 8).to(dtype)}
        arguments |= {"draft": i32(3, 1), "mask": torch.zeros(7), "scale": None, **norm}
        return arguments | {
            "first_mask": torch.ones(7),
            "rules": RULES.clone(),
            "lengths": i32(3),
            "tokens": i32(3, 4),
            "scores": SCORES.clone(),
            "best_tokens": i32(3, 2, 2),
            "best_logits": torch.zeros(3, 2, 2),
        }
    state = {
        "tokens": i32(3, 6),
        "lengths": torch.tensor([1, 0, 2], dtype=torch.int32),
        "finished": torch.tensor([False, True, False]),
        "stats": i32(3, 3),
    }
    limits = {"k": 1, "eos": 2, "max_length": 5}
    if op == "accept_and_rollback":
        scores = {"scores": SCORES.clone(), "log_probs": torch.zeros(3, 6)}
        return state | {"draft": i32(3, 1), "argmax": i32(3, 2), "rank": i32(3, 1)} | limits | scores
    if op == "compact_kv":
        return {"kv": cache, "rows": i32(3), "source": i32(3, 2), "start": i32(3)}
    assert op == "decoder_step"
    weights = random_decoder(heads=2, head_dim=4, vocabulary=7, positions=6, dtype=dtype).flatten()
    cross = {"cross_kv": torch.randn(2, 2, 3, 2, 5, 4).to(dtype), "cross_lengths": 1 + i32(3)}
    return {"kv": cache, **state, **cross, "weights": weights, "mask": torch.zeros(7), **limits} | {
        "use_draft": True,
        "groups": 1,
        "last_layer_only": False,
        "encoder_stride": 1,
        "first_mask": torch.ones(7),
        "rules": RULES.clone(),
        "log_probs": torch.zeros(3, 6),
    }


def int8_sample(op):
    """The same on int8 caches; None for an op without any."""
    arguments = sample(op)
    if "kv_scale" not in inspect.signature(getattr(ops, op)).parameters:
        return None
    for name in ("kv", "cross_kv"):
        if name in arguments:
            arguments[name], arguments[f"{name}_scale"] = quantise(arguments[name])
    return {name: value for name, value in arguments.items() if not name.startswith("tail")}


OPS = [name for name in ops.__all__ if name.islower()]
int8, uint8 = torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5, 4, dtype=torch.uint8)
fp8 = torch.zeros(5, 8, dtype=torch.float8_e4m3fn)
f64, expanded = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 2, 2, 8)[..., ::2]

int8_kv = torch.zeros(2, 2, 3, 2, 6, 4, dtype=torch.int8)
scales, no_tail = torch.zeros(2, 2, 3, 2, 6), {"tail": None, "tail_lengths": None}

BAD = [
    # op, the argument that the error names, arguments that are wrong
    ("append_kv", "kv", {"kv": torch.zeros(2, 3, 2, 6, 4)}),
    ("append_kv", "kv", {"kv": torch.zeros(2, 2, 3, 2, 6, 4, dtype=torch.float64)}),
    ("append_kv", "kv", {"kv": torch.zeros(2, 2, 3, 2, 6, 8)[..., ::2]}),
    ("append_kv", "k", {"k": [1.0]}),
    ("append_kv", "k", {"k": torch.zeros(2, 2, 2, 4)}),
    ("append_kv", "k", {"k": torch.zeros(3, 2, 2, 4, dtype=torch.bfloat16)}),
    ("append_kv", "k", {"k": torch.zeros(3, 2, 2, 4, device="meta")}),
    ("append_kv", "k", {"k": expanded}),
    ("append_kv", "v", {"v": torch.zeros(3, 2, 1, 4)}),
    ("append_kv", "v", {"v": None}),
    ("append_kv", "lengths", {"lengths": i32(2)}),
    ("append_kv", "lengths", {"lengths": torch.zeros(3, dtype=torch.int64)}),
    ("append_kv", "layer", {"layer": 2}),
    ("append_kv", "layer", {"layer": -1}),
    ("append_kv", "layer", {"layer": 1.0}),
    ("append_kv", "layer", {"layer": True}),
    ("append_kv", "finished", {"finished": i32(3)}),
    ("append_kv", "kv_scale", {"kv": int8_kv}),
    ("append_kv", "kv_scale", {"kv_scale": scales}),
    ("append_kv", "kv_scale", {"kv": int8_kv, "kv_scale": scales[:1]}),
    ("append_kv", "kv_scale", {"kv": int8_kv, "kv_scale": scales.half()}),
    ("append_kv", "v", {"kv": int8_kv, "kv_scale": scales, "v": torch.zeros(3, 2, 2, 4, dtype=torch.int8)}),
    ("flat_kv_attention", "q", {"q": torch.zeros(3, 3, 2, 4)}),
    ("flat_kv_attention", "q", {"q": torch.zeros(3, 2, 2, 5)}),
    ("flat_kv_attention", "q", {"q": torch.zeros(3, 2, 2, 4, dtype=torch.float16)}),
    ("flat_kv_attention", "kv", {"kv": torch.zeros(0, 2, 3, 2, 6, 4)}),
    ("flat_kv_attention", "kv", {"kv": torch.zeros(2, 3, 3, 2, 6, 4)}),
    ("flat_kv_attention", "lengths", {"lengths": f64}),
    ("flat_kv_attention", "causal", {"causal": 2}),
    ("flat_kv_attention", "scale", {"scale": "1"}),
    ("flat_kv_attention", "scale", {"scale": float("nan")}),
    ("flat_kv_attention", "tail", {"tail": None}),
    ("flat_kv_attention", "tail_lengths", {"tail_lengths": None}),
    ("flat_kv_attention", "tail", {"tail": torch.zeros(2, 3, 1, 5, 4)}),
    ("flat_kv_attention", "tail_lengths", {"tail_lengths": i32(4)}),
    ("flat_kv_attention", "tail", {"kv": int8_kv, "kv_scale": scales}),
    ("flat_kv_attention", "kv_scale", no_tail | {"kv": int8_kv}),
    ("flat_kv_attention", "kv_scale", {"kv_scale": scales}),
    ("flat_kv_attention", "kv_scale", no_tail | {"kv": int8_kv, "kv_scale": scales[..., :5]}),
    ("flat_kv_attention", "kv_scale", no_tail | {"kv": int8_kv, "kv_scale": expanded}),
    ("fused_linear", "x", {"x": 3}),
    ("fused_linear", "x", {"x": torch.zeros((), dtype=torch.float32)}),
    ("fused_linear", "x", {"x": torch.zeros(3, 2, 8, dtype=torch.int32)}),
    ("fused_linear", "weight", {"weight": torch.zeros(5, 9)}),
    ("fused_linear", "weight", {"weight": torch.zeros(5, 8, dtype=torch.int16)}),
    ("fused_linear", "weight", {"weight": torch.zeros(5, 8, dtype=torch.uint8), "scale": torch.zeros(5, 1)}),
    ("fused_linear", "weight", {"weight": torch.zeros(5, 8, dtype=torch.float8_e5m2)}),
    ("fused_linear", "weight", {"weight": fp8[:, :7], "scale": torch.zeros(5)}),
    ("fused_linear", "x", {"x": torch.zeros(3, 2, 8, dtype=torch.float8_e4m3fn)}),
    ("fused_linear", "scale", {"weight": fp8}),
    ("fused_linear", "scale", {"weight": fp8, "scale": torch.zeros(5, 1)}),
    ("fused_linear", "scale", {"weight": int8}),
    ("fused_linear", "scale", {"weight": int8, "scale": torch.zeros(5, 1)}),
    ("fused_linear", "scale", {"weight": int8, "scale": f64}),
    ("fused_linear", "scale", {"weight": uint8, "scale": torch.zeros(5)}),
    ("fused_linear", "scale", {"weight": uint8, "scale": torch.zeros(5, 3)}),
    ("fused_linear", "scale", {"weight": uint8, "scale": torch.zeros(5, 0)}),
    ("fused_linear", "scale", {"scale": torch.zeros(5)}),
    ("fused_linear", "bias", {"bias": torch.zeros(8)}),
    ("fused_linear", "norm_weight", {"norm_weight": torch.zeros(5)}),
    ("fused_linear", "norm_bias", {"norm_bias": torch.zeros(5)}),
    ("fused_linear", "norm_bias", {"norm_weight": None}),
    ("fused_linear", "eps", {"eps": -1.0}),
    ("fused_linear", "eps", {"eps": None}),
    ("fused_linear", "gelu", {"gelu": "erf"}),
    ("fused_linear", "residual", {"residual": torch.zeros(3, 2, 8)}),
    ("fused_linear", "residual", {"residual": torch.zeros(2, 3, 5)}),
    ("fused_linear", "residual", {"residual": torch.zeros(3, 2, 5, dtype=torch.float16)}),
    ("lm_head_verify", "x", {"x": torch.zeros(3, 8)}),
    ("lm_head_verify", "x", {"x": torch.zeros(3, 0, 8), "draft": i32(3, 0)}),
    ("lm_head_verify", "weight", {"weight": torch.zeros(7, 4)}),
    ("lm_head_verify", "weight", {"weight": torch.zeros(0, 8), "mask": None}),
    ("lm_head_verify", "draft", {"draft": i32(3, 2)}),
    ("lm_head_verify", "draft", {"draft": torch.zeros(3, 1, dtype=torch.int64)}),
    ("lm_head_verify", "mask", {"mask": torch.zeros(8)}),
    ("lm_head_verify", "mask", {"mask": torch.zeros(7, dtype=torch.bool)}),
    ("lm_head_verify", "norm_bias", {"norm_weight": None}),
    ("lm_head_verify", "x", {"ids": i32(7)}),
    ("lm_head_verify", "first_mask", {"first_mask": torch.zeros(8)}),
    ("lm_head_verify", "first_mask", {"first_mask": torch.zeros(7, dtype=torch.bfloat16)}),
    ("lm_head_verify", "rules", {"rules": i32(3, 3)}),
    ("lm_head_verify", "rules", {"rules": torch.zeros(3, 9)}),
    ("lm_head_verify", "rules", {"rules": None, "lengths": None, "tokens": None}),
    ("lm_head_verify", "lengths", {"rules": None, "first_mask": None}),
    ("lm_head_verify", "lengths", {"lengths": None}),
    ("lm_head_verify", "tokens", {"tokens": None}),
    ("lm_head_verify", "tokens", {"tokens": i32(2, 4)}),
    ("lm_head_verify", "lengths", {"lengths": i32(2)}),
    ("lm_head_verify", "best_logits", {"best_logits": None}),
    ("lm_head_verify", "best_logits", {"best_logits": torch.zeros(3, 2, 3)}),
    ("lm_head_verify", "best_tokens", {"best_tokens": torch.zeros(3, 2, 2)}),
    ("lm_head_verify", "best_tokens", {"best_tokens": i32(3, 2, 65), "best_logits": torch.zeros(3, 2, 65)}),
    ("lm_head_verify", "scores", {"scores": torch.zeros(3, 2, 2)}),
    ("lm_head_verify", "scores", {"scores": torch.zeros(3, 2, 3, dtype=torch.bfloat16)}),
    ("accept_and_rollback", "tokens", {"tokens": i32(6)}),
    ("accept_and_rollback", "lengths", {"lengths": i32(3, 1)}),
    ("accept_and_rollback", "finished", {"finished": i32(3)}),
    ("accept_and_rollback", "stats", {"stats": i32(3, 2)}),
    ("accept_and_rollback", "argmax", {"argmax": i32(3, 0)}),
    ("accept_and_rollback", "draft", {"draft": i32(3, 2)}),
    ("accept_and_rollback", "rank", {"rank": i32(3, 2)}),
    ("accept_and_rollback", "k", {"k": 0}),
    ("accept_and_rollback", "k", {"k": INF}),
    ("accept_and_rollback", "eos", {"eos": -2}),
    ("accept_and_rollback", "max_length", {"max_length": 7}),
    ("accept_and_rollback", "max_length", {"max_length": 0}),
    ("accept_and_rollback", "log_probs", {"log_probs": None}),
    ("accept_and_rollback", "log_probs", {"scores": None}),
    ("accept_and_rollback", "log_probs", {"log_probs": torch.zeros(3, 5)}),
    ("accept_and_rollback", "scores", {"scores": torch.zeros(3, 1, 3)}),
    ("compact_kv", "kv", {"kv": torch.zeros(3)}),
    ("compact_kv", "rows", {"rows": torch.zeros(3, dtype=torch.int64)}),
    ("compact_kv", "source", {"source": i32(3)}),
    ("compact_kv", "start", {"start": i32(1)}),
    ("compact_kv", "kv_scale", {"kv": int8_kv}),
    ("compact_kv", "kv_scale", {"kv_scale": scales}),
    ("decoder_step", "cross_kv", {"kv": torch.zeros(2, 2, 3, 2, 6, 4, dtype=torch.bfloat16)}),
    ("decoder_step", "kv", {"kv": "cache"}),
    ("decoder_step", "cross_kv", {"kv": int8_kv, "kv_scale": scales}),
    ("decoder_step", "kv_scale", {"kv": int8_kv}),
    ("decoder_step", "cross_kv_scale", {"cross_kv_scale": torch.zeros(2, 2, 3, 2, 5)}),
    ("decoder_step", "tokens", {"tokens": i32(2, 6)}),
    ("decoder_step", "cross_kv", {"cross_kv": torch.zeros(1, 2, 3, 2, 5, 4)}),
    ("decoder_step", "cross_lengths", {"cross_lengths": i32(3, 1)}),
    ("decoder_step", "weights", {"weights": []}),
    ("decoder_step", "weights", {"weights": sample("decoder_step")["weights"][:-1]}),
    ("decoder_step", "weights", {"weights": random_decoder(heads=2, head_dim=8, vocabulary=7).flatten()}),
    ("decoder_step", "mask", {"mask": torch.zeros(6)}),
    ("decoder_step", "k", {"k": 0}),
    ("decoder_step", "max_length", {"max_length": 7}),
    ("decoder_step", "use_draft", {"use_draft": 1}),
    (
        "decoder_step",
        "use_draft",
        {"weights": random_decoder(heads=2, head_dim=4, vocabulary=7, blocks=0).flatten(), "groups": 0},
    ),
    ("decoder_step", "groups", {"groups": 3}),
    ("decoder_step", "first_mask", {"first_mask": torch.zeros(6)}),
    ("decoder_step", "rules", {"rules": None}),
    ("decoder_step", "rules", {"rules": i32(4, 4)}),
    ("decoder_step", "log_probs", {"log_probs": torch.zeros(3, 7)}),
]


@pytest.mark.parametrize(("op", "name", "wrong"), BAD, ids=lambda part: part if isinstance(part, str) else "")
def test_bad_calls_name_the_argument(op, name, wrong):
    """Each with what it must be and what it got, and before anything is written."""
    arguments = sample(op) | wrong
    before = {
        a: v.clone() for a, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type != "meta"
    }
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must .*, got ") as caught:
        getattr(ops, op)(**arguments)
    assert all(torch.equal(arguments[a], v) for a, v in before.items())
    if isinstance(caught.value, ValueError):  # the schema alone lets these pass
        native = op != "decoder_step" and find_spec("kvspn._torch_ops")  # whose words are its own
        words = rf"\b{name}\b.* must .*, got " if native else re.escape(str(caught.value))
        with pytest.raises((RuntimeError, ValueError) if native else ValueError, match=words):
            getattr(torch.ops.kvspn, op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(torch.ops.kvspn, op).default, (), sample(op, dtype))
    if (arguments := int8_sample(op)) is not None:
        torch.library.opcheck(getattr(torch.ops.kvspn, op).default, (), arguments)


def test_no_gradient():
    """Weights may be Parameters; backward through an op is refused, not silently wrong."""
    arguments = sample("fused_linear") | {"weight": torch.randn(5, 8, requires_grad=True)}
    torch.library.opcheck(torch.ops.kvspn.fused_linear.default, (), arguments)
    assert not ops.fused_linear(**arguments).requires_grad


@pytest.mark.parametrize(
    ("op", "make"),
    [(op, sample) for op in OPS] + [(op, int8_sample) for op in OPS if int8_sample(op) is not None],
)
def test_one_compiled_graph(op, make):
    """Compiled without a graph break, to the same results and the same changes in place."""
    torch._dynamo.reset()  # which counts how often it compiles this function
    eager, compiled = make(op), {}
    compiled = {a: v.clone() if isinstance(v, torch.Tensor) else v for a, v in eager.items()}
    step = torch.compile(
        lambda **arguments: getattr(ops, op)(**arguments), fullgraph=True, backend="aot_eager"
    )
    expected, actual = getattr(ops, op)(**eager), step(**compiled)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    for name, value in eager.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(compiled[name], value), name
