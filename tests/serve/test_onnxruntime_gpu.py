"""ONNX Runtime on a GPU: what can be known of it without one, and with one the same answers as the CPU's."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra 'cpu' or 'gpu'")

import onnx
import onnxruntime
from bundles import SIZE, write_color_bundle

from cl4wsis.bundle import open_bundle
from cl4wsis.engines import CACHE_VARIABLE
from cl4wsis.errors import BackendError
from cl4wsis_serve.backends import BACKENDS, device_of, why_unavailable
from cl4wsis_serve.backends.base import BackendRequest
from cl4wsis_serve.backends.buckets import choose_bucket, fill_batch, run_in_parts, usable_buckets
from cl4wsis_serve.backends.onnxruntime_gpu import (
    CUDA,
    TENSORRT,
    OnnxRuntimeGpuBackend,
    check_placement,
    open_session,
    provider_options,
    session_options,
)

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def request_for(path: Path, name: str = "onnxruntime-cuda") -> BackendRequest:
    bundle = open_bundle(path)
    return BackendRequest(name, bundle, bundle.variant())


def test_the_table_knows_the_backends() -> None:
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"):
        assert device_of(name) == "cuda"
    names = list(BACKENDS)
    assert names.index("tensorrt") < names.index("onnxruntime-cuda") < names.index("onnxruntime")


@pytest.mark.skipif(HAS_CUDA, reason="needs a build of onnxruntime without CUDA")
@pytest.mark.parametrize(("name", "provider"), [("onnxruntime-cuda", CUDA), ("onnxruntime-tensorrt", TENSORRT)])
def test_without_the_gpu_wheel_the_way_out_is_named(tmp_path: Path, name: str, provider: str) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    with pytest.raises(BackendError, match=rf"has no {provider} .*pip install 'cl4wsis\[gpu\]'"):
        OnnxRuntimeGpuBackend(request_for(path, name))
    reason = why_unavailable(name)
    assert reason is not None
    assert provider in reason


def test_a_graph_with_nodes_on_the_cpu_is_refused(tmp_path: Path) -> None:
    options = session_options(onnxruntime, 2)
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        onnxruntime.InferenceSession(write_color_bundle(tmp_path / "x.cl4wsis") / "model.onnx", options)


def test_nodes_on_other_providers_are_named(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis") / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    check_placement(session, ("CPUExecutionProvider",))
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        check_placement(session, (CUDA,))
    partly = SimpleNamespace(
        get_providers=lambda: [CUDA, "CPUExecutionProvider"],
        get_provider_graph_assignment_info=session.get_provider_graph_assignment_info,
    )
    with pytest.raises(BackendError, match=rf"nodes would not run on {CUDA} .*Greater on CPUExecutionProvider"):
        check_placement(partly, (CUDA,))


def test_a_session_of_one_batch_size_has_no_free_shape(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis") / "model.onnx"
    options = session_options(onnxruntime, 4)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
    options.optimized_model_filepath = str(tmp_path / "fixed.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [value.shape for value in (*session.get_inputs(), *session.get_outputs())][:2] == [[4, *SIZE, 3], [4, *SIZE]]
    kinds = {node.op_type for node in onnx.load(tmp_path / "fixed.onnx").graph.node}
    assert not kinds & {"Shape", "ConstantOfShape", "Range", "Expand"}


def test_options_ask_for_graphs_caches_and_full_float32(tmp_path: Path) -> None:
    [(provider, options)] = provider_options("onnxruntime-cuda", tmp_path, capture=True)
    assert (provider, options["enable_cuda_graph"], options["use_tf32"]) == (CUDA, "1", "0")
    (first, engine), (second, rest) = provider_options("onnxruntime-tensorrt", tmp_path, capture=True)
    assert (first, second) == (TENSORRT, CUDA)
    assert engine["trt_engine_cache_path"] == str(tmp_path)
    assert (engine["trt_cuda_graph_enable"], rest["enable_cuda_graph"]) == ("1", "0")
    assert provider_options("onnxruntime-cuda", tmp_path, capture=False)[0][1]["enable_cuda_graph"] == "0"


def test_a_refused_cuda_graph_opens_the_session_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What ONNX Runtime says when it refuses is recorded; everything else is an error."""
    request = request_for(write_color_bundle(tmp_path / "x.cl4wsis"))
    asked: list[str] = []

    def create(model: Path, options: object, providers: list[tuple[str, dict[str, str]]]) -> object:
        asked.append(providers[0][1]["enable_cuda_graph"])
        if asked[-1] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user as ...")
        return SimpleNamespace(disable_fallback=lambda: None, get_providers=lambda: [CUDA])

    runtime = SimpleNamespace(
        InferenceSession=create, SessionOptions=onnxruntime.SessionOptions, __version__=onnxruntime.__version__
    )
    open_session(runtime, request, 1)
    assert asked == ["1", "0"]
    assert "no CUDA graph for batches of 1" in caplog.text
    runtime.InferenceSession = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("libcudnn.so.9: not found"))
    with pytest.raises(BackendError, match=r"libcudnn\.so\.9: not found; check the driver"):
        open_session(runtime, request, 1)


def test_buckets_hold_what_they_are_given() -> None:
    assert [choose_bucket(batch, (1, 2, 4, 8)) for batch in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert usable_buckets(1, 8) == (1, 2, 4, 8)
    assert usable_buckets(2, 6) == (2, 4, 6)
    for batch in (0, 9):
        with pytest.raises(ValueError, match="batch"):
            choose_bucket(batch, (1, 2, 4, 8))


def test_short_batches_are_filled_with_their_last_image() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    target = np.full((4, 2, 2, 3), 9, np.uint8)
    fill_batch(target, images)
    assert target[:, 0, 0, 0].tolist() == [0, 1, 2, 2]


def test_large_batches_run_in_parts() -> None:
    sizes: list[int] = []

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(images))
        return {"first": images[:, 0]}

    images = np.arange(40, dtype=np.uint8).reshape(20, 2)
    np.testing.assert_array_equal(run_in_parts(run, images, 8)["first"], images[:, 0])
    assert sizes == [8, 8, 4]
