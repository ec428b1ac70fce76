from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from cl4wsis.errors import DataError
from cl4wsis.shapes import (
    SHAPE_NAMES,
    DrawnPicture,
    check_shape_names,
    draw_evaluation_picture,
    draw_picture,
    draw_training_picture,
)
from cl4wsis.tasks import Plan, ShapesData

STEPS = (("disc", "square", "triangle"), ("star", "ring"), ("cross", "crescent", "heart"))


def make_plan(selection: str = "overlap", **data: int) -> tuple[Plan, ShapesData]:
    shapes = ShapesData.model_validate(data)
    return Plan.model_validate({"name": "p", "steps": STEPS, "selection": selection, "data": shapes}), shapes


def draw_alone(name: str, seed: int, size: int = 128) -> DrawnPicture:
    return draw_picture(np.random.default_rng(seed), [name], size)


def pixels_of(pictures: Sequence[DrawnPicture]) -> list[bytes]:
    return [picture.image.tobytes() for picture in pictures]


@pytest.mark.parametrize("size", [64, 128, 200])
def test_ids_tags_and_names_agree(size: int) -> None:
    plan, data = make_plan(image_size=size)
    for index in range(24):
        picture = draw_evaluation_picture(plan, data, index)
        assert picture.image.shape == (size, size, 3)
        assert picture.image.dtype == np.uint8
        assert picture.instance_ids.dtype == np.int32
        assert np.unique(picture.instance_ids).tolist() == list(range(len(picture.class_names) + 1))
        assert picture.tags == set(picture.class_names)
        areas = np.bincount(picture.instance_ids.reshape(-1))[1:]
        assert areas.min() >= 120 * (size / 128) ** 2


def test_rasterize_keeps_only_the_classes_asked_for() -> None:
    rng = np.random.default_rng(1)
    picture = draw_picture(rng, ["ring", "disc", "ring"], 160)
    assert picture.class_names == ("ring", "disc", "ring")
    instance_ids, labels = picture.rasterize(["disc", "ring"])
    np.testing.assert_array_equal(instance_ids, picture.instance_ids)
    assert labels.tolist() == [1, 0, 1]
    instance_ids, labels = picture.rasterize(["ring"])
    assert labels.tolist() == [0, 0]
    np.testing.assert_array_equal(instance_ids == 1, picture.instance_ids == 1)
    np.testing.assert_array_equal(instance_ids == 2, picture.instance_ids == 3)
    instance_ids, labels = picture.rasterize(["heart"])
    assert not instance_ids.any()
    assert labels.shape == (0,)


def test_same_seed_draws_the_same_and_every_set_differs() -> None:
    plan, data = make_plan()
    first = [draw_training_picture(plan, data, 0, index) for index in range(6)]
    again = [draw_training_picture(plan, data, 0, index) for index in range(6)]
    assert pixels_of(first) == pixels_of(again)
    other_step = [draw_training_picture(plan, data, 1, index) for index in range(6)]
    evaluation = [draw_evaluation_picture(plan, data, index) for index in range(6)]
    reseeded, reseeded_data = make_plan(seed=8)
    other_seed = [draw_training_picture(reseeded, reseeded_data, 0, index) for index in range(6)]
    everything = pixels_of([*first, *other_step, *evaluation, *other_seed])
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_training_pictures_show_their_step_and_under_overlap_all_others(step: int) -> None:
    plan, data = make_plan()
    tags = [draw_training_picture(plan, data, step, index).tags for index in range(80)]
    assert all(picture_tags & set(STEPS[step]) for picture_tags in tags)
    assert set().union(*tags) == set(plan.class_names)


def test_disjoint_pictures_show_no_future_class() -> None:
    plan, data = make_plan("disjoint")
    tags = set().union(*(draw_training_picture(plan, data, 1, index).tags for index in range(80)))
    assert tags == set(STEPS[0] + STEPS[1])


def test_evaluation_pictures_hold_all_classes_evenly() -> None:
    plan, data = make_plan()
    counts = Counter(name for index in range(160) for name in draw_evaluation_picture(plan, data, index).tags)
    assert set(counts) == set(SHAPE_NAMES)
    assert min(counts.values()) >= 20  # each is the subject of 20
    assert max(counts.values()) < 2.2 * min(counts.values())


def test_some_pictures_hold_touching_instances_of_one_class() -> None:
    plan, data = make_plan()
    touching = 0
    for index in range(60):
        picture = draw_evaluation_picture(plan, data, index)
        ids = picture.instance_ids
        neighbours = np.stack([ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1)])
        left, right = neighbours[:, (neighbours > 0).all(axis=0) & (neighbours[0] != neighbours[1])]
        names = picture.class_names
        touching += any(names[a - 1] == names[b - 1] for a, b in zip(left, right, strict=True))
    assert touching >= 5


@pytest.mark.parametrize(
    ("name", "fill"),
    # least and largest share of the circle around the object; aspect and turning move it
    [
        ("disc", (0.65, 1.0)),
        ("square", (0.43, 0.70)),
        ("triangle", (0.29, 0.48)),
        ("star", (0.25, 0.45)),
        ("ring", (0.47, 0.75)),
        ("cross", (0.41, 0.66)),
        ("crescent", (0.19, 0.36)),
        ("heart", (0.43, 0.67)),
    ],
)
def test_outlines_fill_what_they_should(name: str, fill: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(12):
        mask = draw_picture(rng, [name], 128).instance_ids > 0
        points = np.argwhere(mask)
        if min(points.min(), 127 - points.max()) == 0:
            continue  # cut off by the border
        radius = np.linalg.norm(points - points.mean(axis=0), axis=1).max() + 0.5
        shares.append(mask.sum() / (np.pi * radius**2))
    assert shares
    assert fill[0] < min(shares)
    assert max(shares) < fill[1]


def test_a_ring_has_a_hole_and_a_disc_has_none() -> None:
    def center_is_inside(name: str, seed: int) -> bool:
        ids = draw_alone(name, seed).instance_ids
        y, x = np.argwhere(ids).mean(axis=0).astype(int)
        return bool(ids[y, x])

    assert not any(center_is_inside("ring", seed) for seed in range(8))
    assert all(center_is_inside("disc", seed) for seed in range(8))


def test_color_does_not_tell_the_class() -> None:
    def mean_colors(name: str) -> np.ndarray:
        pictures = [draw_alone(name, seed) for seed in range(60)]
        return np.array([picture.image[picture.instance_ids > 0].mean(axis=0) for picture in pictures])

    discs, hearts = mean_colors("disc"), mean_colors("heart")
    standard_error = np.sqrt(discs.var(axis=0) / len(discs) + hearts.var(axis=0) / len(hearts))
    assert (discs.std(axis=0) > 40).all()
    assert (np.abs(discs.mean(axis=0) - hearts.mean(axis=0)) < 3 * standard_error).all()


def test_an_object_differs_from_what_is_around_it() -> None:
    for seed in range(20):
        picture = draw_alone("square", seed)
        inside = picture.image[picture.instance_ids > 0].mean(axis=0)
        outside = picture.image[picture.instance_ids == 0].mean(axis=0)
        assert np.linalg.norm(inside - outside) > 20


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["disc", "tringle"], "no drawn shape is called 'tringle'; did you mean 'triangle'?"),
        (["zebra"], "shapes are: disc, square"),
    ],
)
def test_unknown_shape_is_named_with_the_nearest(names: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_shape_names(names)
    assert message in str(caught.value)
    with pytest.raises(DataError):
        draw_picture(np.random.default_rng(0), names, 128)
