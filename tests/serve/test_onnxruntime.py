"""The ONNX Runtime backend: what it checks before it answers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import SIZE, color_manifest, color_model, color_network

from cl4wsis.bundle import Bundle, Manifest, TensorInfo, VariantInfo
from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import BackendRequest
from cl4wsis_serve.backends.onnxruntime import OnnxRuntimeBackend

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def request_for(model: Path, manifest: Manifest, name: str = "onnxruntime", post: str = "graph") -> BackendRequest:
    variant = VariantInfo(file=model.name, precision="float32", post=post, source_sha256="0" * 64)
    return BackendRequest(name, Bundle(model, manifest), variant, threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(color_model(), path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_run_gives_all_outputs_for_any_batch(model: Path, batch: int) -> None:
    backend = OnnxRuntimeBackend(request_for(model, color_manifest()))
    outputs = backend.run(np.full((batch, *SIZE, 3), 200, np.uint8))
    assert {name: array.shape for name, array in outputs.items()} == {
        "instance_ids": (batch, *SIZE),
        "labels": (batch, 4),
        "scores": (batch, 4),
        "areas": (batch, 4),
        "boxes": (batch, 4, 4),
    }
    assert (outputs["instance_ids"] == 1).all()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_host_graph_gives_the_maps(tmp_path: Path, batch: int) -> None:
    path = tmp_path / "network.onnx"
    onnx.save(color_network(), path)
    backend = OnnxRuntimeBackend(request_for(path, color_manifest(), post="host"))
    outputs = backend.run(np.full((batch, *SIZE, 3), 200, np.uint8))
    assert {name: array.shape[:2] for name, array in outputs.items()} == {
        "semantic_logits": (batch, 3),
        "center_heatmap": (batch, 2),
        "offset_map": (batch, 2),
    }


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorInfo(name="masks", dtype="uint8", shape=("batch",), meaning=""), "has no output 'masks'"),
        (TensorInfo(name="labels", dtype="int64", shape=("batch", 4), meaning=""), "'labels' is int32"),
        (TensorInfo(name="labels", dtype="int32", shape=("batch", 64), meaning=""), r"\(batch, 64\) in the manifest"),
        (TensorInfo(name="labels", dtype="int32", shape=("batch",), meaning=""), r"\(batch\) in the manifest"),
    ],
)
def test_graph_that_is_not_the_manifest_s_is_refused(model: Path, tensor: TensorInfo, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeBackend(request_for(model, color_manifest(outputs=(tensor,))))


def test_wrong_input_size_is_refused(model: Path) -> None:
    inputs = (TensorInfo(name="images", dtype="uint8", shape=("batch", 64, 64, 3), meaning=""),)
    with pytest.raises(BackendError, match="input 'images'"):
        OnnxRuntimeBackend(request_for(model, color_manifest(inputs=inputs)))


def test_damaged_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(BackendError, match=r"damaged\.onnx: onnxruntime .* cannot load it"):
        OnnxRuntimeBackend(request_for(path, color_manifest()))


def test_failing_run_says_what_to_do(model: Path) -> None:
    backend = OnnxRuntimeBackend(request_for(model, color_manifest()))
    with pytest.raises(BackendError, match="use a smaller batch size"):
        backend.run(np.zeros((1, 5, 5, 3), np.uint8))
