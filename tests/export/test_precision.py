"""Half precision and the types of layers, on graphs of a few nodes and on the network of the tests."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cl4wsis.errors import BundleError
from cl4wsis_export.borders import network_graph
from cl4wsis_export.fused import MAP_NAMES
from cl4wsis_export.graph import serialize
from cl4wsis_export.precision import HalfPass, check_half_range, count_types, head_nodes, network_nodes
from cl4wsis_export.verify import open_session

FRAMES = np.random.default_rng(5).integers(0, 256, (2, 64, 96, 3), np.uint8)

# Pixels are normalised, go through one layer, are clipped and enlarged, and end in heads, one of them of two parts.
BODY = """
    float_images = Cast<to=1>(images)
    planes = Transpose<perm=[0, 3, 1, 2]>(float_images)
    network_input = Div(planes, std)
    inner = Conv(network_input, weight)
    clipped = Clip(inner, low, high)
    enlarged = Resize<mode="linear">(clipped, , scales)
    old = Conv(enlarged, head)
    new = Conv(enlarged, head)
    semantic_logits = Concat<axis=1>(old, new)
    center_heatmap = Conv(enlarged, head)
    offset_map = Conv(enlarged, head)
"""


def small_network(weight: float = 0.3, high: float = 3.0e38) -> ir.Model:
    outputs = ", ".join(f"float[batch, channels, h, w] {name}" for name in MAP_NAMES)
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (uint8[batch, 4, 4, 3] images) => ({outputs}) {{ {BODY} }}'
    model = ir.from_onnx_text(text)
    constants = {
        "std": np.float32(100),
        "weight": np.full((2, 3, 1, 1), weight, np.float32),
        "low": np.float32(0),
        "high": np.float32(high),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "head": np.full((1, 2, 1, 1), 0.25, np.float32),
    }
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in constants.items():
        value = values[name]
        value.const_value, value.shape, value.type = (
            ir.tensor(array),
            ir.Shape(array.shape),
            ir.TensorType(ir.DataType.FLOAT),
        )
        model.graph.register_initializer(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


@pytest.fixture(scope="module")
def network_of_bundle(bundle_path: Path) -> ir.Model:
    return network_graph(ir.load(str(bundle_path / "model.onnx")))


def test_the_network_lies_between_normalisation_and_heads() -> None:
    model = small_network()
    assert [node.op_type for node in network_nodes(model)][:3] == ["Conv", "Clip", "Resize"]
    assert sorted(node.op_type for node in head_nodes(model)) == ["Concat", "Conv", "Conv", "Conv", "Conv"]


def test_half_precision_begins_after_the_normalisation_and_ends_before_the_heads() -> None:
    model = small_network()
    assert HalfPass()(model).modified
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert types["network_input"] == ir.DataType.FLOAT
    assert types["inner"] == types["clipped"] == types["enlarged"] == ir.DataType.FLOAT16
    assert {types[name] for name in MAP_NAMES} == {ir.DataType.FLOAT}
    assert count_types(model) == {"float16": 1, "float32": 4}
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert resize.inputs[2] is not None
    assert resize.inputs[2].const_value is not None
    assert resize.inputs[2].const_value.dtype == ir.DataType.FLOAT  # factors are float32 whatever is resized
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 3  # from uint8, to half, and back once for all heads


def test_half_precision_answers_almost_as_float() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    model = small_network()
    expected = open_session(serialize(model)).run(None, {"images": images})
    HalfPass()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for array, half in zip(expected, open_session(serialize(model)).run(None, {"images": images}), strict=True):
        np.testing.assert_allclose(half, array, rtol=2e-3)
        assert not np.array_equal(half, array)  # something was rounded


def test_a_pass_leaves_other_copies_alone() -> None:
    model = small_network()
    HalfPass()(model.clone())
    assert count_types(model) == {"float32": 5}
    open_session(serialize(model))


def test_a_weight_beyond_half_precision_is_named() -> None:
    with pytest.raises(
        BundleError, match=r"weights 'weight' reach 7e\+04, half precision ends at 65504.*--precision fp32"
    ):
        HalfPass()(small_network(weight=7.0e4))


def test_a_graph_without_a_border_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    )
    with pytest.raises(ir.passes.PreconditionError, match="network_input"):
        HalfPass()(model)


@pytest.mark.parametrize(("weight", "problem"), [(6.0e3, "'inner' reaches"), (float("nan"), "reaches nan")])
def test_an_activation_near_the_end_of_half_precision_is_named(weight: float, problem: str) -> None:
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    check_half_range(small_network(), white)
    with pytest.raises(BundleError, match=problem):
        check_half_range(small_network(weight), white)


def test_the_network_of_a_bundle_becomes_half(network_of_bundle: ir.Model) -> None:
    half = network_of_bundle.clone()
    check_half_range(half, FRAMES)
    HalfPass()(half)
    types = count_types(half)
    heads = sum(node.op_type == "Conv" for node in head_nodes(network_of_bundle))
    assert heads == 5  # classes, discriminant, upsampling, centers, offsets; those of all steps in one
    assert types == {"float16": count_types(network_of_bundle)["float32"] - heads, "float32": heads}
    assert len(serialize(half)) < 0.6 * len(serialize(network_of_bundle))
    expected = open_session(serialize(network_of_bundle)).run(list(MAP_NAMES), {"images": FRAMES})
    answers = open_session(serialize(half)).run(list(MAP_NAMES), {"images": FRAMES})
    for array, answer in zip(expected, answers, strict=True):
        assert answer.dtype == np.float32
        # Shares of centers follow from class logits that the fixture has made twenty times as steep.
        np.testing.assert_allclose(answer, array, atol=0.05 * np.abs(array).max())


def test_types_are_counted_in_a_file_too(bundle_path: Path) -> None:
    assert count_types((bundle_path / "model.onnx").read_bytes())["float32"] > 50
