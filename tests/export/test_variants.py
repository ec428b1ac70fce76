"""A bundle with every precision: what is written, that it answers, and what is left out beyond the limits."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cl4wsis.bundle import Post, Precision, open_bundle
from cl4wsis.checks import Limits
from cl4wsis.errors import BundleError
from cl4wsis.steps import StepInfo, file_sha256
from cl4wsis_export import ExportSpec, export_network, pack
from cl4wsis_export.precision import count_types
from cl4wsis_export.verify import open_session, verification_frames
from cl4wsis_train.models.network import InstanceSegmenter

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
LOOSE = Limits(matched=0.3)  # the network is not trained, so many of its instances are a matter of rounding


@pytest.fixture(scope="module")
def spec(export_spec: ExportSpec) -> ExportSpec:
    changes = {
        "precisions": PRECISIONS,
        "verification_images": 2,
        "precision_images": 4,
        "calibration_images": 4,
        "limits": {"float16": Limits(matched=0.8), "int8": LOOSE},
    }
    return export_spec.model_copy(update=changes)


@pytest.fixture(scope="module")
def path(
    network: InstanceSegmenter,
    step_info: StepInfo,
    spec: ExportSpec,
    bundle_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Export every precision of the graph that was traced for the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "build_graph", lambda segmenter, opset: ir.load(str(bundle_path / "model.onnx")))
        return export_network(network, step_info, tmp_path_factory.mktemp("bundles") / "all.cl4wsis", spec)


def test_every_precision_has_two_graphs(path: Path) -> None:
    bundle = open_bundle(path)
    files = {(variant.precision, variant.post): variant.file for variant in bundle.manifest.variants}
    assert files == {
        ("float32", "graph"): "model.onnx",
        ("float32", "host"): "network.onnx",
        ("float16", "graph"): "model-fp16.onnx",
        ("float16", "host"): "network-fp16.onnx",
        ("int8", "graph"): "model-int8.onnx",
        ("int8", "host"): "network-int8.onnx",
    }
    truth = file_sha256(path / "model.onnx")
    for variant in bundle.manifest.variants:
        assert variant.source_sha256 == truth
        assert len(variant.calibration) == (4 if variant.precision == "int8" else 0)
        assert variant.weights_file == (None if variant.post == "graph" else files[variant.precision, "graph"])


def test_the_manifest_tells_the_types_that_the_files_have(path: Path) -> None:
    bundle = open_bundle(path)
    for precision in PRECISIONS:
        graph, host = bundle.variant(precision), bundle.variant(precision, "host")
        assert host.types == count_types(bundle.path_of(host).read_bytes())
        assert graph.types == count_types(bundle.path_of(graph).read_bytes())
        assert max(graph.types, key=lambda name: graph.types[name]) == precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lower_precisions_agree_with_float32(path: Path, precision: Precision) -> None:
    for post in ("graph", "host"):
        agreement = open_bundle(path).variant(precision, post).agreement
        if precision == "float32":
            assert agreement is None
        else:
            assert agreement is not None
            assert agreement.images == 4
            assert agreement.instances >= 8
            assert agreement.matched >= (0.8 if precision == "float16" else LOOSE.matched)


@pytest.mark.parametrize("post", ["graph", "host"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_answers_at_every_batch_size(
    path: Path, step_info: StepInfo, precision: Precision, post: Post
) -> None:
    bundle = open_bundle(path)
    session = open_session(bundle.path_of(bundle.variant(precision, post)))
    described = bundle.manifest.outputs if post == "graph" else bundle.manifest.maps
    assert [value.name for value in session.get_outputs()] == [info.name for info in described]
    frames = verification_frames(step_info.input, 8, seed=2)
    alone = [session.run(None, {"images": frame[None]}) for frame in frames]
    for size in range(1, 9):
        for index, array in enumerate(session.run(None, {"images": frames[:size]})):
            assert array.dtype == described[index].dtype
            assert array.shape == (size, *described[index].shape[1:])
            expected = np.concatenate([answer[index] for answer in alone[:size]])
            np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-3 * max(1, float(np.abs(expected).max())))


def test_lower_precisions_are_smaller(path: Path) -> None:
    size = {name: (path / name).stat().st_size for name in ("model.onnx", "model-fp16.onnx", "model-int8.onnx")}
    assert size["model-int8.onnx"] < size["model-fp16.onnx"] < size["model.onnx"]


def test_a_lone_variant_knows_what_it_is(path: Path, tmp_path: Path) -> None:
    shutil.copy(path / "model-int8.onnx", tmp_path / "taken.onnx")
    taken = open_bundle(tmp_path / "taken.onnx")
    [variant] = taken.manifest.variants
    assert (variant.precision, variant.post, variant.file) == ("int8", "graph", "taken.onnx")
    assert variant.calibration == open_bundle(path).variant("int8").calibration
    with pytest.raises(BundleError, match=r"no float32 graph with post=graph, only int8 with post=graph"):
        taken.variant()


@pytest.mark.parametrize("name", ["model-fp16.onnx", "network-int8.onnx"])
def test_a_changed_variant_is_refused(path: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(path, tmp_path / "copy.cl4wsis")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: is not the file that was exported"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("precision", "limits", "message"),
    [
        ("int8", Limits(matched=1.0, mask_iou=1.0), r"the int8 graph is too far .*calibrate with more images"),
        (
            "float16",
            Limits(differing_pixels=0.0),
            r"the float16 graph is too far .*another instance than with float32 \(limit 0\.00%\)",
        ),
        ("int8", Limits(score_error=1e-6), r"scores differ by up to"),
    ],
)
def test_beyond_the_limits_the_others_are_written(
    network: InstanceSegmenter,
    step_info: StepInfo,
    spec: ExportSpec,
    bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    limits: Limits,
    message: str,
) -> None:
    monkeypatch.setattr(pack, "build_graph", lambda segmenter, opset: ir.load(str(bundle_path / "model.onnx")))
    tight = spec.model_copy(update={"precisions": (precision,), "limits": {precision: limits}})
    with pytest.raises(BundleError, match=message) as caught:
        export_network(network, step_info, tmp_path / "x.cl4wsis", tight)
    assert str(caught.value).startswith(f"{tmp_path / 'x.cl4wsis'} is written without {precision}: ")
    assert [variant.file for variant in open_bundle(tmp_path / "x.cl4wsis").manifest.variants] == [
        "model.onnx",
        "network.onnx",
    ]


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_tensorrt_rtx_builds_lower_precisions(path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    from cl4wsis_export.engines import TENSORRT_RTX, EngineSpec, build_engine, load_library

    bundle = open_bundle(path)
    variant = bundle.variant(precision)
    spec = EngineSpec(max_batch=8, compute_capabilities=("8.6",))
    built = build_engine(TENSORRT_RTX, load_library(TENSORRT_RTX), bundle.path_of(variant), spec, variant.types)
    assert len(built.content) > 100_000
    assert (
        max(built.types, key=lambda name: built.types[name]) == precision
    )  # convolutions merged by the builder count once
