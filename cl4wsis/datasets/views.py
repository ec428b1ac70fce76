"""Which images belong to a step, and what the step may know about them.

Source: CL4WSIS (ICCV 2023), experimental setup; the ``overlap`` and ``disjoint`` protocols of continual segmentation.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cl4wsis.tasks import Plan

PhaseName = Literal["base", "semantic", "instance"]


@dataclass(frozen=True)
class StepView:
    """What a step may know about an image.

    Attributes:
        class_names: all classes seen so far, in label order.
        mask_names: classes whose masks it sees; empty if it learns from tags.
        tag_names: classes whose tags it sees.
        select_names: an image belongs to the step if it holds one of these classes ...
        exclude_names: ... and none of these.
    """

    class_names: tuple[str, ...]
    mask_names: tuple[str, ...]
    tag_names: tuple[str, ...]
    select_names: tuple[str, ...]
    exclude_names: tuple[str, ...]

    def selects(self, tags: frozenset[str]) -> bool:
        """Tell whether an image with these classes belongs to the step."""
        return not tags.isdisjoint(self.select_names) and tags.isdisjoint(self.exclude_names)

    def image_labels(self, tags: frozenset[str]) -> NDArray[np.float32]:
        """Return (num_classes,) float32: 1 for the classes in the image that the step sees, 0 for all others."""
        visible = tags.intersection(self.tag_names)
        return np.array([name in visible for name in self.class_names], dtype=np.float32)


def build_step_view(plan: Plan, step: int, phase: PhaseName) -> StepView:
    """Work out what a step may know.

    Masks are visible in phase ``base`` alone: of the step's own classes, or with ``joint`` training of all classes seen
    so far. Tags are visible for the same classes, and for all seen classes if the plan gives them. Under ``overlap`` an
    image belongs to a step if it holds one of its classes; ``disjoint`` also excludes images with a class that a later
    step adds. Classes that no step adds are background throughout.

    Raises:
        ValueError: the phase does not exist in this step: a later step has masks only for the supervised baselines.
    """
    split = plan.split(step)
    method = plan.recipe.method
    supervised = phase == "base"
    if supervised != plan.learns_from_masks(step):
        raise ValueError(f"step {step} of plan '{plan.name}' with method '{method}' has no phase '{phase}'")
    current_names = split.seen_names if method == "joint" else split.new_names
    later_names = tuple(name for name in plan.class_names if name not in split.seen_names)
    return StepView(
        class_names=split.seen_names,
        mask_names=current_names if supervised else (),
        tag_names=split.seen_names if plan.all_seen_labels else current_names,
        select_names=current_names,
        exclude_names=later_names if plan.selection == "disjoint" else (),
    )
