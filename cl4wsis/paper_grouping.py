"""Grouping as published, for tables that are compared with the publication; one image, on the host.

Per class and 8-connected part of at least ``min_area`` pixels:

1. Seeds: values of the class's center channel above ``center_threshold`` that equal the maximum of their window. The
   channel is 0 outside the part, so each part has its own maxima; equal neighbours are all seeds.
2. Offset sinks: 4-connected areas of 19 to 23 pixels in which offsets are shorter than 2.5 px (a perfect sink covers 21
   pixels). A sink whose center, rounded down, has a value above 0.05 is a further seed if it lies more than 100 px from
   every seed of 1, or if there is none. The channel is set to 1 at accepted sinks.
3. Without a seed the part is one instance. Otherwise each pixel goes to the seed nearest to where its offset points;
   the first wins a tie. There is no limit on the number of instances, and seeds without pixels are forgotten.
4. Score: largest center value in the mask times mean class probability; the mean alone if that value reaches 1. It may
   be 0 or less, and nothing is filtered by it.

An image in which nothing is found gets one instance of class 0 with an empty mask and score 0.

Source: CL4WSIS (ICCV 2023) and its published implementation; offset sinks come from BESTIE (CVPR 2022).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.instances import Instances

FloatMap = NDArray[np.float32]
Points = NDArray[np.int64]

_SINK_RADIUS = 2.5
_SINK_AREAS = (18, 24)  # exclusive bounds: 21 +- 3
_SINK_CENTER_THRESHOLD = 0.05
_SINK_DISTANCE = 100.0


def group_as_published(
    class_map: NDArray[Any],
    class_probs: FloatMap,
    center_heatmap: FloatMap,
    offset_map: FloatMap,
    center_threshold: float,
    nms_kernel_size: int,
    min_area: int,
) -> Instances:
    """Group pixels as the published implementation does.

    Args:
        class_map: (H, W), 0 background; class ``c`` is ``c + 1``. All maps are at output resolution.
        class_probs: (H, W), probability of the class in ``class_map``.
        center_heatmap: (C - 1, H, W).
        offset_map: (2, H, W), center minus pixel, (dy, dx), px. They are added to pixel positions as they stand; the
            published tables come from offsets that were not rescaled with the image.
        center_threshold: a seed's value exceeds this.
        nms_kernel_size: side of the window, px.
        min_area: smallest part, px.

    Returns:
        Instances by class, part (in reading order of their first pixels) and seed.
    """
    import cv2

    instance_ids = np.zeros(class_map.shape, np.int32)
    labels: list[int] = []
    scores: list[float] = []
    for value in np.unique(class_map[class_map > 0]).tolist():
        mask = (class_map == value).astype(np.uint8)
        _, part_ids, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        numbers, first_pixels = np.unique(part_ids, return_index=True)
        # OpenCV numbers parts in an order of its own.
        for part in numbers[np.argsort(first_pixels)]:
            if part == 0 or stats[part, cv2.CC_STAT_AREA] < min_area:
                continue
            left, top, width, height = stats[part, : cv2.CC_STAT_AREA]
            box = (slice(top, top + height), slice(left, left + width))
            inside = part_ids[box] == part
            centers = np.where(inside, center_heatmap[value - 1][box], 0)
            offsets = offset_map[:, *box]
            seeds = _find_seeds(centers, center_threshold, nms_kernel_size)
            sinks = _accepted_sinks(_find_sinks(offsets, inside), seeds, centers)
            centers[sinks[:, 0], sinks[:, 1]] = 1.0
            groups = _group_part(offsets, inside, np.concatenate([seeds, sinks]))
            instance_ids[box][inside] = groups + len(labels) + 1
            part_scores = _score_groups(groups, centers[inside], class_probs[box][inside])
            labels += [value - 1] * len(part_scores)
            scores += part_scores
    return Instances.from_ids(instance_ids, labels, scores) if labels else Instances.from_ids(instance_ids, [0], [0.0])


def _find_seeds(centers: FloatMap, threshold: float, window_size: int) -> Points:
    import cv2

    strong = np.where(centers > np.float32(threshold), centers, 0)
    largest = cv2.dilate(strong, np.ones((window_size, window_size), np.uint8))
    return np.argwhere((strong == largest) & (strong > 0))


def _find_sinks(offset_map: FloatMap, inside: NDArray[np.bool_]) -> Points:
    """Centers, rounded down, of the small areas to which offsets point from all sides."""
    import cv2

    is_short = (np.hypot(offset_map[0], offset_map[1]) < _SINK_RADIUS) & inside
    _, _, stats, centroids = cv2.connectedComponentsWithStats(is_short.astype(np.uint8), connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    low, high = _SINK_AREAS
    found = centroids[1:][(areas > low) & (areas < high)]  # (S, 2), (x, y)
    sinks: Points = found[:, ::-1].astype(np.int64)
    return sinks[np.lexsort((sinks[:, 1], sinks[:, 0]))]


def _accepted_sinks(sinks: Points, seeds: Points, centers: FloatMap) -> Points:
    sinks = sinks[centers[sinks[:, 0], sinks[:, 1]] > _SINK_CENTER_THRESHOLD]
    distances = np.linalg.norm(sinks[:, None] - seeds[None], axis=2)  # (S, A)
    accepted: Points = sinks[(distances > _SINK_DISTANCE).all(axis=1)]
    return accepted


def _group_part(offset_map: FloatMap, inside: NDArray[np.bool_], seeds: Points) -> NDArray[np.int64]:
    """Number the pixels of a part by the seed their offset points at, 0..G-1 without gaps, in the order of seeds."""
    rows, columns = np.nonzero(inside)
    target_y, target_x = rows + offset_map[0][inside], columns + offset_map[1][inside]
    nearest = np.zeros(len(rows), np.int64)
    least = np.full(len(rows), np.inf)
    for number, (y, x) in enumerate(seeds.tolist()):
        distance = (target_y - y) ** 2 + (target_x - x) ** 2
        nearest[distance < least] = number
        np.minimum(least, distance, out=least)
    groups: NDArray[np.int64] = np.unique(nearest, return_inverse=True)[1].reshape(-1)
    return groups


def _score_groups(groups: NDArray[np.int64], centers: FloatMap, class_probs: FloatMap) -> list[float]:
    areas = np.bincount(groups)
    means = np.bincount(groups, weights=class_probs) / areas
    largest = np.full(len(areas), -np.inf, np.float32)
    np.maximum.at(largest, groups, centers)
    scores: list[float] = np.where(largest >= 1, means, largest * means).tolist()
    return scores
