"""Fitting an image into the network input, and the way back; one rule for training, evaluation, export and runtime.

The image is scaled by one factor so that it just fits, laid into the upper left corner and padded right and below.

Convention. Pixel ``i`` covers the interval [i, i + 1) and its center lies at i + 0.5 (half-pixel convention). Maps
of ids are sampled where pixel centers fall, in integer arithmetic without rounding errors: pixel ``i`` of ``n`` reads
pixel ``floor((i + 0.5) * m / n)`` of ``m``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.instances import Instances


@dataclass(frozen=True)
class FitTransform:
    """How an image of one size lies in a frame of another.

    Attributes:
        source_size: (height, width) of the image, px.
        frame_size: (height, width) of the frame, px.
        content_size: (height, width) the image has in the frame, px; the rest, right and below, is padding.
    """

    source_size: tuple[int, int]
    frame_size: tuple[int, int]
    content_size: tuple[int, int]

    @classmethod
    def fit(cls, source_size: tuple[int, int], frame_size: tuple[int, int]) -> "FitTransform":
        """Find the largest size at which an image fits with its aspect kept (to the nearest pixel, at least one).

        Args:
            source_size: (height, width) of the image, px.
            frame_size: (height, width) of the frame, px.

        Raises:
            ValueError: a side is not positive.
        """
        if min(*source_size, *frame_size) < 1:
            raise ValueError(f"sides must be positive, found image {source_size} and frame {frame_size}")
        (source_height, source_width), (height, width) = source_size, frame_size
        scale = min(height / source_height, width / source_width)
        content_height = min(max(round(source_height * scale), 1), height)
        content_width = min(max(round(source_width * scale), 1), width)
        return cls(source_size, frame_size, (content_height, content_width))

    @property
    def scale(self) -> tuple[float, float]:
        """Frame pixels per source pixel, (y, x); the two differ by the rounding of the content size only."""
        return self.content_size[0] / self.source_size[0], self.content_size[1] / self.source_size[1]

    def fit_image(self, image: NDArray[np.uint8], pad_value: Sequence[int]) -> NDArray[np.uint8]:
        """Lay an image into the frame: averaged over areas when it shrinks, bilinear when it grows.

        Args:
            image: (h, w, 3) uint8 of the source size.
            pad_value: 3 values for the padding.

        Returns:
            (H, W, 3) uint8.
        """
        self._check(image.shape[:2], self.source_size, "image")
        height, width = self.content_size
        frame = np.empty((*self.frame_size, 3), np.uint8)
        frame[:height, width:] = pad_value
        frame[height:] = pad_value
        frame[:height, :width] = _resize(image, self.content_size)
        return frame

    def fit_ids(self, instance_ids: NDArray[Any]) -> NDArray[Any]:
        """Lay an (h, w) id map into the frame, nearest pixel; the padding is 0."""
        self._check(instance_ids.shape, self.source_size, "id map")
        frame = np.zeros(self.frame_size, instance_ids.dtype)
        frame[: self.content_size[0], : self.content_size[1]] = _sample(
            instance_ids, self.source_size, self.content_size
        )
        return frame

    def restore_ids(self, instance_ids: NDArray[Any]) -> NDArray[Any]:
        """Bring an (H, W) id map of the frame back to (h, w) source pixels.

        Where the image had grown, this undoes :meth:`fit_ids` exactly.
        """
        self._check(instance_ids.shape, self.frame_size, "id map")
        content = instance_ids[: self.content_size[0], : self.content_size[1]]
        return _sample(content, self.content_size, self.source_size)

    @staticmethod
    def _check(found: tuple[int, ...], expected: tuple[int, int], name: str) -> None:
        if tuple(found) != tuple(expected):
            raise ValueError(f"{name} must be of size {tuple(expected)} (height, width), found {tuple(found)}")


def fit_image(
    image: NDArray[np.uint8], size: tuple[int, int], pad_value: Sequence[int]
) -> tuple[NDArray[np.uint8], FitTransform]:
    """Fit an image into a frame.

    Args:
        image: (h, w, 3) uint8.
        size: (height, width) of the frame, px.
        pad_value: 3 values for the padding right and below.

    Returns:
        The (height, width, 3) uint8 frame, and the transform that leads back.
    """
    transform = FitTransform.fit((image.shape[0], image.shape[1]), size)
    return transform.fit_image(image, pad_value), transform


def restore_instances(instances: Instances, transform: FitTransform, min_area: int = 0) -> Instances:
    """Bring instances found in the frame back to source pixels.

    Instances of which no pixel is left are dropped, and those of which the frame shows fewer than ``min_area`` pixels
    outside the padding: the grouping, which knows of no padding, would have dropped them. Boxes are measured anew.

    Args:
        instances: in pixels of the frame.
        transform: that of the image.
        min_area: of the grouping, pixels of the frame.
    """
    height, width = transform.content_size
    ids = instances.instance_ids
    if ids[height:].any() or ids[:height, width:].any():
        shown = np.bincount(ids[:height, :width].reshape(-1), minlength=len(instances) + 1)[1:]
        instances = instances.select(shown >= min_area)
    restored = Instances.from_ids(transform.restore_ids(instances.instance_ids), instances.labels, instances.scores)
    return restored.select(restored.boxes[:, 2] > 0)


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    import cv2

    shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=method), dtype=np.uint8)


def _sample(values: NDArray[Any], source: tuple[int, int], target: tuple[int, int]) -> NDArray[Any]:
    """Resample a map to the target size, each pixel reading the one its center falls into."""
    if source == target:
        return values
    rows, columns = (
        (2 * np.arange(new, dtype=np.int64) + 1) * old // (2 * new) for old, new in zip(source, target, strict=True)
    )
    return values[rows].take(columns, axis=1)
