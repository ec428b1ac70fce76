"""Row runs of an integer map: few numbers per object instead of thousands of pixels, for areas, boxes and sums."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Runs(NamedTuple):
    """Stretches of equal value within the rows of an (H, W) map, in reading order; together they cover the map."""

    starts: NDArray[np.int64]
    """(R,) flat index of the first pixel, ascending."""
    lengths: NDArray[np.int64]
    """(R,) pixels."""
    values: NDArray[Any]
    """(R,) value of the map."""

    def paint(self, values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        """Return the (H, W) map that has other values, (R,), on the same runs."""
        return np.repeat(values, self.lengths).reshape(size)

    def values_at(self, pixels: NDArray[np.int64]) -> NDArray[Any]:
        """Return the value of the map at flat indices, (M,)."""
        return np.asarray(self.values[np.searchsorted(self.starts, pixels, side="right") - 1])


def find_runs(values: NDArray[Any]) -> Runs:
    """Find the runs of an (H, W) map."""
    width = values.shape[1]
    flat = np.ascontiguousarray(values).reshape(-1)
    is_edge = np.empty(flat.size + 1, bool)
    np.not_equal(flat[1:], flat[:-1], out=is_edge[1:-1])
    is_edge[:: max(width, 1)] = True
    edges = np.flatnonzero(is_edge)
    starts, lengths = edges[:-1], edges[1:] - edges[:-1]
    return Runs(starts, lengths, flat[starts])


def areas_of_runs(runs: Runs, count: int) -> NDArray[np.int64]:
    """Count the pixels of the ids 1..count on their runs: (count,)."""
    areas: NDArray[np.int64] = np.bincount(runs.values, weights=runs.lengths, minlength=count + 1)[1:].astype(np.int64)
    return areas


def boxes_of_runs(runs: Runs, width: int, count: int) -> NDArray[np.float32]:
    """Measure the boxes of the ids 1..count on their runs.

    Args:
        runs: of an id map; 0 is none.
        width: of the map, px.
        count: number of ids N.

    Returns:
        (N, 4) float32 xyxy, right and lower edge behind the last pixel; zeros where an id does not occur.
    """
    rows, columns = np.divmod(runs.starts, width)
    edges = np.zeros((4, count + 1), np.int64)  # left, top, right, bottom
    edges[0] = width
    np.minimum.at(edges[0], runs.values, columns)
    edges[1][runs.values[::-1]] = rows[::-1]  # in reading order, the first run of an id is its highest
    np.maximum.at(edges[2], runs.values, columns + runs.lengths)
    edges[3][runs.values] = rows + 1
    edges[:, edges[3] == 0] = 0
    boxes: NDArray[np.float32] = edges[:, 1:].T.astype(np.float32)
    return boxes
