"""The pictures a plan needs: those of a step with tags or masks, and those it is measured on."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cl4wsis.datasets.coco import AnnotatedImage, list_instances
from cl4wsis.datasets.indexed import IndexedImage
from cl4wsis.datasets.pictures import EvaluationSet, Listing, MaskedPicture, Picture, TaggedImage, occurring_classes
from cl4wsis.datasets.problems import LISTED_PROBLEMS, raise_problems
from cl4wsis.datasets.sbd import list_sbd_instances, list_sbd_tags
from cl4wsis.datasets.tags import read_tags
from cl4wsis.datasets.voc import list_voc_instances, list_voc_tags
from cl4wsis.errors import DataError
from cl4wsis.shapes import DrawnPicture, check_shape_names, draw_evaluation_picture, draw_training_picture
from cl4wsis.tasks import FileData, FileSource, Plan, SbdSource, ShapesData, VocSource

MaskedListing = Listing[AnnotatedImage] | Listing[IndexedImage]


def load_evaluation_set(plan: Plan, step: int) -> EvaluationSet:
    """List the evaluation images of a plan as they are judged after a step.

    All images are kept; objects of classes that come later, or belong to no step, count as background, and so do void
    pixels and crowds.

    Raises:
        DataError: there are no evaluation instances, they cannot be read, or they lack a class seen so far.
    """
    seen_names = plan.split(step).seen_names
    if isinstance(plan.data, ShapesData):
        shapes = plan.data
        check_shape_names(plan.class_names)
        return EvaluationSet(shapes.num_val, lambda index: draw_evaluation_picture(plan, shapes, index), seen_names)
    listing = list_evaluation_pictures(plan, plan.data)
    images = listing.checked()
    raise_problems(missing_evaluation_classes(plan, plan.data, step, listing))
    return EvaluationSet(len(images), images.__getitem__, seen_names)


def load_tagged_pictures(plan: Plan, step: int) -> list[Picture]:
    """List all training images of a step's source with their tags; no masks are read.

    Raises:
        DataError: the source has no tags file, it cannot be read, or it lacks a class of the step.
    """
    if isinstance(plan.data, ShapesData):
        return [*draw_training_set(plan, plan.data, step)]
    listing = list_tagged_pictures(plan, plan.data.source(step), step)
    images = listing.checked()
    require_classes(plan.steps[step], occurring_classes(images), listing.file)
    return list(images)


def load_masked_pictures(plan: Plan, step: int) -> list[MaskedPicture]:
    """List all training images of a step's source with their instances; masks are decoded on demand.

    With ``joint`` training these are the sources of all steps so far, each once. Images without a valid annotation (no
    box with both sides longer than 1 px) are left out.

    Raises:
        DataError: a source has no instances, they cannot be read, or they lack a class of its steps.
    """
    if isinstance(plan.data, ShapesData):
        return [picture for number in plan.mask_steps(step) for picture in draw_training_set(plan, plan.data, number)]
    images: list[MaskedPicture] = []
    for source, names in sources_of_masks(plan, plan.data, step):
        listing = list_masked_pictures(plan, source, step, names)
        found = listing.checked()
        require_classes(names, occurring_classes(found), listing.file)
        images += [image for image in found if image.has_valid_box]
    return images


def draw_training_set(plan: Plan, data: ShapesData, step: int) -> list[DrawnPicture]:
    """Draw the training pictures of a step.

    Raises:
        DataError: a class of the plan is no shape.
    """
    check_shape_names(plan.class_names)
    return [draw_training_picture(plan, data, step, index) for index in range(data.num_train)]


def sources_of_masks(plan: Plan, data: FileData, step: int) -> list[tuple[FileSource, list[str]]]:
    """List the sources whose masks a step reads, each once, with the classes it should hold."""
    sources: list[tuple[FileSource, list[str]]] = []
    for number in plan.mask_steps(step):
        source = data.source(number)
        known = [names for other, names in sources if other == source]
        if known:
            known[0].extend(plan.steps[number])
        else:
            sources.append((source, list(plan.steps[number])))
    return sources


def list_masked_pictures(plan: Plan, source: FileSource, step: int, names: Sequence[str]) -> MaskedListing:
    """List the images of a source that a step learns from with masks.

    Raises:
        DataError: the source has no instances, or they cannot be read at all.
    """
    listing = _list_instances(source)
    if listing is None:
        own = isinstance(plan.data, FileData) and step in plan.data.steps
        raise DataError(
            f"plan '{plan.name}': step {step} learns from masks of {', '.join(names)}, but their source names no "
            f"'instances' file; set {f'data.steps.{step}' if own else 'data.train'}.instances to a COCO instances JSON"
        )
    return listing


def list_evaluation_pictures(plan: Plan, data: FileData) -> MaskedListing:
    """List the images a plan is measured on.

    Raises:
        DataError: there are no instances, or they cannot be read at all.
    """
    listing = _list_instances(data.evaluation_source)
    if listing is None:
        raise DataError(f"plan '{plan.name}': evaluation needs masks, but data.val names no 'instances' file")
    return listing


def _list_instances(source: FileSource) -> MaskedListing | None:
    if isinstance(source, VocSource):
        return list_voc_instances(source)
    if isinstance(source, SbdSource):
        return list_sbd_instances(source)
    return None if source.instances is None else list_instances(source.instances, source.images, source.rename)


def list_tagged_pictures(plan: Plan, source: FileSource, step: int) -> Listing[TaggedImage]:
    """List the images of a source that a step learns from with tags.

    Raises:
        DataError: the source has no tags, or they cannot be read at all.
    """
    if isinstance(source, VocSource):
        return list_voc_tags(source)
    if isinstance(source, SbdSource):
        return list_sbd_tags(source)
    if source.tags is None:
        raise DataError(
            f"plan '{plan.name}': step {step} learns from image tags, but its source names no 'tags' file; "
            f"write one ({{file: [class names]}} as JSON, or CSV) and set data.train.tags or data.steps.{step}.tags"
        )
    images = read_tags(source.tags, source.images, source.rename)
    return Listing(images, source.tags, tuple(sorted(occurring_classes(images))))


def missing_evaluation_classes(plan: Plan, data: FileData, step: int, listing: MaskedListing) -> list[str]:
    """Describe the classes seen so far that the evaluation images do not know, unless the plan allows for it."""
    seen_names = plan.split(step).seen_names
    if not data.val_lacks_classes:
        problems = describe_missing(seen_names, listing.class_names, listing.file)
        way_out = "; if it cannot be measured there, set data.val_lacks_classes = true"
        return [f"{problem}{way_out}" for problem in problems]
    if not set(seen_names).isdisjoint(listing.class_names):
        return []
    listed = ", ".join(seen_names[:LISTED_PROBLEMS]) + (", ..." if len(seen_names) > LISTED_PROBLEMS else "")
    return [f"{listing.file}: knows none of the classes seen in step {step} ({listed}); measure it on another data.val"]


def require_classes(class_names: Iterable[str], found: Iterable[str], file: Path) -> None:
    """Check that classes of a plan occur in a source.

    Raises:
        DataError: one line per class that does not occur, with the nearest name that does.
    """
    raise_problems(describe_missing(class_names, found, file))


def describe_missing(class_names: Iterable[str], found: Iterable[str], file: Path) -> list[str]:
    """Describe classes of a plan that do not occur in a source, each with the nearest name that does."""
    known = sorted(set(found))
    return [_describe_missing(name, known, file) for name in class_names if name not in known]


def _describe_missing(name: str, known: Sequence[str], file: Path) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"{file}: class '{name}' of the plan does not occur; did you mean '{by_lower[near[0]]}'?"
    listed = ", ".join(known[:LISTED_PROBLEMS]) + (", ..." if len(known) > LISTED_PROBLEMS else "")
    return f"{file}: class '{name}' of the plan does not occur; it has: {listed or 'no classes at all'}"
