"""PASCAL VOC and SBD folders as they are unpacked, and the rules for objects, void and tags."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from layouts import (
    HEIGHT,
    WIDTH,
    Split,
    class_map,
    index_png,
    object_map,
    write_coco,
    write_sbd,
    write_voc,
)

from cl4wsis.datasets import VOC_CLASSES, VOID_ID, load_evaluation_set, load_masked_pictures, load_tagged_pictures
from cl4wsis.errors import DataError
from cl4wsis.tasks import Plan

TRAIN: Split = {
    "2007_000001": [("cat", (4, 4, 30, 30)), ("dog", (40, 10, 60, 40))],
    "2008_000002": [("dog", (0, 0, 20, 20)), ("dog", (30, 20, 50, 44))],
    "2009_000003": [],
}
VAL: Split = {"2010_000004": [("cat", (4, 4, 30, 30))], "2011_000005": [("sofa", (8, 8, 40, 40))]}


def make_plan(root: Path, kind: str, steps: Any = (("cat",), ("dog",)), **data: Any) -> Plan:
    sources = {"train": {"split": "train"}, "val": {"split": "val"}}
    return Plan.model_validate({"name": "p", "steps": steps, "data": {"kind": kind, "root": root, **sources, **data}})


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write_voc(tmp_path, {"train": TRAIN, "val": VAL})
    return tmp_path


@pytest.fixture
def sbd(tmp_path: Path) -> Path:
    pytest.importorskip("scipy")
    write_sbd(tmp_path, {"train": TRAIN, "val": VAL})
    return tmp_path


def test_classes_are_those_of_pascal_in_their_order() -> None:
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    assert [VOC_CLASSES.index(name) + 1 for name in ("aeroplane", "cat", "person", "tvmonitor")] == [1, 8, 15, 20]


# --- VOC ---


def test_voc_objects_become_an_id_map_with_void_around_them(voc: Path) -> None:
    pictures = load_masked_pictures(make_plan(voc, "voc"), 0)
    assert [(picture.name, picture.tags) for picture in pictures] == [
        ("2007_000001.jpg", {"cat", "dog"}),
        ("2008_000002.jpg", {"dog"}),  # the third image holds nothing that could be trained on
    ]
    instance_ids, labels = pictures[0].rasterize(["dog", "cat"])
    assert labels.tolist() == [1, 0]
    objects = object_map(TRAIN["2007_000001"])
    np.testing.assert_array_equal(np.maximum(instance_ids, 0), objects)
    void = instance_ids == VOID_ID
    assert void[3, 3:31].all()  # the band above the cat
    assert not void[(objects > 0) | (cv2.dilate(objects, np.ones((3, 3))) == 0)].any()
    instance_ids, labels = pictures[1].rasterize(["dog"])
    assert labels.tolist() == [0, 0]
    assert np.unique(instance_ids).tolist() == [-1, 0, 1, 2]


def test_voc_objects_of_other_classes_are_background_and_void_stays(voc: Path) -> None:
    picture = load_masked_pictures(make_plan(voc, "voc"), 0)[0]
    instance_ids, labels = picture.rasterize(["cat"])
    assert labels.tolist() == [0]
    assert instance_ids[20, 50] == 0
    assert instance_ids[20, 39] == VOID_ID


def test_voc_tags_come_from_annotations_without_opening_a_mask(voc: Path) -> None:
    for folder in ("SegmentationClass", "SegmentationObject"):
        for path in (voc / folder).iterdir():
            path.write_bytes(b"poison")
    pictures = load_tagged_pictures(make_plan(voc, "voc"), 1)
    assert {picture.name: picture.tags for picture in pictures} == {
        "2007_000001.jpg": {"cat", "dog"},
        "2008_000002.jpg": {"dog"},
        "2009_000003.jpg": set(),
    }


@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_voc_tags_may_come_from_a_file(voc: Path, suffix: str) -> None:
    (voc / "tags.json").write_text(json.dumps({f"{name}{suffix}": ["dog"] for name in [*TRAIN, *VAL]}))
    plan = make_plan(voc, "voc", train={"split": "train", "tags": "tags.json"})
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"dog"}] * 3
    (voc / "tags.json").write_text(json.dumps({"2007_000001": ["dog"]}))
    with pytest.raises(DataError, match="has no entry for '2008_000002'"):
        load_tagged_pictures(plan, 1)


def test_voc_evaluation_takes_void_for_background_and_keeps_every_image(voc: Path) -> None:
    samples = load_evaluation_set(make_plan(voc, "voc"), 1)
    assert [sample.name for sample in samples] == ["2010_000004.jpg", "2011_000005.jpg"]
    assert [sample.labels.tolist() for sample in samples] == [[0], []]
    np.testing.assert_array_equal(samples[0].instance_ids, object_map(VAL["2010_000004"]))
    assert not samples[1].instance_ids.any()
    assert samples[0].image.shape == (HEIGHT, WIDTH, 3)


def test_voc_lists_may_hold_pairs_of_paths(voc: Path) -> None:
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClass/{name}.png" for name in TRAIN]
    (voc / "ImageSets" / "Segmentation" / "pairs.txt").write_text("\r\n".join(lines))
    plan = make_plan(voc, "voc", train={"split": "pairs"})
    assert len(load_tagged_pictures(plan, 1)) == 3


def test_byte_order_mark_is_no_part_of_a_list(voc: Path) -> None:
    path = voc / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text(f"\ufeff{path.read_text()}", encoding="utf-8")
    assert [picture.name for picture in load_tagged_pictures(make_plan(voc, "voc"), 1)] == [f"{n}.jpg" for n in TRAIN]


@pytest.mark.parametrize("tags", [{}, {"tags": "tags.csv"}], ids=["xml", "tags file"])
@pytest.mark.parametrize("suffix", ["", ".jpg", ".PNG"])
def test_only_the_ending_of_an_image_is_dropped_from_a_name(tmp_path: Path, suffix: str, tags: dict[str, str]) -> None:
    write_voc(tmp_path, {"train": {"img.v2": TRAIN["2007_000001"]}, "val": VAL})
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text(f"img.v2{suffix}\n")
    (tmp_path / "tags.csv").write_text(f"img.v2{suffix},cat,dog\n")
    plan = make_plan(tmp_path, "voc", train={"split": "train", **tags})
    assert [(picture.name, picture.tags) for picture in load_tagged_pictures(plan, 1)] == [
        ("img.v2.jpg", {"cat", "dog"})
    ]


def test_object_has_the_class_of_most_of_its_pixels_and_a_pixel_is_enough(tmp_path: Path) -> None:
    objects = [("cat", (0, 0, 10, 10)), ("dog", (20, 20, 21, 21))]
    write_voc(tmp_path, {"train": {"a": objects}, "val": VAL})
    classes = class_map(objects)
    classes[0, :] = VOC_CLASSES.index("sofa") + 1  # a stroke of another class
    (tmp_path / "SegmentationClass" / "a.png").write_bytes(index_png(classes))
    (picture,) = load_masked_pictures(make_plan(tmp_path, "voc"), 0)
    assert picture.class_names == ("cat", "dog")
    instance_ids, labels = picture.rasterize(["dog"])
    assert labels.tolist() == [0]
    assert (instance_ids == 1).sum() == 1


def test_image_with_nothing_but_slivers_is_not_trained_on_with_masks(tmp_path: Path) -> None:
    pictures: Split = {"a": [("cat", (5, 5, 6, 30))], "b": [("cat", (5, 5, 7, 30)), ("dog", (40, 4, 50, 14))]}
    write_voc(tmp_path, {"train": pictures, "val": VAL})
    assert [picture.name for picture in load_masked_pictures(make_plan(tmp_path, "voc"), 0)] == ["b.jpg"]


def test_names_can_be_those_of_the_plan(voc: Path) -> None:
    rename = {"rename": {"sofa": "couch", "dog": "hound"}}
    plan = make_plan(voc, "voc", [["cat"], ["hound"], ["couch"]], train={"split": "train"} | rename)
    assert load_tagged_pictures(plan, 1)[1].tags == {"hound"}
    assert load_masked_pictures(plan, 0)[0].class_names == ("cat", "hound")
    with pytest.raises(DataError, match="class 'hound' of the plan does not occur"):
        load_evaluation_set(plan, 1)  # evaluation images have their own names
    plan = make_plan(voc, "voc", [["cat"], ["hound"], ["couch"]], val={"split": "val"} | rename)
    assert load_evaluation_set(plan, 2)[1].labels.tolist() == [2]


def damage_voc(root: Path, what: str) -> None:
    name = "2007_000001"
    class_mask, object_mask = (root / f / f"{name}.png" for f in ("SegmentationClass", "SegmentationObject"))
    if what == "no list":
        (root / "ImageSets" / "Segmentation" / "train.txt").unlink()
    elif what == "empty list":
        (root / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    elif what == "listed twice":
        (root / "ImageSets" / "Segmentation" / "train.txt").write_text(f"{name}\n{name}\n")
    elif what == "no mask":
        object_mask.unlink()
    elif what == "other size":
        object_mask.write_bytes(index_png(np.zeros((HEIGHT, WIDTH - 1), np.uint8)))
    elif what == "colors":
        cv2.imwrite(str(class_mask), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    elif what == "no class":
        class_mask.write_bytes(index_png(np.zeros((HEIGHT, WIDTH), np.uint8)))
    elif what == "class 21":
        class_mask.write_bytes(index_png(np.full((HEIGHT, WIDTH), 21, np.uint8)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no list", r"train\.txt: cannot be read"),
        ("empty list", r"train\.txt: names no image"),
        ("listed twice", r"train\.txt: image '2007_000001' is listed 2 times"),
        ("no mask", r"SegmentationObject/2007_000001\.png: cannot be read"),
        ("other size", r"SegmentationObject/2007_000001\.png: is 63x48 px .* is 64x48"),
        ("colors", r"SegmentationClass/2007_000001\.png: holds colors"),
        ("no class", r"SegmentationClass/2007_000001\.png: an object of 2007_000001\.png lies on class 0"),
        ("class 21", r"lies on class 21; expected are classes 1 to 20"),
    ],
)
def test_broken_voc_folders_are_explained(voc: Path, what: str, message: str) -> None:
    damage_voc(voc, what)
    with pytest.raises(DataError, match=message):
        load_masked_pictures(make_plan(voc, "voc"), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Annotations/2007_000001\.xml: cannot be read"),
        ("<annotation>", r"2007_000001\.xml: is not valid XML"),
        ("<annotation><object><name/></object></annotation>", r"2007_000001\.xml: an object has no name"),
    ],
)
def test_broken_voc_annotations_are_explained(voc: Path, content: str | None, message: str) -> None:
    path = voc / "Annotations" / "2007_000001.xml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_tagged_pictures(make_plan(voc, "voc"), 1)


# --- SBD ---


def test_sbd_objects_become_an_id_map_without_void(sbd: Path) -> None:
    pictures = load_masked_pictures(make_plan(sbd, "sbd"), 0)
    assert [picture.class_names for picture in pictures] == [("cat", "dog"), ("dog", "dog")]
    instance_ids, labels = pictures[0].rasterize(["dog", "cat"])
    np.testing.assert_array_equal(instance_ids, object_map(TRAIN["2007_000001"]))
    assert labels.tolist() == [1, 0]
    assert pictures[0].read().shape == (HEIGHT, WIDTH, 3)


def test_sbd_tags_come_from_class_files_or_a_tags_file(sbd: Path) -> None:
    for path in (sbd / "inst").iterdir():
        path.write_bytes(b"poison")
    plan = make_plan(sbd, "sbd")
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"cat", "dog"}, {"dog"}, set()]
    (sbd / "tags.csv").write_text("".join(f"{name},dog;sheep\n" for name in TRAIN))
    plan = make_plan(sbd, "sbd", train={"split": "train", "tags": "tags.csv"})
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"dog", "sheep"}] * 3


def test_sbd_as_coco_json_needs_no_category_names(tmp_path: Path) -> None:
    nameless: dict[int, str | None] = dict.fromkeys(range(1, 21))
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        write_coco(tmp_path / "img", tmp_path / f"pascal_sbd_{split}.json", pictures, nameless)
    sources = {split: {"instances": f"pascal_sbd_{split}.json"} for split in ("train", "val")}
    plan = make_plan(tmp_path, "sbd", **sources)
    assert [picture.class_names for picture in load_masked_pictures(plan, 0)] == [("cat", "dog"), ("dog", "dog")]
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"cat", "dog"}, {"dog"}, set()]
    assert [sample.labels.tolist() for sample in load_evaluation_set(plan, 1)] == [[0], []]


def test_coco_file_without_category_names_is_explained(tmp_path: Path) -> None:
    write_coco(tmp_path / "img", tmp_path / "i.json", TRAIN, dict.fromkeys(range(1, 21)))
    source = {"images": "img", "instances": "i.json"}
    data = {"kind": "coco", "root": tmp_path, "train": source, "val": source}
    with pytest.raises(DataError, match="category 1 has no name; add one, or set kind = 'sbd'"):
        load_masked_pictures(Plan.model_validate({"name": "p", "steps": [["cat"]], "data": data}), 0)


def write_mat(path: Path, **content: Any) -> None:
    from scipy.io import savemat

    savemat(path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"poison", r"2007_000001\.mat: is no MATLAB file"),
        ({"GTother": {"a": 1}}, r"2007_000001\.mat: has no GTinst with Segmentation and Categories"),
        ({"GTinst": {"Segmentation": np.ones((4, 4), np.uint8), "Categories": [[21]]}}, "names class 21"),
        (
            {"GTinst": {"Segmentation": np.full((4, 4), 2, np.uint8), "Categories": [[1]]}},
            "object 2 of the mask has no",
        ),
        ({"GTinst": {"Segmentation": np.ones((4, 4)), "Categories": [[1]]}}, "expected whole numbers"),
    ],
    ids=["no mat", "other struct", "class 21", "object without class", "floats"],
)
def test_broken_sbd_files_are_explained(sbd: Path, content: Any, message: str) -> None:
    path = sbd / "inst" / "2007_000001.mat"
    path.write_bytes(content) if isinstance(content, bytes) else write_mat(path, **content)
    with pytest.raises(DataError, match=message):
        load_masked_pictures(make_plan(sbd, "sbd"), 0)


def test_object_numbers_may_have_gaps(sbd: Path) -> None:
    segmentation = np.zeros((HEIGHT, WIDTH), np.uint8)
    segmentation[:10, :10], segmentation[20:30, 20:30] = 3, 1
    categories = np.array([[8], [15], [12]], np.uint8)
    write_mat(sbd / "inst" / "2007_000001.mat", GTinst={"Segmentation": segmentation, "Categories": categories})
    picture = load_masked_pictures(make_plan(sbd, "sbd"), 0)[0]
    assert picture.class_names == ("cat", "dog")
    instance_ids, labels = picture.rasterize(["cat", "dog"])
    assert labels.tolist() == [0, 1]
    assert (instance_ids[:10, :10] == 2).all()
    assert (instance_ids[20:30, 20:30] == 1).all()


# --- several sources ---


def test_base_from_coco_later_classes_from_voc(tmp_path: Path) -> None:
    categories: dict[int, str | None] = {1: "truck", 5: "cat", 9: "dog"}
    coco = {"a": [("truck", (0, 0, 30, 30))], "b": [("truck", (0, 0, 30, 30)), ("dog", (32, 0, 50, 20))]}
    write_coco(tmp_path / "coco", tmp_path / "coco.json", coco, categories)
    write_voc(tmp_path / "voc", {"train": TRAIN, "val": VAL})
    data = {
        "kind": "coco",
        "root": tmp_path,
        "train": {"images": "coco", "instances": "coco.json"},
        "steps": {1: {"kind": "voc", "folder": "voc"}},
        "val": {"kind": "voc", "folder": "voc", "split": "val"},
    }
    tables = {"name": "p", "steps": [["truck"], ["cat", "dog"]], "data": data}
    plan = Plan.model_validate(tables)
    assert [picture.name for picture in load_masked_pictures(plan, 0)] == ["a.jpg", "b.jpg"]
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"cat", "dog"}, {"dog"}, set()]
    with pytest.raises(DataError, match="class 'truck' of the plan does not occur"):
        load_evaluation_set(plan, 1)
    lenient = Plan.model_validate(tables | {"data": data | {"val_lacks_classes": True}})
    assert [sample.labels.tolist() for sample in load_evaluation_set(lenient, 1)] == [[1], []]
    with pytest.raises(DataError, match=r"knows none of the classes seen in step 0 .truck.; measure it on another"):
        load_evaluation_set(lenient, 0)
    assert Plan.model_validate_json(lenient.model_dump_json()) == lenient
