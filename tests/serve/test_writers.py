"""Results on disk: what is written can be read back, and nothing is left half-written."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from bundles import color_image, color_manifest
from pycocotools.coco import COCO

from cl4wsis.errors import DataError
from cl4wsis.images import read_image, write_png
from cl4wsis.instances import Instances
from cl4wsis.masks import mask_from_segmentation
from cl4wsis_serve.writers import CocoWriter, IdsWriter, ImageFile, OverlayWriter, Picture

CLASSES = color_manifest().classes


def image(name: str, path: Path = Path(__file__)) -> Picture:
    """Name an image; its file only has to be there."""
    return Picture(ImageFile(path, f"{name}.png", name))


def two_squares() -> Instances:
    ids = np.zeros((64, 96), np.int32)
    ids[2:6, 3:10], ids[20:30, 40:60] = 1, 2
    return Instances.from_ids(ids, [1, 0], [0.75, 0.5])


def test_id_map_and_sidecar(tmp_path: Path) -> None:
    with IdsWriter(tmp_path, CLASSES, {"name": "m"}) as writer:
        writer.write(image("a/b"), two_squares())
    ids = cv2.imread(str(tmp_path / "a/b.png"), cv2.IMREAD_UNCHANGED)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, two_squares().instance_ids)
    sidecar = json.loads((tmp_path / "a/b.json").read_text())
    assert (sidecar["image"], sidecar["height"], sidecar["width"]) == ("a/b.png", 64, 96)
    assert sidecar["model"] == {"name": "m"}
    assert sidecar["instances"] == [
        {"id": 1, "label": 1, "class": "blue", "score": 0.75, "area": 28, "box": [3.0, 2.0, 10.0, 6.0]},
        {"id": 2, "label": 0, "class": "red", "score": 0.5, "area": 200, "box": [40.0, 20.0, 60.0, 30.0]},
    ]


@pytest.mark.parametrize("count", [0, 255, 256, 300])
def test_answers_are_read_back_whole(tmp_path: Path, count: int) -> None:
    ids = np.arange(400, dtype=np.int32).reshape(20, 20)
    instances = Instances.from_ids(np.where(ids <= count, ids, 0), np.arange(count) % 2, np.linspace(0, 1, count))
    with IdsWriter(tmp_path, CLASSES, {}) as writer:
        writer.write(image("x"), instances)
        read = writer.read(image("x"))
    assert read is not None
    np.testing.assert_array_equal(read.instance_ids, instances.instance_ids)
    np.testing.assert_array_equal(read.labels, instances.labels)
    np.testing.assert_array_equal(read.boxes, instances.boxes)
    np.testing.assert_allclose(read.scores, instances.scores, atol=1e-6)


@pytest.mark.parametrize("damage", ["no sidecar", "no map", "broken sidecar", "broken map", "other model", "none"])
def test_incomplete_answers_are_not_taken_over(tmp_path: Path, damage: str) -> None:
    IdsWriter(tmp_path, CLASSES, {"name": "other" if damage == "other model" else "m"}).write(image("x"), two_squares())
    if damage.startswith("no "):
        (tmp_path / ("x.json" if "sidecar" in damage else "x.png")).unlink()
    elif damage.startswith("broken "):
        (tmp_path / ("x.json" if "sidecar" in damage else "x.png")).write_bytes(b"{")
    assert (IdsWriter(tmp_path, CLASSES, {"name": "m"}).read(image("x")) is None) == (damage != "none")


def test_answers_for_another_image_of_the_same_name_are_not_taken_over(tmp_path: Path) -> None:
    writer = IdsWriter(tmp_path / "out", CLASSES, {})
    photo = tmp_path / "x.png"
    write_png(photo, color_image())
    writer.write(image("x", photo), two_squares())
    assert writer.read(image("x", photo)) is not None
    write_png(photo, color_image(30, 40))
    assert writer.read(image("x", photo)) is None


def test_names_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xff")
    IdsWriter(tmp_path, CLASSES, {}).write(image(name), two_squares())
    assert json.loads((tmp_path / f"{name}.json").read_text())["image"] == f"{name}.png"


def test_a_coco_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.mkdir()
    with pytest.raises(DataError, match=r"coco\.json: cannot be written"), CocoWriter(path, CLASSES) as writer:
        writer.write(image("first"), two_squares())
    assert [entry.name for entry in tmp_path.iterdir()] == ["coco.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("count", [1, 300])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, count: int) -> None:
    writer = CocoWriter(tmp_path / "coco.json", CLASSES)

    def write() -> None:
        with writer:
            (tmp_path / ".coco.json.tmp").unlink()
            (tmp_path / ".coco.json.tmp").symlink_to("/dev/full")
            assert writer._file is not None
            writer._file.close()
            writer._file = (tmp_path / ".coco.json.tmp").open("w", encoding="utf-8")
            for _ in range(count):
                writer.write(image("x"), two_squares())

    with pytest.raises(DataError, match=r"coco\.json: cannot be written: No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_coco_file_is_read_by_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CocoWriter(tmp_path / "out" / "coco.json", CLASSES) as writer:
        writer.write(image("first"), two_squares())
        writer.write(image("empty"), Instances.empty(10, 12))
        writer.write(image("third"), two_squares())
    coco = COCO(str(tmp_path / "out" / "coco.json"))
    assert [entry["file_name"] for entry in coco.dataset["images"]] == ["first.png", "empty.png", "third.png"]
    assert [len(coco.getAnnIds(imgIds=[i])) for i in (1, 2, 3)] == [2, 0, 2]
    assert {category["name"] for category in coco.dataset["categories"]} == {"red", "blue"}
    annotation = coco.loadAnns(coco.getAnnIds(imgIds=[3]))[0]
    assert (annotation["category_id"], annotation["area"], annotation["score"]) == (2, 28, 0.75)
    mask = mask_from_segmentation(annotation["segmentation"], 64, 96)
    np.testing.assert_array_equal(mask, two_squares().instance_ids == 1)


def test_interrupted_coco_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text("old")

    def interrupted() -> None:
        with CocoWriter(path, CLASSES) as writer:
            writer.write(image("first"), two_squares())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["coco.json"]


def test_coco_writer_must_be_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use it in a 'with' statement"):
        CocoWriter(tmp_path / "coco.json", CLASSES).write(image("x"), two_squares())


def test_overlay_is_a_readable_picture(tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    write_png(source, color_image())
    with OverlayWriter(tmp_path, CLASSES) as writer:
        writer.write(image("a/b", source), two_squares())
        written = writer.time_of(image("a/b").file)
        assert writer.has(image("a/b").file, written)
        assert not writer.has(image("a/b").file, written + 1)
        assert not writer.has(image("a/c").file, 0)
    assert max(read_image(tmp_path / "a/b.jpg").shape[:2]) >= 480


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(DataError, match="cannot be"):
        IdsWriter(tmp_path, CLASSES, {}).write(image("a/b"), two_squares())
