"""Engines in the runtime: which are loaded, which are refused and why, and how batches lie in memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bundles import SIZE, color_answer, color_manifest, write_color_bundle
from pretended_gpu import PretendedCuda, PretendedTensorRt, has_gpu

from cl4wsis.bundle import Bundle, EngineInfo, open_bundle
from cl4wsis.engines import (
    CACHE_VARIABLE,
    TRUST_VARIABLE,
    EngineMissingError,
    Machine,
    add_engine,
    cache_folder,
    engine_key,
    find_built,
    find_engine,
    graph_sha256,
    why_unfit,
)
from cl4wsis.errors import BackendError, BundleError
from cl4wsis_serve.backends import tensorrt as backend_module
from cl4wsis_serve.backends import why_unavailable
from cl4wsis_serve.backends.base import BackendRequest
from cl4wsis_serve.backends.tensorrt import BufferLayout, TensorRtBackend

A10 = Machine("NVIDIA A10", "8.6", "580.65.06 (CUDA 13.0)", "linux-x86_64")
VERSION = "11.4.0.106"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_color_bundle(tmp_path / "x.cl4wsis"))


def engine_of(bundle: Bundle, **changes: object) -> EngineInfo:
    fields = {
        "file": "engines/none",
        "runtime": f"tensorrt {VERSION}",
        "compute_capabilities": ("8.6",),
        "max_batch": 4,
        "graph_sha256": graph_sha256(bundle, bundle.variant()),
        "gpu": A10.gpu,
        "driver": A10.driver,
        "platform": A10.platform,
    }
    return EngineInfo.model_validate({**fields, **changes})


def test_an_engine_is_found_again(bundle: Bundle) -> None:
    added = add_engine(bundle, engine_of(bundle), b"engine" * 100)
    opened = open_bundle(bundle.path)
    found = find_engine(opened, opened.variant(), "tensorrt", VERSION, A10)
    assert found == added
    assert found.read() == b"engine" * 100


UNFIT = {
    "another version": ({}, VERSION, A10, {"runtime": "tensorrt 11.3.0"}, "was built by TensorRT 11.3.0, but 11.4"),
    "an older version than a compatible engine": (
        {},
        "11.2.0",
        A10,
        {"version_compatible": True},
        r"was built by TensorRT 11\.4\.0\.106, but 11\.2\.0 is installed",
    ),
    "another GPU": ({"gpu": "NVIDIA L4"}, VERSION, A10, {}, "was built on NVIDIA A10, but this machine has NVIDIA L4"),
    "another driver": ({"driver": "590.1"}, VERSION, A10, {}, r"was built with driver 580\.65.*, but 590\.1"),
    "another system": ({"platform": "win32-amd64"}, VERSION, A10, {}, "was built on linux-x86_64, but this is win32"),
    "too old a GPU": (
        {"gpu": "Tesla T4", "compute_capability": "7.5"},
        VERSION,
        A10,
        {"hardware_level": "ampere-plus"},
        "is for GPUs from Ampere on, but Tesla T4 has compute capability 7.5",
    ),
    "another compute capability": (
        {"gpu": "NVIDIA L4", "compute_capability": "8.9"},
        VERSION,
        A10,
        {"hardware_level": "same-compute-capability"},
        r"is for compute capability 8\.6, but NVIDIA L4 has 8\.9",
    ),
    "a GPU TensorRT-RTX did not build for": (
        {"compute_capability": "12.0"},
        "1.7.1",
        A10,
        {"runtime": "tensorrt-rtx 1.7.1", "gpu": None, "driver": None, "platform": ""},
        r"is for compute capability 8\.6, but NVIDIA A10 has 12\.0",
    ),
}


@pytest.mark.parametrize(("other", "version", "machine", "changes", "message"), UNFIT.values(), ids=UNFIT)
def test_a_foreign_engine_is_refused_with_its_reason_and_the_way_out(
    bundle: Bundle, other: dict[str, str], version: str, machine: Machine, changes: dict[str, object], message: str
) -> None:
    info = engine_of(bundle, **changes)
    add_engine(bundle, info, b"engine")
    opened = open_bundle(bundle.path)
    here = Machine(**{**vars(machine), **other})
    runtime = info.runtime.split()[0]
    with pytest.raises(EngineMissingError, match=rf"{message}.*; build one here: cl4wsis export --format trt"):
        find_engine(opened, opened.variant(), runtime, version, here)


@pytest.mark.parametrize(
    ("changes", "machine", "version"),
    [
        ({"version_compatible": True}, A10, "11.9.0"),
        ({"hardware_level": "ampere-plus"}, Machine("NVIDIA L4", "8.9", A10.driver, A10.platform), VERSION),
        ({"hardware_level": "same-compute-capability"}, Machine("RTX A6000", "8.6", A10.driver, A10.platform), VERSION),
        ({"runtime": "tensorrt-rtx 1.7.1", "gpu": None, "driver": None, "platform": ""}, A10, "1.7.1"),
    ],
)
def test_engines_made_for_others_are_accepted_there(
    bundle: Bundle, changes: dict[str, object], machine: Machine, version: str
) -> None:
    assert why_unfit(engine_of(bundle, **changes), version, machine) is None


def test_an_engine_of_another_graph_is_not_considered(bundle: Bundle) -> None:
    add_engine(bundle, engine_of(bundle, graph_sha256="ab" * 32), b"engine", in_cache=True)
    with pytest.raises(EngineMissingError, match="none was built of its float32 graph with post=graph"):
        find_engine(bundle, bundle.variant(), "tensorrt", VERSION, A10)


def test_an_engine_that_came_with_a_bundle_is_not_trusted(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = add_engine(bundle, engine_of(bundle), b"engine").sha256
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache of another user"))
    opened = open_bundle(bundle.path)
    with pytest.raises(EngineMissingError, match=rf"not built by this user.*{TRUST_VARIABLE}={digest}"):
        find_engine(opened, opened.variant(), "tensorrt", VERSION, A10)
    for named in (f"{'0' * 64}, {digest}", "all"):
        monkeypatch.setenv(TRUST_VARIABLE, named)
        assert find_engine(opened, opened.variant(), "tensorrt", VERSION, A10).sha256 == digest


@pytest.mark.parametrize("content", [b"engi", b"Engine" * 100, b""])
def test_a_truncated_or_changed_engine_is_refused(bundle: Bundle, content: bytes) -> None:
    added = add_engine(bundle, engine_of(bundle), b"engine" * 100, in_cache=True)
    added.path.write_bytes(content)
    with pytest.raises(BackendError, match=rf"damaged or changed \({len(content)} bytes"):
        find_engine(bundle, bundle.variant(), "tensorrt", VERSION, A10).read()
    assert find_built(bundle, engine_of(bundle)) is None


def test_engines_lie_in_the_cache_where_the_bundle_is_a_graph(bundle: Bundle) -> None:
    lone = open_bundle(bundle.path / "model.onnx")
    added = add_engine(lone, engine_of(lone), b"engine")
    assert cache_folder() in added.path.parents
    assert find_engine(lone, lone.variant(), "tensorrt", VERSION, A10) == added


def test_a_rebuilt_engine_takes_the_place_of_the_old_one(bundle: Bundle) -> None:
    for in_cache in (False, True):
        first = add_engine(bundle, engine_of(bundle), b"first", in_cache)
        second = add_engine(open_bundle(bundle.path), engine_of(bundle), b"second", in_cache)
        assert first.path != second.path
        assert not first.path.exists()
        assert [file.name for file in second.path.parent.glob("*.engine")] == [second.path.name]
    opened = open_bundle(bundle.path)
    assert len(opened.manifest.engines) == 1


def test_an_engine_of_a_bundle_that_cannot_be_written_names_the_cache(bundle: Bundle) -> None:
    (bundle.path / "engines").write_text("a file where the folder should be")
    with pytest.raises(BundleError, match="--engine-cache"):
        add_engine(bundle, engine_of(bundle), b"engine")


def test_everything_an_engine_depends_on_is_in_its_key(bundle: Bundle) -> None:
    base = engine_of(bundle)
    changes: list[dict[str, object]] = [
        {"runtime": "tensorrt 11.5"},
        {"gpu": "NVIDIA L4"},
        {"driver": "1"},
        {"graph_sha256": "0" * 64},
        {"max_batch": 5},
        {"opt_batch": 4},
        {"workspace_mib": 64},
        {"refittable": True},
        {"version_compatible": True},
        {"hardware_level": "ampere-plus"},
        {"platform": "win32-amd64"},
        {"compute_capabilities": ("8.9",)},
    ]
    keys = {engine_key(base.model_copy(update=change)) for change in changes}
    assert len(keys | {engine_key(base)}) == len(changes) + 1
    assert engine_key(base.model_copy(update={"file": "x", "types": {"int8": 1}})) == engine_key(base)


def test_tensors_lie_apart_in_one_buffer() -> None:
    manifest = color_manifest()
    layout = BufferLayout.plan(manifest.inputs, manifest.outputs, 3)
    spans = []
    for dtype, shape, offset in layout.tensors.values():
        assert offset % 256 == 0
        spans.append((offset, offset + int(np.prod(shape)) * dtype.itemsize))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][1] <= layout.input_bytes <= spans[1][0]
    assert spans[-1][1] <= layout.total_bytes
    buffer = np.zeros(layout.total_bytes, np.uint8)
    layout.view(buffer, "scores")[2, 1] = 0.5
    assert layout.view(buffer, "scores").shape == (3, 4)
    assert layout.view(buffer, "scores").sum() == 0.5
    assert layout.view(buffer, "boxes").sum() == 0
    assert layout.view(buffer, "images").shape == (3, *SIZE, 3)


@pytest.mark.skipif(has_gpu(), reason="a GPU is there")
def test_without_a_gpu_the_reason_is_told(bundle: Bundle) -> None:
    for name in ("tensorrt", "tensorrt-rtx"):
        reason = why_unavailable(name)
        assert reason is not None
        assert "pip install 'cl4wsis[" in reason or "CUDA" in reason
        with pytest.raises(BackendError, match=r"pip install 'cl4wsis\[trt|CUDA"):
            TensorRtBackend(BackendRequest(name, bundle, bundle.variant()))


def open_pretended(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, cuda: PretendedCuda, trt: PretendedTensorRt, name: str = "tensorrt"
) -> TensorRtBackend:
    rtx = {"runtime": f"tensorrt-rtx {VERSION}", "gpu": None, "driver": None, "platform": ""}
    add_engine(bundle, engine_of(bundle, **(rtx if name == "tensorrt-rtx" else {})), b"engine")
    monkeypatch.setattr(backend_module, "_import", lambda name: trt)
    monkeypatch.setattr(backend_module, "cuda_runtime", lambda: cuda)
    monkeypatch.setattr(backend_module, "find_machine", lambda: A10)
    opened = open_bundle(bundle.path)
    return TensorRtBackend(BackendRequest(name, opened, opened.variant()))


def color_frames(count: int) -> np.ndarray:
    """Draw frames that all differ: a red patch that moves."""
    frames = np.full((count, *SIZE, 3), 90, np.uint8)
    for index in range(count):
        frames[index, index : index + 4, 2 * index : 2 * index + 9] = (220, 10, 10)
    return frames


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_batches_of_every_size_are_answered_image_by_image(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cuda = PretendedCuda()
    trt = PretendedTensorRt(cuda, VERSION, captures=name == "tensorrt-rtx")
    backend = open_pretended(monkeypatch, bundle, cuda, trt, name)
    frames = color_frames(11)
    for size in (1, 2, 3, 4, 5, 11, 3, 1):
        outputs = backend.run(frames[:size])
        for row, frame in enumerate(frames[:size]):
            for tensor, expected in color_answer(frame).items():
                np.testing.assert_array_equal(outputs[tensor][row], expected)
    runs = 1 + 1 + 1 + 1 + 2 + 3 + 1 + 1  # in parts of at most 4, the largest batch of the engine
    assert cuda.launches == (runs if name == "tensorrt" else 0)
    assert backend._engine.strategies == [None if name == "tensorrt" else "whole"] * 3
    backend.close()
    assert cuda.taken == {}


def test_answers_stay_as_they_are_when_the_next_batch_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendedCuda()
    backend = open_pretended(monkeypatch, bundle, cuda, PretendedTensorRt(cuda, VERSION))
    frames = color_frames(2)
    first = backend.run(frames[:1])
    kept = {name: value.copy() for name, value in first.items()}
    backend.run(frames[1:])
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = PretendedCuda()
    cuda.refuses_capture = True
    backend = open_pretended(monkeypatch, bundle, cuda, PretendedTensorRt(cuda, VERSION))
    frames = color_frames(1)
    np.testing.assert_array_equal(backend.run(frames)["areas"][0], color_answer(frames[0])["areas"])
    assert "no CUDA graph for batches of 1" in caplog.text
    assert cuda.launches == 0


def test_too_little_memory_is_told_and_nothing_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendedCuda(memory=10_000)
    backend = open_pretended(monkeypatch, bundle, cuda, PretendedTensorRt(cuda, VERSION))
    with pytest.raises(BackendError, match=r"bytes for a batch: out of memory \(2\); use a smaller batch"):
        backend.run(color_frames(4))
    assert cuda.taken == {}


def test_what_tensorrt_says_of_an_engine_it_does_not_load_is_passed_on(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = PretendedCuda()
    with pytest.raises(BackendError, match=r"cannot load it on NVIDIA A10: Serialization assertion .*; build it again"):
        open_pretended(monkeypatch, bundle, cuda, PretendedTensorRt(cuda, VERSION, damaged=True))
