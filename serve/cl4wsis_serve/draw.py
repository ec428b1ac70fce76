"""Overlay: what was found, drawn over the image so that a person can check it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cl4wsis.instances import Instances

_SMALLEST_SIDE = 512
"""Longer side below which an image is scaled up, px: labels would cover the objects otherwise."""
_LARGEST_MEDIAN = 31
"""Side of the largest median window that OpenCV 5 accepts, px."""
_ALL_LETTERS = 5
"""Version of OpenCV from which on it draws more than ASCII."""
_OPACITY = 0.45
_SHADES = (0.0, 0.35, -0.3, 0.55, -0.45)
"""Steps towards white (positive) or black (negative) that tell instances of one class apart."""


@dataclass(frozen=True)
class _Label:
    """A text and the rectangle it fills: left, top, right, bottom, px."""

    text: str
    color: tuple[int, int, int]
    box: tuple[int, int, int, int]
    baseline: int


def draw_overlay(
    image: NDArray[np.uint8],
    instances: Instances,
    class_names: Sequence[str],
    class_colors: Sequence[tuple[int, int, int]],
) -> NDArray[np.uint8]:
    """Draw translucent masks in class colors, their contours, and a label with the score.

    Instances of one class differ in shade. An image whose longer side is under 512 px is scaled up first.

    Args:
        image: (H, W, 3) uint8 RGB, not changed.
        instances: in pixels of the image.
        class_names: by label.
        class_colors: RGB by label.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        ValueError: the instances belong to an image of another size.
    """
    if instances.instance_ids.shape != image.shape[:2]:
        raise ValueError(
            f"instances of an image of size {instances.instance_ids.shape} cannot be drawn on one of {image.shape[:2]}"
        )
    factor = max(1, round(_SMALLEST_SIDE / max(image.shape[:2])))
    canvas, ids = _enlarge(image, instances.instance_ids, factor)
    colors = _instance_colors(instances, class_colors)
    thickness = max(1, round(max(canvas.shape[:2]) / 400))
    canvas = _blend_masks(canvas, ids, colors)
    canvas = _draw_contours(canvas, ids, colors, thickness)
    return _draw_labels(canvas, instances, ids, colors, class_names)


def _enlarge(
    image: NDArray[np.uint8], instance_ids: NDArray[np.int32], factor: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Scale image and ids up by a whole factor, the staircases of the ids rounded off."""
    if factor == 1:
        return image, instance_ids
    import cv2

    height, width = image.shape[0] * factor, image.shape[1] * factor
    canvas = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    ids = instance_ids.repeat(factor, axis=0).repeat(factor, axis=1)
    if ids.max() <= 255:
        # A median acts on ids as a majority vote wherever two regions meet.
        ids = cv2.medianBlur(ids.astype(np.uint8), min(2 * factor + 1, _LARGEST_MEDIAN)).astype(np.int32)
    return np.asarray(canvas, np.uint8), ids


def _instance_colors(instances: Instances, class_colors: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
    """Return (N + 1, 3) RGB: row 0 for no instance, then class colors, lifted and shaded by the rank in the class."""
    colors = np.zeros((len(instances) + 1, 3), np.float32)
    if len(instances):
        labels = instances.labels
        rank = np.tril(labels[:, None] == labels[None, :], -1).sum(1)
        shade = np.asarray(_SHADES, np.float32)[rank % len(_SHADES), None]
        base = 255 * np.sqrt(np.asarray(class_colors, np.float32)[labels] / 255)  # dark palettes would look like shadow
        colors[1:] = np.where(shade >= 0, base + (255 - base) * shade, base * (1 + shade))
    return colors


def _blend_masks(canvas: NDArray[np.uint8], ids: NDArray[np.int32], colors: NDArray[np.float32]) -> NDArray[np.uint8]:
    import cv2

    blended = canvas.copy()
    if len(colors) > 1:
        tinted = cv2.addWeighted(canvas, 1 - _OPACITY, colors.astype(np.uint8)[ids], _OPACITY, 0)
        np.copyto(blended, tinted, where=(ids > 0)[..., None])
    return blended


def _draw_contours(
    canvas: NDArray[np.uint8], ids: NDArray[np.int32], colors: NDArray[np.float32], thickness: int
) -> NDArray[np.uint8]:
    """Paint the inner rim of every instance in its color, and a thin white line where it meets something else."""
    import cv2

    edges = _edges(ids)
    rim = cv2.dilate(edges, np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)).astype(bool) & (ids > 0)
    line = edges.astype(bool) & (ids > 0)
    canvas = canvas.copy()
    canvas[rim] = colors.astype(np.uint8)[ids[rim]]
    canvas[line] = 255
    return canvas


def _edges(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Mark pixels of which the right, left, lower or upper neighbour has another id."""
    edges = np.zeros(ids.shape, np.uint8)
    beside, below = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    edges[:, 1:] |= beside
    edges[:, :-1] |= beside
    edges[1:] |= below
    edges[:-1] |= below
    return edges


def _draw_labels(
    canvas: NDArray[np.uint8],
    instances: Instances,
    ids: NDArray[np.int32],
    colors: NDArray[np.float32],
    class_names: Sequence[str],
) -> NDArray[np.uint8]:
    import cv2

    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(0.45, max(canvas.shape[:2]) / 1400)
    weight = max(1, round(scale * 1.6))
    canvas = np.ascontiguousarray(canvas)
    for label in _place_labels(canvas.shape, instances, ids, colors, class_names, (font, scale, weight)):
        left, top, right, bottom = label.box
        cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), label.color, cv2.FILLED)
        ink = (0, 0, 0) if _is_bright(label.color) else (255, 255, 255)
        origin = (left + _margin(scale), bottom - _margin(scale) - label.baseline // 2)
        cv2.putText(canvas, label.text, origin, font, scale, ink, weight, cv2.LINE_AA)
    return canvas


def _place_labels(
    shape: tuple[int, ...],
    instances: Instances,
    ids: NDArray[np.int32],
    colors: NDArray[np.float32],
    class_names: Sequence[str],
    font: tuple[int, float, int],
) -> list[_Label]:
    """Lay labels at the upper left corner of their instances, inside the image; one that hides another moves down."""
    import cv2

    from cl4wsis.instances import boxes_from_ids

    height, width = shape[:2]
    margin = _margin(font[1])
    placed: list[_Label] = []
    boxes = boxes_from_ids(ids, len(instances)).astype(int)
    for row in np.argsort(-instances.scores, kind="stable").tolist():
        if not boxes[row].any():
            continue
        text = f"{_drawable(class_names[instances.labels[row]])} {instances.scores[row]:.2f}"
        (text_width, text_height), baseline = cv2.getTextSize(text, *font)
        box_width, box_height = text_width + 2 * margin, text_height + baseline // 2 + 2 * margin
        left = int(np.clip(boxes[row, 0], 0, max(0, width - box_width)))
        top = int(np.clip(boxes[row, 1] - box_height, 0, max(0, height - box_height)))
        while top + box_height < height and _overlaps((left, top, left + box_width, top + box_height), placed):
            top += box_height // 2
        top = min(top, max(0, height - box_height))
        red, green, blue = (int(value) for value in colors[row + 1])
        box = (left, top, left + box_width, top + box_height)
        placed.append(_Label(text, (red, green, blue), box, baseline))
    return placed[::-1]


def _overlaps(box: tuple[int, int, int, int], placed: Sequence[_Label]) -> bool:
    left, top, right, bottom = box
    return any(
        left < other.box[2] and other.box[0] < right and top < other.box[3] and other.box[1] < bottom
        for other in placed
    )


def _margin(scale: float) -> int:
    return max(3, round(7 * scale))


def _drawable(text: str) -> str:
    """Return a name in letters that OpenCV can draw: before version 5 those of ASCII alone, so accents fall away."""
    import cv2

    if int(cv2.__version__.partition(".")[0]) >= _ALL_LETTERS:
        return text
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or text


def _is_bright(color: tuple[int, int, int]) -> bool:
    """Tell whether black text reads better than white (luma of ITU-R BT.601)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140
