"""TensorRT-RTX as a gate: NVIDIA's own importer and builder accept what is exported, on a machine without a GPU."""

from pathlib import Path

import pytest

from cl4wsis.bundle import open_bundle
from cl4wsis.engines import CACHE_VARIABLE, is_trusted
from cl4wsis.errors import ConfigError
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import StepInfo
from cl4wsis_export import ExportSpec, export_network, pack
from cl4wsis_export.engines import TENSORRT_RTX, EngineSpec, build_engine, load_library
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
    spec = ExportSpec(
        grouping=GroupingSpec(profile="fast", min_area=16, max_instances=12),
        verification_images=2,
        compute_capabilities=("8.6",),
    )
    path = export_network(network, step_info, tmp_path / "fast.cl4wsis", spec)
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


def test_an_unknown_gpu_leaves_no_bundle(
    network: InstanceSegmenter,
    step_info: StepInfo,
    bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pack.ir.load(str(bundle_path / "model.onnx"))
    monkeypatch.setattr(pack, "build_graph", lambda segmenter, opset: model)
    grouping = GroupingSpec(min_area=4, max_instances=12)
    spec = ExportSpec(grouping=grouping, verification_images=1, compute_capabilities=("9.9",))
    with pytest.raises(ConfigError, match=r"9\.9: TensorRT-RTX .* builds for .*8\.6"):
        export_network(network, step_info, tmp_path / "out" / "x.cl4wsis", spec)
    assert not (tmp_path / "out").exists()
