"""The overlay: size, colors, and pixels that must not change."""

import numpy as np
import pytest

from cl4wsis.instances import Instances
from cl4wsis_serve.draw import _drawable, draw_overlay

NAMES, COLORS = ("red", "blue"), ((200, 0, 0), (0, 0, 200))


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def test_nothing_found_leaves_the_image() -> None:
    np.testing.assert_array_equal(
        draw_overlay(gray(600, 700), Instances.empty(600, 700), NAMES, COLORS), gray(600, 700)
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 128), (384, 512)), ((1, 1), (512, 512)), ((600, 700), (600, 700)), ((300, 400), (300, 400))],
)
def test_small_images_are_scaled_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw_overlay(gray(*size), Instances.empty(*size), NAMES, COLORS).shape[:2] == expected


def test_masks_take_the_color_of_their_class_and_the_rest_stays() -> None:
    ids = np.zeros((600, 600), np.int32)
    ids[100:300, 100:500], ids[350:550, 100:500] = 1, 2
    drawn = draw_overlay(gray(600, 600), Instances.from_ids(ids, [0, 1], [0.9, 0.8]), NAMES, COLORS)
    assert drawn[200, 300, 0] > drawn[200, 300, 2] + 50
    assert drawn[450, 300, 2] > drawn[450, 300, 0] + 50
    assert (drawn[20, 20] == 100).all()
    assert (drawn[320, 590] == 100).all()


def test_instances_of_one_class_differ() -> None:
    ids = np.zeros((600, 600), np.int32)
    ids[:, :300], ids[:, 300:] = 1, 2
    drawn = draw_overlay(gray(600, 600), Instances.from_ids(ids, [0, 0], [0.9, 0.8]), NAMES, COLORS)
    assert np.abs(drawn[500, 150].astype(int) - drawn[500, 450]).max() > 30


def test_label_stands_inside_the_image_even_for_an_object_at_the_edge() -> None:
    ids = np.zeros((600, 600), np.int32)
    ids[:40, 560:] = 1
    drawn = draw_overlay(gray(600, 600), Instances.from_ids(ids, [1], [0.5]), NAMES, COLORS)
    assert (drawn[:40, 500:560] != 100).any()


def test_image_is_not_changed() -> None:
    image, ids = gray(600, 600), np.ones((600, 600), np.int32)
    draw_overlay(image, Instances.from_ids(ids, [0], [1.0]), NAMES, COLORS)
    assert (image == 100).all()


def test_many_instances_in_a_tiny_image() -> None:
    ids = (np.arange(64, dtype=np.int32) + 1).reshape(8, 8)
    drawn = draw_overlay(gray(8, 8), Instances.from_ids(ids, np.arange(64) % 2, np.linspace(0, 1, 64)), NAMES, COLORS)
    assert drawn.shape == (512, 512, 3)


def test_instances_of_another_image_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        draw_overlay(gray(8, 9), Instances.empty(9, 8), NAMES, COLORS)


def test_names_are_drawn_with_the_letters_that_opencv_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    for version, expected in (("4.10.0", "Katzchen"), ("5.0.0", "K\u00e4tzchen")):
        monkeypatch.setattr(cv2, "__version__", version)
        assert _drawable("K\u00e4tzchen") == expected
        assert _drawable("\u732b") == "\u732b"  # without any letter of ASCII there is nothing better
