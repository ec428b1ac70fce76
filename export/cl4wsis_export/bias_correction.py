"""Biases that make up for rounded weights.

Rounding the weights of a layer moves the mean of each of its channels, and layer after layer adds to that. What a layer
loses is the answer of a layer whose weights are the part that rounding took away; its mean over images, channel by
channel, is added to the bias. The corrected network costs nothing more.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2;
the means are measured on images here, padding included.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from cl4wsis_export.fused import INPUT_NAME
from cl4wsis_export.graph import serialize
from cl4wsis_export.passes import add_constant
from cl4wsis_export.precision import layer_type
from cl4wsis_export.verify import open_session

FloatArray = NDArray[np.float32]


def correct_biases(network: ir.Model, quantized: ir.Model, frames: NDArray[np.uint8]) -> None:
    """Correct the biases of the int8 convolutions of a network graph.

    Args:
        network: the float32 graph; it stays as it is.
        quantized: made from it, with the same names; its biases are replaced.
        frames: (N, H, W, 3) uint8 RGB over which means are taken.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    layers = {node.name: node for node in quantized.graph if node.op_type == "Conv" and layer_type(node) == "int8"}
    weights = {node.name: _array(node.inputs[1]) for node in network.graph if node.name in layers}
    lost = {name: weights[name] - _dequantized(node.inputs[1]) for name, node in layers.items()}
    for name, mean in _mean_answers(network, lost, frames).items():
        node = layers[name]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        node.resize_inputs(3)
        corrected = mean if bias is None else _array(bias) + mean
        node.replace_input_with(2, add_constant(quantized, corrected, f"{name}_corrected_bias"))
    common.RemoveUnusedNodesPass()(quantized)  # with the biases that were replaced


def _mean_answers(
    network: ir.Model, weights: dict[str | None, FloatArray], frames: NDArray[np.uint8]
) -> dict[str | None, FloatArray]:
    """Return the mean of each channel that convolutions would answer with other weights and no bias: (C,) by name."""
    if not weights:
        return {}
    probe = network.clone()
    probe.graph.outputs.clear()
    for node in list(probe.graph):
        if node.name not in weights:
            continue
        other = add_constant(probe, weights[node.name], f"{node.name}_other_weight")
        places = [axis for axis in range(weights[node.name].ndim) if axis != 1]
        axes = add_constant(probe, np.array(places, np.int64), f"{node.name}_mean_axes")
        answer = ir.node("Conv", [node.inputs[0], other], dict(node.attributes))
        mean = ir.node("ReduceMean", [answer.outputs[0], axes], {"keepdims": ir.AttrInt64("keepdims", 0)})
        (output,) = mean.outputs
        output.name, output.shape = f"{node.name}_mean", ir.Shape(weights[node.name].shape[:1])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        probe.graph.extend([answer, mean])
        probe.graph.outputs.append(output)
    common.NameFixPass()(probe)
    session = open_session(serialize(probe))
    means = [session.run(None, {INPUT_NAME: frame[None]}) for frame in frames]
    names = [node.name for node in network.graph if node.name in weights]
    return {name: np.mean(of_frames, axis=0) for name, of_frames in zip(names, zip(*means, strict=True), strict=True)}


def _dequantized(value: ir.Value | None) -> FloatArray:
    """Return int8 weights with a scale per output channel as the numbers they stand for."""
    assert value is not None
    node = value.producer()
    assert node is not None
    integers, scales = _array(node.inputs[0]), _array(node.inputs[1])
    weights: FloatArray = integers.astype(np.float32) * scales.reshape(-1, *[1] * (integers.ndim - 1))
    return weights


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array
