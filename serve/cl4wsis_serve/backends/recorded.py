"""A backend that replays recorded outputs, for tests of everything around the graph."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cl4wsis_serve.backends.base import Device, Outputs


class RecordedBackend:
    """Answer the i-th image with the i-th recording, across batches, and start over at the end.

    Args:
        recordings: one dict per image, the graph's outputs without the batch axis; all with the same names.
    """

    name = "recorded"
    device: Device = "cpu"

    def __init__(self, recordings: Sequence[Outputs]) -> None:
        if not recordings:
            raise ValueError("at least one recording is needed")
        self._recordings = list(recordings)
        self.batches: list[NDArray[np.uint8]] = []
        """The batches that were asked for, in order."""

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Return the next recordings as one batch."""
        start = sum(len(batch) for batch in self.batches)
        self.batches.append(images)
        chosen = [self._recordings[(start + i) % len(self._recordings)] for i in range(len(images))]
        return {name: np.stack([recording[name] for recording in chosen]) for name in self._recordings[0]}
