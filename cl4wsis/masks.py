"""Masks in their four forms: id map, boolean stack, run-length code (RLE), polygons. pycocotools does the work."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


def rle_from_masks(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Encode masks as COCO compressed RLE.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N dicts with ``size`` [H, W] and ``counts`` as text, ready for JSON.
    """
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if len(masks) else []
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def rle_from_ids(instance_ids: NDArray[Any], count: int) -> list[dict[str, Any]]:
    """Encode the instances 1..count of an (H, W) id map as COCO compressed RLE."""
    column_major = np.asfortranarray(instance_ids)
    rles = []
    for index in range(1, count + 1):
        rle = coco_mask.encode(np.asfortranarray(column_major == index, dtype=np.uint8))
        rles.append({"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")})
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
        ValueError: the segmentation is empty, of an unknown form, or of another size.
    """
    rle = _rle_from_segmentation(segmentation, height, width)
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"mask of size {list(rle['size'])} in an image of size {[height, width]} (height, width)")
    decoded: NDArray[np.bool_] = coco_mask.decode(rle).astype(bool)
    return decoded


def _rle_from_segmentation(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        return coco_mask.frPyObjects(segmentation, *segmentation["size"])
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str | bytes):
        return segmentation
    polygons = [p for p in segmentation if len(p) >= 6] if isinstance(segmentation, list) else []
    if not polygons:
        raise ValueError("segmentation is neither RLE nor a polygon of three points or more")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def mask_iou(predictions: Sequence[dict[str, Any]], ground_truths: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Compute intersection over union of RLE masks of one image.

    Returns:
        (P, G) for P predictions and G ground truths.
    """
    if not predictions or not ground_truths:
        return np.zeros((len(predictions), len(ground_truths)))
    crowd = [0] * len(ground_truths)
    overlap: NDArray[np.float64] = coco_mask.iou(list(predictions), list(ground_truths), crowd)
    return overlap
