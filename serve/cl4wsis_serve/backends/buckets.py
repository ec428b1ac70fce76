"""Batches of few sizes: what has fixed shapes and addresses can be captured once and launched again.

A batch of three runs as four, its last image repeated in the rest and dropped from the results.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cl4wsis_serve.backends.base import Outputs

BUCKETS = (1, 2, 4, 8)
"""Batch sizes that are run; others are filled up to the next of them."""


def usable_buckets(min_batch: int, max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes at which an engine is run: the buckets within its range, and its largest batch."""
    return tuple(sorted({*(size for size in BUCKETS if min_batch <= size <= max_batch), max_batch}))


def choose_bucket(batch: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds a batch.

    Raises:
        ValueError: none does, or the batch is empty.
    """
    if batch < 1:
        raise ValueError(f"a batch holds at least one image, found {batch}")
    for bucket in sorted(buckets):
        if batch <= bucket:
            return bucket
    raise ValueError(f"a batch of {batch} is larger than the largest bucket {max(buckets)}")


def fill_batch(target: NDArray[np.uint8], images: NDArray[np.uint8]) -> None:
    """Copy images into a buffer of as many or more rows; the last image is repeated in the rest."""
    target[: len(images)] = images
    target[len(images) :] = images[-1]


def run_in_parts(run: Callable[[NDArray[np.uint8]], Outputs], images: NDArray[np.uint8], largest: int) -> Outputs:
    """Run images in parts of at most the largest bucket, and join the results.

    Args:
        run: runs one part.
        images: (B, H, W, 3) uint8.
        largest: images of a part.
    """
    if len(images) <= largest:
        return run(images)
    parts = [run(images[start : start + largest]) for start in range(0, len(images), largest)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
