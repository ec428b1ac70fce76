"""Dilated int8 convolutions that OpenVINO need not multiply with padding: the same answers, and only where it pays."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cl4wsis_serve.backends.openvino import shared_core
from cl4wsis_serve.backends.openvino_padding import leave_out_padding

openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")

CHANNELS = 8
PLAIN = {"kernel_shape": [3, 3], "dilations": [6, 6], "pads": [6, 6, 6, 6]}


def int8_convolution(size: tuple[int, int], *readers: dict[str, Any], zero_point: int = 0) -> onnx.ModelProto:
    """Return images -> ReLU -> int8 convolutions with these attributes, as our quantiser writes them."""
    generator = np.random.default_rng(0)
    kernel = readers[0]["kernel_shape"]
    constants = {
        "scale": np.float32(0.02),
        "zero": np.int8(zero_point),
        "weights": generator.integers(-63, 64, (CHANNELS, CHANNELS, *kernel), dtype=np.int8),
        "scales": generator.uniform(0.001, 0.01, CHANNELS).astype(np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
        "bias": generator.normal(0, 1, CHANNELS).astype(np.float32),
    }
    nodes = [
        helper.make_node("Relu", ["images"], ["features"]),
        helper.make_node("QuantizeLinear", ["features", "scale", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["dequantized"]),
        helper.make_node("DequantizeLinear", ["weights", "scales", "zeros"], ["dequantized_weights"], axis=0),
    ]
    for number, attributes in enumerate(readers):
        inputs = ["dequantized", "dequantized_weights", "bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"answer_{number}"], **attributes))
    shape = ["batch", CHANNELS, *size]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"answer_{number}", TensorProto.FLOAT, None) for number in range(len(readers))],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def compiled(graph: onnx.ModelProto, size: tuple[int, int], cuts: bool, batch: int = 2) -> tuple[Any, int]:
    core = shared_core()
    model = core.read_model(graph.SerializeToString())
    model.reshape({"images": [batch, CHANNELS, *size]})
    count = leave_out_padding(model) if cuts else 0
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}), count


def convolutions(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return the type of the input, and the shape of the output, of every convolution that is computed."""
    nodes = [
        n for n in model.get_runtime_model().get_ordered_ops() if "onvolution" in n.get_rt_info()["layerType"].value
    ]
    return [(n.get_input_element_type(0).get_type_name(), tuple(n.get_output_shape(0))) for n in nodes]


@pytest.mark.parametrize("size", [(14, 14), (7, 20), (6, 6), (5, 9), (1, 13)])
def test_answers_stay_the_same(size: tuple[int, int]) -> None:
    graph = int8_convolution(size, PLAIN, {**PLAIN, "dilations": [5, 5], "pads": [5, 5, 5, 5]})
    images = np.random.default_rng(1).normal(0, 1, (2, CHANNELS, *size)).astype(np.float32)
    (whole, _), (parts, count) = (compiled(graph, size, cuts) for cuts in (False, True))
    assert count == 2
    for number in range(2):
        # One step of an integer sum is 2e-5 or more.
        np.testing.assert_allclose(parts(images)[number], whole(images)[number], rtol=0, atol=5e-6)


def test_parts_compute_in_int8_and_only_what_sees_the_map() -> None:
    size = (14, 14)
    model, _ = compiled(int8_convolution(size, PLAIN), size, cuts=True)
    found = convolutions(model)
    assert {kind for kind, _ in found} <= {"u8", "i8"}
    assert sorted(shape[2:] for _, shape in found) == sorted((h, w) for h in (6, 2, 6) for w in (6, 2, 6))


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        pytest.param({**PLAIN, "dilations": [1, 1], "pads": [1, 1, 1, 1]}, (14, 14), id="little padding"),
        pytest.param(PLAIN, (60, 60), id="large map"),
        pytest.param({**PLAIN, "pads": [0, 0, 0, 0]}, (14, 14), id="no padding"),
        pytest.param({**PLAIN, "pads": [6, 3, 6, 3], "dilations": [6, 3]}, (14, 14), id="two dilations"),
        pytest.param({**PLAIN, "strides": [2, 2]}, (14, 14), id="stride"),
        pytest.param({**PLAIN, "kernel_shape": [5, 5], "pads": [12, 12, 12, 12]}, (14, 14), id="larger kernel"),
    ],
)
def test_other_convolutions_stay_as_they_are(attributes: dict[str, Any], size: tuple[int, int]) -> None:
    assert compiled(int8_convolution(size, attributes), size, cuts=True)[1] == 0


def test_activations_with_a_zero_point_stay_as_they_are() -> None:
    assert compiled(int8_convolution((14, 14), PLAIN, zero_point=-128), (14, 14), cuts=True)[1] == 0


def test_a_float_convolution_stays_as_it_is() -> None:
    graph = int8_convolution((14, 14), PLAIN)
    conv = next(node for node in graph.graph.node if node.op_type == "Conv")
    conv.input[0] = "features"
    assert compiled(graph, (14, 14), cuts=True)[1] == 0
