import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cl4wsis.datasets import (
    VOID_ID,
    check_sources,
    coco,
    load_evaluation_set,
    load_masked_pictures,
    load_tagged_pictures,
    read_instances,
    read_tags,
)
from cl4wsis.errors import DataError
from cl4wsis.tasks import Plan

HEIGHT, WIDTH = 6, 8
CATEGORIES = {1: "cat", 2: "dog", 3: "tie"}


def box_polygon(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotate(image_id: int, category_id: int, box: tuple[int, int, int, int], **fields: Any) -> dict[str, Any]:
    left, top, right, bottom = box
    annotation = {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [left, top, right - left, bottom - top],
        "segmentation": box_polygon(*box),
        "iscrowd": 0,
    }
    return annotation | fields


ANNOTATIONS = [
    annotate(1, 1, (0, 0, 4, 3)),
    annotate(1, 2, (4, 3, 8, 6)),
    annotate(2, 2, (0, 0, 8, 6)),
    annotate(2, 3, (2, 2, 4, 4)),
    annotate(3, 1, (0, 0, 2, 2)),
]


def write_source(
    root: Path, name: str, annotations: list[dict[str, Any]] = ANNOTATIONS, num_images: int = 3
) -> dict[str, str]:
    """Write images, instances and tags; return the section of a plan that names them."""
    folder = root / name
    folder.mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, num_images + 1)]
    for image in images:
        pixels = np.full((HEIGHT, WIDTH, 3), 10 * image["id"], np.uint8)
        cv2.imwrite(str(folder / image["file_name"]), pixels)
    categories = [{"id": key, "name": value} for key, value in CATEGORIES.items()]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{name}.json").write_text(json.dumps(coco))
    tags = {
        image["file_name"]: sorted({CATEGORIES[a["category_id"]] for a in annotations if a["image_id"] == image["id"]})
        for image in images
    }
    (root / f"{name}_tags.json").write_text(json.dumps(tags))
    return {"images": name, "instances": f"{name}.json", "tags": f"{name}_tags.json"}


def make_plan(root: Path, steps: Any = (("cat",), ("dog",)), data: dict[str, Any] | None = None, **fields: Any) -> Plan:
    if not (root / "train").exists():
        write_source(root, "train")
        write_source(root, "val")
    source = {
        name: {"images": name, "instances": f"{name}.json", "tags": f"{name}_tags.json"} for name in ("train", "val")
    }
    tables = {"name": "p", "steps": steps, "data": {"kind": "coco", "root": root, **source, **(data or {})}}
    return Plan.model_validate(tables | fields)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- instances ---


def test_instances_become_an_id_map_of_the_classes_asked_for(tmp_path: Path) -> None:
    write_source(tmp_path, "train")
    images = read_instances(tmp_path / "train.json", tmp_path / "train")
    assert [image.name for image in images] == ["1.png", "2.png", "3.png"]
    assert images[0].tags == {"cat", "dog"}
    instance_ids, labels = images[0].rasterize(["dog", "cat"])
    expected = """
        11110000
        11110000
        11110000
        00002222
        00002222
        00002222
    """
    np.testing.assert_array_equal(instance_ids, [[int(digit) for digit in row] for row in expected.split()])
    assert instance_ids.dtype == np.int32
    assert labels.tolist() == [1, 0]
    instance_ids, labels = images[0].rasterize(["dog"])
    assert np.unique(instance_ids[3:, 4:]).tolist() == [1]
    assert instance_ids.sum() == 12
    assert labels.tolist() == [0]


@pytest.mark.parametrize("order", [[2, 3], [3, 2]])
def test_smaller_mask_lies_in_front(tmp_path: Path, order: list[int]) -> None:
    boxes = {2: (0, 0, 8, 6), 3: (2, 2, 4, 4)}
    write_source(tmp_path, "train", [annotate(1, category, boxes[category]) for category in order])
    instance_ids, labels = read_instances(tmp_path / "train.json", tmp_path / "train")[0].rasterize(["dog", "tie"])
    tie = labels.tolist().index(1) + 1
    assert (instance_ids[2:4, 2:4] == tie).all()
    assert np.bincount(instance_ids.reshape(-1)).tolist()[tie] == 4
    assert (instance_ids > 0).all()


def test_run_length_codes_are_read(tmp_path: Path) -> None:
    # Column-major runs: the first column is foreground.
    counts = [0, HEIGHT, HEIGHT * (WIDTH - 1)]
    rle = {"size": [HEIGHT, WIDTH], "counts": counts}
    write_source(tmp_path, "train", [annotate(1, 1, (0, 0, 1, 6), segmentation=rle)])
    image = read_instances(tmp_path / "train.json", tmp_path / "train")[0]
    instance_ids, _ = image.rasterize(["cat"])
    assert instance_ids[:, 0].tolist() == [1] * HEIGHT
    assert not instance_ids[:, 1:].any()
    assert not image.has_valid_box  # 1 px wide


def test_crowd_regions_are_neither_instances_nor_tags(tmp_path: Path) -> None:
    crowd = annotate(1, 2, (0, 0, 8, 6), iscrowd=1)
    write_source(tmp_path, "train", [annotate(1, 1, (0, 0, 4, 4)), crowd])
    image = read_instances(tmp_path / "train.json", tmp_path / "train")[0]
    assert image.tags == {"cat"}
    assert image.rasterize(["cat", "dog"])[1].tolist() == [0]


def test_crowds_of_wanted_classes_are_void_behind_all_instances(tmp_path: Path) -> None:
    crowds = [annotate(1, 2, (0, 0, 8, 3), iscrowd=1), annotate(1, 3, (0, 3, 8, 6), iscrowd=1)]
    write_source(tmp_path, "train", [annotate(1, 1, (0, 0, 4, 4)), *crowds])
    image = read_instances(tmp_path / "train.json", tmp_path / "train")[0]
    expected = """
        1111vvvv
        1111vvvv
        1111vvvv
        1111....
        ........
        ........
    """
    number = {"1": 1, "v": VOID_ID, ".": 0}
    instance_ids, labels = image.rasterize(["cat", "dog"])
    np.testing.assert_array_equal(instance_ids, [[number[c] for c in row] for row in expected.split()])
    assert labels.tolist() == [0]


def test_crowds_are_background_in_evaluation(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_source(tmp_path, name, [*ANNOTATIONS, annotate(3, 1, (0, 0, 8, 6), iscrowd=1)])
    sample = load_evaluation_set(make_plan(tmp_path), 1)[2]
    assert sample.labels.tolist() == [0]
    assert np.unique(sample.instance_ids).tolist() == [0, 1]


def test_object_of_one_pixel_is_kept_in_evaluation_and_beside_larger_ones(tmp_path: Path) -> None:
    annotations = [annotate(1, 1, (0, 0, 4, 4)), annotate(1, 2, (6, 2, 7, 3)), annotate(2, 2, (6, 2, 7, 3))]
    for name in ("train", "val"):
        write_source(tmp_path, name, annotations)
    plan = make_plan(tmp_path)
    assert [sample.labels.tolist() for sample in load_evaluation_set(plan, 1)] == [[0, 1], [1], []]
    (picture,) = load_masked_pictures(make_plan(tmp_path, steps=(("cat", "dog"),)), 0)
    instance_ids, _ = picture.rasterize(["cat", "dog"])
    assert np.argwhere(instance_ids == 2).tolist() == [[2, 6]]


def test_images_without_objects_belong_to_the_evaluation_alone(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_source(tmp_path, name, ANNOTATIONS[:1])
    plan = make_plan(tmp_path, steps=(("cat",),))
    assert [picture.name for picture in load_masked_pictures(plan, 0)] == ["1.png"]
    assert [len(sample.labels) for sample in load_evaluation_set(plan, 0)] == [1, 0, 0]


def write_as(path: Path, form: str) -> None:
    """Write a gray image of 8x6 px with a bright pixel at the upper left, in some form."""
    pillow = pytest.importorskip("PIL.Image")
    values = np.full((HEIGHT, WIDTH), 100, np.uint8)
    values[:3, :3] = 250
    if form == "16 bits":
        cv2.imwrite(str(path), values.astype(np.uint16) * 257)
    elif form == "rotated":  # stored lying on its side, to be shown upright
        exif = pillow.Exif()
        exif[0x112] = 6
        pillow.fromarray(np.rot90(values, 1).copy()).save(path, "PNG", exif=exif)
    else:
        pillow.fromarray(values).convert({"gray": "L", "alpha": "RGBA", "palette": "P"}[form]).save(path, "PNG")


@pytest.mark.parametrize("form", ["gray", "16 bits", "alpha", "palette", "rotated"])
def test_images_of_every_form_are_read_upright_as_rgb(tmp_path: Path, form: str) -> None:
    plan = make_plan(tmp_path)
    write_as(tmp_path / "train" / "1.png", form)
    check_sources(plan, 0)
    image = load_masked_pictures(plan, 0)[0].read()
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert abs(int(image[0, 0, 0]) - 250) < 8
    assert abs(int(image[-1, -1, 2]) - 100) < 8


def test_cmyk_images_are_read_as_rgb(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    plan = make_plan(tmp_path)
    for folder in ("train", "val"):
        pillow.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)).save(tmp_path / folder / "1.jpg")
        edit_json(
            tmp_path / f"{folder}.json",
            images=[
                {"id": i, "file_name": "1.jpg" if i == 1 else f"{i}.png", "width": WIDTH, "height": HEIGHT}
                for i in (1, 2, 3)
            ],
        )
    image = load_masked_pictures(plan, 0)[0].read()
    assert image[0, 0, 0] > 200
    assert image[0, 0, 1:].max() < 60


def test_annotation_of_the_image_lying_on_its_side_is_refused(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    plan = make_plan(tmp_path)
    exif = pillow.Exif()
    exif[0x112] = 6
    pillow.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "train" / "1.png", exif=exif)
    with pytest.raises(DataError, match="store it without EXIF rotation"):
        check_sources(plan, 0)


def test_images_without_a_valid_box_are_left_out_of_training_only(tmp_path: Path) -> None:
    annotations = [annotate(1, 1, (0, 0, 4, 4)), annotate(2, 1, (0, 0, 1, 4))]
    for name in ("train", "val"):
        write_source(tmp_path, name, annotations)
    plan = make_plan(tmp_path, steps=(("cat",),))
    assert [picture.name for picture in load_masked_pictures(plan, 0)] == ["1.png"]
    assert [sample.name for sample in load_evaluation_set(plan, 0)] == ["1.png", "2.png", "3.png"]


def test_file_names_may_begin_with_the_folder(tmp_path: Path) -> None:
    write_source(tmp_path, "train")
    (tmp_path / "tags.json").write_text(json.dumps({"train/1.png": ["cat"], "2.png": ["dog"]}))
    images = read_tags(tmp_path / "tags.json", tmp_path / "train")
    assert [image.read()[0, 0, 0] for image in images] == [10, 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 1, "name": "cat"}]}, "annotations.1: there is no category with id 2"),
        ({"annotations": [annotate(9, 1, (0, 0, 2, 2))]}, "annotations.0: there is no image with id 9"),
        ({"images": [{"id": 1, "file_name": "1.png", "height": 6}]}, "images.0.width: Field required"),
        (
            {"images": [{"id": i, "file_name": "1.png", "height": 6, "width": 8} for i in (1, 2, 3)]},
            "file name '1.png' is listed 3 times",
        ),
        (
            {
                "images": [
                    {"id": i, "file_name": n, "height": 6, "width": 8}
                    for i, n in enumerate(("1.png", "./1.png", "2.png"), start=1)
                ]
            },
            "file name '1.png' is listed 2 times",
        ),
        (
            {
                "images": [
                    {"id": i, "file_name": f"{n}.png", "height": 6, "width": 8} for n, i in enumerate((1, 2, 3, 3))
                ]
            },
            "image id 3 is listed 2 times",
        ),
        ({"categories": [{"id": 1, "name": n} for n in ("cat", "dog")]}, "category id 1 is listed 2 times"),
        (
            {"annotations": [annotate(1, 1, (0, 0, 2, 2), id=7) for _ in range(2)]},
            "annotation 7 of image 1 is listed 2 times",
        ),
    ],
)
def test_contradictions_in_instances_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_source(tmp_path, "train")
    edit_json(tmp_path / "train.json", **changes)
    with pytest.raises(DataError) as caught:
        read_instances(tmp_path / "train.json", tmp_path / "train")
    assert f"{tmp_path / 'train.json'}: {message}" in str(caught.value)


def test_at_most_twenty_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    write_source(tmp_path, "train", [annotate(100 + i, 1, (0, 0, 2, 2)) for i in range(3)])
    edit_json(tmp_path / "train.json", annotations=[annotate(100 + i, 1, (0, 0, 2, 2)) for i in range(33)])
    with pytest.raises(DataError) as caught:
        read_instances(tmp_path / "train.json", tmp_path / "train")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 13 more problems"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}'])
def test_what_is_no_coco_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"broken\.json"):
        read_instances(path, tmp_path)


def test_byte_order_mark_is_no_part_of_the_instances(tmp_path: Path) -> None:
    write_source(tmp_path, "train")
    path = tmp_path / "train.json"
    path.write_text(f"\ufeff{path.read_text()}", encoding="utf-8")
    assert len(read_instances(path, tmp_path / "train")) == 3


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        read_instances(tmp_path / "none.json", tmp_path)


# --- tags ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '{"a.png": ["cat", "dog"], "b.png": []}'),
        ("t.csv", "a.png,cat,dog\nb.png\n"),
        ("t.csv", "a.png, cat;dog ,\nb.png,\n\n"),
        ("t.csv", "\ufefffile_name,classes\na.png,cat;dog\nb.png,\n"),
        ("t.CSV", 'Image,class\r\n"a.png","cat","dog"\r\nb.png\r\n'),
    ],
)
def test_tags_are_read_from_json_and_csv(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    images = read_tags(tmp_path / name, tmp_path / "images")
    assert [(image.name, image.tags) for image in images] == [("a.png", {"cat", "dog"}), ("b.png", set())]
    assert images[0].path == tmp_path / "images" / "a.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b'{"a.png": ["cat"], "a.png": ["dog"]}', "file name 'a.png' is listed 2 times"),
        ("t.json", b'{"a.png": "cat"}', "'a.png': expected a list of class names, found 'cat'"),
        ("t.json", b'{"a.png": [1]}', "'a.png': expected a list of class names"),
        ("t.json", b'["a.png"]', "expected one JSON object"),
        ("t.json", b'{"a.png":', "is not valid JSON"),
        ("t.json", b"\xff\xfe", "is not UTF-8 text"),
        ("t.csv", b"a.png,cat\nb.png,dog\na.png,dog\n", "file name 'a.png' is listed 2 times"),
        ("t.csv", b"a.png,cat\n./a.png,dog\n", "file name 'a.png' is listed 2 times"),
        ("t.json", b'{"x/a.png": ["cat"], "x//a.png": ["dog"]}', "file name 'x/a.png' is listed 2 times"),
        ("t.csv", b"file,class\na.png,cat\nb.png;dog\n", "line 'b.png;dog' has no comma; commas are expected"),
        ("t.csv", b"file\tclass\na.png\tcat\n", r"line 'file\tclass' has no comma; commas are expected"),
    ],
)
def test_broken_tags_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_tags(tmp_path / name, tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


# --- a plan's sources ---


def test_evaluation_drops_classes_of_later_steps(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    before, after = load_evaluation_set(plan, 0), load_evaluation_set(plan, 1)
    assert len(before) == len(after) == 3
    assert [sample.labels.tolist() for sample in before] == [[0], [], [0]]
    assert [sample.labels.tolist() for sample in after] == [[0, 1], [1], [0]]
    assert not before[1].instance_ids.any()
    assert before[1].image.shape == (HEIGHT, WIDTH, 3)
    assert [sample.name for sample in after[1:]] == ["2.png", "3.png"]
    assert after[-1].name == "3.png"
    with pytest.raises(IndexError):
        after[3]


def test_evaluation_drops_instances_without_a_visible_pixel(tmp_path: Path) -> None:
    annotations = [annotate(1, 1, (0, 0, 4, 4)), annotate(1, 2, (0, 0, 4, 4)), annotate(1, 1, (5, 0, 8, 3))]
    for name in ("train", "val"):
        write_source(tmp_path, name, annotations)
    sample = load_evaluation_set(make_plan(tmp_path), 1)[0]
    assert sample.labels.tolist() in ([0, 0], [1, 0])
    assert np.unique(sample.instance_ids).tolist() == [0, 1, 2]


def test_evaluation_reads_nothing_before_it_is_asked(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    samples = load_evaluation_set(plan, 1)
    (tmp_path / "val" / "2.png").unlink()
    assert samples[0].name == "1.png"
    with pytest.raises(DataError, match=r"2\.png"):
        samples[1]


def test_drawn_shapes_are_evaluated_alike() -> None:
    data = {"kind": "shapes", "num_val": 12, "num_train": 1}
    plan = Plan.model_validate({"name": "s", "steps": [["disc", "ring"], ["star"]], "data": data})
    base, last = load_evaluation_set(plan, 0), load_evaluation_set(plan, 1)
    assert len(base) == len(last) == 12
    assert {label for sample in base for label in sample.labels.tolist()} == {0, 1}
    assert {label for sample in last for label in sample.labels.tolist()} == {0, 1, 2}
    for first, second in zip(base, last, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(second.instance_ids[first.instance_ids > 0] > 0, True)


def test_whole_sources_pass_the_check_and_are_counted(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert str(check_sources(plan, 0)) == "step 0 learns from masks of 2 of 3 images: cat 2"
    assert str(check_sources(plan, 1)) == "step 1 learns from tags of 2 of 3 images: dog 2"
    shapes = Plan.model_validate({"name": "s", "steps": [["disc"], ["star"]], "data": {"kind": "shapes"}})
    assert str(check_sources(shapes, 1)) == "step 1 learns from tags of 480 of 480 images"


def test_later_step_never_reads_training_masks(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    (tmp_path / "train.json").unlink()
    check_sources(plan, 1)
    assert [picture.tags for picture in load_tagged_pictures(plan, 1)] == [{"cat", "dog"}, {"dog", "tie"}, {"cat"}]
    with pytest.raises(DataError, match=r"train\.json: cannot be read"):
        check_sources(plan, 0)


def test_joint_training_reads_each_source_of_all_steps_once(tmp_path: Path) -> None:
    write_source(tmp_path, "later", [annotate(1, 2, (0, 0, 4, 4))], num_images=1)
    later = {"images": "later", "instances": "later.json"}
    joint = {"recipe": {"method": "joint"}}
    shared = make_plan(tmp_path, **joint)
    assert len(load_masked_pictures(shared, 1)) == 3
    separate = make_plan(tmp_path, data={"steps": {1: later}}, **joint)
    assert [picture.name for picture in load_masked_pictures(separate, 1)] == ["1.png", "2.png", "3.png", "1.png"]
    assert len(load_masked_pictures(separate, 0)) == 3


def damage(root: Path, what: str) -> None:
    image = root / "train" / "1.png"
    if what == "missing":
        image.unlink()
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:-20])
    elif what == "other size":
        cv2.imwrite(str(image), np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    elif what == "mask size":
        rle = {"size": [5, 5], "counts": [0, 5, 20]}
        edit_json(root / "train.json", annotations=[annotate(1, 1, (0, 0, 4, 4), segmentation=rle)])
    elif what == "no mask":
        edit_json(root / "train.json", annotations=[annotate(1, 1, (0, 0, 4, 4), segmentation=None, id=17)])
    elif what == "no folder":
        (root / "train").rename(root / "moved")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "train/1.png: cannot be read"),
        ("truncated", "train/1.png: ends before the image is complete"),
        ("other size", "train/1.png: is 6x8 px (width x height), but annotated as 8x6"),
        ("mask size", "1.png: mask of 'cat': mask of size [5, 5] in an image of size [6, 8]"),
        ("no mask", "1.png: mask of 'cat' (annotation 17): segmentation is neither RLE nor a polygon"),
        ("no folder", "train: is not a folder of images"),
    ],
)
def test_broken_data_is_found_before_training(tmp_path: Path, what: str, message: str) -> None:
    plan = make_plan(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(DataError) as caught:
        check_sources(plan, 0)
    assert message in str(caught.value)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    for file in ("train/1.png", "train/3.png", "val/2.png"):
        (tmp_path / file).unlink()
    with pytest.raises(DataError) as caught:
        check_sources(plan, 0)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / f) for f in ("train/1.png", "train/3.png", "val/2.png")
    ]


@pytest.mark.parametrize(
    ("steps", "step", "message"),
    [
        ((("catt",), ("dog",)), 0, "train.json: class 'catt' of the plan does not occur; did you mean 'cat'?"),
        ((("cat",), ("Dog",)), 1, "train_tags.json: class 'Dog' of the plan does not occur; did you mean 'dog'?"),
        ((("cat",), ("zebra",)), 1, "train_tags.json: class 'zebra' of the plan does not occur; it has: cat, dog, tie"),
        ((("catt",), ("dog",)), 1, "val.json: class 'catt' of the plan does not occur; did you mean 'cat'?"),
    ],
)
def test_class_that_never_occurs_is_named_with_the_nearest(tmp_path: Path, steps: Any, step: int, message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_sources(make_plan(tmp_path, steps), step)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "left_out", "step", "message"),
    [
        ("train", "tags", 1, "step 1 learns from image tags, but its source names no 'tags' file"),
        ("train", "instances", 0, "step 0 learns from masks of cat, but their source names no 'instances' file"),
        ("val", "instances", 0, "evaluation needs masks, but data.val names no 'instances' file"),
    ],
)
def test_missing_kind_of_annotation_is_explained(
    tmp_path: Path, source: str, left_out: str, step: int, message: str
) -> None:
    kept = {"images": source, "instances": f"{source}.json", "tags": f"{source}_tags.json"}
    plan = make_plan(tmp_path, data={source: {key: value for key, value in kept.items() if key != left_out}})
    with pytest.raises(DataError) as caught:
        check_sources(plan, step)
    assert message in str(caught.value)


def test_shape_plans_are_checked_for_names() -> None:
    plan = Plan.model_validate({"name": "s", "steps": [["disk"]], "data": {"kind": "shapes"}})
    with pytest.raises(DataError, match="did you mean 'disc'"):
        check_sources(plan, 0)


def test_a_file_is_read_again_once_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path, "train")
    path, reads = tmp_path / "train.json", []
    real = coco._parse_coco
    monkeypatch.setattr(coco, "_parse_coco", lambda file: reads.append(file) or real(file))
    before = [coco.list_instances(path, tmp_path / "train") for _ in range(2)]
    assert len(reads) == 1
    renamed = coco.list_instances(path, tmp_path / "train", rename={"cat": "kitten"})
    assert "kitten" in renamed.class_names
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    after = coco.list_instances(path, tmp_path / "train")
    assert before[0].pictures[0].class_names
    assert not after.pictures[0].class_names


@pytest.mark.parametrize("written", ["K\u00e4tzchen", "Ka\u0308tzchen"])
@pytest.mark.parametrize("planned", ["K\u00e4tzchen", "Ka\u0308tzchen"])
def test_accents_may_be_one_character_or_two(tmp_path: Path, written: str, planned: str) -> None:
    write_source(tmp_path, "train")
    edit_json(tmp_path / "train.json", categories=[{"id": 1, "name": written}, {"id": 2, "name": "dog"}])
    (tmp_path / "tags.json").write_text(json.dumps({"1.png": [written]}))
    source = {"images": "train", "instances": "train.json", "tags": "tags.json"}
    data = {"kind": "coco", "root": str(tmp_path), "train": source, "val": source}
    plan = Plan.model_validate({"name": "pets", "steps": [["dog"], [planned]], "data": data})
    assert plan.steps[1] == ("K\u00e4tzchen",)
    assert {"K\u00e4tzchen"} < set(coco.list_instances(tmp_path / "train.json", tmp_path / "train").class_names)
    assert load_tagged_pictures(plan, 1)[0].tags == {"K\u00e4tzchen"}
