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
        ids, owners = _label_parts(class_map.cpu().numpy(), connectivity)
        pixels = np.flatnonzero(ids != 0)
        pixel_regions = ids.reshape(-1)[pixels].astype(np.int64) - 1
        areas = np.bincount(pixel_regions, minlength=len(owners))
        large = areas >= min_area
        if not large.all():
            numbers = np.where(large, large.cumsum(), 0).astype(np.int32)  # (R,), from 1; 0 for what is too small
            ids.reshape(-1)[pixels] = numbered = numbers[pixel_regions]
            kept = np.flatnonzero(numbered)
            pixels, pixel_regions = pixels[kept], numbered[kept].astype(np.int64) - 1
            owners, areas = owners[large], areas[large]

        height, width = ids.shape[1:]
        rows = pixels // width
        points = np.stack((rows % height, pixels - rows * width)).T  # each axis by itself in memory
        sums = [np.bincount(pixel_regions, axis, len(owners)) for axis in points.T]
        centroids = (np.stack(sums, axis=1) / areas[:, None]).astype(np.int64)
        arrays = (ids, pixels, points, pixel_regions, owners[:, 0], owners[:, 1], areas, centroids)
        return cls(*(torch.from_numpy(array).to(class_map.device) for array in arrays))

    def __len__(self) -> int:
        return len(self.labels)

    def axes_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and columns, (G,) int64 each, of the pixels at some positions (G,) of the list."""
        rows, columns = (axis.index_select(0, positions) for axis in self.points.unbind(1))
        return rows, columns


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
    maxima = flat_nonzero(values == _windowed_maximum(points, values, groups, window))
    last = maxima == _windowed_maximum(points[maxima], maxima.double(), groups[maxima], 3)
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, maxima[last], True)


def running_maximum(maps: Tensor, window: int, dim: int) -> Tensor:
    """Return the maximum of each ``window`` consecutive entries; the result is ``window - 1`` shorter.

    Windows of doubling width need log2(window) passes.

    Args:
        maps: of any shape.
        window: number of entries.
        dim: along which they are consecutive.
    """
    width = 1
    while width < window:
        step = min(width, window - width)
        length = maps.shape[dim] - step
        maps = torch.maximum(maps.narrow(dim, 0, length), maps.narrow(dim, step, length))
        width += step
    return maps


def flat_nonzero(mask: Tensor) -> Tensor:
    """Return the flat positions at which a bool tensor is true, (P,) int64.

    On a CPU this goes through NumPy, which is several times faster.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


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
            mask = (class_map == value).view(np.uint8)
            left, top, width, height = cv2.boundingRect(mask)
            box = np.s_[top : top + height, left : left + width]
            count, parts = cv2.connectedComponents(mask[box], connectivity=connectivity)
            parts += mask[box] * np.int32(total)
            ids[image][box] += parts  # still 0 where this class is
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
    canvas = running_maximum(running_maximum(canvas.view(height, width), window, 0), window, 1)
    return canvas.reshape(-1).index_select(0, (rows - radius) * canvas.shape[1] + columns - radius)


def _reduce(values: Tensor, index: Tensor, num_groups: int, reduce: str) -> Tensor:
    """Reduce the values of each group, (G,)."""
    return values.new_zeros(num_groups).scatter_reduce_(0, index, values, reduce, include_self=False)
