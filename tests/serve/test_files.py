"""Finding images, naming results, and taking an earlier run over."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import SIZE, SLOTS, color_image, color_manifest

from cl4wsis.errors import DataError
from cl4wsis.images import write_png
from cl4wsis_serve.backends.recorded import RecordedBackend
from cl4wsis_serve.files import find_images, predict_files
from cl4wsis_serve.predictor import Predictor
from cl4wsis_serve.writers import IdsWriter, OverlayWriter


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with four images, two of them with the same stem, and things that are no images."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.png", "a.PNG", "sub/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
    (photos / "masks" / "ids").mkdir(parents=True)
    write_png(photos / "masks" / "kept.png", color_image())
    write_png(photos / "masks" / "ids" / "b.png", color_image())
    assert names([str(photos)], photos / "masks") == ["a.PNG", "a.png", "b", "masks-b", "sub/c"]
    assert names([str(photos / "masks")], photos / "masks" / "ids", photos / "other") == ["kept"]
    assert names([str(photos / "masks" / "ids")], photos / "masks" / "ids") == ["b"]


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
    assert all(overlays.has(image) for image in images)
    list(predict_files(predictor, images, [ids], finished=IdsWriter(tmp_path / "ids", classes, {"m": 2})))
    assert len(backend.batches) == 8
