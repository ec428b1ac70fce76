"""What needs an NVIDIA GPU: every GPU backend answers as ONNX Runtime does on the CPU, and engines take new weights."""

from pathlib import Path

import numpy as np
import pytest
from typed import TYPES, typed_model

from cl4wsis.bundle import open_bundle
from cl4wsis.engines import CACHE_VARIABLE, find_machine
from cl4wsis.errors import BackendError, MissingExtraError
from cl4wsis.images import read_image
from cl4wsis_export.engines import TENSORRT, TENSORRT_RTX, EngineSpec, build_engine, load_library
from cl4wsis_export.from_bundle import add_engines
from cl4wsis_export.refit import inspect_engine, refit_engine
from cl4wsis_serve import Predictor
from cl4wsis_serve.backends import why_unavailable

pytestmark = pytest.mark.gpu

MAX_DIFFERING = 0.005
MAX_SCORE_ERROR = 1e-3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    try:
        find_machine()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_the_gpu_answers_as_the_cpu(bundle_path: Path, name: str) -> None:
    reason = why_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    if name.startswith("tensorrt"):
        library = TENSORRT if name == "tensorrt" else TENSORRT_RTX
        capability = find_machine().compute_capability
        targets = () if library is TENSORRT else (capability,)
        add_engines(
            bundle_path, library, ["float32"], EngineSpec(max_batch=4, compute_capabilities=targets), in_cache=True
        )
    golden = [read_image(bundle_path / case.image) for case in open_bundle(bundle_path).manifest.golden]
    images = (golden * 7)[:7]
    gpu, cpu = (Predictor.open(bundle_path, backend, post="graph") for backend in (name, "onnxruntime"))
    expected = cpu.predict_batch(images)
    for _ in range(2):  # the second time through the captured graph
        for found, wanted in zip(gpu.predict_batch(images), expected, strict=True):
            assert float(np.mean(found.instance_ids != wanted.instance_ids)) <= MAX_DIFFERING
            np.testing.assert_allclose(found.scores, wanted.scores, atol=MAX_SCORE_ERROR)


def test_a_refitted_engine_answers_with_the_new_weights(tmp_path: Path) -> None:
    try:
        trt = load_library(TENSORRT)
    except (BackendError, MissingExtraError) as error:
        pytest.skip(str(error))
    graphs = [tmp_path / "old.onnx", tmp_path / "new.onnx"]
    for seed, graph in enumerate(graphs):
        graph.write_bytes(typed_model("float32", seed).SerializeToString())
    engine = build_engine(TENSORRT, trt, graphs[0], EngineSpec(max_batch=4, refittable=True), TYPES["float32"]).content
    assert inspect_engine(TENSORRT, trt, engine)
    refitted = refit_engine(TENSORRT, trt, engine, graphs[1])
    assert refitted != engine
    assert inspect_engine(TENSORRT, trt, refitted) == inspect_engine(TENSORRT, trt, engine)
