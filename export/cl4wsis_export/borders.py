"""Cut the exported graph at the borders of its network, and join networks of other arithmetic to the same grouping.

The whole graph (images to instances) is the *network graph* (images to the three raw maps) followed by the *tail*
(maps to instances). A variant changes the network graph alone, so the grouping of every variant is the same.

A network graph keeps its weights in the file of the whole graph, to which its initializers point by offset and length:
ONNX calls that external data, and ONNX Runtime, OpenVINO and TensorRT read it in place.
"""

from collections.abc import Iterator
from io import BytesIO

import onnx_ir as ir
from onnx_ir.passes import common

from cl4wsis.errors import BundleError
from cl4wsis.protobuf import length_delimited
from cl4wsis_export.fused import MAP_NAMES

_MIN_SHARED_BYTES = 1024
"""Smaller initializers, such as shapes and bounds, are stored twice: runtimes look into them while they load."""
_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9  # fields of ModelProto, GraphProto and TensorProto in onnx.proto


def network_graph(model: ir.Model) -> ir.Model:
    """Return the part of an exported graph that ends with the network's raw maps.

    Args:
        model: as built by :func:`cl4wsis_export.graph.build_graph`; it stays as it is.

    Raises:
        BundleError: the graph has no values of the maps' names.
    """
    network = model.clone()
    network.graph.outputs[:] = _maps(network)
    common.RemoveUnusedNodesPass()(network)
    return network


def grouping_tail(model: ir.Model) -> ir.Model:
    """Return the part of an exported graph that begins with the network's raw maps; see :func:`network_graph`."""
    tail = model.clone()
    maps = _maps(tail)
    inputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in maps]
    for value, taken in zip(maps, inputs, strict=True):
        value.name = f"{value.name}_of_network"
        ir.convenience.replace_all_uses_with(value, taken)
    tail.graph.inputs[:] = inputs
    common.RemoveUnusedNodesPass()(tail)
    return tail


def join(network: ir.Model, tail: ir.Model) -> ir.Model:
    """Put a network graph before a tail; both stay as they are."""
    whole, rest = network.clone(), tail.clone()
    for value, taken in zip(whole.graph.outputs, rest.graph.inputs, strict=True):
        assert value.name == taken.name
        ir.convenience.replace_all_uses_with(taken, value)
    outputs, initializers = list(rest.graph.outputs), list(rest.graph.initializers.values())
    rest.graph.outputs.clear()
    rest.graph.initializers.clear()
    nodes = list(rest.graph)
    rest.graph.remove(nodes)
    whole.graph.outputs[:] = outputs
    for value in initializers:
        if value.name in whole.graph.initializers:
            value.name = f"{value.name}_of_grouping"
        whole.graph.register_initializer(value)
    whole.graph.extend(nodes)
    passes = ir.passes.Sequential(common.DeduplicateInitializersPass(), common.NameFixPass())
    joined: ir.Model = passes(whole).model
    return joined


def share_weights(network: ir.Model, whole: bytes, location: str) -> ir.Model:
    """Let the weights of a network graph lie in the file of the whole graph.

    Args:
        network: its initializers have the names, types and values they have in the whole graph.
        whole: contents of that file.
        location: its name; both files lie in one folder.

    Returns:
        The graph to serialize; ``network`` stays as it is.
    """
    places = dict(_raw_data(whole))
    sparse = network.clone()
    for name, value in sparse.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _MIN_SHARED_BYTES or name not in places:
            continue
        offset, length = places[name]
        content = tensor.tobytes()
        if whole[offset : offset + length] != content:
            continue  # a value of that name was changed on one of the two sides
        value.const_value = ir.ExternalTensor(
            location, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
        )
    return sparse


def _maps(model: ir.Model) -> list[ir.Value]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    missing = [name for name in MAP_NAMES if name not in values]
    if missing:
        raise BundleError(
            f"the graph has no value {', '.join(missing)}, so its network cannot be told from its grouping"
        )
    return [values[name] for name in MAP_NAMES]


def _raw_data(content: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, and (offset, length) of the raw data, of every initializer of a serialized graph."""
    file = BytesIO(content)
    for field, size in length_delimited(file, len(content)):
        if field != _GRAPH:
            continue
        for part, length in length_delimited(file, size):
            if part == _INITIALIZER:
                places = {number: (file.tell(), count) for number, count in length_delimited(file, length)}
                if _NAME in places and _RAW_DATA in places:
                    start, count = places[_NAME]
                    yield content[start : start + count].decode("utf-8"), places[_RAW_DATA]
