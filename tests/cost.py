"""What a graph costs at least: floating-point operations and bytes of its layers, counted from the ONNX file.

Only layers with weights and products are counted, each as one fused kernel that reads its data and weights once and
writes its result once; what stands between them (activations, sums, resizing, the grouping) is taken to be free in
operations, and its bytes are told apart. So the roofline time is a bound from below: no kernel is faster.

Source: the roofline model of Williams, Waterman and Patterson, "Roofline: an insightful visual performance model"
(CACM 2009).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl4wsis.errors import BundleError, require

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSwish", "Sigmoid")
_TYPES = {"FLOAT": "float32", "FLOAT16": "float16"}


@dataclass(frozen=True)
class LayerCost:
    """One layer.

    Attributes:
        name: of its node.
        precision: ``float32``, ``float16`` or ``int8``.
        flops: multiplications and additions.
        moved_bytes: of data, weights and result.
    """

    name: str
    precision: str
    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class GraphCost:
    """A graph at one batch size.

    Attributes:
        layers: with weights, and products.
        other_bytes: read and written by all other nodes, if none of them were fused.
        weight_bytes: of all constants.
    """

    layers: tuple[LayerCost, ...]
    other_bytes: int
    weight_bytes: int

    @property
    def flops(self) -> dict[str, int]:
        """Operations by precision."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[layer.precision] = found.get(layer.precision, 0) + layer.flops
        return found

    @property
    def layer_bytes(self) -> int:
        """Bytes that all layers move."""
        return sum(layer.moved_bytes for layer in self.layers)

    def roofline_seconds(self, peak_flops: Mapping[str, float], peak_bandwidth: float) -> float:
        """Return the time below which no implementation comes on a device: of each layer the slower of two bounds.

        Args:
            peak_flops: operations per second by precision.
            peak_bandwidth: bytes per second.
        """
        return sum(
            max(layer.flops / peak_flops[layer.precision], layer.moved_bytes / peak_bandwidth) for layer in self.layers
        )


def count_cost(path: Path, batch: int) -> GraphCost:
    """Count what a graph costs.

    Args:
        path: of the ``.onnx`` file; weights beside it are not read.
        batch: number of images.

    Raises:
        MissingExtraError: onnx is not installed.
        BundleError: shapes within the graph cannot be inferred.
    """
    require("export")
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return _Counter(onnx, inferred.graph).count()


class _Counter:
    """Shapes and types of one graph."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._graph = graph
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._item_bytes: dict[str, int] = {}
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            self._add(onnx, value.name, tensor.elem_type, tuple(side.dim_value for side in tensor.shape.dim))
        for value in graph.initializer:
            self._add(onnx, value.name, value.data_type, tuple(value.dims))
        self._makers = {output: node for node in graph.node for output in node.output}
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def count(self) -> GraphCost:
        layers, other = [], 0
        for node in self._graph.node:
            if node.op_type in _LAYERS:
                layers.append(self._layer(node))
            elif node.op_type != "Constant":
                other += sum(self._bytes(name) for name in (*node.input, *node.output) if name)
        weights = sum(self._bytes(value.name) for value in self._graph.initializer)
        return GraphCost(tuple(layers), other, weights)

    def _add(self, onnx: Any, name: str, elem_type: int, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape
        self._types[name] = onnx.TensorProto.DataType.Name(elem_type)
        self._item_bytes[name] = onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize

    def _layer(self, node: Any) -> LayerCost:
        data, weights = node.input[:2]
        quantised = all(self._is_dequantized(name) for name in (data, weights))
        precision = "int8" if quantised else _TYPES.get(self._types.get(data, ""), "float32")
        moved = self._operand_bytes(data) + self._operand_bytes(weights) + self._result_bytes(node.output[0])
        return LayerCost(node.name, precision, self._flops(node), moved)

    def _flops(self, node: Any) -> int:
        data, weights = (self._shape(name) for name in node.input[:2])
        result = self._shape(node.output[0])
        if node.op_type == "Conv":
            return 2 * math.prod(result) * math.prod(weights[1:])
        if node.op_type == "ConvTranspose":
            return 2 * math.prod(data) * math.prod(weights[1:])
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return 2 * math.prod(result) * data[0 if transposed else -1]

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None or (shape and min(shape) < 1):
            raise BundleError(f"the shape of '{name}' cannot be inferred from the graph; export the step again")
        return shape

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes.get(name, ())) * self._item_bytes.get(name, 0)

    def _operand_bytes(self, name: str) -> int:
        """Return the bytes that a layer reads: of the quantised values where they are dequantised on the way in."""
        return self._bytes(self._makers[name].input[0]) if self._is_dequantized(name) else self._bytes(name)

    def _result_bytes(self, name: str) -> int:
        """Return the bytes that a layer writes: of the quantised values where only a quantiser reads the others."""
        users = self._users.get(name, [])
        while len(users) == 1 and users[0].op_type in _ACTIVATIONS:
            name = users[0].output[0]
            users = self._users.get(name, [])
        if users and all(user.op_type == "QuantizeLinear" for user in users):
            return self._bytes(users[0].output[0])
        return self._bytes(name)

    def _is_dequantized(self, name: str) -> bool:
        return name in self._makers and self._makers[name].op_type == "DequantizeLinear"
