"""Runs of a map against counting its pixels."""

import numpy as np
import pytest

from cl4wsis.runs import areas_of_runs, boxes_of_runs, find_runs


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (13, 17), (0, 4), (4, 0)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_areas_boxes_and_the_map_itself_come_back(size: tuple[int, int], count: int) -> None:
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, count + 1, size).astype(np.int32)
        runs = find_runs(ids)
        np.testing.assert_array_equal(runs.paint(runs.values, size), ids)
        np.testing.assert_array_equal(runs.values_at(np.arange(ids.size)), ids.reshape(-1))
        np.testing.assert_array_equal(areas_of_runs(runs, count), [(ids == i).sum() for i in range(1, count + 1)])
        for index, box in enumerate(boxes_of_runs(runs, size[1], count).tolist(), start=1):
            rows, columns = np.nonzero(ids == index)
            expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
            assert tuple(box) == expected


def test_runs_end_with_their_row() -> None:
    runs = find_runs(np.array([[0, 1, 1], [1, 1, 2]], np.uint8))
    assert runs.starts.tolist() == [0, 1, 3, 5]
    assert runs.lengths.tolist() == [1, 2, 2, 1]
    assert runs.values.tolist() == [0, 1, 1, 2]


def test_views_of_larger_maps_work() -> None:
    ids = np.arange(100, dtype=np.uint8).reshape(10, 10) % 7
    np.testing.assert_array_equal(boxes_of_runs(find_runs(ids[2:5, 3:6]), 3, 6)[0, 2:] > 0, [True, True])
