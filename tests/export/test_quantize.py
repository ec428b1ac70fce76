"""INT8 by real quantisation: what becomes int8, what stays, and how far the answers move."""

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layouts import Split, write_coco

from cl4wsis.errors import BundleError, DataError
from cl4wsis.steps import StepInfo
from cl4wsis.tasks import Plan
from cl4wsis_export import quantize
from cl4wsis_export.borders import network_graph
from cl4wsis_export.calibration import balanced_order, calibration_images
from cl4wsis_export.fused import MAP_NAMES
from cl4wsis_export.graph import serialize
from cl4wsis_export.passes import TidyPass, add_constant
from cl4wsis_export.precision import count_types, head_nodes, network_nodes
from cl4wsis_export.quantize import _hold_quantization, frame_hashes, layers_to_quantize, quantize_network
from cl4wsis_export.verify import open_session, verification_frames


@pytest.fixture(scope="module")
def frames(step_info: StepInfo) -> np.ndarray:
    return verification_frames(step_info.input, 4, seed=1)


@pytest.fixture(scope="module")
def network_of_bundle(bundle_path: Path) -> ir.Model:
    return network_graph(ir.load(str(bundle_path / "model.onnx")))


@pytest.fixture(scope="module")
def quantized(network_of_bundle: ir.Model, frames: np.ndarray) -> ir.Model:
    return quantize_network(network_of_bundle, frames)


def test_all_but_the_first_convolution_and_the_heads_are_int8(network_of_bundle: ir.Model, quantized: ir.Model) -> None:
    layers = layers_to_quantize(network_of_bundle)
    inside = [node for node in network_nodes(network_of_bundle) if node.op_type == "Conv"]
    heads = [node for node in head_nodes(network_of_bundle) if node.op_type == "Conv"]
    assert inside[0].name not in layers
    assert not {node.name for node in heads} & set(layers)
    assert len(layers) == len(inside) - 1 - len(heads)
    assert count_types(quantized) == {"float32": 1 + len(heads), "int8": len(layers)}


def test_scales_suit_tensorrt(quantized: ir.Model) -> None:
    """Zero points are zero and int8; weights have one scale per output channel, activations one; biases are float."""
    for node in quantized.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = node.inputs[1], node.inputs[2]
        assert scale is not None
        assert scale.const_value is not None
        assert zero is not None
        assert zero.const_value is not None
        assert zero.const_value.dtype == ir.DataType.INT8
        assert not zero.const_value.numpy().any()
        assert (scale.const_value.numpy() > 0).all()
        source = node.inputs[0]
        assert source is not None
        if source.const_value is not None:
            assert source.const_value.dtype == ir.DataType.INT8
            assert scale.const_value.shape == (source.const_value.shape[0],)
        else:
            assert scale.const_value.size == 1
    for node in quantized.graph:
        if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
            assert node.inputs[2].const_value is not None
            assert node.inputs[2].const_value.dtype == ir.DataType.FLOAT


def test_weights_leave_a_bit_unused_so_that_no_cpu_saturates(quantized: ir.Model) -> None:
    """Two products of 8-bit activations with 7-bit weights fit 16 bits; depthwise convolutions add none in 16 bits."""
    largest: dict[bool, int] = {True: 0, False: 0}
    for node in quantized.graph:
        weights = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if weights is not None:
            is_depthwise = weights.shape[1] == 1
            largest[is_depthwise] = max(largest[is_depthwise], int(np.abs(weights.numpy().astype(int)).max()))
    assert largest == {True: 127, False: 64}


def test_a_value_is_quantised_once_for_all_its_readers(quantized: ir.Model) -> None:
    sources = [node.inputs[0] for node in quantized.graph if node.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


def test_answers_stay_near_those_of_float32(
    network_of_bundle: ir.Model, quantized: ir.Model, frames: np.ndarray
) -> None:
    expected = open_session(serialize(network_of_bundle)).run(list(MAP_NAMES), {"images": frames})
    for array, answer in zip(
        expected, open_session(serialize(quantized)).run(list(MAP_NAMES), {"images": frames}), strict=True
    ):
        noise = np.sqrt(np.mean((answer - array) ** 2) / np.mean(array**2))
        assert 1e-4 < noise < 0.3


def test_copies_of_a_shared_bias_take_no_name_of_another_value(network_of_bundle: ir.Model, frames: np.ndarray) -> None:
    network = network_of_bundle.clone()
    layers = layers_to_quantize(network)
    convolutions = [node for node in network.graph if node.name in layers]
    widths = {node: node.outputs[0].shape[1] for node in convolutions if node.outputs[0].shape is not None}
    (width, count), *_ = Counter(widths.values()).most_common()
    assert count > 1
    shared = add_constant(network, np.zeros(int(str(width)), np.float32), "zeros")
    alike = [node for node in convolutions if widths[node] == width]
    for node in alike:
        node.resize_inputs(3)
        node.replace_input_with(2, shared)
    for number, node in enumerate(convolutions[-9:], start=1):
        node.outputs[0].name = f"zeros{number}"
    assert count_types(quantize_network(network, frames[:1]))["int8"] == len(layers)


def test_only_the_concatenation_of_the_instance_pyramid_is_held(quantized: ir.Model) -> None:
    """Others are read by depthwise convolutions, or pass a leaky ReLU anyway."""
    held = [node for node in quantized.graph if node.op_type == "LeakyRelu" and node.attributes["alpha"].value == 1]
    assert len(held) == 1


@pytest.mark.parametrize("between", ["Identity (joined)", "Relu (joined)", "Mul (joined, gain)", "Add (joined, gain)"])
def test_openvino_does_the_arithmetic_of_a_quantised_concatenation(between: str) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    graph = concatenation(between)
    _hold_quantization(TidyPass()(graph).model)
    features = np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)
    (expected,) = open_session(serialize(graph)).run(None, {"x": features})
    model = openvino.Core().read_model(serialize(graph))
    answer = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": features})["y"]
    np.testing.assert_allclose(answer, expected, atol=1e-4)


def concatenation(between: str) -> ir.Model:
    """Two convolutions whose results are joined, changed, quantised, and read by a third."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]> agraph (float[1, 4, 6, 6] x) => (float[1, 8, 6, 6] y)
        <float scale = {{0.05}}, int8 zero = {{0}}> {{
            first = Conv (x, left)
            second = Conv (x, right)
            joined = Concat <axis = 1> (first, second)
            changed = {between}
            integers = QuantizeLinear (changed, scale, zero)
            rounded = DequantizeLinear (integers, scale, zero)
            weights = DequantizeLinear <axis = 0> (weight_integers, weight_scales, weight_zeros)
            y = Conv (rounded, weights)
        }}"""
    )
    arrays = {
        "left": rng.normal(size=(8, 4, 1, 1)).astype(np.float32),
        "right": rng.normal(size=(8, 4, 1, 1)).astype(np.float32),
        "gain": rng.uniform(0.5, 1.5, (1, 16, 1, 1)).astype(np.float32),
        "weight_integers": rng.integers(-64, 65, (8, 16, 1, 1), dtype=np.int8),
        "weight_scales": np.full(8, 0.01, np.float32),
        "weight_zeros": np.zeros(8, np.int8),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(model)


def test_int8_is_a_quarter_of_the_size(network_of_bundle: ir.Model, quantized: ir.Model) -> None:
    assert len(serialize(quantized)) < 0.35 * len(serialize(network_of_bundle))


def test_a_layer_that_stays_float_is_an_error(
    network_of_bundle: ir.Model, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quantize._quantize_file
    monkeypatch.setattr(quantize, "_quantize_file", lambda a, b, layers, *c: real(a, b, layers[3:], *c))
    with pytest.raises(BundleError, match=r"3 of \d+ layers were not quantised, among them"):
        quantize_network(network_of_bundle, frames)


def test_frames_are_known_by_their_pixels(frames: np.ndarray) -> None:
    hashes = frame_hashes(frames)
    assert len(set(hashes)) == len(frames)
    assert frame_hashes(frames[::-1].copy()) == hashes[::-1]
    assert all(len(text) == 64 for text in hashes)


def test_rare_classes_are_chosen_as_often_as_frequent_ones() -> None:
    tags = [frozenset({"cat"})] * 50 + [frozenset({"dog"})] * 3 + [frozenset({"cow", "dog"})] * 3 + [frozenset({"emu"})]
    chosen = list(islice(balanced_order(tags, ["cat", "dog", "cow"], seed=0), 12))
    assert len(chosen) == len(set(chosen)) == 12
    names = [tags[index] for index in chosen]
    assert sum("cat" in image for image in names) == 6  # dog and cow have six images in all
    assert sum("cow" in image for image in names) == 3
    assert not any("emu" in image for image in names)
    assert list(islice(balanced_order(tags, ["cat", "dog", "cow"], seed=0), 12)) == chosen
    assert len(list(balanced_order(tags, ["dog"], seed=0))) == 6


def test_calibration_images_come_from_all_steps(step_info: StepInfo) -> None:
    images = calibration_images(step_info.plan, step_info.step, 6)
    assert len(images) == 6
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize("method", ["cl4wsis", "fine-tune", "joint"])
def test_calibration_goes_without_images_that_are_gone(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Old images may not be kept; a supervised baseline has masks and no tags."""
    classes = {1: "cat", 2: "dog"}
    for folder, name in (("old", "cat"), ("new", "dog")):
        pictures: Split = {f"{name}{i}": [(name, (0, 0, 20, 20))] for i in range(4)}
        write_coco(tmp_path / folder, tmp_path / f"{folder}.json", pictures, classes)
    tags = tmp_path / "tags.json"
    tags.write_text(json.dumps({f"dog{i}.jpg": ["dog"] for i in range(4)}))
    later = {"images": "new", **({"tags": "tags.json"} if method == "cl4wsis" else {"instances": "new.json"})}
    old = {"images": "old", "instances": "old.json"}
    plan = Plan.model_validate(
        {
            "name": "pets",
            "steps": [["cat"], ["dog"]],
            "recipe": {"method": method},
            "data": {"kind": "coco", "root": str(tmp_path), "train": old, "steps": {"1": later}, "val": old},
        }
    )
    assert len(calibration_images(plan, 1, 8)) == 8
    for path in [*(tmp_path / "old").iterdir()][:3]:
        path.unlink()
    assert len(calibration_images(plan, 1, 8)) == 5
    assert "calibrating without 3 images that cannot be read" in caplog.text
    (tmp_path / "old.json").unlink()
    assert len(calibration_images(plan, 1, 8)) == 4
    assert "calibrating without the images of step 0" in caplog.text
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(DataError, match="no training image of its classes is at hand"):
        calibration_images(plan, 1, 8)
