"""INT8: pairs of QuantizeLinear and DequantizeLinear around the convolutions of a network graph.

ONNX Runtime's static quantiser places the pairs, so that every runtime does the same arithmetic: symmetric signed
activations with one scale per tensor, as TensorRT wants them, symmetric weights with one scale per output channel,
float32 biases. Only the inputs of convolutions are quantised, once for all their readers. Then a residual connection
reads the same int8 values as the convolution beside it, and an engine fuses convolution, addition and activation.

The first convolution (it sees pixels, of which every level counts) and the heads stay float32, and so does everything
after them. Ranges are the largest magnitudes on the calibration images: most activations here are bounded by a ReLU6,
and clipping the others at a percentile of their histogram measured no better.

Weights use 7 of the 8 bits. CPUs without VNNI instructions add two products in 16 bits, and where the sum does not fit
they cut it off without a word: with 8 bits, answers were wrong there, in ONNX Runtime and in OpenVINO. Depthwise
convolutions keep 8 bits: both compute them exactly on such a CPU, and coarser weights would cost most there. Biases
make up for what rounded weights shift (:mod:`cl4wsis_export.bias_correction`).

OpenVINO (2025.0 to 2026.4 at least) carries the quantisation of a concatenation to its parts, and where an ordinary
convolution reads the result, it then truncates the values to whole numbers without scaling them: the projection of the
instance pyramid was off by 42 % of its spread. A leaky ReLU of slope 1, which changes nothing, keeps the quantisation
where it is.
"""

import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from cl4wsis.errors import BundleError, require
from cl4wsis_export.bias_correction import correct_biases
from cl4wsis_export.fused import INPUT_NAME
from cl4wsis_export.graph import serialize
from cl4wsis_export.passes import TidyPass, add_constant
from cl4wsis_export.precision import head_nodes, is_layer, layer_type, network_nodes

_CORRECTION_FRAMES = 16
"""Calibration images over which the shift of a channel is averaged; 64 gave much the same."""
_CARRIED_THROUGH = ("Relu", "BatchNormalization", "Add", "Mul", "Reshape", "Transpose")
"""Operators through which OpenVINO carries a quantisation to the concatenation before them."""
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}  # else the quantiser advises to fold and infer shapes first


def quantize_network(network: ir.Model, frames: NDArray[np.uint8]) -> ir.Model:
    """Quantise the convolutions of a network graph.

    Args:
        network: float32; it stays as it is.
        frames: (N, H, W, 3) uint8 RGB, images of the input size on which ranges are measured.

    Returns:
        The same graph with int8 layers.

    Raises:
        BundleError: the quantiser failed, or left a layer as it was.
        MissingExtraError: ONNX Runtime is not installed.
    """
    layers = layers_to_quantize(network)
    full_range = _depthwise_weights(network, layers)
    with tempfile.TemporaryDirectory(prefix="cl4wsis-") as folder:
        source, target = Path(folder) / "network.onnx", Path(folder) / "network-int8.onnx"
        prepared = network.clone()
        _separate_biases(prepared, layers)
        prepared.metadata_props.update(_PREPARED)
        source.write_bytes(serialize(prepared))
        _quantize_file(source, target, layers, full_range, frames)
        quantized = ir.load(str(target))
        model = ir.from_proto(ir.to_proto(quantized))  # the file is gone when the folder is
    model.graph.sort()
    model = TidyPass()(model).model
    _hold_quantization(model)
    left = [node.name or "?" for node in model.graph if node.name in layers and layer_type(node) != "int8"]
    if left:
        raise BundleError(f"{len(left)} of {len(layers)} layers were not quantised, among them {', '.join(left[:3])}")
    correct_biases(network, model, frames[:_CORRECTION_FRAMES])
    return model


def layers_to_quantize(network: ir.Model) -> list[str]:
    """Name the convolutions with constant weights between the first one and the heads."""
    inside = [node for node in network_nodes(network) if node.op_type == "Conv" and is_layer(node)]
    kept = {*head_nodes(network), inside[0]}
    return [node.name or "" for node in inside if node not in kept]


def frame_hashes(frames: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the SHA-256 of the pixels of each frame."""
    return tuple(sha256(np.ascontiguousarray(frame).tobytes()).hexdigest() for frame in frames)


def _separate_biases(network: ir.Model, layers: Sequence[str]) -> None:
    """Give every layer a bias of its own; the quantiser would copy shared ones to names that other values may have."""
    for node in network.graph:
        bias = node.inputs[2] if node.name in layers and len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            node.replace_input_with(2, add_constant(network, bias.const_value.numpy(), f"{node.name}_own_bias"))
    common.RemoveUnusedNodesPass()(network)  # with the biases that were replaced


def _hold_quantization(model: ir.Model) -> None:
    """Keep OpenVINO from moving the quantisation of a concatenation that an ordinary convolution reads."""
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if value is None or not _comes_from_concatenation(value) or all(map(_is_depthwise, _readers(node))):
            continue
        hold = ir.node("LeakyRelu", [value], {"alpha": ir.AttrFloat32("alpha", 1.0)}, name=f"{value.name}_hold")
        (held,) = hold.outputs
        held.name, held.type, held.shape = f"{value.name}_held", value.type, value.shape
        model.graph.insert_before(node, hold)
        node.replace_input_with(0, held)


def _comes_from_concatenation(value: ir.Value) -> bool:
    """Return whether a value is a concatenation, or made of one by operators that a quantisation is carried through."""
    producer = value.producer()
    while producer is not None and producer.op_type in _CARRIED_THROUGH and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Concat"


def _readers(quantize: ir.Node) -> Iterator[ir.Node]:
    """Yield the layers that read a quantised value."""
    for dequantize, _ in quantize.outputs[0].uses():
        yield from (reader for reader, _ in dequantize.outputs[0].uses())


def _is_depthwise(node: ir.Node) -> bool:
    """Return whether every channel of a convolution, quantised or not, has a filter of its own."""
    if node.op_type != "Conv" or node.inputs[1] is None or node.attributes.get_int("group", 1) == 1:
        return False
    dequantize = node.inputs[1].producer()
    weights = node.inputs[1] if dequantize is None else dequantize.inputs[0]
    return weights is not None and weights.shape is not None and weights.shape[1] == 1


def _depthwise_weights(network: ir.Model, layers: Sequence[str]) -> list[str]:
    """Name the weights of the layers in which every channel has a filter of its own."""
    weights = [node.inputs[1] for node in network.graph if node.name in layers and _is_depthwise(node)]
    return [value.name or "" for value in weights if value is not None]


def _quantize_file(
    source: Path, target: Path, layers: Sequence[str], full_range: Sequence[str], frames: NDArray[np.uint8]
) -> None:
    """Quantise a file; ``full_range`` names the weights that keep 8 bits."""
    require("cpu")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    whole_byte = {"quant_type": QuantType.QInt8, "reduce_range": False, "symmetric": True, "axis": 0}
    try:
        quantize_static(
            str(source),
            str(target),
            _reader(frames),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=list(layers),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Conv"],
                "TensorQuantOverrides": {name: [whole_byte] for name in full_range},
            },
        )
    except Exception as error:  # the quantiser raises errors of many kinds
        raise BundleError(f"ONNX Runtime could not quantise the network: {error}") from error


def _reader(frames: NDArray[np.uint8]) -> Any:
    """Return what the quantiser reads calibration images from, one at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, NDArray[np.uint8]]] = ({INPUT_NAME: frame[None]} for frame in frames)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(self._feeds, None)

    return Reader()
