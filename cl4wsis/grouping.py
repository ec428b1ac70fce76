"""grouping/1: from class probabilities, center heatmap and offsets to instances (NumPy and OpenCV reference).

This module defines the answer; every other placement of the grouping (exported graph, engine) must give the same ids.

Grid. The maps are (h, w); their stride ``s`` is 1 for ``exact`` and 4 for ``fast``. Pixels of the grid have the index
``y * w + x``. Lengths of the specification are pixels of the network input (s * h, s * w) and are scaled so:
the window side is the smallest odd number >= ``nms_kernel_size / s``; offsets are divided by ``s`` (exact in float32).
All arithmetic is float32, and inputs must be finite.

1. Class map: argmax over channels; the lowest channel wins a tie. 0 is background, class ``c`` is channel ``c + 1``.
2. Regions: 8-connected parts of equal class > 0. A region of ``area`` grid pixels is dropped when
   ``area * s * s < min_area``: its pixels get no id and its peaks are no centers. (A region has ``m`` pixels or more
   exactly when ``m`` of them lie within Chebyshev distance ``m - 1`` of one of them: a test without counting regions.)
3. Peaks: ``v(p)`` is the center heatmap at ``p`` in the channel of the class of ``p``. The window of ``p`` holds the
   pixels of the *same class* in the square around ``p``, cut at the border; they may lie in other regions, also in
   dropped ones. ``p`` is a candidate when ``v(p) > center_threshold`` and ``v(p)`` is the maximum of its window.
   A candidate is a peak when no candidate in its window has a higher pixel index; a candidate suppresses others even
   if it is suppressed itself. (That is a second maximum over ``index * candidate``.)
   A peak belongs to the region in which it lies. A region without a peak has one pseudo-center: its pixel of highest
   index.
4. Priority: peaks come before pseudo-centers. Peaks are ordered by falling ``v``, equal ones by falling pixel index;
   pseudo-centers by falling pixel index. The first ``max_instances`` are kept, the others are forgotten: a region
   that loses some of its centers is shared among the rest, a region that loses all has no id. (Ties in a TopK are
   resolved by its second key, so order the K candidates by (value, index) and choose among those that equal the K-th
   value by index; ``index - h * w`` is a unique key below every peak for the pseudo-centers.)
5. Assignment: pixel ``p`` of a region goes to the kept center ``c`` of that region with the least
   ``(p_y + o_y - c_y)^2 + (p_x + o_x - c_x)^2``, evaluated in this order; the first in priority wins a tie.
6. Score: ``v(center) *`` mean of the class probability over the grid pixels assigned in step 5; for a pseudo-center
   the mean alone. Scores are not clipped.
7. Output ids at network-input resolution. ``exact``: the assignment itself. ``fast``: (a) grid pixels with id 0 take
   the highest id in their 3x3 neighbourhood (ids of step 4, 1 for the first; one maximum pool, once, written only
   where the id is 0); (b) every grid pixel becomes a 4x4 block; (c) a pixel keeps its id where the full-size class map
   has the class of that id, and gets 0 elsewhere. The full-size class map is the argmax (lowest wins) of the
   probabilities upsampled bilinearly by 4 with half-pixel centers (``align_corners=False``, clamped at the border).
8. Areas and boxes are those of the output ids. Instances with ``area < max(min_area, 1)`` are dropped, in both
   profiles after step 7; their pixels get 0 and are not given to a neighbour. Boxes are xyxy in network-input pixels,
   right and lower edge behind the last pixel.
9. The rows of :class:`~cl4wsis.instances.Instances` are the remaining centers in priority order, ids 1..N without
   gaps. A graph with K fixed slots keeps the id ``slot + 1`` of step 4 and zeroes the rows of dropped and unused slots;
   leaving out the slots of area 0 in order gives these rows.

Source: CL4WSIS (ICCV 2023), inference; Panoptic-DeepLab (CVPR 2020), section 3.3, with the class and the connected
region of a pixel deciding which centers it may join.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cl4wsis.config import Settings
from cl4wsis.instances import Instances, boxes_from_ids
from cl4wsis.paper_grouping import group_as_published

FloatMap = NDArray[np.float32]
_FAST_STRIDE = 4


class GroupingSpec(Settings):
    """Settings of grouping/1. Lengths are in pixels of the network input, whatever grid the grouping runs on."""

    profile: Literal["exact", "fast", "paper"] = "exact"
    """``exact``: grouping at network-input resolution; ``fast``: at stride 4; ``paper``: as published (host only)."""
    center_threshold: float = Field(0.1, ge=0)
    """A center's heatmap value must exceed this."""
    nms_kernel_size: int = Field(41, gt=0)
    """Side of the window in which a center must be the maximum, px (odd)."""
    min_area: int = Field(50, ge=0)
    """Regions and instances with fewer pixels are dropped, square px."""
    max_instances: int = Field(64, gt=0, le=255)
    """Centers kept per image, by score; ids fit a byte. ``paper`` keeps all."""

    @property
    def stride(self) -> int:
        """Network-input pixels per grid pixel."""
        return _FAST_STRIDE if self.profile == "fast" else 1

    @property
    def window_size(self) -> int:
        """Side of the window on the grid: the smallest odd number that covers ``nms_kernel_size``."""
        return -(-self.nms_kernel_size // self.stride) // 2 * 2 + 1


@dataclass(frozen=True, eq=False)
class _Regions:
    """Connected parts of one class; row 0 is "no region".

    Attributes:
        pixels: (P,) flat indices of the foreground, ascending.
        of_pixel: (P,) int32, region of each of them, 1..R.
        classes: (R + 1,) class-map value of each region.
        kept: (R + 1,) bool, large enough.
        id_map: (h, w) int32, region of every grid pixel.
    """

    pixels: NDArray[np.int64]
    of_pixel: NDArray[np.int32]
    classes: NDArray[np.int64]
    kept: NDArray[np.bool_]
    id_map: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class _Centers:
    """Kept centers in priority order.

    Attributes:
        pixels: (K,) flat index.
        regions: (K,) region in which each lies.
        factors: (K,) float32, heatmap value; 1 for a pseudo-center.
    """

    pixels: NDArray[np.int64]
    regions: NDArray[np.int32]
    factors: NDArray[np.float32]


def group_instances(
    semantic_probs: NDArray[Any], center_heatmap: NDArray[Any], offset_map: NDArray[Any], spec: GroupingSpec
) -> Instances:
    """Group the pixels of one image into instances, as the module describes.

    Args:
        semantic_probs: (C, h, w), channel 0 is background. At network-input resolution for ``exact``, at stride 4 for
            ``fast``, at output resolution for ``paper``.
        center_heatmap: (C - 1, h, w), raw values.
        offset_map: (2, h, w), center minus pixel, (dy, dx), in pixels of the network input (``paper``: of the output).
        spec: thresholds and lengths.

    Returns:
        Instances on (h, w); for ``fast`` on (4h, 4w).

    Raises:
        ValueError: the maps do not fit together.
    """
    probs, heatmap, offsets = _checked_maps(semantic_probs, center_heatmap, offset_map)
    class_map, class_probs = argmax_channels(probs)
    if spec.profile == "paper":
        return group_as_published(
            class_map, class_probs, heatmap, offsets, spec.center_threshold, spec.nms_kernel_size, spec.min_area
        )
    regions = _find_regions(class_map, smallest=-(-spec.min_area // spec.stride**2))
    centers = _find_centers(regions, class_map, heatmap, spec)
    ids = _assign_pixels(regions, centers, offsets, spec.stride)  # (P,)
    scores = _score_centers(ids, class_probs.reshape(-1)[regions.pixels], centers)
    labels = regions.classes[centers.regions] - 1
    id_map = np.zeros(class_map.shape, np.uint8)
    id_map.reshape(-1)[regions.pixels] = ids
    if spec.profile == "fast":
        id_map = _full_size_ids(id_map, labels, _full_size_class_map(probs, class_map))
    return _drop_small(id_map, labels, scores, spec.min_area)


def argmax_channels(values: FloatMap) -> tuple[NDArray[Any], FloatMap]:
    """Find the largest channel of every pixel in one pass over the memory; the lowest channel wins a tie.

    Args:
        values: (C, ...).

    Returns:
        The channel, (...) uint8 (uint16 for more than 256 channels), and its value.
    """
    largest = values[0].copy()
    channels = np.zeros(largest.shape, np.uint8 if len(values) <= 256 else np.uint16)
    is_larger = np.empty(largest.shape, bool)
    candidate = np.empty_like(channels)
    for channel in range(1, len(values)):
        np.greater(values[channel], largest, out=is_larger)
        np.maximum(values[channel], largest, out=largest)
        np.multiply(is_larger, channels.dtype.type(channel), out=candidate)
        np.maximum(channels, candidate, out=channels)
    return channels, largest


def _checked_maps(
    semantic_probs: NDArray[Any], center_heatmap: NDArray[Any], offset_map: NDArray[Any]
) -> tuple[FloatMap, FloatMap, FloatMap]:
    if semantic_probs.ndim != 3 or len(semantic_probs) < 2 or semantic_probs.size == 0:
        raise ValueError(
            f"semantic_probs must be (C, h, w) of one image with C >= 2 channels, found {semantic_probs.shape}"
        )
    channels, height, width = semantic_probs.shape
    for name, found, expected in (
        ("center_heatmap", center_heatmap.shape, (channels - 1, height, width)),
        ("offset_map", offset_map.shape, (2, height, width)),
    ):
        if found != expected:
            raise ValueError(f"{name} must be {expected} to match semantic_probs {semantic_probs.shape}, found {found}")
    probs, heatmap, offsets = (np.asarray(a, np.float32) for a in (semantic_probs, center_heatmap, offset_map))
    return probs, heatmap, offsets


def _find_regions(class_map: NDArray[Any], smallest: int) -> _Regions:
    import cv2

    id_map = np.zeros(class_map.shape, np.int32)
    classes = [np.zeros(1, np.int64)]
    count = 0
    for value in _present_classes(class_map):
        mask = class_map == value
        box = _bounding_box(mask)
        found, part_ids = cv2.connectedComponents(mask[box].view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        np.add(part_ids, count, out=id_map[box], where=mask[box])
        classes.append(np.full(found - 1, value))
        count += found - 1
    pixels = np.flatnonzero(class_map != 0)
    of_pixel = id_map.reshape(-1)[pixels]
    kept = np.bincount(of_pixel, minlength=count + 1) >= smallest
    kept[0] = False
    return _Regions(pixels, of_pixel, np.concatenate(classes), kept, id_map)


def _present_classes(class_map: NDArray[Any]) -> list[int]:
    present: list[int] = np.flatnonzero(np.bincount(class_map.reshape(-1))).tolist()
    return [value for value in present if value > 0]


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    import cv2

    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def _find_centers(regions: _Regions, class_map: NDArray[Any], heatmap: FloatMap, spec: GroupingSpec) -> _Centers:
    """Peaks and pseudo-centers of the kept regions in priority order, cut to the first ``max_instances``."""
    peaks = [
        find_peaks(heatmap[value - 1], class_map == value, spec.center_threshold, spec.window_size)
        for value in _present_classes(class_map)
    ]
    pixels = np.concatenate([np.zeros(0, np.int64), *peaks])
    of_peak = regions.id_map.reshape(-1)[pixels]
    pixels, of_peak = pixels[regions.kept[of_peak]], of_peak[regions.kept[of_peak]]
    values = heatmap.reshape(len(heatmap), -1)[regions.classes[of_peak] - 1, pixels]

    last_pixel = np.zeros(len(regions.classes), np.int64)
    last_pixel[regions.of_pixel] = regions.pixels  # ascending: the highest index of a region is written last
    without_peak = regions.kept.copy()
    without_peak[of_peak] = False
    lonely = np.flatnonzero(without_peak).astype(np.int32)

    by_value = np.lexsort((-pixels, -values))
    by_index = np.argsort(-last_pixel[lonely])
    keep = slice(spec.max_instances)
    return _Centers(
        pixels=np.concatenate([pixels[by_value], last_pixel[lonely][by_index]])[keep],
        regions=np.concatenate([of_peak[by_value], lonely[by_index]])[keep],
        factors=np.concatenate([values[by_value], np.ones(len(lonely), np.float32)])[keep],
    )


def find_peaks(values: FloatMap, mask: NDArray[np.bool_], threshold: float, window_size: int) -> NDArray[np.int64]:
    """Find the values that exceed a threshold and are the maximum of their window; the last pixel wins among equals.

    Args:
        values: (h, w).
        mask: (h, w), pixels that take part.
        threshold: at least 0.
        window_size: side of the square window, odd, px.

    Returns:
        (M,) flat indices, ascending.
    """
    import cv2

    above = mask & (values > np.float32(threshold))
    box = _bounding_box(above)  # values up to the threshold decide nothing
    if above[box].size == 0:
        return np.zeros(0, np.int64)
    strong = np.where(above[box], values[box], 0)
    window = np.ones((window_size, window_size), np.uint8)
    candidates = (cv2.dilate(strong, window) == strong) & above[box]
    rows, columns = np.nonzero(candidates)
    if len(np.unique(strong[rows, columns])) < len(rows):
        order = np.zeros(candidates.shape, np.float32)
        order[rows, columns] = np.arange(1, len(rows) + 1)
        survives = cv2.dilate(order, window)[rows, columns] == order[rows, columns]
        rows, columns = rows[survives], columns[survives]
    flat: NDArray[np.int64] = (rows + box[0].start) * values.shape[1] + (columns + box[1].start)
    return flat


def _assign_pixels(regions: _Regions, centers: _Centers, offset_map: FloatMap, stride: int) -> NDArray[np.uint8]:
    """Give every foreground pixel the id (priority + 1) of its center; 0 where its region has none."""
    ids_of_centers = np.arange(1, len(centers.pixels) + 1, dtype=np.uint8)
    first_id = np.zeros(len(regions.classes), np.uint8)
    first_id[centers.regions[::-1]] = ids_of_centers[::-1]
    ids = first_id[regions.of_pixel]

    shared = np.flatnonzero(np.bincount(centers.regions, minlength=len(regions.classes)) > 1)
    slot = np.zeros(len(regions.classes), np.uint8)  # at most 127 regions share 255 centers
    slot[shared] = np.arange(1, len(shared) + 1)
    slot_of_pixel = slot[regions.of_pixel]
    members = np.flatnonzero(slot_of_pixel)
    members = members[np.argsort(slot_of_pixel[members], kind="stable")]  # region after region
    ends = np.cumsum(np.bincount(slot_of_pixel[members], minlength=len(shared) + 1))

    height, width = offset_map.shape[1:]
    offsets = offset_map / np.float32(stride)
    flat = regions.pixels[members]
    target_y = (offsets[0] + np.arange(height, dtype=np.float32)[:, None]).reshape(-1)[flat]
    target_x = (offsets[1] + np.arange(width, dtype=np.float32)).reshape(-1)[flat]
    for number, region in enumerate(shared):
        part = slice(ends[number], ends[number + 1])
        choices = np.flatnonzero(centers.regions == region)
        nearest = nearest_center(target_y[part], target_x[part], *np.divmod(centers.pixels[choices], width))
        ids[members[part]] = ids_of_centers[choices][nearest]
    return ids


def nearest_center(
    target_y: FloatMap, target_x: FloatMap, center_y: NDArray[np.int64], center_x: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Find the nearest center of every point; the first wins a tie. Squared distances in float32, difference form.

    Args:
        target_y: (P,).
        target_x: (P,).
        center_y: (K,), K <= 256.
        center_x: (K,).

    Returns:
        (P,) index of the center.
    """
    nearest = np.zeros(len(target_y), np.uint8)
    least = np.full(len(target_y), np.inf, np.float32)
    distance, delta = np.empty_like(least), np.empty_like(least)
    is_nearer = np.empty(len(least), bool)
    for number, (y, x) in enumerate(zip(center_y.tolist(), center_x.tolist(), strict=True)):
        np.subtract(target_y, np.float32(y), out=distance)
        np.multiply(distance, distance, out=distance)
        np.subtract(target_x, np.float32(x), out=delta)
        np.multiply(delta, delta, out=delta)
        np.add(distance, delta, out=distance)
        np.less(distance, least, out=is_nearer)
        np.minimum(distance, least, out=least)
        np.maximum(nearest, np.multiply(is_nearer, np.uint8(number)), out=nearest)
    return nearest


def _score_centers(ids: NDArray[np.uint8], class_probs: FloatMap, centers: _Centers) -> FloatMap:
    count = len(centers.pixels)
    areas = np.bincount(ids, minlength=count + 1)[1:]
    mass = np.bincount(ids, weights=class_probs, minlength=count + 1)[1:]
    scores: FloatMap = (centers.factors * (mass / np.maximum(areas, 1))).astype(np.float32)
    return scores


def _full_size_class_map(semantic_probs: FloatMap, class_map: NDArray[Any]) -> NDArray[Any]:
    """Argmax of the probabilities upsampled bilinearly by 4 (half-pixel centers).

    Between four grid pixels of one class every interpolated pixel has that class, so probabilities are interpolated
    only where the four differ.

    Args:
        semantic_probs: (C, h, w).
        class_map: (h, w), their argmax.

    Returns:
        (4h, 4w).
    """
    height, width = class_map.shape
    padded = np.pad(class_map, 1, mode="edge")
    corner = padded[:-1, :-1]  # (h + 1, w + 1) squares between grid pixels, half of the outer ones beyond the border
    mixed = (padded[:-1, 1:] != corner) | (padded[1:, :-1] != corner) | (padded[1:, 1:] != corner)
    tiles = np.empty((height + 1, 4, width + 1, 4), class_map.dtype)
    tiles[:] = corner[:, None, :, None]
    rows, columns = np.nonzero(mixed)
    top, bottom = np.maximum(rows - 1, 0) * width, np.minimum(rows, height - 1) * width
    left, right = np.maximum(columns - 1, 0), np.minimum(columns, width - 1)
    flat_probs = semantic_probs.reshape(len(semantic_probs), -1, 1)
    far = np.array([0.125, 0.375, 0.625, 0.875], np.float32)
    near = far[::-1]
    upper = flat_probs.take(top + left, axis=1) * near + flat_probs.take(top + right, axis=1) * far  # (C, M, 4)
    lower = flat_probs.take(bottom + left, axis=1) * near + flat_probs.take(bottom + right, axis=1) * far
    probs = upper[:, :, None] * near[:, None] + lower[:, :, None] * far[:, None]  # (C, M, 4, 4)
    tiles[rows, :, columns, :] = argmax_channels(probs.astype(np.float32, copy=False))[0]
    return tiles.reshape(4 * (height + 1), 4 * (width + 1))[2:-2, 2:-2]


def _full_size_ids(
    id_map: NDArray[np.uint8], labels: NDArray[np.int64], full_class_map: NDArray[Any]
) -> NDArray[np.uint8]:
    """Widen ids by one grid pixel, enlarge them by 4, and keep them where the class agrees: (h, w) -> (4h, 4w)."""
    import cv2

    height, width = id_map.shape
    widened = np.where(id_map == 0, cv2.dilate(id_map, np.ones((3, 3), np.uint8)), id_map)
    class_of_id = np.concatenate([[0], labels + 1]).astype(full_class_map.dtype)
    full_size = (height, _FAST_STRIDE, width, _FAST_STRIDE)
    ids = np.broadcast_to(widened[:, None, :, None], full_size).reshape(full_class_map.shape)
    classes = np.broadcast_to(class_of_id[widened][:, None, :, None], full_size).reshape(full_class_map.shape)
    kept: NDArray[np.uint8] = np.where(classes == full_class_map, ids, np.uint8(0))
    return kept


def _drop_small(id_map: NDArray[np.uint8], labels: NDArray[np.int64], scores: FloatMap, min_area: int) -> Instances:
    kept = np.flatnonzero(np.bincount(id_map.reshape(-1), minlength=len(labels) + 1)[1:] >= max(min_area, 1))
    new_ids = np.zeros(len(labels) + 1, np.int32)
    new_ids[kept + 1] = np.arange(1, len(kept) + 1)
    instance_ids = new_ids[id_map]
    return Instances(instance_ids, labels[kept].astype(np.int32), scores[kept], boxes_from_ids(instance_ids, len(kept)))
