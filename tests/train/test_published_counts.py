"""The numbers of images per step that the protocols give on VOC 2012 ``train_aug`` (10,582 images).

The tags of single images are not needed for them. How many images hold classes of which of the groups 1-10, 11-15 and
16-20 follows from the published numbers of overlap images, and so do the images that hold several classes of 16-20; the
number of images that hold all three groups is free, and drops out. The tests therefore build a label matrix with these
numbers and the published number of images per class, and count with the selection rules of the loaders.
"""

from functools import cache

import numpy as np
import pytest

from cl4wsis.datasets import VOC_CLASSES, build_step_view
from cl4wsis.tasks import load_plan

NUM_IMAGES = 10_582
PER_CLASS = (586, 486, 698, 461, 654, 385, 1086, 1000, 1081, 264, 528, 1177, 444, 482, 3898, 487, 299, 491, 500, 548)

# Images by the groups of classes they hold: first 1-10, second 11-15, third 16-20.
_ALL_THREE = 100  # free
GROUPS = {
    (1, 0, 0): 3706,
    (1, 1, 0): 2113 - _ALL_THREE,
    (1, 0, 1): 320,
    (1, 1, 1): _ALL_THREE,
    (0, 1, 1): 811 - _ALL_THREE,
    (0, 1, 0): 2618 + _ALL_THREE,
    (0, 0, 1): 1014,
}
# Images that hold a class of 16-20 by the set of these they hold; the first 1131 hold earlier classes as well.
THIRD_GROUP = (
    *([(16, 20)] * 109 + [(18, 20)] * 71 + [(20,)] * 196 + [(16,)] * 378 + [(17,)] * 299 + [(18,)] * 78),
    *([(18,)] * 342 + [(19,)] * 500 + [(20,)] * 172),
)


@cache
def label_matrix() -> np.ndarray:
    """Return (10582, 20) bool."""
    held = np.array([groups for groups, count in GROUPS.items() for _ in range(count)], dtype=bool)
    labels = np.zeros((len(held), 20), bool)
    for group, (first, last) in enumerate(((1, 10), (11, 15))):
        rows = np.flatnonzero(held[:, group])
        classes = np.repeat(np.arange(first, last + 1), PER_CLASS[first - 1 : last])
        labels[rows[np.arange(len(classes)) % len(rows)], classes - 1] = True
    with_earlier = np.flatnonzero(held[:, 2] & held[:, :2].any(axis=1))
    alone = np.flatnonzero(held[:, 2] & ~held[:, :2].any(axis=1))
    for row, classes_held in zip([*with_earlier, *alone], THIRD_GROUP, strict=True):
        labels[row, np.array(classes_held) - 1] = True
    return labels


@cache
def tag_sets() -> list[frozenset[str]]:
    return [frozenset(VOC_CLASSES[i] for i in np.flatnonzero(row)) for row in label_matrix()]


def count(plan_name: str, step: int) -> int:
    plan = load_plan(plan_name)
    view = build_step_view(plan, step, "base" if step == 0 else "semantic")
    return sum(view.selects(tags) for tags in tag_sets())


def test_matrix_has_the_published_images_per_class() -> None:
    labels = label_matrix()
    assert labels.shape == (NUM_IMAGES, 20)
    assert labels.sum(axis=0).tolist() == list(PER_CLASS)
    assert labels.any(axis=1).all()
    assert labels.sum() / NUM_IMAGES == pytest.approx(1.47, abs=0.005)


@pytest.mark.parametrize(
    ("task", "step", "overlap", "disjoint"),
    [
        ("15-5", 0, 9568, 8437),
        ("15-5", 1, 2145, 2145),
        ("10-10", 0, 6139, 3706),
        ("10-10", 1, 6876, 6876),
        ("10-5-5", 0, 6139, 3706),
        ("10-5-5", 1, 5542, 4731),
        ("10-5-5", 2, 2145, 2145),
        ("15-1", 1, 487, 378),
        ("15-1", 2, 299, 299),
        ("15-1", 3, 491, 420),
        ("15-1", 4, 500, 500),
        ("15-1", 5, 548, 548),
        ("19-1", 0, 10410, 10034),
        ("19-1", 1, 548, 548),
        ("joint", 0, 10582, 10582),
    ],
)
def test_steps_have_the_published_number_of_images(task: str, step: int, overlap: int, disjoint: int) -> None:
    assert count(f"voc/{task}", step) == overlap
    if task != "joint":
        assert count(f"voc/{task}-disjoint", step) == disjoint


@pytest.mark.parametrize(
    ("task", "step", "with_old", "with_later"),
    [
        ("15-5", 0, 0, 1131),
        ("15-5", 1, 1131, 0),
        ("10-10", 0, 0, 2433),
        ("10-10", 1, 2433, 0),
        ("10-5-5", 1, 2113, 811),
        ("10-5-5", 2, 1131, 0),
    ],
)
def test_overlap_images_hold_the_published_number_of_other_classes(
    task: str, step: int, with_old: int, with_later: int
) -> None:
    plan = load_plan(f"voc/{task}")
    split = plan.split(step)
    view = build_step_view(plan, step, "base" if step == 0 else "semantic")
    chosen = [tags for tags in tag_sets() if view.selects(tags)]
    later = set(plan.class_names) - set(split.seen_names)
    assert sum(not tags.isdisjoint(split.old_names) for tags in chosen) == with_old
    assert sum(not tags.isdisjoint(later) for tags in chosen) == with_later


def test_all_images_belong_to_the_voc_step_of_coco_to_voc() -> None:
    plan = load_plan("coco_voc/coco-voc")
    rename = plan.data.steps[1].rename  # type: ignore[union-attr]
    view = build_step_view(plan, 1, "semantic")
    assert sum(view.selects(frozenset(rename.get(tag, tag) for tag in tags)) for tags in tag_sets()) == NUM_IMAGES


def test_base_images_of_coco_to_voc_are_free_of_voc_classes() -> None:
    view = build_step_view(load_plan("coco_voc/coco-voc"), 0, "base")
    table = {"truck": True, "truck car": False, "car": False, "clock toothbrush": True, "": False, "tv clock": False}
    assert {text: view.selects(frozenset(text.split())) for text in table} == table
