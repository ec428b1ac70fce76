"""Masks of every COCO form, and damaged ones, which must never reach the library that trusts them."""

from typing import Any

import numpy as np
import pytest
from cases import encoded_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from cl4wsis.masks import mask_from_segmentation

HEIGHT, WIDTH = 3, 4
# Column-major: one pixel of background, five of foreground, six of background.
EXPECTED = """
    .##.
    ##..
    ##..
"""


def grid(text: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in text.split()])


@pytest.mark.parametrize("counts", [[1, 6, 5], "165", b"165"], ids=["list", "text", "bytes"])
def test_run_lengths_are_read_column_by_column(counts: Any) -> None:
    found = mask_from_segmentation({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
    np.testing.assert_array_equal(found, grid(EXPECTED))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_compressed_masks_survive(height: int, width: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    np.testing.assert_array_equal(mask_from_segmentation(encoded_mask(mask), height, width), mask)


def test_large_masks_with_long_runs_survive() -> None:
    mask = np.zeros((900, 1200), bool)
    mask[:, 500:] = True
    np.testing.assert_array_equal(mask_from_segmentation(encoded_mask(mask), 900, 1200), mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [1, 6, 6]}, "do not add up to the 12 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 6]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, -6, 17]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5, 10.5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "166"}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "ooooooooo"}, "text of the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "16P"}, "text of the RLE is damaged"),  # another group should follow
        ({"size": [HEIGHT, WIDTH], "counts": "1 5"}, "text of the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "1\u00e95"}, "do not add up|damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "text of the RLE is damaged"),
        ({"size": [WIDTH, HEIGHT], "counts": [1, 6, 5]}, r"mask of size \[4, 3\] in an image of size \[3, 4\]"),
        ({"counts": [1, 6, 5]}, "mask of size None"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "polygon has a point more than 40 px away"),
        ([[0, 0, -(2**63), 0, 2, 2]], "polygon has a point more than 40 px away"),
        ([[0, 0, float("nan"), 0, 2, 2]], "polygon has a point that is not finite"),
        ([[0, 0, 2, 0, 2, 2, 1]], "polygon has 7 numbers; give every point both x and y"),
        ([[0, 0, 2, 0, 2, 2], [1, 1, 2]], "polygon has 3 numbers"),
        ([0, 0, 2, 0, 2, 2], "segmentation holds 0 where a polygon is expected; write lists of numbers"),
        ([[[0, 0], [2, 0], [2, 2]]], r"segmentation holds \[\[0, 0\], \[2, 0\], \[2, 2\]\] where a polygon"),
        ([["0", "0", "2", "0", "2", "2"]], "segmentation holds .* where a polygon is expected"),
        ([None], "segmentation holds None where a polygon is expected"),
        ([[0, 0, 2, 2]], "neither RLE nor a polygon of three points"),
        ([], "neither RLE nor a polygon"),
        (None, "neither RLE nor a polygon"),
    ],
)
def test_damaged_masks_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_from_segmentation(segmentation, HEIGHT, WIDTH)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=12))
@settings(max_examples=300, deadline=None)
def test_arbitrary_text_gives_a_mask_or_an_error(counts: str) -> None:
    try:
        mask = mask_from_segmentation({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
    except ValueError:
        return
    assert mask.shape == (HEIGHT, WIDTH)
