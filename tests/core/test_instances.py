import json

import numpy as np
import pytest
from cases import encoded_mask
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cl4wsis.instances import Instances, boxes_from_ids
from cl4wsis.masks import mask_from_segmentation, rle_from_ids

ID_MAPS = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4))


def grid(*rows):
    return np.array([[int(digit) for digit in line] for line in rows], np.int32)


EXAMPLE = Instances.from_ids(grid("0110", "0112", "0002"), [4, 1], [0.5, 0.25])


def test_boxes_end_behind_the_last_pixel():
    assert EXAMPLE.boxes.tolist() == [[1, 0, 3, 2], [3, 1, 4, 3]]
    assert EXAMPLE.boxes.dtype == np.float32
    assert EXAMPLE.areas.tolist() == [4, 2]


def test_id_without_pixels_has_a_zero_box_and_area():
    found = Instances.from_ids(grid("20", "20"), [0, 0, 0], [1, 1, 1])
    assert found.boxes.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert found.areas.tolist() == [0, 2, 0]


@given(ID_MAPS)
def test_boxes_are_the_extent_of_each_mask(ids):
    for index, box in enumerate(boxes_from_ids(ids, 4).astype(int).tolist(), start=1):
        rows, columns = np.nonzero(ids == index)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box == expected


def test_empty():
    empty = Instances.empty(3, 5)
    assert len(empty) == 0
    assert empty.masks().shape == (0, 3, 5)
    assert empty.boxes.shape == (0, 4)
    assert empty.to_coco() == []


@given(ID_MAPS)
def test_masks_and_ids_are_inverse(ids):
    masks = Instances.from_ids(ids, [0] * 4, [0.0] * 4).masks()
    assert masks.dtype == np.bool_
    assert masks.sum(axis=0).max(initial=0) <= 1
    np.testing.assert_array_equal((masks * np.arange(1, 5)[:, None, None]).sum(axis=0), ids)


@pytest.mark.parametrize(
    ("keep", "ids", "labels"),
    [
        (np.array([False, True]), grid("0000", "0001", "0001"), [1]),
        (np.array([1, 0]), grid("0220", "0221", "0001"), [1, 4]),
        (np.array([], np.int64), grid("0000", "0000", "0000"), []),
        (np.array([False, False]), grid("0000", "0000", "0000"), []),
        (np.array([-1]), grid("0000", "0001", "0001"), [1]),
        (np.array([-1, -2]), grid("0220", "0221", "0001"), [1, 4]),
        (np.array([]), grid("0000", "0000", "0000"), []),
    ],
)
def test_select_renumbers_the_map(keep, ids, labels):
    found = EXAMPLE.select(keep)
    np.testing.assert_array_equal(found.instance_ids, ids)
    assert found.labels.tolist() == labels
    np.testing.assert_array_equal(found.boxes, boxes_from_ids(ids, len(labels)))


@pytest.mark.parametrize("keep", [[2], [-3], [0, 5], [True], [True, False, True]])
def test_select_refuses_instances_that_are_not_there(keep):
    with pytest.raises(ValueError, match=r"cannot select from 2 instances: .*(out of bounds|did not match)"):
        EXAMPLE.select(np.array(keep))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": np.zeros(3, np.float32)}, r"scores must have shape \(2,\) to match labels, found \(3,\)"),
        ({"boxes": np.zeros((2, 5), np.float32)}, r"boxes must have shape \(2, 4\)"),
        ({"instance_ids": np.zeros((3, 4), np.int64)}, r"must be \(H, W\) int32, found \(3, 4\) int64"),
        ({"instance_ids": np.zeros((1, 3, 4), np.int32)}, r"must be \(H, W\) int32"),
        ({"instance_ids": grid("0003")}, r"must lie in 0\.\.2 \(0 is none\), found 0\.\.3"),
        ({"instance_ids": -grid("0001")}, r"found -1\.\.0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    good = {name: getattr(EXAMPLE, name) for name in ("instance_ids", "labels", "scores", "boxes")}
    with pytest.raises(ValueError, match=message):
        Instances(**{**good, **fields})


def test_coco_results_hold_masks_boxes_and_categories():
    results = json.loads(json.dumps(EXAMPLE.to_coco(image_id=7, category_ids=[10, 11, 12, 13, 20])))
    assert [result["category_id"] for result in results] == [20, 11]
    assert [result["bbox"] for result in results] == [[1, 0, 2, 2], [3, 1, 1, 2]]
    assert [result["score"] for result in results] == [0.5, 0.25]
    assert {result["image_id"] for result in results} == {7}
    for result, mask in zip(results, EXAMPLE.masks(), strict=True):
        np.testing.assert_array_equal(mask_from_segmentation(result["segmentation"], 3, 4), mask)
    assert [result["category_id"] for result in EXAMPLE.to_coco()] == [5, 2]


@given(ID_MAPS)
def test_run_lengths_of_ids_and_masks_agree_and_decode(ids):
    masks = Instances.from_ids(ids, [0] * 4, [0.0] * 4).masks()
    rles = rle_from_ids(ids, 4)
    assert rles == [encoded_mask(mask) for mask in masks]
    for rle, mask in zip(rles, masks, strict=True):
        np.testing.assert_array_equal(mask_from_segmentation(rle, *ids.shape), mask)


def test_no_masks_have_no_run_lengths():
    assert rle_from_ids(np.zeros((3, 4), np.int32), 0) == []


def test_polygon_and_uncompressed_run_lengths():
    square = [[1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0]]
    expected = grid("0000", "0110", "0110", "0000") == 1
    np.testing.assert_array_equal(mask_from_segmentation(square, 4, 4), expected)
    counts = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
    np.testing.assert_array_equal(mask_from_segmentation(counts, 4, 4), expected)
    both = mask_from_segmentation([*square, [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], 4, 4)
    assert both.sum() == 5


@pytest.mark.parametrize("segmentation", [[], [[0, 0, 1, 1]], {}, None, "text"])
def test_segmentation_without_a_shape_is_refused(segmentation):
    with pytest.raises(ValueError, match="neither RLE nor a polygon"):
        mask_from_segmentation(segmentation, 4, 4)


def test_segmentation_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size \[3, 4\] in an image of size \[5, 5\]"):
        mask_from_segmentation(rle_from_ids(EXAMPLE.instance_ids, 1)[0], 5, 5)
