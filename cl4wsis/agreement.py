"""Compare answers: how alike are what two runtimes say about the same images?

Legend: N instances of the answer, M instances of the reference.
"""

import numpy as np
from numpy.typing import NDArray

from cl4wsis.checks import Agreement
from cl4wsis.instances import Instances
from cl4wsis.metrics import overlap_matrix

_MATCH_IOU = 0.5  # above it, an instance has at most one partner, as instances of one side do not overlap


class AgreementCounter:
    """Adds up the agreement over images, one at a time."""

    def __init__(self) -> None:
        self._images = 0
        self._instances = self._answered = 0
        self._matched = 0
        self._overlap = 0.0
        self._foreground = self._differing = 0
        self._score_error = 0.0

    def add(self, answer: Instances, reference: Instances) -> None:
        """Compare one image.

        Raises:
            ValueError: the two are of different sizes.
        """
        if answer.instance_ids.shape != reference.instance_ids.shape:
            raise ValueError(
                f"answers of sizes {answer.instance_ids.shape} and {reference.instance_ids.shape} cannot be compared"
            )
        overlaps = overlap_matrix(answer, reference)  # (N, M)
        overlaps[answer.labels[:, None] != reference.labels[None]] = 0
        rows, columns = np.nonzero(overlaps > _MATCH_IOU)
        self._images += 1
        self._instances += len(reference)
        self._answered += len(answer)
        self._matched += len(rows)
        self._overlap += float(overlaps[rows, columns].sum())
        foreground, differing = _count_pixels(answer, reference, rows, columns)
        self._foreground += foreground
        self._differing += differing
        errors = np.abs(answer.scores[rows] - reference.scores[columns])
        self._score_error = max(self._score_error, float(errors.max(initial=0)))

    def result(self) -> Agreement:
        """Return the agreement over all images that were added."""
        both_sides = self._instances + self._answered
        return Agreement(
            images=self._images,
            instances=self._instances,
            differing_pixels=self._differing / self._foreground if self._foreground else 0.0,
            matched=2 * self._matched / both_sides if both_sides else 1.0,
            mask_iou=self._overlap / self._matched if self._matched else 1.0,
            score_error=self._score_error,
        )


def _count_pixels(
    answer: Instances, reference: Instances, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> tuple[int, int]:
    """Count pixels that are foreground on either side, and those of them at which instances are not partners."""
    partner = np.full(len(answer) + 1, -1, np.int32)
    partner[0] = 0
    partner[rows + 1] = columns + 1
    foreground = (answer.instance_ids > 0) | (reference.instance_ids > 0)
    return int(foreground.sum()), int((partner[answer.instance_ids] != reference.instance_ids).sum())
