"""The OpenVINO backend: the answers of ONNX Runtime, the arithmetic that the graph states, and clear refusals."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import RED, SIZE, color_image, color_manifest, color_model, color_network, write_color_bundle
from onnx import TensorProto, helper

from cl4wsis.bundle import Bundle, Manifest, Post, Precision, TensorInfo, VariantInfo
from cl4wsis.errors import BackendError
from cl4wsis_serve import Predictor, backend_status
from cl4wsis_serve.backends import openvino as openvino_backend
from cl4wsis_serve.backends.base import BackendRequest

pytest.importorskip("openvino", reason="needs the extra 'openvino'")


def request_for(
    model: Path, manifest: Manifest, post: Post = "graph", precision: Precision = "float32"
) -> BackendRequest:
    variant = VariantInfo(file=model.name, precision=precision, post=post, source_sha256="0" * 64)
    return BackendRequest("openvino", Bundle(model, manifest), variant, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    onnx.save(color_model(), folder / "model.onnx")
    onnx.save(color_network(), folder / "network.onnx")
    return folder


def test_it_is_ready_where_it_is_installed() -> None:
    assert backend_status()["openvino"] is None


@pytest.mark.parametrize("post", ["graph", "host"])
def test_answers_are_those_of_onnxruntime(tmp_path: Path, post: Post) -> None:
    bundle = write_color_bundle(tmp_path / "colors.cl4wsis")
    ours, theirs = (Predictor.open(bundle, name, post=post, threads=1) for name in ("openvino", "onnxruntime"))
    images = [color_image(*SIZE), color_image(200, 100), np.full((9, 9, 3), RED, np.uint8)]
    for batch in (images[:1], images, images[1:]):  # batches of other sizes, up and down
        for found, expected in zip(ours.predict_batch(batch), theirs.predict_batch(batch), strict=True):
            np.testing.assert_array_equal(found.instance_ids, expected.instance_ids)
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_maps_are_those_of_onnxruntime_channel_by_channel(tmp_path: Path) -> None:
    bundle = write_color_bundle(tmp_path / "colors.cl4wsis")
    ours, theirs = (Predictor.open(bundle, name, post="host", threads=1) for name in ("openvino", "onnxruntime"))
    images = np.stack([color_image(*SIZE), color_image(*SIZE)[::-1], color_image(*SIZE)[:, ::-1]])
    for frames in (images, images[:1]):
        expected = theirs.backend.run(frames)
        found = ours.backend.run(frames)
        assert found.keys() == expected.keys()
        for name, maps in expected.items():
            np.testing.assert_allclose(found[name], maps, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("post", ["graph", "host"])
def test_threads_may_share_a_predictor(tmp_path: Path, post: Post) -> None:
    predictor = Predictor.open(write_color_bundle(tmp_path / "colors.cl4wsis"), "openvino", post=post, threads=1)
    images = [np.roll(color_image(*SIZE), shift, axis=1) for shift in range(8)]
    expected = [predictor.predict(image).instance_ids for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predictor.predict, images * 50))
    for index, answer in enumerate(found):
        np.testing.assert_array_equal(answer.instance_ids, expected[index % len(images)])


def test_a_signal_may_come_after_another_thread_let_go_of_a_predictor(tmp_path: Path) -> None:
    program = """
import os, signal, sys, threading, time
from cl4wsis_serve import Predictor

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
predictors = [Predictor.open(sys.argv[1], "openvino")]
thread = threading.Thread(target=predictors.clear)
thread.start()
thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    bundle = write_color_bundle(tmp_path / "colors.cl4wsis")
    ended = subprocess.run([sys.executable, "-c", program, str(bundle)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


def test_images_need_not_be_contiguous(folder: Path) -> None:
    backend = openvino_backend.OpenVinoBackend(request_for(folder / "model.onnx", color_manifest()))
    frame = color_image(*SIZE)
    expected = backend.run(frame[None])["instance_ids"].copy()
    mirrored = np.ascontiguousarray(frame[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(backend.run(mirrored[None])["instance_ids"], expected)


def test_float32_graphs_compute_in_float32(folder: Path) -> None:
    for precision in ("float32", "int8"):
        request = request_for(folder / "network.onnx", color_manifest(), "host", precision)  # type: ignore[arg-type]
        assert openvino_backend.OpenVinoBackend(request).arithmetic == "f32"


def product_model(path: Path) -> Path:
    """A graph whose float32 result needs more digits than half precision has: a pixel times 1 + 1/1024 + 1/4096."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float_images"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_images"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weights"], ["scores"]),
    ]
    weights = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1) * np.float32(1 + 1 / 1024 + 1 / 4096)
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *SIZE, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3, *SIZE])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_no_digits_are_lost_in_silence(tmp_path: Path) -> None:
    path = product_model(tmp_path / "product.onnx")
    scores = TensorInfo(name="scores", dtype="float32", shape=("batch", 3, *SIZE), meaning="")
    request = request_for(path, color_manifest(outputs=(scores,)))
    backend = openvino_backend.OpenVinoBackend(request)
    call = backend._call_for(1)
    call.infer({"images": np.full((1, *SIZE, 3), 251, np.uint8)})
    np.testing.assert_allclose(call.get_tensor("scores").data, 251 * (1 + 1 / 1024 + 1 / 4096), rtol=1e-6)


def test_half_precision_graphs_compute_in_half_or_say_that_the_cpu_cannot(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for(folder / "network.onnx", color_manifest(), "host", "float16")
    arithmetic = openvino_backend.OpenVinoBackend(request).arithmetic
    assert arithmetic in ("f16", "bf16", "f32")
    assert ("no half-precision arithmetic" in caplog.text) == (arithmetic == "f32")


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("int8", ["FP32", "INT8"], True),
        ("int8", ["FP32", "INT8", "BF16"], False),
        ("float32", ["FP32", "INT8"], False),
    ],
)
def test_padding_is_left_out_where_int8_kernels_multiply_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, capabilities: list[str], expected: bool
) -> None:
    cut_up: list[int] = []
    monkeypatch.setattr(openvino_backend, "_capabilities", lambda core: capabilities)
    monkeypatch.setattr(openvino_backend, "leave_out_padding", lambda model: cut_up.append(model.inputs[0].shape[0]))
    backend = openvino_backend.OpenVinoBackend(
        request_for(folder / "network.onnx", color_manifest(), "host", precision)
    )
    backend.run(np.zeros((3, *SIZE, 3), np.uint8))
    assert cut_up == ([1, 3] if expected else [])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorInfo(name="masks", dtype="uint8", shape=("batch",), meaning=""), "has no output 'masks'"),
        (TensorInfo(name="labels", dtype="int64", shape=("batch", 4), meaning=""), "'labels' is int32"),
        (TensorInfo(name="labels", dtype="int32", shape=("batch", 64), meaning=""), r"\(batch, 64\) in the manifest"),
    ],
)
def test_graph_that_is_not_the_manifest_s_is_refused(folder: Path, tensor: TensorInfo, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        openvino_backend.OpenVinoBackend(request_for(folder / "model.onnx", color_manifest(outputs=(tensor,))))


@pytest.mark.parametrize("content", [b"no protobuf", b""])
def test_damaged_graph_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    with pytest.raises(BackendError, match=r"damaged\.onnx: "):
        openvino_backend.OpenVinoBackend(request_for(path, color_manifest()))


def test_weights_at_addresses_in_memory_are_refused(tmp_path: Path) -> None:
    model = color_network()
    tensor = next(t for t in model.graph.initializer if t.name == "is_color")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "36")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = tmp_path / "forged.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match="refer to memory outside the file"):
        openvino_backend.OpenVinoBackend(request_for(path, color_manifest(), "host"))


def test_wrong_size_is_named(folder: Path) -> None:
    backend = openvino_backend.OpenVinoBackend(request_for(folder / "model.onnx", color_manifest()))
    with pytest.raises(BackendError, match=r"shape \(1, 5, 5, 3\), expected"):
        backend.run(np.zeros((1, 5, 5, 3), np.uint8))


def test_many_batch_sizes_do_not_pile_up(folder: Path) -> None:
    backend = openvino_backend.OpenVinoBackend(request_for(folder / "model.onnx", color_manifest()))
    compiled = []
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 2):
        before = set(backend._calls)
        outputs = backend.run(np.full((batch, *SIZE, 3), 200, np.uint8))
        assert outputs["instance_ids"].shape == (batch, *SIZE)
        assert (outputs["instance_ids"] == 1).all()
        compiled += [batch] if batch not in before else []
    assert compiled == [2, 3, 4, 5, 6, 7, 8, 9, 2]
    assert list(backend._calls) == [4, 5, 6, 7, 8, 1, 9, 2]


def test_compiled_graphs_are_stored_where_the_environment_says_and_nowhere_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(folder.iterdir())
    images = np.full((1, *SIZE, 3), 200, np.uint8)
    request = request_for(folder / "network.onnx", color_manifest(), "host")
    plain = openvino_backend.OpenVinoBackend(request).run(images)["semantic_logits"].copy()
    monkeypatch.setenv("CL4WSIS_OPENVINO_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # written, then read
        stored = openvino_backend.OpenVinoBackend(request).run(images)["semantic_logits"]
        np.testing.assert_array_equal(stored, plain)
    assert list((tmp_path / "cache").iterdir())
    assert set(folder.iterdir()) == before


def test_missing_wheel_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    assert "pip install 'cl4wsis[openvino]'" in str(backend_status()["openvino"])
