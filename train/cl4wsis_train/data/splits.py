"""The images of a step, as the loaders take them; which those are is decided in ``cl4wsis.datasets``."""

from collections.abc import Sequence
from typing import TypeVar

from cl4wsis.datasets import (
    MaskedPicture,
    PhaseName,
    Picture,
    StepView,
    build_step_view,
    load_masked_pictures,
    load_tagged_pictures,
)
from cl4wsis.errors import DataError
from cl4wsis.tasks import Plan

__all__ = ["PhaseName", "StepView", "build_step_view", "select_masked_pictures", "select_weak_pictures"]

PictureT = TypeVar("PictureT", bound=Picture)


def select_weak_pictures(plan: Plan, step: int, view: StepView) -> list[Picture]:
    """List the images of a step that learns from tags; no mask is opened.

    Raises:
        DataError: the tags cannot be read, or no image belongs to the step.
    """
    return _select(plan, step, view, load_tagged_pictures(plan, step))


def select_masked_pictures(plan: Plan, step: int, view: StepView) -> list[MaskedPicture]:
    """List the images of a step that learns from masks.

    Raises:
        DataError: the instances cannot be read, or no image belongs to the step.
    """
    return _select(plan, step, view, load_masked_pictures(plan, step))


def _select(plan: Plan, step: int, view: StepView, pictures: Sequence[PictureT]) -> list[PictureT]:
    selected = [picture for picture in pictures if view.selects(picture.tags)]
    if not selected:
        without = f" and none of {', '.join(view.exclude_names)}" if view.exclude_names else ""
        raise DataError(
            f"plan '{plan.name}': none of {len(pictures)} images belongs to step {step} under '{plan.selection}' "
            f"selection: each must hold one of {', '.join(view.select_names)}{without}"
        )
    return selected
