"""Coarse maps read on a finer grid: the same values as a map that was enlarged as a whole."""

import cv2
import numpy as np
import pytest

from cl4wsis.enlarge import EnlargedMap, classify_enlarged, enlarged_argmax


def coarse_map(seed: int, channels: int = 4, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (channels, height, width)).astype(np.float32)


def whole(values: np.ndarray, scale: int) -> np.ndarray:
    size = (values.shape[2] * scale, values.shape[1] * scale)
    return np.stack([cv2.resize(channel, size, interpolation=cv2.INTER_LINEAR) for channel in values])


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 16])
def test_every_crop_is_a_part_of_the_whole(scale: int) -> None:
    values = coarse_map(0)
    expected, view = whole(values, scale), EnlargedMap(values, scale)
    np.testing.assert_allclose(view.full(), expected, atol=1e-5)
    generator = np.random.default_rng(1)
    for _ in range(30):
        top, left = generator.integers(0, 5 * scale), generator.integers(0, 7 * scale)
        bottom, right = generator.integers(top + 1, 5 * scale + 1), generator.integers(left + 1, 7 * scale + 1)
        box = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        np.testing.assert_allclose(view.crop(2, box), expected[2][box], atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8, 16])
def test_values_beyond_the_outermost_coarse_pixels_are_exactly_equal(scale: int) -> None:
    """Of equal peaks the last one is the center; a rounding error among them would choose another one."""
    fine = EnlargedMap(coarse_map(3, height=16, width=24), scale).full()
    rim = (scale + 1) // 2
    for side in (fine, fine.transpose(0, 2, 1)):
        for strip in (side[:, :rim], side[:, -rim:]):
            np.testing.assert_array_equal(strip, np.broadcast_to(strip[:, :1], strip.shape))


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5, 8, 16])
def test_classes_and_probabilities_are_those_of_the_whole(scale: int) -> None:
    logits = coarse_map(2)
    fine = whole(logits, scale)
    classes, probs = classify_enlarged(logits, scale)
    assert (classes == fine.argmax(axis=0)).mean() > 0.999
    exponentials = np.exp(fine - fine.max(axis=0))
    foreground = fine.argmax(axis=0) > 0
    np.testing.assert_allclose(probs[foreground], (1 / exponentials.sum(axis=0))[foreground], atol=1e-6)
    assert (enlarged_argmax(logits, scale) == classes).mean() > 0.999


def test_background_needs_no_probabilities() -> None:
    logits = np.zeros((2, 4, 4), np.float32)
    logits[0] = 1
    classes, probs = classify_enlarged(logits, 16)
    assert not classes.any()
    assert not probs.any()


def test_large_logits_give_finite_probabilities() -> None:
    logits = np.zeros((3, 2, 2), np.float32)
    logits[1] = [[1e4, -1e4], [1e4, 3e4]]
    probs = classify_enlarged(logits, 8)[1]
    assert np.isfinite(probs).all()
    assert probs.max() == 1


@pytest.mark.parametrize("scale", [1, 4])
def test_nothing_exceeds_the_threshold_outside_its_box(scale: int) -> None:
    values = np.zeros((2, 9, 9), np.float32)
    values[1, 4, 0] = 1
    view = EnlargedMap(values, scale)
    assert view.box_above(0, 0.1) is None
    box = view.box_above(1, 0.1)
    fine = whole(values, scale)[1]
    assert (fine > 0.1).sum() == (fine[box] > 0.1).sum() > 0
    assert fine[box].size < fine.size / 3
