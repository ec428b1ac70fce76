"""What an export leaves behind: a bundle that opens, answers as the network did, and is never half written."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from cl4wsis.bundle import VariantInfo, open_bundle
from cl4wsis.checks import DEFAULT_LIMITS, Limits
from cl4wsis.errors import BundleError, ConfigError, RunError
from cl4wsis.steps import WEIGHTS_FILE, StepInfo, file_sha256, write_step_info
from cl4wsis_export import ExportSpec, export_network, export_step, pack, spec_for_step
from cl4wsis_export.fused import FusedSegmenter
from cl4wsis_export.verify import open_session, verification_frames
from cl4wsis_train.models.network import InstanceSegmenter

OUTPUTS = ("instance_ids", "labels", "scores", "areas", "boxes")


def golden(path: Path) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    cases = []
    for case in open_bundle(path).manifest.golden:
        image = cv2.imread(str(path / case.image))[..., ::-1]
        with np.load(path / case.outputs, allow_pickle=False) as arrays:
            cases.append((image, dict(arrays)))
    return cases


@pytest.fixture
def built_graph(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare an export the work of tracing: its graph is that of the bundle."""
    model = pack.ir.load(str(bundle_path / "model.onnx"))
    monkeypatch.setattr(pack, "build_graph", lambda segmenter, opset: model)


def test_manifest_tells_what_a_runtime_needs(bundle_path: Path, step_info: StepInfo) -> None:
    manifest = open_bundle(bundle_path).manifest
    assert [info.name for info in manifest.classes] == ["disc", "square", "star", "ring", "cross"]
    assert [info.step_added for info in manifest.classes] == [0, 0, 0, 1, 1]
    assert manifest.step == 1
    assert manifest.input == step_info.input
    assert manifest.weights_sha256 == step_info.weights_sha256
    assert manifest.parent_sha256 == step_info.parent_sha256
    assert manifest.accuracy == step_info.metrics
    assert manifest.grouping.max_instances == 12
    assert (bundle_path / "labels.txt").read_text().split() == ["disc", "square", "star", "ring", "cross"]
    card = (bundle_path / "card.md").read_text()
    assert "| 3 | ring | 1 |" in card
    assert "| AP50 | 50.0 | - | 45.6 |" in card


def test_verification_compared_something(bundle_path: Path) -> None:
    check = open_bundle(bundle_path).manifest.verification
    assert check is not None
    assert check.instances >= 6
    assert check.matched >= 0.995
    assert check.differing_pixels <= 1e-3
    assert check.unconverged == 0
    assert check.batch_sizes == (1, 2, 5)


def test_a_lone_graph_says_the_same_as_its_bundle(bundle_path: Path, tmp_path: Path) -> None:
    alone = tmp_path / "moved.onnx"
    alone.write_bytes((bundle_path / "model.onnx").read_bytes())
    whole = open_bundle(bundle_path).manifest
    own = VariantInfo(file="moved.onnx", precision="float32", post="graph", source_sha256=file_sha256(alone))
    expected = whole.model_copy(update={"verification": None, "golden": (), "files": {}, "variants": (own,)})
    assert open_bundle(alone).manifest == expected


def test_graph_states_names_types_and_a_free_batch(bundle_path: Path) -> None:
    session = open_session((bundle_path / "model.onnx").read_bytes())
    found = {value.name: (value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())}
    assert found == {
        "images": ("tensor(uint8)", ["batch", 64, 96, 3]),
        "instance_ids": ("tensor(uint8)", ["batch", 64, 96]),
        "labels": ("tensor(int32)", ["batch", 12]),
        "scores": ("tensor(float)", ["batch", 12]),
        "areas": ("tensor(int32)", ["batch", 12]),
        "boxes": ("tensor(float)", ["batch", 12, 4]),
    }


def test_graph_keeps_no_traces_of_the_machine(bundle_path: Path) -> None:
    model = onnx.load(str(bundle_path / "model.onnx"))
    onnx.checker.check_model(model)
    assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
    assert all(prop.key.startswith("cl4wsis.") for prop in model.metadata_props)
    assert str(Path.cwd()).encode() not in (bundle_path / "model.onnx").read_bytes()


def test_golden_outputs_come_again_at_any_batch_size(bundle_path: Path) -> None:
    session = open_session((bundle_path / "model.onnx").read_bytes())
    cases = golden(bundle_path)
    assert len(cases) == 2
    images = np.stack([image for image, _ in cases])
    for repeats in (1, 2, 5):
        answers = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images.repeat(repeats, 0)}), strict=True))
        for row in range(len(images) * repeats):
            expected = cases[row // repeats][1]
            np.testing.assert_array_equal(answers["instance_ids"][row], expected["instance_ids"])
            np.testing.assert_array_equal(answers["labels"][row], expected["labels"])
            np.testing.assert_allclose(answers["scores"][row], expected["scores"], atol=1e-5)


def test_golden_outputs_are_those_of_the_network(
    bundle_path: Path, network: InstanceSegmenter, export_spec: ExportSpec
) -> None:
    assert export_spec.grouping is not None
    segmenter = FusedSegmenter(network, export_spec.grouping, (64, 96), rounds=6)
    for image, expected in golden(bundle_path):
        with torch.inference_mode():
            found = segmenter(torch.from_numpy(image.copy())[None])
        assert (found.instance_ids[0].numpy() != expected["instance_ids"]).mean() < 1e-3
        np.testing.assert_allclose(found.scores[0].numpy(), expected["scores"], atol=1e-4)


@pytest.mark.usefixtures("built_graph")
def test_a_disagreeing_graph_is_not_packed(
    network: InstanceSegmenter,
    step_info: StepInfo,
    export_spec: ExportSpec,
    tmp_path: Path,
) -> None:
    """The graph of another network stands in for one that was exported wrongly."""
    other = InstanceSegmenter(step_info.network, step_info.class_counts)
    with pytest.raises(BundleError, match=r"does not answer as the network did: up to \d+\.\d+% of an image's pixels"):
        export_network(other, step_info, tmp_path / "bad.cl4wsis", export_spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("built_graph")
def test_an_interrupted_export_leaves_the_old_bundle(
    network: InstanceSegmenter,
    step_info: StepInfo,
    export_spec: ExportSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination = export_network(network, step_info, tmp_path / "a.cl4wsis", export_spec)
    before = file_sha256(destination / "manifest.json")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_network(network, step_info, destination, export_spec)
    assert file_sha256(destination / "manifest.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.cl4wsis"]
    open_bundle(destination)


@pytest.mark.usefixtures("built_graph")
def test_a_trained_step_is_exported_from_its_folder(
    network: InstanceSegmenter,
    step_info: StepInfo,
    export_spec: ExportSpec,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    save_file(network.state_dict(), folder / WEIGHTS_FILE)
    info = step_info.model_copy(update={"weights_sha256": file_sha256(folder / WEIGHTS_FILE)})
    write_step_info(folder, info)
    path = export_step(folder, tmp_path / "out" / "x.cl4wsis", export_spec)
    assert open_bundle(path).manifest.weights_sha256 == info.weights_sha256


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a trained step"):
        export_step(tmp_path / "step-7", tmp_path / "x.cl4wsis", ExportSpec())


def test_paper_profile_is_refused_before_any_work(
    network: InstanceSegmenter, step_info: StepInfo, tmp_path: Path
) -> None:
    spec = spec_for_step(step_info, ["grouping.profile=paper"])
    with pytest.raises(ConfigError, match="export with 'exact' or 'fast'"):
        export_network(network, step_info, tmp_path / "x.cl4wsis", spec)


def test_overrides_start_from_the_plan(step_info: StepInfo) -> None:
    spec = spec_for_step(step_info, ["grouping.max_instances=7", "name=mine"])
    assert spec.name == "mine"
    assert spec.grouping == step_info.plan.recipe.grouping.model_copy(update={"max_instances": 7})
    with pytest.raises(ConfigError, match=r"did you mean 'grouping\.max_instances'"):
        spec_for_step(step_info, ["grouping.max_instance=7"])


def test_a_limit_that_is_set_leaves_the_others(step_info: StepInfo) -> None:
    spec = spec_for_step(step_info, ["limits.int8.matched=0.7"])
    assert spec.limits["int8"] == DEFAULT_LIMITS["int8"].model_copy(update={"matched": 0.7})
    assert ExportSpec(limits={"int8": Limits(matched=0.7)}).limits == spec.limits
    assert ExportSpec(limits={"int8": Limits(matched=None)}).limits["int8"].matched is None


@pytest.mark.usefixtures("built_graph")
def test_a_precision_that_cannot_be_made_is_left_out(
    network: InstanceSegmenter,
    step_info: StepInfo,
    export_spec: ExportSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def fail(*_: object) -> None:
        raise BundleError("weights are beyond half precision")

    monkeypatch.setattr(pack, "lower_pair", fail)
    spec = export_spec.model_copy(update={"precisions": ("float32", "float16")})
    with pytest.raises(BundleError, match="written without float16: weights are beyond half precision"):
        export_network(network, step_info, tmp_path / "a.cl4wsis", spec)
    assert [v.precision for v in open_bundle(tmp_path / "a.cl4wsis").manifest.variants] == ["float32", "float32"]


def test_shapes_are_drawn_only_where_no_image_is_given(step_info: StepInfo) -> None:
    image = np.full((32, 96, 3), 200, np.uint8)
    frames = verification_frames(step_info.input, 2, seed=0, images=[image])
    assert frames.shape == (1, 64, 96, 3)
    assert (frames[0, :32] == 200).all()
    drawn = verification_frames(step_info.input, 2, seed=0)
    assert drawn.shape == (2, 64, 96, 3)
    assert min(drawn[0].std(), drawn[1].std()) > 1
    assert (drawn[0] != drawn[1]).any()


def test_manifest_is_plain_json(bundle_path: Path) -> None:
    content = json.loads((bundle_path / "manifest.json").read_text())
    assert content["format"] == "cl4wsis-bundle/1"
    assert content["training"]["seconds"] == {"semantic": 1.5}
