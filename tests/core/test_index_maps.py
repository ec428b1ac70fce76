"""PNG files of numbers: what counts is the number of a pixel, never the color its palette gives it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from layouts import index_png

from cl4wsis.errors import DataError
from cl4wsis.images import read_index_map


@pytest.mark.parametrize("palette", [True, False], ids=["palette", "grayscale"])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_numbers_of_every_bit_depth_are_read(tmp_path: Path, depth: int, palette: bool) -> None:
    values = np.random.default_rng(depth).integers(0, 2**depth, (7, 13), dtype=np.uint8)
    values.flat[:2] = 0, 2**depth - 1
    (tmp_path / "a.png").write_bytes(index_png(values, depth, palette))
    found = read_index_map(tmp_path / "a.png")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.uint8


def test_palette_files_of_other_writers_are_read(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = pillow.fromarray(values).convert("P")
    image.putpalette([index // 2 for index in range(256) for _ in range(3)])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_index_map(tmp_path / "a.png"), values)


def test_sixteen_bit_numbers_are_read(tmp_path: Path) -> None:
    values = np.array([[0, 1, 70, 60000]], np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    found = read_index_map(tmp_path / "a.png")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.uint16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes(), "holds colors; expected are numbers"),
        (index_png(np.arange(64, dtype=np.uint8).reshape(8, 8))[:-20], "ends before the image is complete"),
        (cv2.imencode(".jpg", np.zeros((4, 4), np.uint8))[1].tobytes(), "is not a PNG"),
        (b"", "is not a PNG"),
    ],
    ids=["color", "truncated", "JPEG", "empty"],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_index_map(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: cannot be read: No such file"):
        read_index_map(tmp_path / "a.png")
