"""What a loader hands to a phase: images, tags and, in supervised steps, instance ids.

    B = images, N = instance slots

Center heatmaps, offsets and semantic targets are made from the ids on the training device; they would be far larger
than the images themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_LABEL = -1
"""Label of a slot that holds no instance."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One augmented image.

    Attributes:
        image: (3, H, W) uint8 RGB.
        image_labels: (num_classes,) float32 0/1.
        instance_ids: (H, W) int32, 0 none; None in weakly supervised steps.
        labels: (N,) int64, class of id ``i + 1``; None in weakly supervised steps.
        void: (H, W) bool, pixels of which nobody knows what they show; None if there are none.
        proposals: (H, W) int32, class-agnostic proposals, 0 none; None where the plan has none.
    """

    image: Tensor
    image_labels: Tensor
    instance_ids: Tensor | None = None
    labels: Tensor | None = None
    void: Tensor | None = None
    proposals: Tensor | None = None


@dataclass(eq=False)  # not frozen: Fabric's mixed precision replaces the fields of its own copy
class Batch:
    """A training batch.

    Attributes:
        images: (B, 3, H, W) uint8 RGB, H = W = crop size.
        image_labels: (B, num_classes) float32 0/1, the tags of the whole image that this step may see, over all classes
            seen so far; entries of old classes are 0 unless the plan gives them.
        instance_ids: (B, H, W) int32, 0 none; None in weakly supervised steps. An id outside the crop has no pixel.
        labels: (B, N) int64, class of id ``i + 1``, -1 in unused slots; None in weakly supervised steps.
        void: (B, H, W) bool, pixels to leave out of the supervised losses (VOC's void, COCO's crowds); no instance
            lies there. None if there are none.
        proposals: (B, H, W) int32, class-agnostic mask proposals that follow the augmentation, numbered as in their
            file from 1, 0 none; in weakly supervised steps of plans that name a folder of them, None otherwise.
    """

    images: Tensor
    image_labels: Tensor
    instance_ids: Tensor | None = None
    labels: Tensor | None = None
    void: Tensor | None = None
    proposals: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy every tensor to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy every tensor to page-locked memory; called by the loader when there is a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (self.images, self.image_labels, self.instance_ids, self.labels, self.void, self.proposals)
        return Batch(*(None if tensor is None else function(tensor) for tensor in tensors))  # type: ignore[arg-type]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size; labels are padded to the longest row."""
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        image_labels=torch.stack([sample.image_labels for sample in samples]),
        instance_ids=_stack([sample.instance_ids for sample in samples]),
        labels=_pad([sample.labels for sample in samples]),
        void=_stack_void(samples),
        proposals=_stack([sample.proposals for sample in samples]),
    )


def _stack_void(samples: Sequence[Sample]) -> Tensor | None:
    """Stack what is void; an image without any has an empty mask beside those that have."""
    if all(sample.void is None for sample in samples):
        return None
    nothing = torch.zeros(samples[0].image.shape[-2:], dtype=torch.bool)
    return torch.stack([nothing if sample.void is None else sample.void for sample in samples])


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _pad(rows: Sequence[Tensor | None]) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    return torch.nn.utils.rnn.pad_sequence(present, batch_first=True, padding_value=PADDING_LABEL)
