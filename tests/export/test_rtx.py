"""TensorRT-RTX as a gate: NVIDIA's own importer and builder accept the graph, on a machine without a GPU."""

from pathlib import Path

import pytest

from cl4wsis.bundle import open_bundle
from cl4wsis.errors import BackendError, ConfigError
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import StepInfo
from cl4wsis_export import ExportSpec, export_network, pack
from cl4wsis_export.rtx import build_rtx_engine
from cl4wsis_train.models.network import InstanceSegmenter

pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")

pytestmark = pytest.mark.trt


@pytest.mark.slow
def test_the_fused_graph_becomes_an_engine(bundle_path: Path) -> None:
    engine = build_rtx_engine((bundle_path / "model.onnx").read_bytes(), (64, 96), ["8.6", "8.9"], max_batch=4)
    assert len(engine) > 100_000


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
    assert engine.file == "engines/tensorrt-rtx-sm86.engine"
    assert engine.graph_sha256 == manifest.files["model.onnx"]
    assert (path / engine.file).stat().st_size > 100_000


def test_an_unknown_gpu_is_refused_before_the_build(bundle_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9\.9: TensorRT-RTX .* builds for .*8\.6"):
        build_rtx_engine((bundle_path / "model.onnx").read_bytes(), (64, 96), ["9.9"])


def test_a_foreign_file_is_explained() -> None:
    with pytest.raises(BackendError, match="cannot read the graph"):
        build_rtx_engine(b"no graph", (64, 96), ["8.6"])


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
    with pytest.raises(ConfigError):
        export_network(network, step_info, tmp_path / "x.cl4wsis", spec)
    assert list(tmp_path.iterdir()) == []
