"""A real bundle small enough to follow by eye: its graph finds red and blue areas by a threshold.

Red pixels (red above 128) are instance 1, class "red", score 0.9; other pixels with blue above 128 are instance 2,
class "blue", score 0.6. A color that does not occur leaves its slot empty.

Its host variant answers with maps at full resolution in which each color is one class with a flat heatmap of 0.9 or
0.6 and no offsets, so that grouping them gives the same instances, as long as each color is one area.
"""

import io
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cl4wsis.bundle import (
    GoldenCase,
    GraphInfo,
    Manifest,
    TensorInfo,
    VariantInfo,
    metadata_from_manifest,
    write_bundle,
)
from cl4wsis.grouping import GroupingSpec
from cl4wsis.images import encode_png
from cl4wsis.steps import ClassInfo, InputRule

SIZE = (32, 48)
SLOTS = 4
RED, BLUE, GRAY = (220, 10, 10), (10, 10, 220), (90, 90, 90)

_OUTPUTS = {
    "instance_ids": ("uint8", ("batch", *SIZE)),
    "labels": ("int32", ("batch", SLOTS)),
    "scores": ("float32", ("batch", SLOTS)),
    "areas": ("int32", ("batch", SLOTS)),
    "boxes": ("float32", ("batch", SLOTS, 4)),
}
_MAPS = {"semantic_logits": 3, "center_heatmap": 2, "offset_map": 2}
_TYPES = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}


def color_manifest(**changes: object) -> Manifest:
    """Describe the graph; keywords replace fields."""
    fields = {
        "name": "colors-step1",
        "plan": "colors",
        "step": 1,
        "classes": (
            ClassInfo(name="red", step_added=0, color=(200, 0, 0)),
            ClassInfo(name="blue", step_added=1, color=(0, 0, 200)),
        ),
        "input": InputRule(size=SIZE, mean=(90.0, 90.0, 90.0), std=(50.0, 50.0, 50.0)),
        "inputs": (TensorInfo(name="images", dtype="uint8", shape=("batch", *SIZE, 3), meaning="RGB"),),
        "outputs": tuple(
            TensorInfo(name=name, dtype=dtype, shape=shape, meaning=name) for name, (dtype, shape) in _OUTPUTS.items()
        ),
        "grouping": GroupingSpec(max_instances=SLOTS),
        "maps": tuple(
            TensorInfo(name=name, dtype="float32", shape=("batch", channels, *SIZE), meaning=name)
            for name, channels in _MAPS.items()
        ),
        "graph": GraphInfo(opset=18, operators={}, region_rounds=1),
        "weights_sha256": "0" * 64,
        "parent_sha256": None,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Manifest.model_validate({**fields, **changes})


def color_model(manifest: Manifest | None = None) -> onnx.ModelProto:
    """Build the graph; with a manifest its metadata is stored too."""
    constants = {
        "threshold": np.uint8(128),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "three": np.array([3], np.int64),
        "channels": np.array([3], np.int64),
        "plane": np.array([1, 2], np.int64),
        "two_i": np.int32(2),
        "zero_i": np.int32(0),
        "no_slots": np.zeros((1, SLOTS - 2), np.int32),
        "slot_labels": np.array([[0, 1, 0, 0]], np.int32),
        "slot_scores": np.array([[0.9, 0.6, 0, 0]], np.float32),
        "no_box": np.zeros((1, SLOTS, 4), np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["images", "zero", "one", "channels"], ["red_4d"]),
        helper.make_node("Slice", ["images", "two", "three", "channels"], ["blue_4d"]),
        helper.make_node("Squeeze", ["red_4d", "channels"], ["red"]),
        helper.make_node("Squeeze", ["blue_4d", "channels"], ["blue"]),
        helper.make_node("Greater", ["red", "threshold"], ["is_red"]),
        helper.make_node("Greater", ["blue", "threshold"], ["is_bluish"]),
        helper.make_node("Not", ["is_red"], ["not_red"]),
        helper.make_node("And", ["is_bluish", "not_red"], ["is_blue"]),
        helper.make_node("Cast", ["is_red"], ["red_i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["is_blue"], ["blue_i"], to=TensorProto.INT32),
        helper.make_node("Mul", ["blue_i", "two_i"], ["blue_ids"]),
        helper.make_node("Add", ["red_i", "blue_ids"], ["ids"]),
        helper.make_node("Cast", ["ids"], ["instance_ids"], to=TensorProto.UINT8),
        helper.make_node("ReduceSum", ["red_i", "plane"], ["red_area"], keepdims=0),
        helper.make_node("ReduceSum", ["blue_i", "plane"], ["blue_area"], keepdims=0),
        helper.make_node("Unsqueeze", ["red_area", "one"], ["red_column"]),
        helper.make_node("Unsqueeze", ["blue_area", "one"], ["blue_column"]),
        helper.make_node("Concat", ["red_column", "blue_column"], ["two_areas"], axis=1),
        helper.make_node("Mul", ["red_column", "no_slots"], ["no_areas"]),
        helper.make_node("Concat", ["two_areas", "no_areas"], ["areas"], axis=1),
        helper.make_node("Greater", ["areas", "zero_i"], ["present"]),
        helper.make_node("Cast", ["present"], ["present_i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["present"], ["present_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["present_i", "slot_labels"], ["labels"]),
        helper.make_node("Mul", ["present_f", "slot_scores"], ["scores"]),
        helper.make_node("Unsqueeze", ["present_f", "two"], ["present_3d"]),
        helper.make_node("Mul", ["present_3d", "no_box"], ["boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *SIZE, 3])],
        [helper.make_tensor_value_info(name, _TYPES[dtype], shape) for name, (dtype, shape) in _OUTPUTS.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    if manifest is not None:
        helper.set_model_props(model, metadata_from_manifest(manifest))
    return model


def color_network(manifest: Manifest | None = None, variant: VariantInfo | None = None) -> onnx.ModelProto:
    """Build the host graph; with a manifest its metadata is stored too."""
    constants = {
        "background": np.array([1, 0, 0], np.float32).reshape(1, 3, 1, 1),
        "is_color": np.array([[-1, -1, -1], [1, 0, 0], [0, 0, 1]], np.float32).reshape(3, 3, 1, 1),
        "overrides": np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 1]], np.float32).reshape(3, 3, 1, 1),
        "threshold": np.float32(128),
        "sure": np.float32(40),
        "heights": np.array([[0, 0.9, 0], [0, 0, 0.6]], np.float32).reshape(2, 3, 1, 1),
        "nothing": np.zeros((2, 3, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float_images"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_images"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Greater", ["planes", "threshold"], ["is_bright"]),
        helper.make_node("Cast", ["is_bright"], ["bright"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["bright", "overrides"], ["colors"]),
        helper.make_node("Relu", ["colors"], ["exclusive"]),
        helper.make_node("Conv", ["exclusive", "is_color"], ["votes"]),
        helper.make_node("Add", ["votes", "background"], ["shares"]),
        helper.make_node("Mul", ["shares", "sure"], ["semantic_logits"]),
        helper.make_node("Conv", ["votes", "heights"], ["center_heatmap"]),
        helper.make_node("Conv", ["votes", "nothing"], ["offset_map"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *SIZE, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, *SIZE])
            for name, channels in _MAPS.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    if manifest is not None:
        helper.set_model_props(model, metadata_from_manifest(manifest, variant))
    return model


def write_color_bundle(path: Path, num_golden: int = 0, **changes: object) -> Path:
    """Write the bundle; keywords replace fields of its manifest. Golden inputs show a red and a blue area."""
    manifest = color_manifest(**changes)
    model = color_model(manifest).SerializeToString()
    digest = sha256(model).hexdigest()
    truth = VariantInfo(file="model.onnx", precision="float32", post="graph", source_sha256=digest)
    host = truth.model_copy(update={"file": "network.onnx", "post": "host"})
    if not manifest.variants:
        manifest = manifest.model_copy(update={"variants": (truth, host)})
    network = color_network(manifest, host).SerializeToString()
    files = {"model.onnx": model, "network.onnx": network, "labels.txt": b"red\nblue\n"}
    cases = tuple(GoldenCase(image=f"golden/{n}.png", outputs=f"golden/{n}.npz") for n in range(num_golden))
    for number, case in enumerate(cases):
        frame = np.roll(color_image(*SIZE), number, axis=1)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **color_answer(frame))
        files |= {case.image: encode_png(frame), case.outputs: buffer.getvalue()}
    return write_bundle(path, manifest.model_copy(update={"golden": cases}) if cases else manifest, files)


def color_answer(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Say what the graph must give for a frame of its size, without the batch axis."""
    red = frame[..., 0] > 128
    ids = np.where(red, 1, np.where(frame[..., 2] > 128, 2, 0))
    areas = np.bincount(ids.reshape(-1), minlength=SLOTS + 1)[1:]
    slots = np.arange(SLOTS)
    return {
        "instance_ids": ids.astype(np.uint8),
        "labels": ((areas > 0) & (slots == 1)).astype(np.int32),
        "scores": (np.array([0.9, 0.6, 0, 0]) * (areas > 0)).astype(np.float32),
        "areas": areas.astype(np.int32),
        "boxes": np.zeros((SLOTS, 4), np.float32),
    }


def color_image(height: int = 64, width: int = 96) -> np.ndarray:
    """Draw a gray (height, width, 3) image with a red rectangle upper left and a blue one lower right."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GRAY
    image[height // 8 : height // 2, width // 8 : width // 2] = RED
    image[height // 2 : height - height // 8, width // 2 : width - width // 8] = BLUE
    return image
