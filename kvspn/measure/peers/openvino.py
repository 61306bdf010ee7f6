"""OpenVINO: f32, bf16, and int8 or int4 weights with bf16 activations; a graph for each number of rows."""

from __future__ import annotations

import tempfile
from typing import Any

import onnx
import openvino
import torch
from openvino.preprocess import PrePostProcessor
from torch import Tensor

from kvspn.measure.peers import Problem, Skipped, Step, graph, timed

FORMATS = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}
ROWS = (1, 2)
LAUNCHES = 1


def prepare(problem: Problem, fmt: str) -> Step:
    if torch.get_num_threads() == 1 and fmt == "fp32":
        raise Skipped("openvino, fp32: skipped, as its compiler crashes on one thread (seen in 2026.4.1)")
    core = openvino.Core()
    requests = {rows: _request(core, problem, fmt, rows) for rows in ROWS}

    def step(rows: int) -> tuple[float, Tensor]:
        request, _ = requests[rows]
        milliseconds, _ = timed(request.infer)
        return milliseconds, torch.from_numpy(request.get_tensor("logits").data.copy())

    return step


def _request(core: openvino.Core, problem: Problem, fmt: str, rows: int) -> tuple[Any, list[Any]]:
    """A request whose inputs are set, and the memory that they share."""
    masked = rows > 1  # in bf16, OpenVINO 2026.4.1 gets one row with a mask wrong
    arrays = graph.inputs(problem, rows, masked)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/step.onnx"
        onnx.save(graph.build(problem, "fp32" if fmt == "bf16" else fmt, masked), path)
        model = core.read_model(path)
    model.reshape({name: array.shape for name, array in arrays.items()})
    cached = [name for name in arrays if FORMATS[fmt] == 2 and name not in ("x", "mask")]
    types = PrePostProcessor(model)
    for name in cached:
        types.input(name).tensor().set_element_type(openvino.Type.bf16)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if fmt == "fp32" else "bf16",
    }
    request = core.compile_model(types.build(), "CPU", settings).create_infer_request()
    held = []
    for name, array in arrays.items():
        if name in cached:
            held.append(torch.from_numpy(array).bfloat16().view(torch.int16).numpy())
            request.set_tensor(name, openvino.Tensor(held[-1], array.shape, openvino.Type.bf16))
        else:
            held.append(array)
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return request, held
