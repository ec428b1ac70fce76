"""Fitting and the way back: inverse pairs, sizes that do not divide, and instances that vanish."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl4wsis.geometry import FitTransform, fit_image, restore_instances
from cl4wsis.instances import Instances
from cl4wsis.preprocess import pad_color, prepare_batch, prepare_image
from cl4wsis.steps import InputRule

SIDES = st.integers(1, 90)
SIZES = st.tuples(SIDES, SIDES)


def random_ids(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 6, size).astype(np.int32)


@pytest.mark.parametrize(
    ("source", "frame", "content"),
    [
        ((100, 200), (100, 200), (100, 200)),
        ((100, 200), (64, 64), (32, 64)),
        ((200, 100), (64, 64), (64, 32)),
        ((10, 20), (64, 64), (32, 64)),
        ((1, 1000), (64, 64), (1, 64)),
        ((33, 50), (32, 64), (32, 48)),
    ],
)
def test_image_just_fits_with_its_aspect(
    source: tuple[int, int], frame: tuple[int, int], content: tuple[int, int]
) -> None:
    assert FitTransform.fit(source, frame).content_size == content


@pytest.mark.parametrize(("source", "frame"), [((0, 5), (8, 8)), ((5, 5), (8, 0))])
def test_sizes_must_be_positive(source: tuple[int, int], frame: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        FitTransform.fit(source, frame)


@given(SIZES, SIZES)
def test_content_touches_the_frame_and_never_leaves_it(source: tuple[int, int], frame: tuple[int, int]) -> None:
    height, width = FitTransform.fit(source, frame).content_size
    assert 1 <= height <= frame[0]
    assert 1 <= width <= frame[1]
    assert height == frame[0] or width == frame[1]


@given(SIZES, st.integers(1, 5))
def test_ids_come_back_exactly_from_a_larger_frame(source: tuple[int, int], seed: int) -> None:
    transform = FitTransform.fit(source, (96, 96))
    ids = random_ids(source, seed)
    np.testing.assert_array_equal(transform.restore_ids(transform.fit_ids(ids)), ids)


@given(SIZES, SIZES)
def test_restored_ids_are_those_under_each_pixel_center(source: tuple[int, int], frame: tuple[int, int]) -> None:
    transform = FitTransform.fit(source, frame)
    ids = np.arange(frame[0] * frame[1]).reshape(frame)
    rows, columns = np.indices(source)
    centers = np.stack([rows.ravel(), columns.ravel()], 1)
    nearest = np.floor((centers + 0.5) * transform.scale + 1e-9).astype(int)
    np.testing.assert_array_equal(transform.restore_ids(ids).ravel(), ids[nearest[:, 0], nearest[:, 1]])


def test_image_of_the_frame_size_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    fitted, _ = fit_image(image, (20, 30), (1, 2, 3))
    np.testing.assert_array_equal(fitted, image)


@pytest.mark.parametrize("size", [(8, 16), (40, 80)])
def test_padding_is_right_and_below(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 200, np.uint8)
    fitted, _ = fit_image(image, (32, 32), (10, 20, 30))
    assert (fitted[:16] == 200).all()
    assert (fitted[16:] == (10, 20, 30)).all()


def test_image_content_lies_where_ids_say() -> None:
    ids = np.zeros((40, 60), np.uint8)
    ids[10:30, 15:45] = 1
    image = np.repeat(ids[..., None] * 255, 3, axis=2).astype(np.uint8)
    for frame in ((20, 32), (128, 128)):
        fitted, transform = fit_image(image, frame, (0, 0, 0))
        disagree = (fitted[..., 0] > 127) != (transform.fit_ids(ids) > 0)
        assert disagree.sum() <= 2 * sum(transform.content_size)


def test_arrays_of_another_size_are_refused() -> None:
    transform = FitTransform.fit((20, 30), (32, 32))
    with pytest.raises(ValueError, match=r"image must be of size \(20, 30\)"):
        transform.fit_image(np.zeros((30, 20, 3), np.uint8), (0, 0, 0))
    with pytest.raises(ValueError, match=r"id map must be of size \(32, 32\)"):
        transform.restore_ids(np.zeros((20, 30), np.int32))


def test_restored_instances_keep_rows_and_get_new_boxes() -> None:
    ids = np.zeros((4, 4), np.int32)
    ids[0:2, 0:2], ids[2:4, 2:4] = 1, 2
    restored = restore_instances(Instances.from_ids(ids, [5, 7], [0.5, 0.25]), FitTransform.fit((8, 8), (4, 4)))
    np.testing.assert_array_equal(restored.labels, [5, 7])
    np.testing.assert_array_equal(restored.scores, np.float32([0.5, 0.25]))
    np.testing.assert_array_equal(restored.boxes, [[0, 0, 4, 4], [4, 4, 8, 8]])


def test_instances_without_a_source_pixel_are_dropped() -> None:
    ids = np.zeros((8, 8), np.int32)
    ids[0, 0] = 1  # lies between two source pixels
    ids[0:4, 4:8] = 2
    ids[6, 2] = 3  # padding
    restored = restore_instances(Instances.from_ids(ids, [0, 1, 2], [0.9, 0.8, 0.7]), FitTransform.fit((2, 4), (8, 8)))
    np.testing.assert_array_equal(restored.labels, [1])
    np.testing.assert_array_equal(restored.instance_ids, [[0, 0, 1, 1], [0, 0, 1, 1]])


def test_what_the_image_shows_of_an_instance_counts_towards_its_area() -> None:
    ids = np.zeros((8, 8), np.int32)
    ids[3:8, 0:2] = 1  # 2 pixels in the image, 8 in the padding
    ids[2:8, 4:8] = 2  # 8 and 16
    found, fitted = Instances.from_ids(ids, [0, 1], [0.9, 0.8]), FitTransform.fit((8, 16), (8, 8))
    np.testing.assert_array_equal(restore_instances(found, fitted).labels, [0, 1])
    np.testing.assert_array_equal(restore_instances(found, fitted, min_area=2).labels, [0, 1])
    restored = restore_instances(found, fitted, min_area=3)
    np.testing.assert_array_equal(restored.labels, [1])
    np.testing.assert_array_equal(restored.boxes, [[8, 4, 16, 8]])
    np.testing.assert_array_equal(
        restore_instances(found, FitTransform.fit((8, 8), (8, 8)), min_area=99).labels, [0, 1]
    )


RULE = InputRule(size=(32, 64), mean=(123.675, 116.28, 103.53), std=(58.4, 57.1, 57.4))


def test_pad_color_is_the_rounded_mean() -> None:
    assert pad_color(RULE.mean) == (124, 116, 104)


def test_batch_is_what_single_images_give() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((10, 20), (100, 50), (32, 64))]
    batch, transforms = prepare_batch(images, RULE)
    assert batch.shape == (3, 32, 64, 3)
    for image, frame, transform in zip(images, batch, transforms, strict=True):
        single, expected = prepare_image(image, RULE)
        np.testing.assert_array_equal(frame, single)
        assert transform == expected


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_that_are_no_image_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image must be"):
        prepare_image(image, RULE)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        prepare_batch([], RULE)
