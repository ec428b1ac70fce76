"""The answer for one image: an id map, and one row per instance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.runs import boxes_of_runs, find_runs


@dataclass(frozen=True, eq=False)
class Instances:
    """Instances of one image, in pixels of that image.

    Attributes:
        instance_ids: (H, W) int32; 0 is none, ``i + 1`` belongs to row ``i``. Instances do not overlap.
        labels: (N,) int32, class number from 0.
        scores: (N,) float32.
        boxes: (N, 4) float32, xyxy; the right and lower edges lie behind the last pixel. An empty mask has a zero box.

    Raises:
        ValueError: a field has the wrong shape or type, or an id has no row.
    """

    instance_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]

    def __post_init__(self) -> None:
        count = len(self.labels)
        expected = {"labels": (count,), "scores": (count,), "boxes": (count, 4)}
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} must have shape {shape} to match labels, found {found}")
        if self.instance_ids.ndim != 2 or self.instance_ids.dtype != np.int32:
            raise ValueError(
                f"instance_ids must be (H, W) int32, found {self.instance_ids.shape} {self.instance_ids.dtype}"
            )
        low, high = (int(self.instance_ids.min()), int(self.instance_ids.max())) if self.instance_ids.size else (0, 0)
        if low < 0 or high > count:
            raise ValueError(f"instance_ids must lie in 0..{count} (0 is none), found {low}..{high}")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_ids(
        cls,
        instance_ids: NDArray[np.int32],
        labels: Sequence[int] | NDArray[Any],
        scores: Sequence[float] | NDArray[Any],
    ) -> "Instances":
        """Build instances from an id map and its rows; boxes are measured on the map.

        Args:
            instance_ids: (H, W), 0..N.
            labels: (N,) class numbers.
            scores: (N,).
        """
        return cls(
            instance_ids=np.ascontiguousarray(instance_ids, dtype=np.int32),
            labels=np.asarray(labels, dtype=np.int32).reshape(-1),
            scores=np.asarray(scores, dtype=np.float32).reshape(-1),
            boxes=boxes_from_ids(instance_ids, len(labels)),
        )

    @classmethod
    def from_slots(cls, outputs: Mapping[str, NDArray[Any]]) -> "Instances":
        """Take what a graph says about one image, unused slots included (:mod:`cl4wsis.grouping`, step 9).

        Args:
            outputs: ``instance_ids`` (H, W), and ``labels``, ``scores`` (K,) and ``boxes`` (K, 4) of K slots.
        """
        return cls(
            instance_ids=outputs["instance_ids"].astype(np.int32),
            labels=outputs["labels"].astype(np.int32),
            scores=outputs["scores"].astype(np.float32),
            boxes=outputs["boxes"].astype(np.float32),
        )

    @classmethod
    def empty(cls, height: int, width: int) -> "Instances":
        """Return the answer for an image in which nothing was found."""
        return cls.from_ids(np.zeros((height, width), np.int32), (), ())

    @cached_property
    def areas(self) -> NDArray[np.int32]:
        """(N,) pixels of each instance."""
        return np.bincount(self.instance_ids.reshape(-1), minlength=len(self) + 1)[1:].astype(np.int32)

    def masks(self) -> NDArray[np.bool_]:
        """Cut the id map into masks.

        Returns:
            (N, H, W) bool. This allocates N full images; prefer ``instance_ids`` where it serves.
        """
        ids = np.arange(1, len(self) + 1, dtype=np.int32)
        masks: NDArray[np.bool_] = self.instance_ids[None] == ids[:, None, None]
        return masks

    def select(self, keep: NDArray[Any]) -> "Instances":
        """Keep some instances.

        Args:
            keep: (N,) bool, or indices in the order wanted; -1 is the last, as everywhere in NumPy.

        Raises:
            ValueError: there is no instance of an index, or the mask has another length.
        """
        if keep.dtype == np.bool_ and len(keep) == len(self) and keep.all():
            return self
        try:
            rows = np.arange(len(self))[keep if keep.dtype == np.bool_ else np.asarray(keep, dtype=np.int64)]
        except IndexError as error:
            raise ValueError(f"cannot select from {len(self)} instances: {error}") from error
        new_ids = np.zeros(len(self) + 1, np.int32)
        new_ids[rows + 1] = np.arange(1, len(rows) + 1, dtype=np.int32)
        return Instances(new_ids[self.instance_ids], self.labels[rows], self.scores[rows], self.boxes[rows])

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: one dict per instance with a compressed RLE mask.

        Args:
            image_id: COCO image id.
            category_ids: COCO category id of each label; ``label + 1`` when not given.
        """
        from cl4wsis.masks import rle_from_ids

        rles = rle_from_ids(self.instance_ids, len(self))
        results = []
        for rle, label, score, (left, top, right, bottom) in zip(
            rles, self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
        ):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label + 1 if category_ids is None else category_ids[label],
                    "segmentation": rle,
                    "bbox": [left, top, right - left, bottom - top],
                    "score": score,
                }
            )
        return results


def boxes_from_ids(instance_ids: NDArray[Any], count: int) -> NDArray[np.float32]:
    """Measure the boxes of an id map.

    Args:
        instance_ids: (H, W), 0..count.
        count: number of instances N.

    Returns:
        (N, 4) float32 xyxy; zeros where an id does not occur.
    """
    return boxes_of_runs(find_runs(instance_ids), instance_ids.shape[1], count)
