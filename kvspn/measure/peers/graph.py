"""The decoder step as an ONNX graph, for the runtimes that take one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from kvspn.measure.peers import Problem
from kvspn.weights import Linear, Norm
from kvspn.weights.linear import quantise_linear


def inputs(problem: Problem, rows: int, masked: bool = True) -> dict[str, NDArray[np.float32]]:
    """What the graph takes; keys lie transposed, as the products read them."""
    length = len(problem.prompt)
    found = {"x": problem.embedded(rows)}
    if masked:
        found["mask"] = torch.full((rows, length + rows), -torch.inf).triu(length + 1)
    for i, ((keys, values), (cross_keys, cross_values)) in enumerate(
        zip(problem.kv, problem.cross_kv, strict=True)
    ):
        found |= {f"keys.{i}": keys.mT, f"values.{i}": values}
        found |= {f"cross_keys.{i}": cross_keys.mT, f"cross_values.{i}": cross_values}
    return {name: tensor.contiguous().numpy() for name, tensor in found.items()}


def build(problem: Problem, fmt: str, masked: bool = True) -> onnx.ModelProto:
    """Inputs x [Q, d], mask [Q, T + Q], every layer's cache; outputs logits [Q, V], new keys and values.

    Args:
        problem: weights and sizes.
        fmt: of the matrices, quantised as kvspn does it. int8: DequantizeLinear; int4: MatMulNBits.
        masked: False for a graph of one row, which needs no mask.
    """
    return _Graph(problem, fmt, masked).model()


class _Graph:
    def __init__(self, problem: Problem, fmt: str, masked: bool) -> None:
        self._w, self._fmt = problem.weights, fmt
        self._inputs = {name: array.shape for name, array in inputs(problem, 1, masked).items()}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._count = 0

    def model(self) -> onnx.ModelProto:
        w, heads = self._w, self._w.heads
        width = w.embed_tokens.shape[1]
        x, outputs = "x", []
        for i, layer in enumerate(w.layers):
            qkv = self._linear(self._norm(x, layer.self_norm), layer.self_qkv)
            parts = self._op("Reshape", qkv, self._ints(-1, 3, heads, width // heads))  # [Q, 3, H, D]
            q, k, v = (self._op("Gather", parts, self._int(part), axis=1) for part in range(3))
            new_keys = self._op("Transpose", k, perm=[1, 2, 0], name=f"new_keys.{i}")  # [H, D, Q]
            new_values = self._op("Transpose", v, perm=[1, 0, 2], name=f"new_values.{i}")  # [H, Q, D]
            outputs += [new_keys, new_values]
            keys = self._op("Concat", f"keys.{i}", new_keys, axis=2)
            values = self._op("Concat", f"values.{i}", new_values, axis=1)
            q = self._op("Transpose", q, perm=[1, 0, 2])
            attended = self._attend(q, keys, values, "mask" in self._inputs)
            x = self._op("Add", x, self._linear(attended, layer.self_out))

            cross_norm, cross_q, _, cross_out = layer.cross
            q = self._linear(self._norm(x, cross_norm), cross_q)
            q = self._op("Reshape", q, self._ints(-1, heads, width // heads))
            q = self._op("Transpose", q, perm=[1, 0, 2])
            attended = self._attend(q, f"cross_keys.{i}", f"cross_values.{i}", False)
            x = self._op("Add", x, self._linear(attended, cross_out))

            hidden = self._op("Gelu", self._linear(self._norm(x, layer.ffn_norm), layer.fc1))
            x = self._op("Add", x, self._linear(hidden, layer.fc2))
        self._linear(self._norm(x, w.norm), w.head, "logits")

        def described(name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        symbolic: dict[str, tuple[int | str, ...]] = {"x": ("Q", width), "mask": ("Q", "T+Q")}
        graph = helper.make_graph(
            self._nodes,
            "decoder step",
            [described(name, symbolic.get(name, shape)) for name, shape in self._inputs.items()],
            [
                described("logits", ("Q", len(w.head.weight))),
                *(described(name, (heads, "?", "??")) for name in outputs),
            ],
            self._constants,
        )
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def _op(self, kind: str, *args: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        self._count += 1
        name = name or f"{kind}.{self._count}"
        self._nodes.append(helper.make_node(kind, args, [name], name, domain=domain, **attributes))
        return name

    def _constant(self, value: Tensor | NDArray[Any]) -> str:
        self._count += 1
        name = f"constant.{self._count}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def _int(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _norm(self, x: str, norm: Norm) -> str:
        assert norm.bias is not None
        weight, bias = self._constant(norm.weight), self._constant(norm.bias)
        return self._op("LayerNormalization", x, weight, bias, axis=-1, epsilon=1e-5)

    def _attend(self, q: str, keys: str, values: str, masked: bool) -> str:
        """q [H, Q, D], keys [H, D, T], values [H, T, D] -> [Q, H * D]."""
        w = self._w
        width = w.embed_tokens.shape[1]
        q = self._op("Mul", q, self._constant(np.array((width // w.heads) ** -0.5, np.float32)))
        scores = self._op("MatMul", q, keys)
        if masked:
            scores = self._op("Add", scores, "mask")
        attended = self._op("MatMul", self._op("Softmax", scores, axis=-1), values)
        return self._op("Reshape", self._op("Transpose", attended, perm=[1, 0, 2]), self._ints(-1, width))

    def _linear(self, x: str, linear: Linear, name: str = "") -> str:
        """x [Q, K] -> [Q, N]."""
        weight, bias, _ = linear
        to = "" if bias is not None else name
        if self._fmt == "int4":
            y = self._int4(x, linear, to)
        elif self._fmt == "int8":
            weight, _, scale = quantise_linear(linear, "int8")
            assert scale is not None
            matrix = self._op("DequantizeLinear", self._constant(weight.T), self._constant(scale), axis=1)
            y = self._op("MatMul", x, matrix, name=to)
        else:
            y = self._op("MatMul", x, self._constant(weight.T), name=to)
        return y if bias is None else self._op("Add", y, self._constant(bias), name=name)

    def _int4(self, x: str, linear: Linear, name: str) -> str:
        n, k = linear.weight.shape
        packed, _, scale = quantise_linear(linear, "int4")
        assert scale is not None
        groups = scale.shape[1]
        return self._op(
            "MatMulNBits",
            x,
            self._constant(packed.view(n, groups, -1)),
            self._constant(scale),
            name=name,
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=k // groups,
            accuracy_level=4,  # int8 activations
        )
