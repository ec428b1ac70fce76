"""TensorRT-RTX as a gate: NVIDIA's own importer and builder accept what is exported, on a machine without a GPU."""

from pathlib import Path

import pytest

from cl4wsis.bundle import open_bundle
from cl4wsis.engines import CACHE_VARIABLE, is_trusted
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import StepInfo
from cl4wsis_export import ExportSpec, export_network
from cl4wsis_export.engines import TENSORRT_RTX, EngineSpec, build_engine, load_library
from cl4wsis_export.from_bundle import add_engines
from cl4wsis_train.models.network import InstanceSegmenter

pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")

pytestmark = pytest.mark.trt


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_fused_graph_becomes_an_engine_with_its_layer_types(bundle_path: Path) -> None:
    variant = open_bundle(bundle_path).variant("float32", "graph")
    spec = EngineSpec(max_batch=4, compute_capabilities=("8.6", "8.9"))
    built = build_engine(TENSORRT_RTX, load_library(TENSORRT_RTX), bundle_path / variant.file, spec, variant.types)
    assert len(built.content) > 100_000
    assert built.types == variant.types


@pytest.mark.slow
def test_the_fast_profile_becomes_an_engine_in_the_bundle(
    network: InstanceSegmenter, step_info: StepInfo, tmp_path: Path
) -> None:
    grouping = GroupingSpec(profile="fast", min_area=16, max_instances=12)
    spec = ExportSpec(grouping=grouping, verification_images=2)
    path = export_network(network, step_info, tmp_path / "fast.cl4wsis", spec)
    add_engines(path, TENSORRT_RTX, ["float32"], EngineSpec(compute_capabilities=("8.6",)))
    manifest = open_bundle(path).manifest
    assert manifest.verification is not None
    assert manifest.verification.instances > 0
    [engine] = manifest.engines
    assert engine.file.startswith("engines/tensorrt-rtx-")
    assert "-sm86-" in engine.file
    assert engine.graph_sha256 == manifest.files["model.onnx"]
    assert engine.types["float32"] == manifest.variants[0].types["float32"]
    assert is_trusted(manifest.files[engine.file])
    assert (path / engine.file).stat().st_size > 100_000
