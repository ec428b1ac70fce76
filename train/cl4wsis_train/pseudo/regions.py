"""Connected parts of class maps, and local maxima on scattered pixels: the tools of the instance pseudo labels.

Pixels of a batch are kept as lists: only the few that belong to a region are ever touched. A flat pixel number is
``(b * H + y) * W + x``.

Shapes: B batch, R regions, P region pixels, H W the network input.
"""

from typing import Any, NamedTuple, Self

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
            Regions in order of image and class.
        """
        device = class_map.device
        ids, owners = _label_parts(class_map.cpu().numpy(), connectivity)
        region_ids = torch.from_numpy(ids).to(device)
        image_index, labels = torch.from_numpy(owners).to(device).unbind(1)  # (R,) each
        pixels = region_ids.view(-1).nonzero()[:, 0]
        pixel_regions = region_ids.view(-1).index_select(0, pixels).long() - 1

        large = torch.bincount(pixel_regions, minlength=len(labels)) >= min_area
        if not bool(large.all()):
            numbers = torch.where(large, large.cumsum(0), 0)  # (R,), from 1; 0 for what is too small
            numbered = numbers.index_select(0, pixel_regions)
            region_ids.view(-1).scatter_(0, pixels, numbered.to(torch.int32))
            kept = numbered.nonzero()[:, 0]
            pixels, pixel_regions = pixels.index_select(0, kept), numbered.index_select(0, kept) - 1
            image_index, labels = image_index[large], labels[large]

        points = pixel_points(pixels, *region_ids.shape[1:])
        areas = torch.bincount(pixel_regions, minlength=len(labels))
        sums = [torch.bincount(pixel_regions, axis.double(), len(labels)) for axis in points.unbind(1)]
        centroids = (torch.stack(sums, dim=1) / areas[:, None]).long()
        return cls(region_ids, pixels, points, pixel_regions, image_index, labels, areas, centroids)

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


def _label_parts(maps: NDArray[Any], connectivity: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the connected parts of class maps (B, H, W) from 1; return ids, and image and class of each, (R, 2)."""
    ids = np.zeros(maps.shape, dtype=np.int32)
    owners = [np.zeros((0, 2), dtype=np.int64)]
    total = 0
    for image, class_map in enumerate(maps):
        for value in np.flatnonzero(np.bincount(class_map.reshape(-1))[1:]) + 1:
            mask = class_map == value
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            count, parts = cv2.connectedComponents(mask[box].view(np.uint8), connectivity=connectivity)
            np.add(parts, total, out=ids[image][box], where=mask[box])
            owners.append(np.full((count - 1, 2), (image, value - 1)))
            total += count - 1
    return ids, np.concatenate(owners)


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
