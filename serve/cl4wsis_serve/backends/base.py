"""What every backend does: run the exported graph on a batch. All else (reading, fitting, restoring) is shared.

Legend: B images in the batch, K instance slots, H W network input.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import BackendError

INPUT_NAME = "images"
OUTPUT_NAMES = ("instance_ids", "labels", "scores", "areas", "boxes")

Outputs = dict[str, NDArray[Any]]


class Backend(Protocol):
    """A loaded graph on one device. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """Name of the backend, as given to ``Predictor.open``."""
        ...

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph.

        Args:
            images: (B, H, W, 3) uint8 RGB.

        Returns:
            ``instance_ids`` (B, H, W) uint8 with 0 for none and ``k + 1`` for slot ``k``, ``labels`` (B, K) int32,
            ``scores`` (B, K) float32, ``areas`` (B, K) int32, ``boxes`` (B, K, 4) float32 xyxy; unused slots are zero.

        Raises:
            BackendError: the runtime failed; the message says what to do.
        """
        ...


def check_outputs(outputs: Outputs, batch: int, size: tuple[int, int], num_classes: int) -> None:
    """Check what came out of a graph before anyone relies on it.

    Args:
        outputs: by name.
        batch: number of images B that went in.
        size: (height, width) of the network input.
        num_classes: number of foreground classes in the manifest.

    Raises:
        BackendError: an output is missing, has another shape, or names a class that the manifest does not know.
    """
    missing = [name for name in OUTPUT_NAMES if name not in outputs]
    if missing:
        raise BackendError(f"the graph gave no {', '.join(missing)}; it gave {', '.join(outputs) or 'nothing'}")
    slots = outputs["labels"].shape[-1]
    expected = {
        "instance_ids": (batch, *size),
        "labels": (batch, slots),
        "scores": (batch, slots),
        "areas": (batch, slots),
        "boxes": (batch, slots, 4),
    }
    for name, shape in expected.items():
        if outputs[name].shape != shape:
            raise BackendError(f"graph output '{name}' has shape {outputs[name].shape}, expected {shape}")
    labels = outputs["labels"]
    if labels.size and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise BackendError(
            f"the graph gave class {int(labels.max())}, but the manifest has {num_classes} classes; export it again"
        )
    if int(outputs["instance_ids"].max(initial=0)) > slots:
        raise BackendError(f"the graph gave instance {int(outputs['instance_ids'].max())} of {slots} slots")
