"""The C ABI in ctypes, as a C program has it: its structs, and calls with values that are right."""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

import numpy as np

from kvspn.weights.decoder import named_tensors
from kvspn.weights.random import random_decoder

OK, INVALID, NO_TOKEN = 0, 1, 5
DTYPES = {np.dtype(np.float32): 0, np.dtype(np.int8): 3, np.dtype(np.int32): 4, np.dtype(np.bool_): 5}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 6),
        ("strides", c_int64 * 6),
    )

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "Tensor":
        strides = [step // array.itemsize for step in array.strides]
        return cls(
            name.encode(),
            array.ctypes.data,
            DTYPES[array.dtype],
            array.ndim,
            (c_int64 * 6)(*array.shape),
            (c_int64 * 6)(*strides),
        )


class EngineParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("blocks", c_int32),
        ("groups", c_int32),
        ("last_layer_only", c_int32),
        ("threads", c_int32),
        ("encoder_stride", c_int32),
        ("device", c_int32),
        ("variant", c_char_p),
        ("key_heads", c_int32),
        ("rms_norm", c_int32),
        ("norm_eps", c_float),
        ("gated", c_int32),
        ("rotary_base", c_float),
        ("no_cross", c_int32),
    )


BATCH = ("kv", "lengths", "tokens", "finished", "stats", "cross_kv", "cross_lengths")
SCALES = ("kv_scale", "cross_kv_scale")


class Batch(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        *((name, Tensor) for name in BATCH),
        *((name, POINTER(Tensor)) for name in SCALES),
    )


class StepParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("mask", POINTER(c_float)),
        ("k", c_int32),
        ("eos", c_int32),
        ("max_length", c_int32),
        ("draft", c_int32),
        ("draft_tokens", POINTER(Tensor)),
        ("first_mask", POINTER(c_float)),
        ("log_probs", POINTER(Tensor)),
    )


class Rule(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("temperature", c_float),
        ("seed", c_uint64),
        ("timestamps", c_int32 * 4),
        ("top_k", c_int32),
    )


ON_STEP = ctypes.CFUNCTYPE(c_int32, c_void_p)


class GenerateParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("step", StepParams),
        ("first_mask", POINTER(c_float)),
        ("max_steps", c_int32),
        ("on_step", ON_STEP),
        ("context", c_void_p),
    )


COUNTS = ("tokens", "steps", "drafted", "accepted")


class Statistics(ctypes.Structure):
    _fields_ = (("struct_size", c_uint32), *((name, c_int64) for name in COUNTS))


class Stage(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("nanoseconds", c_int64), ("bytes", c_int64))


def library(path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.kvspn_last_error.restype = c_char_p
    lib.kvspn_instruction_set.restype = c_char_p
    lib.kvspn_engine_destroy.argtypes = [c_void_p]
    lib.kvspn_engine_destroy.restype = None
    lib.kvspn_engine_reset.argtypes = [c_void_p]
    for name in ("set_stream", "bind", "step", "generate"):
        getattr(lib, f"kvspn_engine_{name}").argtypes = [c_void_p, c_void_p]
    for name in ("encode", "read_statistics", "set_rule"):
        getattr(lib, f"kvspn_engine_{name}").argtypes = [c_void_p, c_int32, c_void_p]
    lib.kvspn_engine_prefill_from.argtypes = [c_void_p, *[c_int32] * 4, c_void_p]
    for name in ("prefill", "rollback"):
        getattr(lib, f"kvspn_engine_{name}").argtypes = [c_void_p, c_int32, c_int32]
    return lib


def random_weights() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in named_tensors(random_decoder())}


def params(**fields: int) -> EngineParams:
    values = {"layers": 2, "heads": 2, "blocks": 1, "groups": 1, "last_layer_only": 0, "threads": 1}
    return EngineParams(ctypes.sizeof(EngineParams), **(values | fields))


def create(lib, weights, given=None):
    engine = c_void_p()
    tensors = (Tensor * len(weights))(*(Tensor.of(name, array) for name, array in weights.items()))
    status = lib.kvspn_engine_create(byref(given or params()), tensors, len(weights), byref(engine))
    return status, engine


def arrays(int8: bool = False, rows: int = 1) -> dict[str, np.ndarray]:
    values = {
        "kv": np.full((2, 2, rows, 2, 12, 8), np.nan, np.float32),
        "lengths": np.zeros(rows, np.int32),
        "tokens": np.full((rows, 12), 3, np.int32),
        "finished": np.zeros(rows, np.bool_),
        "stats": np.zeros((rows, 3), np.int32),
        "cross_kv": np.full((2, 2, rows, 2, 6, 8), np.nan, np.float32),
        "cross_lengths": np.zeros(rows, np.int32),
    }
    for name in ("kv", "cross_kv") if int8 else ():
        values[f"{name}_scale"] = values[name][..., 0].copy()
        values[name] = np.full(values[name].shape, -128, np.int8)
    return values


def batch(values: dict[str, np.ndarray]) -> Batch:
    scales = (ctypes.pointer(Tensor.of(name, values[name])) if name in values else None for name in SCALES)
    return Batch(ctypes.sizeof(Batch), *(Tensor.of(name, values[name]) for name in BATCH), *scales)


def step(**fields: int) -> StepParams:
    values = {"k": 1, "eos": -1, "max_length": 12, "draft": 1}
    return StepParams(ctypes.sizeof(StepParams), None, **(values | fields))


def generate(first_mask=None, max_steps: int = 0, on_step=None, **fields: int) -> GenerateParams:
    mask = None if first_mask is None else first_mask.ctypes.data_as(POINTER(c_float))
    on_step = ON_STEP() if on_step is None else ON_STEP(on_step)
    return GenerateParams(ctypes.sizeof(GenerateParams), step(**fields), mask, max_steps, on_step, None)


def statistics(lib, engine, row: int) -> dict[str, int]:
    found = Statistics(ctypes.sizeof(Statistics))
    assert lib.kvspn_engine_read_statistics(engine, row, byref(found)) == OK
    return {name: getattr(found, name) for name in COUNTS}


WORK = ctypes.CFUNCTYPE(None, c_void_p, c_int32)
RUN = ctypes.CFUNCTYPE(None, c_void_p, c_int32, WORK, c_void_p)


class Stream(ctypes.Structure):
    _fields_ = (
        ("handle", c_void_p),
        ("allocate", c_void_p),
        ("context", c_void_p),
        ("run", RUN),
        ("threads", c_int32),
    )


class AttentionParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        *((name, Tensor) for name in ("q", "kv", "lengths", "out")),
        ("tail", POINTER(Tensor)),
        ("tail_lengths", POINTER(Tensor)),
        ("scale", c_float),
        ("causal", c_int32),
        ("kv_scale", POINTER(Tensor)),
        ("stream", POINTER(Stream)),
        ("device", c_int32),
    )


def attention(q, kv, lengths, out, stream=None, kv_scale=None) -> AttentionParams:
    tensors = [
        Tensor.of(name, array) for name, array in (("q", q), ("kv", kv), ("lengths", lengths), ("out", out))
    ]
    scale = None if kv_scale is None else ctypes.pointer(Tensor.of("kv_scale", kv_scale))
    place = None if stream is None else ctypes.pointer(stream)
    return AttentionParams(ctypes.sizeof(AttentionParams), *tensors, None, None, 0.5, 0, scale, place)


class AppendParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        *((name, Tensor) for name in ("kv", "k", "v", "lengths", "finished")),
        ("layer", c_int32),
        ("stream", POINTER(Stream)),
        ("kv_scale", Tensor),
        ("device", c_int32),
    )


class LinearParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        *(
            (name, Tensor)
            for name in ("x", "weight", "out", "scale", "bias", "norm_weight", "norm_bias", "residual")
        ),
        ("eps", c_float),
        ("gelu", c_int32),
        ("stream", POINTER(Stream)),
        ("device", c_int32),
    )
