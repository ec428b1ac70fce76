"""Mask proposals: reading, contradictions, and the map in which the smaller lies in front."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import encoded_mask

from cl4wsis.errors import DataError
from cl4wsis.masks import mask_from_segmentation
from cl4wsis.proposals import Proposals, proposal_file, read_proposals

HEIGHT, WIDTH = 5, 8


def mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[top:bottom, left:right] = True
    return drawn


def masks_of(proposals: Proposals) -> list[np.ndarray]:
    return [mask_from_segmentation(rle, HEIGHT, WIDTH) for rle in proposals.rles]


def write(folder: Path, name: str, *proposals: tuple[np.ndarray, float]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rles = [encoded_mask(drawn) for drawn, _ in proposals]
    scores = [score for _, score in proposals]
    path.write_text(json.dumps([{"segmentation": r, "score": s} for r, s in zip(rles, scores, strict=True)]))


@pytest.mark.parametrize("large_first", [True, False])
def test_smaller_proposal_lies_in_front(tmp_path: Path, large_first: bool) -> None:
    pair = [(mask(0, 0, 6, 4), 0.5), (mask(4, 1, 7, 3), 0.9)]
    write(tmp_path, "a.json", *(pair if large_first else pair[::-1]))
    proposals = read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)
    large, small = (1, 2) if large_first else (2, 1)
    expected = """
        LLLLLL..
        LLLLSSS.
        LLLLSSS.
        LLLLLL..
        ........
    """
    number = {"L": large, "S": small, ".": 0}
    np.testing.assert_array_equal(proposals.id_map(), [[number[c] for c in row] for row in expected.split()])
    assert proposals.id_map().dtype == np.int32
    np.testing.assert_allclose(proposals.scores, [0.5, 0.9] if large_first else [0.9, 0.5])


def test_of_equal_proposals_the_better_one_shows(tmp_path: Path) -> None:
    write(tmp_path, "a.json", (mask(0, 0, 2, 2), 0.4), (mask(0, 0, 2, 2), 0.8), (mask(0, 0, 2, 2), 0.8))
    assert set(read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH).id_map().flat) == {0, 2}


def test_masks_keep_their_overlaps(tmp_path: Path) -> None:
    drawn = [mask(0, 0, 6, 4), mask(4, 1, 7, 3)]
    write(tmp_path, "a.json", *((m, 1.0) for m in drawn))
    np.testing.assert_array_equal(masks_of(read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)), drawn)


def test_nothing_proposed_is_an_empty_map(tmp_path: Path) -> None:
    write(tmp_path, "a.json")
    proposals = read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)
    assert len(proposals) == 0
    assert not proposals.id_map().any()


def test_a_byte_order_mark_may_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[]")
    assert len(read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)) == 0


def test_polygons_counts_and_scores_of_other_tools_are_read(tmp_path: Path) -> None:
    counts = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, HEIGHT * (WIDTH - 1)]}
    found = [
        {"segmentation": counts, "predicted_iou": 0.25, "area": 5, "stability_score": 1},
        {"segmentation": [[3, 0, 6, 0, 6, 2, 3, 2]], "score": 0.5, "predicted_iou": 0.1},
    ]
    (tmp_path / "a.json").write_text(json.dumps(found))
    proposals = read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)
    np.testing.assert_array_equal(masks_of(proposals), [mask(0, 0, 1, HEIGHT), mask(3, 0, 6, 2)])
    np.testing.assert_allclose(proposals.scores, [0.25, 0.5])


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("a.jpg", "a.json", "a.json"),
        ("train/a.b.jpg", "train/a.b.json", "train/a.b.json"),
        ("train/a.jpg", "a.json", "a.json"),
        ("step-1/00000", "step-1/00000.json", "step-1/00000.json"),
        ("train/a.jpg", "other.json", "train/a.json"),
    ],
)
def test_file_is_found_by_the_name_of_the_image(tmp_path: Path, name: str, written: str, expected: str) -> None:
    write(tmp_path, written)
    assert proposal_file(tmp_path, name) == tmp_path / expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"segmentation": []}, "should be a valid (list|array)"),
        ([{"score": 1.0}], r"0\.segmentation: Field required"),
        ([{"segmentation": []}], r"0\.score: Field required"),
        ([{"segmentation": [], "score": 1.0}], "proposal 0: segmentation is neither RLE nor a polygon"),
        ([{"segmentation": {"size": [9, 9], "counts": [81]}, "score": 1}], r"proposal 0: mask of size \[9, 9\]"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_missing_file_says_how_to_propose_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json: cannot be read: .*needs a file with \[\]"):
        read_proposals(tmp_path, "a.jpg", HEIGHT, WIDTH)
