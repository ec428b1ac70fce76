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
   A graph looks at the first 256 centers before step 2 drops small regions: where a class map has more parts than
   that, it may lose instances.
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
from cl4wsis.enlarge import EnlargedMap, FloatMap, argmax_channels, classify_enlarged, enlarged_argmax
from cl4wsis.instances import Instances
from cl4wsis.paper_grouping import group_as_published
from cl4wsis.runs import Runs, areas_of_runs, boxes_of_runs, find_runs

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
    """Connected parts of one class; row 0 is background.

    Attributes:
        runs: (h, w) row runs of the class map, each in one region; their values are regions.
        classes: (R + 1,) class-map value of each region.
        boxes: (R, 4) left, top, right, bottom of region 1..R.
        kept: (R + 1,) bool, large enough.
    """

    runs: Runs
    classes: NDArray[np.int64]
    boxes: NDArray[np.int64]
    kept: NDArray[np.bool_]


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
    full_class_map = enlarged_argmax(probs, _FAST_STRIDE) if spec.profile == "fast" else class_map
    return _group(class_map, class_probs, full_class_map, EnlargedMap(heatmap), EnlargedMap(offsets), spec)


def group_maps(
    semantic_logits: NDArray[Any],
    center_heatmap: NDArray[Any],
    offset_map: NDArray[Any],
    input_size: tuple[int, int],
    spec: GroupingSpec,
) -> Instances:
    """Group what the network says about one image, at whatever resolution it says it.

    The answer is that of bringing the maps to the grid of the profile (bilinearly, half-pixel centers), taking the
    softmax over classes and calling :func:`group_instances`; ``paper`` runs at network-input resolution. Values are
    computed only where they matter: class probabilities in and around the foreground, heatmaps where they exceed the
    threshold, offsets where a region has several centers.

    Args:
        semantic_logits: (C, h, w) raw, channel 0 is background.
        center_heatmap: (C - 1, h', w') raw values.
        offset_map: (2, h', w'), center minus pixel, (dy, dx), in pixels of the network input.
        input_size: (H, W) of the network input, px; a multiple of the sides of the maps.
        spec: thresholds and lengths.

    Returns:
        Instances on (H, W).

    Raises:
        ValueError: the maps do not fit together, or do not divide the grid of the profile.
    """
    logits = np.ascontiguousarray(semantic_logits, np.float32)  # every channel is read, of the others only some
    heatmap, offsets = (np.asarray(a, np.float32) for a in (center_heatmap, offset_map))
    _check_raw_maps(logits, heatmap, offsets)
    grid = (input_size[0] // spec.stride, input_size[1] // spec.stride)
    logit_scale = _scale_to(grid, logits, "semantic_logits")
    centers = EnlargedMap(heatmap, _scale_to(grid, heatmap, "center_heatmap"))
    directions = EnlargedMap(offsets, _scale_to(grid, offsets, "offset_map"))
    if spec.profile == "fast":
        probs = _softmax(EnlargedMap(logits, logit_scale).full())
        class_map, class_probs = argmax_channels(probs)
        return _group(class_map, class_probs, enlarged_argmax(probs, spec.stride), centers, directions, spec)
    class_map, class_probs = classify_enlarged(logits, logit_scale)
    return _group(class_map, class_probs, class_map, centers, directions, spec)


def _group(
    class_map: NDArray[Any],
    class_probs: FloatMap,
    full_class_map: NDArray[Any],
    heatmap: EnlargedMap,
    offsets: EnlargedMap,
    spec: GroupingSpec,
) -> Instances:
    """Steps 2 to 9; ``class_probs`` needs to hold only where there is a class."""
    if spec.profile == "paper":
        return group_as_published(
            class_map,
            class_probs,
            heatmap.full(),
            offsets.full(),
            spec.center_threshold,
            spec.nms_kernel_size,
            spec.min_area,
        )
    regions = _find_regions(class_map, smallest=-(-spec.min_area // spec.stride**2))
    centers = _find_centers(regions, class_map, heatmap, spec)
    id_map = _assign_pixels(regions, centers, offsets, class_map.shape, spec.stride)  # (h, w)
    runs = find_runs(id_map)
    scores = _score_centers(runs, class_probs, centers)
    labels = regions.classes[centers.regions] - 1
    if spec.profile == "fast":
        id_map = _full_size_ids(id_map, labels, full_class_map)
        runs = find_runs(id_map)
    return _drop_small(runs, full_class_map.shape, labels, scores, spec.min_area)


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


def _check_raw_maps(logits: FloatMap, heatmap: FloatMap, offsets: FloatMap) -> None:
    if logits.ndim != 3 or len(logits) < 2 or logits.size == 0:
        raise ValueError(f"semantic_logits must be (C, h, w) of one image with C >= 2 channels, found {logits.shape}")
    expected = {"center_heatmap": len(logits) - 1, "offset_map": 2}
    for (name, channels), found in zip(expected.items(), (heatmap.shape, offsets.shape), strict=True):
        if len(found) != 3 or found[0] != channels:
            raise ValueError(
                f"{name} must be ({channels}, h, w) beside {len(logits)} channels of semantic_logits, found {found}"
            )


def _scale_to(grid: tuple[int, int], values: FloatMap, name: str) -> int:
    """Return the factor between a map and the grid."""
    height, width = values.shape[1:]
    scale = grid[0] // height if height else 0
    if scale < 1 or (height * scale, width * scale) != grid:
        raise ValueError(
            f"{name} of size {(height, width)} cannot be enlarged to the grid {grid} (height, width) by a whole factor"
        )
    return scale


def _softmax(logits: FloatMap) -> FloatMap:
    """Return probabilities over the first axis, (C, h, w)."""
    exponentials: FloatMap = np.exp(logits - logits.max(axis=0))
    exponentials /= exponentials.sum(axis=0)
    return exponentials


def _find_regions(class_map: NDArray[Any], smallest: int) -> _Regions:
    import cv2

    class_runs = find_runs(class_map)
    width = class_map.shape[1]
    rows, columns = np.divmod(class_runs.starts, width)
    of_run = np.zeros(len(class_runs.starts), np.int32)
    classes = [np.zeros(1, np.int64)]
    count = 0
    for value, box in _class_boxes(class_runs, width):
        inside = class_map[box] == value
        found, part_ids = cv2.connectedComponents(inside.view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        of_class = np.flatnonzero(class_runs.values == value)
        of_run[of_class] = part_ids[rows[of_class] - box[0].start, columns[of_class] - box[1].start] + count
        classes.append(np.full(found - 1, value))
        count += found - 1
    runs = class_runs._replace(values=of_run)
    kept = np.concatenate([[False], areas_of_runs(runs, count) >= smallest])
    boxes = boxes_of_runs(runs, width, count).astype(np.int64)
    return _Regions(runs, np.concatenate(classes), boxes, kept)


def _class_boxes(runs: Runs, width: int) -> list[tuple[int, tuple[slice, slice]]]:
    """Return the foreground classes of a map in order, each with a box that holds all its pixels."""
    boxes = boxes_of_runs(runs, width, int(runs.values.max())).astype(np.int64)  # of classes 1, 2, ...
    present = np.flatnonzero(boxes[:, 2] > 0)
    return [
        (value + 1, (slice(top, bottom), slice(left, right)))
        for value, (left, top, right, bottom) in zip(present.tolist(), boxes[present].tolist(), strict=True)
    ]


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    import cv2

    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def _find_centers(regions: _Regions, class_map: NDArray[Any], heatmap: EnlargedMap, spec: GroupingSpec) -> _Centers:
    """Peaks and pseudo-centers of the kept regions in priority order, cut to the first ``max_instances``."""
    pixels, values = _find_all_peaks(class_map, np.unique(regions.classes[regions.kept]).tolist(), heatmap, spec)
    of_peak = regions.runs.values_at(pixels)
    in_kept = regions.kept[of_peak]
    pixels, values, of_peak = pixels[in_kept], values[in_kept], of_peak[in_kept]

    last_pixel = np.zeros(len(regions.classes), np.int64)
    # In reading order: the last run of a region is written last.
    last_pixel[regions.runs.values] = regions.runs.starts + regions.runs.lengths - 1
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


def _find_all_peaks(
    class_map: NDArray[Any], present: list[int], heatmap: EnlargedMap, spec: GroupingSpec
) -> tuple[NDArray[np.int64], FloatMap]:
    """Return flat index and value of the peaks of the classes present."""
    pixels, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for value in present:
        box = heatmap.box_above(value - 1, spec.center_threshold)
        if box is not None:
            crop = heatmap.crop(value - 1, box)
            found = find_peaks(crop, class_map[box] == value, spec.center_threshold, spec.window_size)
            rows, columns = np.divmod(found, crop.shape[1])
            pixels.append((rows + box[0].start) * class_map.shape[1] + columns + box[1].start)
            values.append(crop[rows, columns])
    return np.concatenate(pixels), np.concatenate(values)


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
    candidates = np.flatnonzero((cv2.dilate(strong, window) == strong) & above[box])
    heights = np.sort(strong.reshape(-1)[candidates])
    if (heights[1:] == heights[:-1]).any():
        order = np.zeros(strong.shape, np.float32)
        order.reshape(-1)[candidates] = np.arange(1, len(candidates) + 1)
        survives = cv2.dilate(order, window).reshape(-1)[candidates] == order.reshape(-1)[candidates]
        candidates = candidates[survives]
    rows, columns = np.divmod(candidates, strong.shape[1])
    flat: NDArray[np.int64] = (rows + box[0].start) * values.shape[1] + (columns + box[1].start)
    return flat


def _assign_pixels(
    regions: _Regions, centers: _Centers, offsets: EnlargedMap, size: tuple[int, int], stride: int
) -> NDArray[np.uint8]:
    """Give every pixel of a region the id (priority + 1) of its center; 0 where its region has none: (h, w)."""
    ids_of_centers = np.arange(1, len(centers.pixels) + 1, dtype=np.uint8)
    first_id = np.zeros(len(regions.classes), np.uint8)
    first_id[centers.regions[::-1]] = ids_of_centers[::-1]
    id_map: NDArray[np.uint8] = regions.runs.paint(first_id[regions.runs.values], size)

    shared = np.flatnonzero(np.bincount(centers.regions, minlength=len(regions.classes)) > 1)
    for region in shared.tolist():  # at most 127 regions share 255 centers
        left, top, right, bottom = regions.boxes[region - 1].tolist()
        box = (slice(top, bottom), slice(left, right))
        choices = np.flatnonzero(centers.regions == region)
        center_y, center_x = np.divmod(centers.pixels[choices], size[1])
        target_y, target_x = _targets(offsets, box, stride)
        nearest = nearest_center(target_y, target_x, center_y, center_x)
        # All of the box is assigned, and written where the region is: gathering its pixels would take longer.
        np.copyto(id_map[box], ids_of_centers[choices].take(nearest), where=id_map[box] == first_id[region])
    return id_map


def _targets(offsets: EnlargedMap, box: tuple[slice, slice], stride: int) -> tuple[FloatMap, FloatMap]:
    """Return where the pixels of a box point, in pixels of the grid: rows and columns, each of the box's size."""
    rows = np.arange(box[0].start, box[0].stop, dtype=np.float32)[:, None]
    columns = np.arange(box[1].start, box[1].stop, dtype=np.float32)
    dy, dx = offsets.crop(0, box), offsets.crop(1, box)
    if stride > 1:
        dy, dx = dy / np.float32(stride), dx / np.float32(stride)
    return dy + rows, dx + columns


def nearest_center(
    target_y: FloatMap, target_x: FloatMap, center_y: NDArray[np.int64], center_x: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Find the nearest center of every point; the first wins a tie. Squared distances in float32, difference form.

    Args:
        target_y: of any shape.
        target_x: of the same shape.
        center_y: (K,), K <= 256.
        center_x: (K,).

    Returns:
        Index of the center, of that shape.
    """
    nearest = np.zeros(target_y.shape, np.uint8)
    least, distance, delta = (np.empty(target_y.shape, np.float32) for _ in range(3))
    is_nearer = np.empty(target_y.shape, bool)
    for number, (y, x) in enumerate(zip(center_y.tolist(), center_x.tolist(), strict=True)):
        squares = distance if number else least
        np.subtract(target_y, np.float32(y), out=squares)
        np.multiply(squares, squares, out=squares)
        np.subtract(target_x, np.float32(x), out=delta)
        np.multiply(delta, delta, out=delta)
        np.add(squares, delta, out=squares)
        if number == 0:
            continue
        np.less(distance, least, out=is_nearer)
        np.minimum(distance, least, out=least)
        np.maximum(nearest, np.multiply(is_nearer, np.uint8(number)), out=nearest)
    return nearest


def _score_centers(runs: Runs, class_probs: FloatMap, centers: _Centers) -> FloatMap:
    count = len(centers.pixels)
    areas = areas_of_runs(runs, count)
    mass_of_run = np.add.reduceat(class_probs.reshape(-1), runs.starts)
    mass = np.bincount(runs.values, weights=mass_of_run, minlength=count + 1)[1:]
    scores: FloatMap = (centers.factors * (mass / np.maximum(areas, 1))).astype(np.float32)
    return scores


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


def _drop_small(
    runs: Runs, size: tuple[int, int], labels: NDArray[np.int64], scores: FloatMap, min_area: int
) -> Instances:
    """Leave out small instances, close up the ids and measure the boxes."""
    kept = np.flatnonzero(areas_of_runs(runs, len(labels)) >= max(min_area, 1))
    new_ids = np.zeros(len(labels) + 1, np.int32)
    new_ids[kept + 1] = np.arange(1, len(kept) + 1)
    new_runs = runs._replace(values=new_ids[runs.values])
    return Instances(
        instance_ids=new_runs.paint(new_runs.values, size),
        labels=labels[kept].astype(np.int32),
        scores=scores[kept],
        boxes=boxes_of_runs(new_runs, size[1], len(kept)),
    )
