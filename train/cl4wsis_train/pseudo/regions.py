"""Connected parts of class maps, and local maxima on scattered pixels: the tools of the instance pseudo labels.

Pixels of a batch are kept as lists: only the few that belong to a region are ever touched. A flat pixel number is
``(b * H + y) * W + x``.

Shapes: B batch, R regions, P region pixels, H W the network input.
"""

from typing import NamedTuple, Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl4wsis_train.data.targets import pixel_points


class Regions(NamedTuple):
    """Connected parts of one class each, over a whole batch."""

    region_ids: Tensor
    """(B, H, W) int32; region ``r`` is ``r + 1``, 0 is none."""
    pixels: Tensor
    """(P,) int64 flat numbers of the region pixels, ascending."""
    points: Tensor
    """(P, 2) int64, (y, x) of those pixels in their image."""
    pixel_regions: Tensor
    """(P,) int64, the region of each pixel."""
    image_index: Tensor
    """(R,) int64, the image of each region."""
    labels: Tensor
    """(R,) int64, the class of each region, from 0 without background."""
    areas: Tensor
    """(R,) int64, pixels."""
    centroids: Tensor
    """(R, 2) int64, (y, x), the mean of the pixels truncated to whole pixels."""

    @classmethod
    def from_class_map(cls, class_map: Tensor, connectivity: int, min_area: float = 0.0) -> Self:
        """Find the connected parts of equal class.

        Args:
            class_map: (B, H, W) integers; 0 is none, class ``c`` is ``c + 1``.
            connectivity: 4 or 8.
            min_area: smaller parts are left out.

        Returns:
            Regions in order of image, class and first pixel.
        """
        maps = class_map.cpu().numpy()
        ids = np.zeros(maps.shape, dtype=np.int32)
        tables: list[NDArray[np.int64]] = []
        num_regions = 0
        for image, (part_map, part_ids) in enumerate(zip(maps, ids, strict=True)):
            for value in np.flatnonzero(np.bincount(part_map.reshape(-1))[1:]) + 1:
                table = _label_class(part_map == value, connectivity, min_area, num_regions, part_ids)
                tables.append(np.column_stack((np.full((len(table), 2), (image, value - 1)), table)))
                num_regions += len(table)
        columns = np.concatenate(tables) if tables else np.zeros((0, 5), dtype=np.int64)
        table_on_device = torch.from_numpy(columns).to(class_map.device)  # image, class, area, y, x
        region_ids = torch.from_numpy(ids).to(class_map.device)
        pixels = region_ids.view(-1).nonzero()[:, 0]
        return cls(
            region_ids=region_ids,
            pixels=pixels,
            points=pixel_points(pixels, *region_ids.shape[1:]),
            pixel_regions=region_ids.view(-1).index_select(0, pixels).long() - 1,
            image_index=table_on_device[:, 0],
            labels=table_on_device[:, 1],
            areas=table_on_device[:, 2],
            centroids=table_on_device[:, 3:],
        )

    def __len__(self) -> int:
        return len(self.labels)


def find_local_maxima(points: Tensor, values: Tensor, groups: Tensor, window: int) -> Tensor:
    """Find the pixels that no pixel of their group exceeds within a square window.

    Of maxima that touch (equal neighbours on a plateau) only the last one stays.

    Args:
        points: (P, 2) whole pixels, (y, x), in raster order.
        values: (P,) floating point.
        groups: (P,) group numbers from 0; pixels of different groups do not see each other.
        window: odd side of the window in pixels.

    Returns:
        (P,) bool.
    """
    maxima = (values == _windowed_maximum(points, values, groups, window)).nonzero()[:, 0]
    last = maxima == _windowed_maximum(points[maxima], maxima.double(), groups[maxima], 3)
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, maxima[last], True)


def rank_in_group(groups: Tensor) -> Tensor:
    """Number the members of each group from 0 in the order in which they stand.

    Args:
        groups: (P,) integers.

    Returns:
        (P,) int64.
    """
    order = torch.argsort(groups, stable=True)
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - starts
    return ranks


def scale_window(window: int, length_scale: float) -> int:
    """Return the odd window side nearest to a scaled one, at least 1."""
    return max(1, 2 * round((window * length_scale - 1) / 2) + 1)


def _label_class(
    mask: NDArray[np.bool_], connectivity: int, min_area: float, first_id: int, ids: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Number the parts of a mask from ``first_id + 1`` inside ``ids``; return area, y and x of each, (R, 3)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    _, parts, stats, centroids = cv2.connectedComponentsWithStats(mask[box].view(np.uint8), connectivity=connectivity)
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = areas >= min_area
    numbers = np.zeros(len(stats), dtype=np.int32)  # 0 for background and for what is too small
    numbers[1:][kept] = np.arange(first_id + 1, first_id + 1 + np.count_nonzero(kept))
    ids[box] += numbers[parts]
    corner = np.array([rows[0], columns[0]])
    return np.column_stack((areas[kept], centroids[1:][kept][:, ::-1] + corner)).astype(np.int64)


def _windowed_maximum(points: Tensor, values: Tensor, groups: Tensor, window: int) -> Tensor:
    """Return the largest value within a square window around each pixel, counted over its group, (P,).

    The bounding boxes of the groups are stacked on one canvas with gaps that no window crosses, so that a plain
    separable maximum serves all groups at once.
    """
    if len(points) == 0:
        return values
    radius = window // 2
    present = torch.bincount(groups) > 0
    index = (present.cumsum(0) - 1).index_select(0, groups)  # (P,) without empty groups
    num_groups = int(present.sum())
    first = torch.stack([_reduce(axis, index, num_groups, "amin") for axis in points.unbind(1)], dim=1)  # (G, 2)
    size = torch.stack([_reduce(axis, index, num_groups, "amax") for axis in points.unbind(1)], dim=1) - first + 1
    top = (size[:, 0] + radius).cumsum(0) - size[:, 0]
    shift = torch.stack((top, torch.full_like(top, radius)), dim=1) - first
    rows, columns = (points + shift.index_select(0, index)).unbind(1)
    height, width = int(size[:, 0].sum()) + radius * (num_groups + 1), int(size[:, 1].max()) + 2 * radius
    canvas = values.new_full((height * width,), -torch.inf).scatter_(0, rows * width + columns, values)
    canvas = _running_maximum(_running_maximum(canvas.view(height, width), window, 0), window, 1)
    return canvas.reshape(-1).index_select(0, (rows - radius) * canvas.shape[1] + columns - radius)


def _running_maximum(maps: Tensor, window: int, dim: int) -> Tensor:
    """Return the maximum of each ``window`` consecutive entries; the result is ``window - 1`` shorter.

    Windows of doubling width need log2(window) passes.
    """
    width = 1
    while width < window:
        step = min(width, window - width)
        length = maps.shape[dim] - step
        maps = torch.maximum(maps.narrow(dim, 0, length), maps.narrow(dim, step, length))
        width += step
    return maps


def _reduce(values: Tensor, index: Tensor, num_groups: int, reduce: str) -> Tensor:
    """Reduce the values of each group, (G,)."""
    return values.new_zeros(num_groups).scatter_reduce_(0, index, values, reduce, include_self=False)
