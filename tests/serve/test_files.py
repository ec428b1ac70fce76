"""Finding images, naming results, and taking an earlier run over."""

import errno
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from bundles import SIZE, SLOTS, color_image, color_manifest, write_color_bundle

from cl4wsis.errors import DataError
from cl4wsis.images import encode_png, read_image
from cl4wsis.instances import Instances
from cl4wsis.steps import file_sha256
from cl4wsis_serve.backends.base import Outputs
from cl4wsis_serve.backends.recorded import RecordedBackend
from cl4wsis_serve.files import find_images, predict_files
from cl4wsis_serve.predictor import Predictor
from cl4wsis_serve.writers import CocoWriter, IdsWriter, OverlayWriter, Picture


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with four images, two of them with the same stem, and things that are no images."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.png", "a.PNG", "sub/c.png"):
        write_png(folder / name, color_image(16, 24))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def names(sources: list[str], *skip: Path) -> list[str]:
    return [image.name for image in find_images(sources, skip)]


def test_folder_is_searched_recursively_and_stems_stay_apart(photos: Path) -> None:
    assert names([str(photos)]) == ["a.PNG", "a.png", "b", "sub/c"]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["b.png"], ["b"]),
        (["b.png", "sub/c.png"], ["b", "sub/c"]),
        (["b.png", "b.png", "./b.png"], ["b"]),
        (["*.png"], ["a", "b"]),
        (["**/*.png"], ["a", "b", "sub/c"]),
        (["sub", "b.png"], ["sub/c", "b"]),
    ],
)
def test_files_patterns_and_folders(
    photos: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], expected: list[str]
) -> None:
    (photos / "a.PNG").unlink()
    monkeypatch.chdir(photos)
    assert names(sources) == expected


def test_results_within_the_source_are_left_out(photos: Path) -> None:
    write_png(photos / "masks-b.png", color_image())
    write_png(photos / "masks" / "kept.png", color_image())
    write_png(photos / "masks" / "ids" / "b.png", color_image())
    assert names([str(photos)], photos / "masks") == ["a.PNG", "a.png", "b", "masks-b", "sub/c"]
    assert names([str(photos / "masks")], photos / "masks" / "ids", photos / "other") == ["kept"]
    assert names([str(photos / "masks" / "ids")], photos / "masks" / "ids") == ["b"]


def test_folders_behind_links_are_searched_but_not_in_circles(photos: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "elsewhere" / "deep" / "d.png", color_image())
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "sub" / "back").symlink_to(photos)
    (tmp_path / "elsewhere" / "deep" / "here").symlink_to(".")
    (photos / "knot").symlink_to("knot")
    assert names([str(photos)]) == ["a.PNG", "a.png", "b", "linked/deep/d", "sub/c"]
    (tmp_path / "photos link").symlink_to(photos)
    assert names([str(tmp_path / "photos link")]) == ["a.PNG", "a.png", "b", "linked/deep/d", "sub/c"]


def test_results_are_left_out_behind_links_too(photos: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "masks" / "ids" / "b.png", color_image())
    (photos / "masks").symlink_to(tmp_path / "masks")
    assert names([str(photos)], photos / "masks" / "ids") == ["a.PNG", "a.png", "b", "sub/c"]


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_a_broken_link_is_an_image_that_cannot_be_read(photos: Path, pattern: str) -> None:
    (photos / "lost.png").symlink_to("gone.png")
    (photos / "lost.txt").symlink_to("gone.txt")
    images = find_images([str(photos / pattern)])
    outcomes = {outcome.image.name: outcome.result for outcome in predict_files(counting_predictor()[0], images, [])}
    assert isinstance(outcomes["lost"], DataError)
    assert "lost.png: cannot be read: No such file" in str(outcomes["lost"])
    assert isinstance(outcomes["b"], Instances)


def test_a_folder_that_cannot_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterdir = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"photos/sub: cannot be read: Permission denied; allow it"):
        find_images([str(photos)])


@pytest.mark.parametrize("formats", ["ids", "ids coco overlay", "coco overlay"])
def test_what_other_runs_left_is_no_photograph(photos: Path, formats: str) -> None:
    predictor, _ = counting_predictor()
    writers = {
        "ids": IdsWriter(photos / "out" / "ids", predictor.classes, {}),
        "coco": CocoWriter(photos / "out" / "coco.json", predictor.classes),
        "overlay": OverlayWriter(photos / "out" / "overlay", predictor.classes),
    }
    with ExitStack() as stack:
        chosen = [stack.enter_context(writers[name]) for name in formats.split()]
        list(predict_files(predictor, find_images([str(photos)]), chosen))
    write_png(photos / "out" / "new.png", color_image())
    assert names([str(photos)]) == ["a.PNG", "a.png", "b", "out/new", "sub/c"]


def test_folders_that_only_look_like_results_are_searched(photos: Path) -> None:
    for folder in ("ids", "overlay"):
        write_png(photos / "own" / folder / "x.png", color_image())
    (photos / "own" / "ids" / "x.json").write_text('{"camera": 1}')
    (photos / "own" / "coco.json").write_text('{"images": []}')
    assert names([str(photos / "own")]) == ["ids/x", "overlay/x"]


def test_golden_inputs_of_bundles_are_no_photographs(photos: Path) -> None:
    write_color_bundle(photos / "models" / "colors.cl4wsis", num_golden=2)
    assert names([str(photos)]) == ["a.PNG", "a.png", "b", "sub/c"]
    assert len(names([str(photos / "models" / "colors.cl4wsis" / "golden")])) == 2


def test_no_two_images_get_the_same_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.png.bmp", "b.png", "b.png.jpg"):
        (tmp_path / name).touch()
    found = {image.path.name: image.name for image in find_images([str(tmp_path)])}
    assert found == {
        "a.png": "a.png",
        "a.bmp": "a.bmp",
        "a.png.bmp": "a.png.bmp",
        "b.png": "b",
        "b.png.jpg": "b.png.jpg",
    }


def test_an_image_given_twice_is_taken_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert names(["b.png", str(photos / "b.png"), "sub/../b.png"]) == ["b"]


def missing(photos: Path) -> str:
    return str(photos / "gone.jpg")


def no_match(photos: Path) -> str:
    return str(photos / "*.webp")


def no_images(photos: Path) -> str:
    (photos / "empty").mkdir()
    return str(photos / "empty")


@pytest.mark.parametrize(
    ("source", "message"),
    [(missing, "no such file"), (no_match, "matches no image"), (no_images, "holds no image")],
)
def test_sources_without_images_are_named(photos: Path, source: Callable[[Path], str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_images([str(photos), source(photos)])


def counting_predictor() -> tuple[Predictor, RecordedBackend]:
    ids = np.zeros(SIZE, np.uint8)
    ids[:8], ids[16:24] = 1, 2
    backend = RecordedBackend(
        [
            {
                "instance_ids": ids,
                "labels": np.array([0, 1, 0, 0], np.int32),
                "scores": np.array([0.9, 0.3, 0, 0], np.float32),
                "areas": np.zeros(SLOTS, np.int32),
                "boxes": np.zeros((SLOTS, 4), np.float32),
            }
        ]
    )
    return Predictor(color_manifest(), backend), backend


def test_low_scores_are_left_out(photos: Path, tmp_path: Path) -> None:
    predictor, _ = counting_predictor()
    outcomes = list(predict_files(predictor, find_images([str(photos)]), [], batch_size=2, min_score=0.5))
    assert [outcome.result.labels.tolist() for outcome in outcomes] == [[0]] * 4


@pytest.mark.parametrize("change", ["deleted", "replaced", "broken"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_are_of_the_image_that_was_read_whatever_becomes_of_its_file(
    photos: Path, tmp_path: Path, change: str, batch_size: int
) -> None:
    predictor, backend = counting_predictor()
    images = find_images([str(photos)])
    hashes = {image.file_name: file_sha256(image.path) for image in images}
    run = backend.run

    def run_and_change(frames: np.ndarray) -> Outputs:
        for image in images:
            if change == "deleted":
                image.path.unlink(missing_ok=True)
            elif change == "replaced":
                write_png(image.path, color_image(40, 30))
            else:
                image.path.write_bytes(b"no image any more")
        return run(frames)

    backend.run = run_and_change  # type: ignore[method-assign]
    ids = IdsWriter(tmp_path / "ids", predictor.classes, {"m": 1})
    overlays, coco = OverlayWriter(tmp_path / "overlay", predictor.classes), tmp_path / "coco.json"
    with CocoWriter(coco, predictor.classes) as writer:
        outcomes = list(predict_files(predictor, images, [ids, writer, overlays], batch_size))
    found = {outcome.image: outcome.result for outcome in outcomes if isinstance(outcome.result, Instances)}
    read = [image for image, instances in found.items() if instances.instance_ids.shape == (16, 24)]
    assert len(read) >= batch_size
    assert coco.is_file()
    for image in read:
        sidecar = json.loads((tmp_path / "ids" / f"{image.name}.json").read_text())
        assert sidecar["image_sha256"] == hashes[image.file_name]
        assert (sidecar["height"], sidecar["width"]) == (16, 24)
        assert read_image(tmp_path / "overlay" / f"{image.name}.jpg").shape == (16 * 21, 24 * 21, 3)
        assert ids.read(Picture(image)) is None


def test_few_pictures_are_held_at_a_time(photos: Path) -> None:
    for number in range(30):
        write_png(photos / f"{number}.png", color_image(16, 24))
    predictor, _ = counting_predictor()
    gc.collect()
    most = 0
    for _ in predict_files(predictor, find_images([str(photos)]), [], batch_size=3):
        most = max(most, sum(type(thing) is Picture for thing in gc.get_objects()))
    assert most <= 4 * 3


@pytest.mark.parametrize("change", ["image", "model"])
def test_resuming_draws_overlays_of_another_image_or_model_again(photos: Path, tmp_path: Path, change: str) -> None:
    """The id map was made anew since, the overlay was not."""
    predictor, backend = counting_predictor()
    images = find_images([str(photos / "b.png")])
    overlays = OverlayWriter(tmp_path / "overlay", predictor.classes)
    first, second = (IdsWriter(tmp_path / "ids", predictor.classes, {"m": model}) for model in (1, 2))
    list(predict_files(predictor, images, [first, overlays]))
    os.utime(tmp_path / "overlay" / "b.jpg", ns=(1, 1))
    before = (tmp_path / "overlay" / "b.jpg").read_bytes()
    if change == "image":
        write_png(images[0].path, color_image(32, 24))
        second = first
    list(predict_files(predictor, images, [second]))
    list(predict_files(predictor, images, [second, overlays], finished=second))
    assert len(backend.batches) == 2
    assert (tmp_path / "overlay" / "b.jpg").stat().st_mtime_ns > 1
    assert ((tmp_path / "overlay" / "b.jpg").read_bytes() != before) == (change == "image")
    later = (time.time_ns() // 10**9 + 1000) * 10**9
    os.utime(tmp_path / "overlay" / "b.jpg", ns=(later, later))
    list(predict_files(predictor, images, [second, overlays], finished=second))
    assert (tmp_path / "overlay" / "b.jpg").stat().st_mtime_ns == later


def test_resuming_predicts_only_what_is_missing(photos: Path, tmp_path: Path) -> None:
    images = find_images([str(photos)])
    predictor, backend = counting_predictor()
    classes = predictor.classes
    ids = IdsWriter(tmp_path / "ids", classes, {"m": 1})
    list(predict_files(predictor, images[:3], [ids], finished=ids))
    assert len(backend.batches) == 3
    overlays = OverlayWriter(tmp_path / "overlay", classes)
    outcomes = list(predict_files(predictor, images, [ids, overlays], finished=ids))
    assert len(backend.batches) == 4
    assert {outcome.image.name for outcome in outcomes} == {image.name for image in images}
    assert all(overlays.has(image, ids.time_of(image)) for image in images)
    list(predict_files(predictor, images, [ids], finished=IdsWriter(tmp_path / "ids", classes, {"m": 2})))
    assert len(backend.batches) == 8
