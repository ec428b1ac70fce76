"""The arithmetic of a graph's network: what it is, and how to make it half precision.

Precision lies in the graph, never in the flags of an engine's builder: a graph says with casts, or with pairs of
QuantizeLinear and DequantizeLinear, in which type each layer computes, and a strongly typed runtime keeps to that.
"""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from cl4wsis.bundle import Precision
from cl4wsis.errors import BundleError
from cl4wsis_export.fused import INPUT_NAME, MAP_NAMES, NETWORK_INPUT
from cl4wsis_export.graph import serialize
from cl4wsis_export.verify import open_session

MAX_HALF = 65504.0
"""Largest number in half precision."""
_HALF_MARGIN = 4.0
"""How much larger values may be on images not seen before."""
_FLOAT_PARAMETERS = {("Resize", 1), ("Resize", 2)}
"""Inputs (operator, position) that are float32 whatever the type of the data: region and factors."""
_LAYERS = ("Conv", "Gemm", "MatMul")
_TYPES: dict[ir.DataType, Precision] = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def count_types(model: ir.Model | bytes) -> dict[str, int]:
    """Count the layers with weights by the type in which a graph lets them compute.

    A layer is a convolution, or a product with a constant; it computes in int8 when both its data and its weights come
    out of a DequantizeLinear.

    Args:
        model: the graph, or the contents of an ``.onnx`` file.

    Returns:
        Number of layers by ``float32``, ``float16`` or ``int8``; types that do not occur are left out.
    """
    if isinstance(model, bytes):
        model = ir.from_proto(onnx.load_from_string(model))
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


class HalfPass(ir.passes.InPlacePass):
    """Let a network graph compute in half precision between its normalisation and its heads.

    Normalisation stays float32, since it begins with values up to 255, and so do the heads, the last layers before the
    three maps: they cost little, offsets of hundreds of pixels would be rounded to a quarter of a pixel, and values of
    the heatmap would fall together. Casts at both borders say so.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that the graph names the input of the network.

        Raises:
            PreconditionError: it does not.
        """
        if all(value.name != NETWORK_INPUT for node in model.graph for value in node.outputs):
            raise ir.passes.PreconditionError(f"the graph has no value {NETWORK_INPUT}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert the graph.

        Raises:
            BundleError: a weight is too large for half precision.
        """
        heads = set(head_nodes(model))
        inside = [node for node in network_nodes(model) if node not in heads]
        source = next(value for node in model.graph for value in node.outputs if value.name == NETWORK_INPUT)
        casts = _Casts(model)
        for node in inside:
            for index, value in enumerate(node.inputs):
                if value is None or (node.op_type, index) in _FLOAT_PARAMETERS or value.dtype != ir.DataType.FLOAT:
                    continue
                if value.const_value is not None:
                    node.replace_input_with(index, casts.constant(value, clip=node.op_type == "Clip"))
                elif value is source:
                    node.replace_input_with(index, casts.cast(value, ir.DataType.FLOAT16))
        for node in inside:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    value.type = ir.TensorType(ir.DataType.FLOAT16)  # clones share the old one
        for node in heads:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == ir.DataType.FLOAT16:
                    node.replace_input_with(index, casts.cast(value, ir.DataType.FLOAT))
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(inside))


def network_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes between the input of the network and its maps, in order."""
    found: set[ir.Node] = set()
    waiting = [node for node in model.graph if any(value.name == NETWORK_INPUT for value in node.inputs if value)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [user for value in node.outputs if value.name not in MAP_NAMES for user, _ in value.uses()]
    return [node for node in model.graph if node in found]


def head_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the last layers before the maps, and what joins the parts that several steps have added."""
    heads: dict[ir.Node, None] = {}  # an ordered set: what joins the parts may use a value several times
    waiting = [node for node in model.graph if any(value.name in MAP_NAMES for value in node.outputs)]
    while waiting:
        node = waiting.pop()
        if node in heads:
            continue
        heads[node] = None
        if not is_layer(node):
            waiting += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
    return list(heads)


class _Casts:
    """Values of a graph in another type, each made once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[tuple[ir.Value, ir.DataType, bool], ir.Value] = {}

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in another type."""
        key = (value, dtype, False)
        if key not in self._made:
            node = ir.node("Cast", [value], {"to": ir.AttrInt64("to", dtype)}, name=f"{value.name}_cast")
            result = node.outputs[0]
            result.name, result.shape = f"{value.name}_{dtype.name.lower()}", value.shape
            result.type = ir.TensorType(dtype)
            producer = value.producer()
            assert producer is not None
            self._model.graph.insert_after(producer, node)
            self._made[key] = result
        return self._made[key]

    def constant(self, value: ir.Value, clip: bool) -> ir.Value:
        """Return a constant in half precision; bounds of a Clip are clipped themselves."""
        key = (value, ir.DataType.FLOAT16, clip)
        if key not in self._made:
            assert value.const_value is not None
            array = value.const_value.numpy()
            array = np.clip(array, -MAX_HALF, MAX_HALF) if clip else array
            largest = float(np.abs(array).max(initial=0))
            if not largest <= MAX_HALF:
                raise BundleError(
                    f"weights '{value.name}' reach {largest:.3g}, half precision ends at {MAX_HALF:g}; "
                    "export with --precision fp32, or train with weight decay"
                )
            name = f"{value.name}_clipped_half" if clip else f"{value.name}_half"
            half = ir.tensor(array.astype(np.float16), name=name)
            made = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(half.dtype), const_value=half)
            self._model.graph.register_initializer(made)
            self._made[key] = made
        return self._made[key]


def check_half_range(network: ir.Model, frames: NDArray[np.uint8]) -> None:
    """Check that no value within a float32 network comes near the end of half precision.

    On a CPU, half precision is computed in float32, so an overflow would show on the GPU alone.

    Args:
        network: a network graph; it stays as it is.
        frames: (N, H, W, 3) uint8 RGB.

    Raises:
        BundleError: a value is too large, or is no number; the message names the largest.
        MissingExtraError: ONNX Runtime is not installed.
    """
    names, probe = _probe_magnitudes(network)
    session = open_session(serialize(probe))
    largest = np.zeros(len(names), np.float32)
    for frame in frames:
        largest = np.maximum(largest, np.array(session.run(None, {INPUT_NAME: frame[None]})))  # NaN stays NaN
    worst = int(np.nanargmax(np.where(np.isnan(largest), np.inf, largest)))
    if not largest[worst] <= MAX_HALF / _HALF_MARGIN:
        raise BundleError(
            f"half precision is no choice for this network: '{names[worst]}' reaches {largest[worst]:.3g} on images "
            f"of the verification, half precision ends at {MAX_HALF:g}; export with --precision fp32 or int8"
        )


def _probe_magnitudes(network: ir.Model) -> tuple[list[str], ir.Model]:
    """Return the names of the values within a network, and a graph that gives the largest magnitude of each."""
    probe = network.clone()
    values = [value for node in network_nodes(probe) for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    probe.graph.outputs.clear()
    for value in values:
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": ir.AttrInt64("keepdims", 0)})
        largest.outputs[0].name = f"{value.name}_largest"
        largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        probe.graph.extend([magnitude, largest])
        probe.graph.outputs.append(largest.outputs[0])
    common.NameFixPass()(probe)
    return [value.name or "?" for value in values], probe
