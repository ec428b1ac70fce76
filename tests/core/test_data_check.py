"""Counts and findings of ``check_plan``: what is in the data of a plan, and what is wrong with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from layouts import Split, index_png, write_coco, write_picture, write_sbd, write_voc

from cl4wsis.datasets import DataReport, check_plan
from cl4wsis.tasks import Plan

CATEGORIES: dict[int, str | None] = {1: "cat", 2: "dog", 3: "sofa"}
STEPS = (("cat",), ("dog",))

TRAIN: Split = {
    "a": [("cat", (0, 0, 20, 20)), ("cat", (30, 0, 50, 20))],
    "b": [("cat", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20))],
    "c": [("dog", (0, 0, 20, 20)), ("sofa", (30, 0, 50, 20))],
    "d": [("sofa", (0, 0, 20, 20))],
    "e": [],
}
VAL: Split = {"v": [("cat", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20))], "w": [("sofa", (0, 0, 20, 20))]}


def make_plan(root: Path, kind: str = "coco", **fields: Any) -> Plan:
    """Write the pictures in one of the layouts and return a plan of them."""
    data: dict[str, Any] = {"kind": kind, "root": root, "train": {"split": "train"}, "val": {"split": "val"}}
    if kind == "coco":
        for split, pictures in (("train", TRAIN), ("val", VAL)):
            write_coco(root / split, root / f"{split}.json", pictures, CATEGORIES)
            tags = {f"{name}.jpg": sorted({label for label, _ in objects}) for name, objects in pictures.items()}
            (root / f"{split}_tags.json").write_text(json.dumps(tags))
            data[split] = {"images": split, "instances": f"{split}.json", "tags": f"{split}_tags.json"}
    elif kind == "voc":
        write_voc(root, {"train": TRAIN, "val": VAL})
    else:
        pytest.importorskip("scipy")
        write_sbd(root, {"train": TRAIN, "val": VAL})
    return Plan.model_validate({"name": "p", "steps": STEPS, "data": data | fields.pop("data", {})} | fields)


def found(report: DataReport, is_broken: bool = True) -> list[tuple[str, str]]:
    return [(f.where, f.kind) for f in report.findings if f.is_broken == is_broken]


def messages(report: DataReport) -> str:
    return "\n".join(finding.message for finding in report.findings)


@pytest.mark.parametrize("kind", ["coco", "voc", "sbd"])
def test_all_layouts_are_counted_alike(tmp_path: Path, kind: str) -> None:
    report = check_plan(make_plan(tmp_path, kind))
    assert not report.is_broken
    base, later = report.steps
    assert (base.learns_from, base.images, base.source_images) == ("masks", 2, 5)
    assert (base.with_old, base.with_later, base.unusable) == (0, 1, 2)
    assert [(c.name, c.images, c.instances) for c in base.classes] == [("cat", 2, 3)]
    assert (later.learns_from, later.images, later.with_old, later.with_later, later.unusable) == ("tags", 2, 1, 0, 2)
    assert [(c.name, c.images, c.instances) for c in later.classes] == [("dog", 2, None)]
    assert report.evaluation is not None
    assert (report.evaluation.images, report.evaluation.without_objects) == (2, 1)
    assert [(c.name, c.images, c.instances) for c in report.evaluation.classes] == [("cat", 1, 1), ("dog", 1, 1)]
    notes = found(report, is_broken=False)  # steps that read the same list say it once
    assert notes[0] == ("step 0", "no usable label")
    assert {kind for _, kind in notes} == {"no usable label"}
    assert "2 images without a usable label are left out: d.jpg, e.jpg" in messages(report)


def test_disjoint_selection_and_all_seen_labels_are_counted(tmp_path: Path) -> None:
    report = check_plan(make_plan(tmp_path, selection="disjoint", all_seen_labels=True))
    assert report.steps[0].images == 1
    assert report.steps[0].with_later == 0
    assert [(c.name, c.images) for c in report.steps[1].classes] == [("cat", 1), ("dog", 2)]


def test_progress_ends_with_all_images(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_plan(make_plan(tmp_path), lambda done, total: calls.append((done, total)))
    # a and b with masks, b and c with tags, two for evaluation
    assert calls == [(done, 6) for done in range(1, 7)]


def damage(root: Path, what: str) -> None:
    image = root / "train" / "a.jpg"
    coco = json.loads((root / "train.json").read_text())
    if what == "missing":
        image.unlink()
    elif what == "corrupt":
        image.write_bytes(image.read_bytes()[:-30])
    elif what == "other size":
        cv2.imwrite(str(image), np.zeros((10, 10, 3), np.uint8))
    elif what == "mask of other size":
        coco["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": [25]}
    elif what == "no mask":
        coco["annotations"][0]["segmentation"] = []
    elif what == "broken code":
        coco["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": [5000]}
    elif what == "odd polygon":
        coco["annotations"][0]["segmentation"].append([5, 5, 9])
    elif what == "empty mask":
        coco["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": [48 * 64]}
    elif what == "out of bounds":
        coco["annotations"][0]["segmentation"] = [[0, 0, 90, 0, 90, 20, 0, 20]]
    elif what == "duplicate":
        shutil.copy(image, root / "val" / "w.jpg")
    elif what == "no folder":
        (root / "train").rename(root / "gone")
    elif what == "unknown category":
        coco["annotations"][0]["category_id"] = 77
    elif what == "no class":
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 1]
    (root / "train.json").write_text(json.dumps(coco))


@pytest.mark.parametrize(
    ("what", "where", "kind", "message"),
    [
        ("missing", "step 0", "unreadable image", "train/a.jpg: cannot be read"),
        ("corrupt", "step 0", "unreadable image", "train/a.jpg: ends before the image is complete"),
        (
            "other size",
            "step 0",
            "unreadable image",
            "train/a.jpg: is 10x10 px (width x height), but annotated as 64x48",
        ),
        ("mask of other size", "step 0", "unreadable mask", "a.jpg: mask of 'cat': mask of size [5, 5]"),
        ("no mask", "step 0", "unreadable mask", "a.jpg: mask of 'cat': segmentation is neither"),
        ("broken code", "step 0", "unreadable mask", "a.jpg: mask of 'cat': "),
        ("odd polygon", "step 0", "unreadable mask", "a.jpg: mask of 'cat': polygon has 3 numbers; give every point"),
        ("duplicate", "evaluation", "duplicate", "train/a.jpg, and measured on"),
        ("no folder", "step 0", "annotations", "train: is not a folder of images"),
        ("unknown category", "step 0", "annotations", "there is no category with id 77"),
        ("no class", "step 0", "missing class", "class 'cat' of the plan does not occur"),
    ],
)
def test_what_must_be_repaired_is_found(tmp_path: Path, what: str, where: str, kind: str, message: str) -> None:
    plan = make_plan(tmp_path)
    damage(tmp_path, what)
    report = check_plan(plan)
    assert (where, kind) in found(report)
    assert message in messages(report)
    assert report.is_broken


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("empty mask", "empty mask", "a.jpg: mask of 'cat': covers no pixel"),
        ("out of bounds", "mask out of bounds", "a.jpg: mask of 'cat': reaches 26 px beyond the image of 64x48 px"),
    ],
)
def test_what_can_be_lived_with_is_told(tmp_path: Path, what: str, kind: str, message: str) -> None:
    plan = make_plan(tmp_path)
    damage(tmp_path, what)
    report = check_plan(plan)
    assert ("step 0", kind) in found(report, is_broken=False)
    assert message in messages(report)
    assert not report.is_broken


def test_a_broken_mask_of_voc_does_not_hide_the_counts(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "voc")
    (tmp_path / "SegmentationObject" / "a.png").write_bytes(index_png(np.zeros((4, 4), np.uint8)))
    report = check_plan(plan)
    assert found(report) == [("step 0", "annotations")]
    assert report.steps[0].images == 1
    assert report.steps[1].images == 2


def test_masks_and_image_of_voc_must_be_of_one_size(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "voc")
    cv2.imwrite(str(tmp_path / "JPEGImages" / "v.jpg"), np.zeros((10, 10, 3), np.uint8))
    assert found(check_plan(plan)) == [("evaluation", "unreadable image")]


def test_every_problem_is_in_the_report(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    for path in (*(tmp_path / "train").iterdir(), *(tmp_path / "val").iterdir()):
        path.unlink()
    # a and b of step 0, c of step 1 (b again, by tags), v and w
    report = check_plan(plan)
    assert found(report).count(("step 0", "unreadable image")) == 2
    assert found(report).count(("step 1", "unreadable image")) == 2
    assert found(report).count(("evaluation", "unreadable image")) == 2


def test_step_without_images_is_broken_and_class_without_images_is_told(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, selection="disjoint", steps=(("cat",), ("sofa", "dog")))
    report = check_plan(plan)
    assert not report.is_broken
    coco = json.loads((tmp_path / "train.json").read_text())
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 1]  # the cat is with a dog now
    (tmp_path / "train.json").write_text(json.dumps(coco))
    assert ("step 0", "no images") in found(check_plan(plan))


def test_proposals_are_checked_where_they_will_be_read(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, data={"proposals": "proposals"})
    (tmp_path / "proposals").mkdir()
    (tmp_path / "proposals" / "b.json").write_text("[]")
    report = check_plan(plan)
    assert found(report) == [("step 1", "proposals")]
    assert "proposals/c.json: cannot be read" in messages(report)
    (tmp_path / "proposals" / "c.json").write_text("[]")
    assert not check_plan(plan).is_broken


def test_drawn_shapes_are_counted() -> None:
    data = {"kind": "shapes", "num_train": 6, "num_val": 4, "image_size": 64}
    plan = Plan.model_validate({"name": "s", "steps": [["disc", "ring"], ["star"]], "data": data})
    report = check_plan(plan)
    assert [step.images for step in report.steps] == [6, 6]
    assert sum(count.images for count in report.steps[0].classes) >= 6
    assert report.evaluation is not None
    assert report.evaluation.images == 4
    assert not report.findings


def test_an_image_may_be_in_several_steps_but_not_in_training_and_evaluation(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_picture(tmp_path / "train" / "b.jpg", VAL["v"])
    shutil.copy(tmp_path / "train" / "b.jpg", tmp_path / "val" / "v.jpg")
    report = check_plan(plan)
    assert found(report) == [("evaluation", "duplicate")]


def test_training_images_used_for_evaluation_are_told_apart_from_copies(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "voc", data={"val": {"split": "train"}})
    report = check_plan(plan)
    assert set(found(report)) == {("evaluation", "duplicate")}
    assert f"{tmp_path / 'JPEGImages' / 'a.jpg'}: is trained on and measured on" in messages(report)


def test_classes_that_cannot_be_measured_are_told(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "voc", steps=(("cat",), ("dog",), ("sheep",)))
    report = check_plan(plan)
    assert ("evaluation", "no objects") in found(report, is_broken=False)
    assert "no object to be measured on: sheep" in messages(report)
