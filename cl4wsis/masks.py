"""Masks in their four forms: id map, boolean stack, run-length code (RLE), polygons. pycocotools does the work."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cl4wsis.runs import find_runs

_FARTHEST_POINT = 10  # image sizes; a polygon that reaches farther is a mistake
_SHORTEST_POLYGON = 6  # numbers, those of a triangle; what has fewer covers nothing
_LONGEST_NUMBER = 7  # characters of a number in compressed RLE; 35 bits


def rle_from_ids(instance_ids: NDArray[Any], count: int) -> list[dict[str, Any]]:
    """Encode the instances 1..count of an (H, W) id map as COCO compressed RLE, in one pass over the map."""
    height, width = instance_ids.shape
    runs = find_runs(instance_ids.T.reshape(1, -1))  # RLE goes down the columns, and on from one to the next
    by_value = np.argsort(runs.values, kind="stable")
    bounds = np.searchsorted(runs.values[by_value], np.arange(1, count + 2))
    rles = []
    for first, behind in pairwise(bounds.tolist()):
        own = by_value[first:behind]
        edges = np.stack([runs.starts[own], runs.starts[own] + runs.lengths[own]], axis=1).reshape(-1)
        counts = np.diff(edges, prepend=0, append=height * width)
        if counts[-1] == 0:
            counts = counts[:-1]
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        rles.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return rles


def mask_from_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decode a COCO segmentation.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], uncompressed RLE (``counts`` a list) or compressed RLE.
        height: of the image, px.
        width: of the image, px.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: the segmentation is empty, of an unknown form, damaged, or of another size.
    """
    decoded: NDArray[np.bool_] = coco_mask.decode(rle_from_segmentation(segmentation, height, width)).astype(bool)
    return decoded


def rle_from_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Bring a COCO segmentation into compressed RLE without decoding it.

    pycocotools trusts what it is given, so everything is checked here.

    Args:
        segmentation: as for :func:`mask_from_segmentation`.
        height: of the image, px.
        width: of the image, px.

    Returns:
        A dict with ``size`` and ``counts`` for pycocotools.

    Raises:
        ValueError: the segmentation is empty, of an unknown form, damaged, or of another size.
    """
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str | bytes):
        counts, size = segmentation["counts"], segmentation.get("size")
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise ValueError(f"mask of size {size} in an image of size {[height, width]} (height, width)")
        runs = np.array(counts) if isinstance(counts, list) else _runs_of(counts)
        if runs.dtype.kind not in "iu" or (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"run lengths do not add up to the {height * width} pixels of the image; RLE is damaged")
        rle: dict[str, Any] = segmentation
        return coco_mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else rle
    limit = _FARTHEST_POINT * max(height, width)  # drawing takes memory for every pixel of the outline
    polygons = []
    for polygon in segmentation if isinstance(segmentation, list) else []:
        values = np.asarray(polygon)
        if values.ndim != 1 or values.dtype.kind not in "iuf":
            raise ValueError(
                f"segmentation holds {str(polygon)[:60]} where a polygon is expected; write lists of numbers, "
                "[[x, y, x, y, ...], ...]"
            )
        if len(values) % 2:
            raise ValueError(f"polygon has {len(values)} numbers; give every point both x and y")
        if not np.isfinite(values).all():
            raise ValueError("polygon has a point that is not finite; give every point as numbers of pixels")
        if ((values < -limit) | (values > limit)).any():
            raise ValueError(f"polygon has a point more than {limit} px away from an image of {width}x{height} px")
        if len(values) >= _SHORTEST_POLYGON:
            polygons.append(polygon)
    if not polygons:
        raise ValueError("segmentation is neither RLE nor a polygon of three points or more")
    merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return merged


def _runs_of(counts: str | bytes) -> NDArray[np.int64]:
    """Decode the text of a compressed RLE into run lengths.

    A number is written in groups of five bits, lowest first, one character from 48 on each; bit 5 says that another
    group follows, and bit 4 of the last one is the sign. From the fourth number on, a run is told by what it has more
    than the run before the last.

    Raises:
        ValueError: the text is damaged.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    is_last = (codes & 32) == 0
    lasts = np.flatnonzero(is_last)
    lengths = np.diff(lasts, prepend=-1)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not is_last[-1] or lengths.max() > _LONGEST_NUMBER:
        raise ValueError("text of the RLE is damaged")
    starts = lasts - lengths + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[lasts] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
