"""Which images the ranges of an INT8 network are measured on.

They are training images of the plan, taken in turns from every class the model knows: a new class with few images
counts as much as an old one with many, since the ranges of its activations are no less needed.
"""

import logging
from collections.abc import Iterator, Sequence

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
        (h, w, 3) uint8 RGB each. Images that are not at hand any more are left out, with a message in the log.

    Raises:
        DataError: no image is at hand.
    """
    pictures = [picture for number in _sources(plan, step) for picture in _list_pictures(plan, number)]
    order = balanced_order([picture.tags for picture in pictures], plan.split(step).seen_names, seed)
    images: list[NDArray[np.uint8]] = []
    problems: list[DataError] = []
    while len(images) < count and (index := next(order, None)) is not None:
        try:
            images.append(pictures[index].read())
        except DataError as error:
            problems.append(error)
    if not images:
        raise DataError(
            f"plan '{plan.name}': no training image of its classes is at hand for the calibration"
            + (f"; {problems[0]}" if problems else "")
        )
    if problems:
        logger.warning("calibrating without %d images that cannot be read: %s", len(problems), problems[0])
    return images


def _sources(plan: Plan, step: int) -> list[int]:
    """Return the steps up to this one whose images are not those of an earlier step as well."""
    if isinstance(plan.data, ShapesData):
        return list(range(step + 1))
    sources = [plan.data.source(number) for number in range(step + 1)]
    return [number for number, source in enumerate(sources) if source not in sources[:number]]


def _list_pictures(plan: Plan, step: int) -> Sequence[Picture]:
    try:
        if not plan.learns_from_masks(step):
            return load_tagged_pictures(plan, step)
        # With joint training this would list the images of all steps so far, for every one of them.
        alone = plan.recipe.model_copy(update={"method": "fine-tune"})
        return load_masked_pictures(plan.model_copy(update={"recipe": alone}), step)
    except DataError as error:
        logger.warning("calibrating without the images of step %d: %s", step, error)
        return ()


def balanced_order(tags: Sequence[frozenset[str]], class_names: Sequence[str], seed: int) -> Iterator[int]:
    """Order images so that each class in turn gets one more.

    Args:
        tags: names of the classes in each image.
        class_names: classes to balance over.
        seed: of the order within a class.

    Yields:
        Indices of different images, until every image that holds one of the classes has come.
    """
    order = np.random.default_rng(seed).permutation(len(tags)).tolist()
    waiting = {name: iter([index for index in order if name in tags[index]]) for name in class_names}
    chosen: set[int] = set()
    while waiting:
        for name in class_names:
            index = next((index for index in waiting.get(name, ()) if index not in chosen), None)
            if index is None:
                waiting.pop(name, None)
                continue
            chosen.add(index)
            yield index
