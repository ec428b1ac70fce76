"""What every backend does: run one graph of a bundle on a batch. All else (reading, fitting, restoring) is shared.

Legend: B images in the batch, K instance slots, C channels with background, H x W network input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import Bundle, Manifest, TensorInfo, VariantInfo
from cl4wsis.errors import BackendError

INPUT_NAME = "images"
INSTANCE_NAMES = ("instance_ids", "labels", "scores", "areas", "boxes")
"""Outputs of a graph that groups, ``post`` ``graph``."""
MAP_NAMES = ("semantic_logits", "center_heatmap", "offset_map")
"""Outputs of a graph whose grouping is left to the host, ``post`` ``host``."""

Device = Literal["cpu", "cuda"]
Outputs = dict[str, NDArray[Any]]
TensorShapes = Mapping[str, tuple[str, Sequence[int | str | None]]]
"""Type (as NumPy spells it) and shape of tensors by name; sizes that are free are no numbers."""


class Backend(Protocol):
    """A loaded graph on one device. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """Name of the backend, as given to ``Predictor.open``."""
        ...

    @property
    def device(self) -> Device:
        """What it runs on."""
        ...

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph.

        Args:
            images: (B, H, W, 3) uint8 RGB, contiguous.

        Returns:
            For a graph that groups: ``instance_ids`` (B, H, W) uint8 with 0 for none and ``k + 1`` for slot ``k``,
            ``labels`` (B, K) int32, ``scores`` (B, K) float32, ``areas`` (B, K) int32, ``boxes`` (B, K, 4) float32
            xyxy; unused slots are zero. For one that leaves that to the host: ``semantic_logits`` (B, C, hs, ws),
            ``center_heatmap`` (B, C - 1, hc, wc) and ``offset_map`` (B, 2, hc, wc), float32. The arrays are valid until
            the next run.

        Raises:
            BackendError: the runtime failed; the message says what to do.
        """
        ...


@dataclass(frozen=True)
class BackendRequest:
    """A graph to be loaded.

    Attributes:
        name: of the backend; some modules implement several.
        bundle: the opened bundle.
        variant: which of its graphs.
        threads: CPU threads within one operator; all usable cores when not given.
    """

    name: str
    bundle: Bundle
    variant: VariantInfo
    threads: int | None = None

    @property
    def model(self) -> Path:
        """The ``.onnx`` file."""
        return self.bundle.path_of(self.variant)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about its graphs."""
        return self.bundle.manifest

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs of the graph."""
        return self.manifest.outputs if self.variant.post == "graph" else self.manifest.maps

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs that :meth:`Backend.run` returns."""
        return INSTANCE_NAMES if self.variant.post == "graph" else MAP_NAMES


def check_graph(request: BackendRequest, inputs: TensorShapes, outputs: TensorShapes) -> None:
    """Compare names, types and fixed sizes of a loaded graph with what the manifest says about them.

    Args:
        request: what was to be loaded.
        inputs: of the graph as the runtime has loaded it.
        outputs: likewise.

    Raises:
        BackendError: they differ.
    """
    for kind, stated, found in (
        ("input", request.manifest.inputs, inputs),
        ("output", request.outputs, outputs),
    ):
        for tensor in stated:
            if tensor.name not in found:
                raise BackendError(
                    f"{request.model}: the graph has no {kind} '{tensor.name}'; it has {', '.join(found)}"
                )
            dtype, shape = found[tensor.name]
            if dtype != tensor.dtype or not _shapes_agree(shape, tensor.shape):
                raise BackendError(
                    f"{request.model}: {kind} '{tensor.name}' is {dtype} {_text(shape)} in the graph, "
                    f"but {tensor.dtype} {_text(tensor.shape)} in the manifest; export the step again"
                )


def check_outputs(outputs: Outputs, batch: int, size: tuple[int, int], num_classes: int) -> None:
    """Check what came out of a graph that groups before anyone relies on it.

    Args:
        outputs: by name.
        batch: number of images B that went in.
        size: (height, width) of the network input.
        num_classes: number of foreground classes in the manifest.

    Raises:
        BackendError: an output is missing, has another shape, or names a class that the manifest does not know.
    """
    _check_names(outputs, INSTANCE_NAMES)
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


def check_maps(outputs: Outputs, batch: int, num_classes: int) -> None:
    """Check what came out of a graph that leaves the grouping to the host.

    Args:
        outputs: by name.
        batch: number of images B that went in.
        num_classes: number of foreground classes in the manifest.

    Raises:
        BackendError: a map is missing, or has another number of images or channels than the manifest has classes.
    """
    _check_names(outputs, MAP_NAMES)
    for name, channels in zip(MAP_NAMES, (num_classes + 1, num_classes, 2), strict=True):
        shape = outputs[name].shape
        if len(shape) != 4 or shape[:2] != (batch, channels):
            raise BackendError(
                f"graph output '{name}' has shape {shape}, expected ({batch}, {channels}, h, w) for the {num_classes} "
                "classes of the manifest; export it again"
            )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_names(outputs: Outputs, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in outputs]
    if missing:
        raise BackendError(f"the graph gave no {', '.join(missing)}; it gave {', '.join(outputs) or 'nothing'}")


def _shapes_agree(found: Sequence[int | str | None], stated: Sequence[int | str]) -> bool:
    """Compare two shapes, letting a size that one of them leaves open pass."""
    if len(found) != len(stated):
        return False
    fixed = ((a, b) for a, b in zip(found, stated, strict=True) if isinstance(a, int) and isinstance(b, int))
    return all(a == b for a, b in fixed)


def _text(shape: Sequence[int | str | None]) -> str:
    return f"({', '.join(str(side) for side in shape)})"
