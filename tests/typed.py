"""Small networks that say in their graph in which arithmetic they compute: float32, float16 or int8."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from bundles import color_manifest
from onnx import TensorProto, helper, numpy_helper

from cl4wsis.bundle import VariantInfo, metadata_from_manifest, write_bundle

SIZE = (16, 24)
CHANNELS = 8
TYPES = {
    "float32": {"float32": 3},
    "float16": {"float16": 2, "float32": 1},
    "int8": {"int8": 2, "float32": 1},
}
"""Layers with weights: two in the middle, and a head that stays float32."""


def typed_model(precision: str, seed: int = 0) -> onnx.ModelProto:
    """Build images (batch, 16, 24, 3) uint8 -> maps (batch, 8, 16, 24) float32: two convolutions and a head."""
    generator = np.random.default_rng(seed)
    constants: dict[str, np.ndarray] = {}
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
    ]
    data = "planes"
    for index, channels in enumerate((3, CHANNELS)):
        weights = generator.normal(size=(CHANNELS, channels, 3, 3)).astype(np.float32) / 10
        data = _add_layer(nodes, constants, f"conv{index}", data, weights, precision)
    head = generator.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    if precision == "float16":
        nodes.append(helper.make_node("Cast", [data], ["single"], to=TensorProto.FLOAT))
        data = "single"
    _add_layer(nodes, constants, "head", data, head, "float32", output="maps")
    graph = helper.make_graph(
        nodes,
        "typed",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *SIZE, 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", CHANNELS, *SIZE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _add_layer(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    name: str,
    data: str,
    weights: np.ndarray,
    precision: str,
    output: str | None = None,
) -> str:
    """Add a convolution with its ReLU, and what tells its type."""
    values = f"{name}_weights"
    if precision == "float16":
        if name == "conv0":
            nodes.append(helper.make_node("Cast", [data], ["half"], to=TensorProto.FLOAT16))
            data = "half"
        constants[values] = weights.astype(np.float16)
    elif precision == "int8":
        scale = np.float32(np.abs(weights).max() / 127)
        constants |= {
            f"{name}_data_scale": np.float32(2.0),
            f"{name}_zero": np.int8(0),
            f"{name}_scale": np.full(len(weights), scale, np.float32),
            f"{name}_zeros": np.zeros(len(weights), np.int8),
            f"{values}_int8": np.round(weights / scale).astype(np.int8),
        }
        around = [f"{name}_data_scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [data, *around], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *around], [f"{name}_dq"]))
        given = [f"{values}_int8", f"{name}_scale", f"{name}_zeros"]
        nodes.append(helper.make_node("DequantizeLinear", given, [values], axis=0))
        data = f"{name}_dq"
    else:
        constants[values] = weights
    pad = weights.shape[2] // 2
    nodes.append(helper.make_node("Conv", [data, values], [f"{name}_sum"], name=name, pads=[pad] * 4))
    nodes.append(helper.make_node("Relu", [f"{name}_sum"], [output or f"{name}_out"]))
    return output or f"{name}_out"


def write_typed_bundle(path: Path, seed: int = 0, **changes: object) -> Path:
    """Write a bundle whose graphs are these networks, in all three precisions; keywords replace fields of its manifest.

    What the graphs give is not what the manifest says: the bundle is for building engines, not for running them.
    """
    model = typed_model("float32", seed)
    helper.set_model_props(model, metadata_from_manifest(color_manifest(**changes)))
    truth = model.SerializeToString()
    digest = sha256(truth).hexdigest()
    files = {"model.onnx": truth}
    for precision, suffix in (("float16", "fp16"), ("int8", "int8")):
        files[f"model-{suffix}.onnx"] = typed_model(precision, seed).SerializeToString()
    variants = tuple(
        VariantInfo(
            file=file,
            precision=precision,
            post="graph",
            source_sha256=digest,
            types=TYPES[precision],
        )
        for file, precision in zip(files, TYPES, strict=True)
    )
    return write_bundle(path, color_manifest(variants=variants, **changes), files)
