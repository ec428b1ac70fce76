"""From an image to what the exported graph takes: (B, H, W, 3) uint8 RGB. Normalisation happens inside the graph."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cl4wsis.geometry import FitTransform, fit_image
from cl4wsis.steps import InputRule


def pad_color(mean: Iterable[float]) -> tuple[int, int, int]:
    """Return the color of the padding: the mean that the network subtracts, rounded, so that padding is about zero."""
    red, green, blue = (min(max(round(value), 0), 255) for value in mean)
    return red, green, blue


def prepare_image(image: NDArray[np.uint8], rule: InputRule) -> tuple[NDArray[np.uint8], FitTransform]:
    """Fit one image into the network input.

    Args:
        image: (h, w, 3) uint8 RGB.
        rule: the network's input size and mean.

    Returns:
        (H, W, 3) uint8 RGB, and the transform that leads back to source pixels.

    Raises:
        ValueError: the image has another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image must be (H, W, 3) uint8 RGB, found {image.shape} {image.dtype}")
    return fit_image(image, rule.size, pad_color(rule.mean))


def prepare_batch(images: Sequence[NDArray[np.uint8]], rule: InputRule) -> tuple[NDArray[np.uint8], list[FitTransform]]:
    """Fit several images, of any sizes, into one batch.

    Args:
        images: each (h, w, 3) uint8 RGB; at least one.
        rule: the network's input size and mean.

    Returns:
        (B, H, W, 3) uint8 RGB, and one transform per image.

    Raises:
        ValueError: there is no image, or one has another shape or type.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    frames, transforms = zip(*(prepare_image(image, rule) for image in images), strict=True)
    return stack_frames(frames), list(transforms)


def stack_frames(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Make a batch (B, H, W, 3) of frames; a single one is not copied."""
    return frames[0][None] if len(frames) == 1 else np.stack(frames)
