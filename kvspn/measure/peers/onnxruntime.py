"""ONNX Runtime: fp32, dynamic int8 per channel, and MatMulNBits."""

from __future__ import annotations

import tempfile

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from kvspn.measure.peers import Problem, Step, graph, timed

FORMATS = {"fp32": 4, "int8": 4, "int4": 4}
ROWS = (1, 2)
LAUNCHES = 1


def prepare(problem: Problem, fmt: str) -> Step:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes the next one's cores
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/step.onnx"
        onnx.save(graph.build(problem, "fp32" if fmt == "int8" else fmt), path)
        if fmt == "int8":
            quantize_dynamic(
                path,
                f"{folder}/int8.onnx",
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
            path = f"{folder}/int8.onnx"
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    bindings = {}
    for rows in ROWS:
        bindings[rows] = binding = session.io_binding()
        for name, array in graph.inputs(problem, rows).items():
            binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            binding.bind_output(output.name)

    def step(rows: int) -> tuple[float, Tensor]:
        milliseconds, _ = timed(lambda: session.run_with_iobinding(bindings[rows]))
        return milliseconds, torch.from_numpy(np.array(bindings[rows].get_outputs()[0].numpy()))

    return step
