"""Which images the ranges of an INT8 network are measured on.

They are training images of the plan, taken in turns from every class the model knows: a new class with few images
counts as much as an old one with many, since the ranges of its activations are no less needed.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cl4wsis.datasets import Picture, load_masked_pictures, load_tagged_pictures
from cl4wsis.errors import DataError
from cl4wsis.tasks import Plan, ShapesData

logger = logging.getLogger(__name__)


def calibration_images(plan: Plan, step: int, count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Choose training images of all steps so far, balanced over their classes.

    Args:
        plan: that the step was trained by.
        step: of the model.
        count: number of images; fewer come back if there are fewer.
        seed: of the choice.

    Returns:
        (h, w, 3) uint8 RGB each. Images of a step that are not at hand any more are left out, with a message in the
        log.

    Raises:
        DataError: no image is at hand.
    """
    pictures = [picture for number in _sources(plan, step) for picture in _list_pictures(plan, number)]
    chosen = balanced_choice([picture.tags for picture in pictures], plan.split(step).seen_names, count, seed)
    if not chosen:
        raise DataError(f"plan '{plan.name}': no training image of its classes is at hand for the calibration")
    return [pictures[index].read() for index in chosen]


def _sources(plan: Plan, step: int) -> list[int]:
    """Return the steps up to this one whose images are not those of an earlier step as well."""
    if isinstance(plan.data, ShapesData):
        return list(range(step + 1))
    sources = [plan.data.source(number) for number in range(step + 1)]
    return [number for number, source in enumerate(sources) if source not in sources[:number]]


def _list_pictures(plan: Plan, step: int) -> Sequence[Picture]:
    try:
        return load_tagged_pictures(plan, step) if step else load_masked_pictures(plan, step)
    except DataError as error:
        logger.warning("calibrating without the images of step %d: %s", step, error)
        return ()


def balanced_choice(tags: Sequence[frozenset[str]], class_names: Sequence[str], count: int, seed: int) -> list[int]:
    """Choose images so that each class in turn gets one more, until there are enough.

    Args:
        tags: names of the classes in each image.
        class_names: classes to balance over.
        count: number of images wanted.
        seed: of the order within a class.

    Returns:
        Indices of at most ``count`` different images, in the order of their choice.
    """
    order = np.random.default_rng(seed).permutation(len(tags))
    waiting = {name: [int(index) for index in order if name in tags[index]] for name in class_names}
    chosen: dict[int, None] = {}
    while len(chosen) < count and any(waiting.values()):
        for name in class_names:
            fresh = [index for index in waiting[name] if index not in chosen]
            waiting[name] = fresh[1:]
            if fresh and len(chosen) < count:
                chosen[fresh[0]] = None
    return list(chosen)
