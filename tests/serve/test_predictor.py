"""The Predictor over a real graph on ONNX Runtime, and over recorded outputs."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import BLUE, GRAY, RED, SIZE, SLOTS, color_image, color_manifest, write_color_bundle

from cl4wsis.bundle import Bundle, Post
from cl4wsis.errors import BackendError, BundleError, DataError
from cl4wsis.images import write_png
from cl4wsis.instances import Instances
from cl4wsis_serve import Predictor
from cl4wsis_serve import predictor as predictor_module
from cl4wsis_serve.backends.recorded import RecordedBackend
from cl4wsis_serve.selection import Selection

POSTS: tuple[Post, Post] = ("graph", "host")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_bundle(tmp_path_factory.mktemp("bundles") / "colors.cl4wsis")


@pytest.fixture(scope="module", params=["graph", "host"])
def predictor(bundle: Path, request: pytest.FixtureRequest) -> Predictor:
    return Predictor.open(bundle, "onnxruntime", post=request.param)


def recording(ids: np.ndarray, labels: list[int], scores: list[float]) -> dict[str, np.ndarray]:
    pad = SLOTS - len(labels)
    return {
        "instance_ids": ids.astype(np.uint8),
        "labels": np.array([*labels, *[0] * pad], np.int32),
        "scores": np.array([*scores, *[0.0] * pad], np.float32),
        "areas": np.bincount(ids.ravel(), minlength=SLOTS + 1)[1 : SLOTS + 1].astype(np.int32),
        "boxes": np.zeros((SLOTS, 4), np.float32),
    }


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 48), (16, 24), (320, 480)])
def test_instances_come_back_in_source_pixels(predictor: Predictor, height: int, width: int) -> None:
    found = predictor.predict(color_image(height, width))
    np.testing.assert_array_equal(found.labels, [0, 1])
    np.testing.assert_allclose(found.scores, [0.9, 0.6])
    h, w = height // 8, width // 8
    np.testing.assert_array_equal(found.boxes, [[w, h, 4 * w, 4 * h], [4 * w, 4 * h, 7 * w, 7 * h]])
    np.testing.assert_array_equal(found.areas, [9 * h * w, 9 * h * w])


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest and graph would be of two bundles."""
    path = tmp_path / "x.cl4wsis"
    write_color_bundle(path)
    real, opened = predictor_module.select_backend, []

    def replace_first(bundle: Bundle, *arguments: Any) -> Selection:
        opened.append(bundle.manifest.step)
        if len(opened) <= times:
            write_color_bundle(path, step=len(opened) + 1)
        return real(bundle, *arguments)

    monkeypatch.setattr(predictor_module, "select_backend", replace_first)
    times = 2
    assert Predictor.open(path, "onnxruntime").manifest.step == 3
    assert opened == [1, 2, 3]
    times = 99
    with pytest.raises(BundleError, match="is being replaced again and again"):
        Predictor.open(path, "onnxruntime")


def test_tall_image_in_a_wide_frame(predictor: Predictor) -> None:
    found = predictor.predict(color_image(96, 40))
    assert found.instance_ids.shape == (96, 40)
    np.testing.assert_allclose(found.boxes, [[5, 12, 20, 48], [20, 48, 35, 84]], atol=3)


def test_padding_is_no_instance(predictor: Predictor) -> None:
    found = predictor.predict(np.full((64, 8, 3), RED, np.uint8))
    np.testing.assert_array_equal(found.instance_ids, np.ones((64, 8), np.int32))


def test_empty_image_gives_no_instance(predictor: Predictor) -> None:
    found = predictor.predict(np.full((20, 30, 3), 90, np.uint8))
    assert len(found) == 0
    assert found.instance_ids.shape == (20, 30)


def test_path_and_array_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", color_image())
    from_path, from_array = predictor.predict(tmp_path / "a.png"), predictor.predict(color_image())
    np.testing.assert_array_equal(from_path.instance_ids, from_array.instance_ids)


def test_batch_is_what_single_images_give(predictor: Predictor) -> None:
    images = [color_image(64, 96), np.full((20, 30, 3), 90, np.uint8), color_image(96, 40)]
    for image, found in zip(images, predictor.predict_batch(images), strict=True):
        np.testing.assert_array_equal(found.instance_ids, predictor.predict(image).instance_ids)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_stream_keeps_order_and_reports_broken_files(predictor: Predictor, tmp_path: Path, batch_size: int) -> None:
    sources = [tmp_path / f"{i}.png" for i in range(7)]
    for i, source in enumerate(sources):
        write_png(source, color_image(16 + i, 24))
    sources[2].write_bytes(b"not an image")
    sources.insert(4, tmp_path / "missing.png")
    answers = list(predictor.stream(sources, batch_size))
    assert [source for source, _ in answers] == sources
    assert [i for i, (_, result) in enumerate(answers) if isinstance(result, DataError)] == [2, 4]
    heights = [result.instance_ids.shape[0] for _, result in answers if isinstance(result, Instances)]
    assert heights == [16, 17, 19, 20, 21, 22]


def test_stream_of_nothing_ends(predictor: Predictor) -> None:
    assert list(predictor.stream([])) == []


def test_stream_refuses_an_empty_batch(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="batch_size must be positive"):
        next(predictor.stream([color_image()], 0))


def test_stream_holds_two_batches_at_most() -> None:
    backend = RecordedBackend([recording(np.zeros(SIZE, int), [], [])])
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield np.zeros((8, 8, 3), np.uint8)

    stream = Predictor(color_manifest(), backend).stream(endless(), batch_size=3)
    for _ in range(10):
        next(stream)
    assert taken <= 10 + 2 * 3
    before = threading.active_count()
    stream.close()
    assert threading.active_count() < before


def color_of(found: Instances | Exception) -> list[int]:
    assert isinstance(found, Instances)
    return found.labels.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_a_camera_may_fill_one_array_again_and_again(predictor: Predictor, batch_size: int) -> None:
    buffer = np.empty((*SIZE, 3), np.uint8)

    def camera() -> Iterator[np.ndarray]:
        for color in (RED, BLUE, GRAY) * 3:
            buffer[:] = color
            yield buffer

    answers = [color_of(found) for _, found in predictor.stream(camera(), batch_size)]
    assert answers == [[0], [1], []] * 3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_array_is_taken_before_the_answers_of_its_batch_are_there(predictor: Predictor, batch_size: int) -> None:
    taken = 0

    def camera() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield color_image()

    stream = predictor.stream(camera(), batch_size)
    for number in range(1, 6):
        next(stream)
        assert taken == -(-number // batch_size) * batch_size


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_sources_before_a_failing_one_are_answered(
    predictor: Predictor, tmp_path: Path, batch_size: int, as_files: bool
) -> None:
    write_png(tmp_path / "a.png", color_image())

    def failing() -> Iterator[Path | np.ndarray]:
        for _ in range(5):
            yield tmp_path / "a.png" if as_files else color_image()
        raise ConnectionError("the camera is gone")

    answers = []
    with pytest.raises(ConnectionError, match="the camera is gone"):
        answers.extend(color_of(found) for _, found in predictor.stream(failing(), batch_size))
    assert answers == [[0, 1]] * 5


def test_arrays_before_an_impossible_one_are_answered(predictor: Predictor) -> None:
    answers = []
    with pytest.raises(ValueError, match="uint8 RGB, found"):
        answers.extend(predictor.stream([color_image(), np.zeros((8, 8), np.uint8)], 2))
    assert len(answers) == 1


def test_unused_slots_are_dropped_wherever_they_stand() -> None:
    ids = np.zeros(SIZE, int)
    ids[:8], ids[16:24] = 1, 3
    backend = RecordedBackend([recording(ids, [1, 0, 0], [0.5, 0.0, 0.75])])
    found = Predictor(color_manifest(), backend).predict(np.zeros((*SIZE, 3), np.uint8))
    np.testing.assert_array_equal(found.labels, [1, 0])
    np.testing.assert_allclose(found.scores, [0.5, 0.75])
    np.testing.assert_array_equal(np.unique(found.instance_ids), [0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([7, 0, 0, 0], np.int32)}, "class 7, but the manifest has 2 classes"),
        ({"instance_ids": np.full(SIZE, 9, np.uint8)}, "instance 9 of 4 slots"),
        ({"scores": np.zeros(3, np.float32)}, "'scores' has shape"),
        ({"instance_ids": np.zeros((4, 4), np.uint8)}, "'instance_ids' has shape"),
    ],
)
def test_answers_that_do_not_fit_the_manifest_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    backend = RecordedBackend([{**recording(np.zeros(SIZE, int), [], []), **change}])
    with pytest.raises(BackendError, match=message):
        Predictor(color_manifest(), backend).predict(color_image())


def test_lone_graph_works_from_its_metadata(bundle: Path, tmp_path: Path) -> None:
    lone = tmp_path / "model.onnx"
    lone.write_bytes((bundle / "model.onnx").read_bytes())
    predictor = Predictor.open(lone)
    assert [info.name for info in predictor.classes] == ["red", "blue"]
    assert len(predictor.predict(color_image())) == 2


def test_foreign_and_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Predictor.open(tmp_path / "gone.cl4wsis")
    (tmp_path / "foreign.onnx").write_bytes(b"hello")
    with pytest.raises(BundleError):
        Predictor.open(tmp_path / "foreign.onnx")


def raw_maps(classes: int = 2, shape: tuple[int, int] = (8, 12)) -> dict[str, np.ndarray]:
    return {
        "semantic_logits": np.zeros((classes + 1, *shape), np.float32),
        "center_heatmap": np.zeros((classes, *shape), np.float32),
        "offset_map": np.zeros((2, *shape), np.float32),
    }


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (raw_maps(classes=3), r"'semantic_logits' has shape \(1, 4, 8, 12\).* 2 classes of the manifest"),
        ({**raw_maps(), "center_heatmap": np.zeros((3, 8, 12), np.float32)}, "'center_heatmap' has shape"),
        ({"semantic_logits": np.zeros((3, 8, 12), np.float32)}, "gave no center_heatmap, offset_map"),
        (raw_maps(shape=(7, 12)), "maps cannot be grouped: .* export the step again"),
    ],
)
def test_maps_that_do_not_fit_the_manifest_are_refused(recorded: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        Predictor(color_manifest(), RecordedBackend([recorded]), post="host").predict(color_image())


def test_recorded_maps_are_grouped() -> None:
    maps = raw_maps()
    maps["semantic_logits"][2, 2:6, 3:9] = 9
    found = Predictor(color_manifest(), RecordedBackend([maps]), post="host").predict(np.zeros((*SIZE, 3), np.uint8))
    np.testing.assert_array_equal(found.labels, [1])
    np.testing.assert_allclose(found.boxes, [[12, 8, 36, 24]], atol=2)


@pytest.mark.parametrize("size", [SIZE, (SIZE[0] + 1, SIZE[1]), (200, 100)])
def test_grouping_on_the_host_gives_what_the_graph_gives(bundle: Path, size: tuple[int, int]) -> None:
    in_graph, on_host = (Predictor.open(bundle, "onnxruntime", post=post).predict(color_image(*size)) for post in POSTS)
    assert len(on_host) == 2
    for name in ("instance_ids", "labels", "boxes"):
        np.testing.assert_array_equal(getattr(on_host, name), getattr(in_graph, name), err_msg=name)
    np.testing.assert_allclose(on_host.scores, in_graph.scores, atol=1e-6)
