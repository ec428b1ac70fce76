"""The arithmetic of a graph's network: what it is, and how to make it half precision.

Precision lies in the graph, never in the flags of an engine's builder: a graph says with casts, or with pairs of
QuantizeLinear and DequantizeLinear, in which type each layer computes, and a strongly typed runtime keeps to that.
"""

from collections import Counter

import onnx_ir as ir

from cl4wsis.bundle import Precision

_LAYERS = ("Conv", "Gemm", "MatMul")
_TYPES: dict[ir.DataType, Precision] = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def count_types(model: ir.Model | bytes) -> dict[str, int]:
    """Count the layers with weights by the type in which a graph lets them compute.

    A layer is a convolution, or a product with a constant; it computes in int8 when both its data and its weights come
    out of a DequantizeLinear.

    Args:
        model: the graph, or the contents of an ``.onnx`` file without external data.

    Returns:
        Number of layers by ``float32``, ``float16`` or ``int8``; types that do not occur are left out.
    """
    if isinstance(model, bytes):
        model = ir.from_proto(ir.serde.onnx.ModelProto.FromString(model))
    types = Counter(layer_type(node) for node in model.graph.all_nodes() if is_layer(node))
    return dict(sorted(types.items()))


def is_layer(node: ir.Node) -> bool:
    """Return whether a node has weights."""
    return node.op_type in _LAYERS and (_is_dequantized(node.inputs[1]) or _is_constant(node.inputs[1]))


def layer_type(node: ir.Node) -> str:
    """Return the type in which a layer computes."""
    data, weights = node.inputs[:2]
    if _is_dequantized(data) and _is_dequantized(weights):
        return "int8"
    assert weights is not None
    dtype = weights.dtype if weights.const_value is None else weights.const_value.dtype
    return _TYPES.get(dtype, str(dtype)) if dtype is not None else "unknown"


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
