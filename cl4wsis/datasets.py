"""Images and what is known about them: COCO instances, image tags, drawn shapes, and checks before training.

A later step sees tags alone: nothing here opens an instances file unless masks are asked for.

Annotations are in pixels of the stored image. Crowd regions (``iscrowd``) stand for no countable object: they are
neither instances nor tags, in training and evaluation alike, and their pixels are background. Where masks overlap, the
smaller one lies in front, so that a tie is not lost in the person who wears it.

A file name is relative to the folder ``images`` of its source. A name that begins with the name of that folder
(``train/a.jpg`` with ``images/train``) is found as well.
"""

import csv
import difflib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from cl4wsis.errors import DataError
from cl4wsis.images import read_image
from cl4wsis.masks import mask_from_segmentation
from cl4wsis.shapes import DrawnPicture, check_shape_names, draw_evaluation_picture, draw_training_picture
from cl4wsis.tasks import CocoData, ImageSource, Plan, ShapesData

logger = logging.getLogger(__name__)

_LISTED_PROBLEMS = 20
_MIN_BOX_SIDE = 1.0  # px; an annotation is valid if both sides of its box are longer (as published)
_CSV_HEADERS = {"file", "file_name", "filename", "image", "image_name", "name", "path"}


class Picture(Protocol):
    """An image and the classes it holds."""

    @property
    def name(self) -> str:
        """Unique within its source."""

    @property
    def tags(self) -> frozenset[str]:
        """Names of all classes in the image, those foreign to the plan included."""

    def read(self) -> NDArray[np.uint8]:
        """Return the image, (H, W, 3) uint8 RGB."""


class MaskedPicture(Picture, Protocol):
    """An image whose instances are known."""

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return instance_ids (H, W) int32 and labels (N,) int32; a label is a position in ``class_names``."""


@dataclass(frozen=True, slots=True)
class TaggedImage:
    """An image file and the classes it is said to hold."""

    name: str
    """File name as written in the annotations."""
    path: Path
    tags: frozenset[str]

    def read(self) -> NDArray[np.uint8]:
        """Read the file as (H, W, 3) uint8 RGB.

        Raises:
            DataError: the file is missing or damaged.
        """
        return read_image(self.path)


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image file and its instances; crowd regions are left out."""

    name: str
    """File name as written in the annotations."""
    path: Path
    height: int
    width: int
    class_names: tuple[str, ...]
    """(N,) class of each instance, in file order."""
    segmentations: tuple[Any, ...]
    """(N,) COCO polygons or RLE; decoded on demand."""
    has_valid_box: bool
    """Whether at least one box is longer than 1 px on both sides."""

    @property
    def tags(self) -> frozenset[str]:
        """Names of the classes of its instances."""
        return frozenset(self.class_names)

    def read(self) -> NDArray[np.uint8]:
        """Read the file as (H, W, 3) uint8 RGB.

        Raises:
            DataError: the file is missing or damaged, or is not of the annotated size.
        """
        image = read_image(self.path)
        if image.shape[:2] != (self.height, self.width):
            raise DataError(
                f"{self.path}: is {image.shape[1]}x{image.shape[0]} px (width x height), but annotated as "
                f"{self.width}x{self.height}; use the very file that was annotated, and store it without EXIF rotation"
            )
        return image

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Draw the id map of the instances of some classes; the smaller mask lies in front.

        Args:
            class_names: the classes wanted; a label is the position in this list.

        Returns:
            instance_ids (H, W) int32, 0 none, and labels (N,) int32 of ids 1..N. A hidden instance keeps its label.

        Raises:
            DataError: a mask cannot be decoded or has another size than the image.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        kept = [row for row, name in enumerate(self.class_names) if name in label_of]
        masks = [self._decode(row) for row in kept]
        instance_ids = np.zeros((self.height, self.width), np.int32)
        for index in np.argsort([-int(mask.sum()) for mask in masks], kind="stable").tolist():
            instance_ids[masks[index]] = index + 1
        return instance_ids, np.array([label_of[self.class_names[row]] for row in kept], dtype=np.int32)

    def mask_problems(self, class_names: Iterable[str]) -> list[str]:
        """Describe what is wrong with the masks of some classes; empty if nothing is."""
        wanted = set(class_names)
        problems = []
        for row, name in enumerate(self.class_names):
            if name in wanted:
                try:
                    self._decode(row)
                except DataError as error:
                    problems.append(str(error))
        return problems

    def _decode(self, row: int) -> NDArray[np.bool_]:
        try:
            return mask_from_segmentation(self.segmentations[row], self.height, self.width)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.name}: mask of '{self.class_names[row]}': {error}") from error


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """One image and its true instances, restricted to the classes seen so far.

    Attributes:
        name: unique within its set.
        image: (H, W, 3) uint8 RGB.
        instance_ids: (H, W) int32; 0 none, ``i + 1`` belongs to ``labels[i]``.
        labels: (N,) int32; every instance has at least one pixel.
    """

    name: str
    image: NDArray[np.uint8]
    instance_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class EvaluationSet(Sequence[EvaluationSample]):
    """All evaluation images of a plan; each is read when it is asked for.

    Args:
        size: number of images.
        picture_at: returns the picture at a position.
        class_names: classes seen so far, in label order; other objects are background.
    """

    def __init__(self, size: int, picture_at: Callable[[int], MaskedPicture], class_names: Sequence[str]) -> None:
        self._positions = range(size)
        self._picture_at = picture_at
        self._class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> EvaluationSample: ...
    @overload
    def __getitem__(self, index: slice) -> "EvaluationSet": ...
    def __getitem__(self, index: int | slice) -> "EvaluationSample | EvaluationSet":
        if isinstance(index, slice):
            positions = self._positions[index]
            return EvaluationSet(len(positions), lambda i: self._picture_at(positions[i]), self._class_names)
        picture = self._picture_at(self._positions[index])
        instance_ids, labels = _without_hidden(*picture.rasterize(self._class_names))
        return EvaluationSample(picture.name, picture.read(), instance_ids, labels)


def _without_hidden(
    instance_ids: NDArray[np.int32], labels: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Drop instances without a visible pixel and close the gaps in the ids."""
    visible = np.bincount(instance_ids.reshape(-1), minlength=len(labels) + 1)[1:] > 0
    new_ids = np.zeros(len(labels) + 1, np.int32)
    new_ids[1:][visible] = np.arange(1, visible.sum() + 1, dtype=np.int32)
    return new_ids[instance_ids], labels[visible]


# --- what a plan needs ---


def load_evaluation_set(plan: Plan, step: int) -> EvaluationSet:
    """List the evaluation images of a plan as they are judged after a step.

    All images are kept; objects of classes that come later, or belong to no step, count as background.

    Raises:
        DataError: there are no evaluation instances, they cannot be read, or they lack a class seen so far.
    """
    seen_names = plan.split(step).seen_names
    if isinstance(plan.data, ShapesData):
        shapes = plan.data
        check_shape_names(plan.class_names)
        return EvaluationSet(shapes.num_val, lambda index: draw_evaluation_picture(plan, shapes, index), seen_names)
    images = _evaluation_images(plan, plan.data, step)
    return EvaluationSet(len(images), images.__getitem__, seen_names)


def _evaluation_images(plan: Plan, data: CocoData, step: int) -> list[AnnotatedImage]:
    source = data.evaluation_source
    if source.instances is None:
        raise DataError(f"plan '{plan.name}': evaluation needs masks, but data.val names no 'instances' file")
    images, category_names = _read_coco(source.instances, source.images)
    _require_classes(plan.split(step).seen_names, category_names, source.instances)
    return images


def load_tagged_pictures(plan: Plan, step: int) -> list[Picture]:
    """List all training images of a step's source with their tags; no masks are read.

    Raises:
        DataError: the source has no tags file, it cannot be read, or it lacks a class of the step.
    """
    if isinstance(plan.data, ShapesData):
        return [*_draw_training_set(plan, plan.data, step)]
    source = plan.data.source(step)
    if source.tags is None:
        raise DataError(
            f"plan '{plan.name}': step {step} learns from image tags, but its source names no 'tags' file; "
            f"write one ({{file: [class names]}} as JSON, or CSV) and set data.train.tags or data.steps.{step}.tags"
        )
    images = read_tags(source.tags, source.images)
    _require_classes(plan.steps[step], _occurring_classes(images), source.tags)
    return list(images)


def load_masked_pictures(plan: Plan, step: int) -> list[MaskedPicture]:
    """List all training images of a step's source with their instances; masks are decoded on demand.

    With ``joint`` training these are the sources of all steps so far, each once. Images without a valid annotation (no
    box with both sides longer than 1 px) are left out.

    Raises:
        DataError: a source has no instances file, it cannot be read, or it lacks a class of its steps.
    """
    steps = range(step + 1) if plan.recipe.method == "joint" else (step,)
    if isinstance(plan.data, ShapesData):
        return [picture for source_step in steps for picture in _draw_training_set(plan, plan.data, source_step)]
    class_names: dict[ImageSource, list[str]] = {}
    for source_step in steps:
        class_names.setdefault(plan.data.source(source_step), []).extend(plan.steps[source_step])
    images: list[AnnotatedImage] = []
    for source, names in class_names.items():
        if source.instances is None:
            raise DataError(
                f"plan '{plan.name}': step {step} learns from masks of {', '.join(names)}, but their source names no "
                f"'instances' file; set data.train.instances, or that of data.steps, to a COCO instances JSON"
            )
        read = read_instances(source.instances, source.images)
        _require_classes(names, _occurring_classes(read), source.instances)
        images += read
    return [image for image in images if image.has_valid_box]


def _draw_training_set(plan: Plan, data: ShapesData, step: int) -> list[DrawnPicture]:
    check_shape_names(plan.class_names)
    return [draw_training_picture(plan, data, step, index) for index in range(data.num_train)]


def _occurring_classes(images: Iterable[Picture]) -> set[str]:
    return {name for image in images for name in image.tags}


def _require_classes(class_names: Iterable[str], found: Iterable[str], file: Path) -> None:
    """Check that classes of a plan occur in a source.

    Raises:
        DataError: one line per class that does not occur, with the nearest name that does.
    """
    known = sorted(set(found))
    _raise_problems([_describe_missing(name, known, file) for name in class_names if name not in known])


def _describe_missing(name: str, known: Sequence[str], file: Path) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"{file}: class '{name}' of the plan does not occur; did you mean '{by_lower[near[0]]}'?"
    listed = ", ".join(known[:_LISTED_PROBLEMS]) + (", ..." if len(known) > _LISTED_PROBLEMS else "")
    return f"{file}: class '{name}' of the plan does not occur; it has: {listed or 'no classes at all'}"


# --- checks before training ---


def check_sources(plan: Plan, step: int) -> None:
    """Check everything that training a step and evaluating it will read, so that nothing fails halfway.

    Annotation files are read, every image that the step or the evaluation uses is decoded once, and so is every mask
    that they use. The masks of a step that learns from tags are not touched.

    Raises:
        DataError: the first problems, one per line with file and reason, and the number of the others.
    """
    plan.split(step)
    if isinstance(plan.data, ShapesData):
        check_shape_names(plan.class_names)
        return
    _raise_problems([*_check_training_source(plan, plan.data, step), *_check_evaluation_source(plan, plan.data, step)])


def _check_training_source(plan: Plan, data: CocoData, step: int) -> list[str]:
    folder_problems = _check_folder(data.source(step))
    if folder_problems:
        return folder_problems
    split, method = plan.split(step), plan.recipe.method
    wanted = set(split.seen_names if method == "joint" else split.new_names)
    try:
        if step > 0 and method == "cl4wsis":
            return _check_pictures([image for image in load_tagged_pictures(plan, step) if image.tags & wanted], ())
        return _check_pictures([image for image in load_masked_pictures(plan, step) if image.tags & wanted], wanted)
    except DataError as error:
        return _problems_of(error)


def _check_evaluation_source(plan: Plan, data: CocoData, step: int) -> list[str]:
    folder_problems = _check_folder(data.evaluation_source)
    if folder_problems:
        return folder_problems
    try:
        images = _evaluation_images(plan, data, step)
    except DataError as error:
        return _problems_of(error)
    return _check_pictures(images, plan.split(step).seen_names)


def _check_folder(source: ImageSource) -> list[str]:
    return [] if source.images.is_dir() else [f"{source.images}: is not a folder of images"]


def _check_pictures(images: Sequence[Picture], mask_classes: Iterable[str]) -> list[str]:
    """Decode images, and the masks of some classes, on all cores; return what went wrong."""
    wanted = frozenset(mask_classes)

    def check(image: Picture) -> list[str]:
        problems = image.mask_problems(wanted) if isinstance(image, AnnotatedImage) else []
        try:
            image.read()
        except DataError as error:
            problems += _problems_of(error)
        return problems

    logger.info("checking %d images", len(images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for problems in pool.map(check, images) for problem in problems]


class _ProblemsError(DataError):
    """Several problems at once; the message lists the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        rest = len(problems) - _LISTED_PROBLEMS
        more = [f"... and {rest} more problems"] if rest > 0 else []
        super().__init__("\n".join([*problems[:_LISTED_PROBLEMS], *more]))
        self.problems = list(problems)


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise _ProblemsError(problems)


def _problems_of(error: DataError) -> list[str]:
    return error.problems if isinstance(error, _ProblemsError) else [str(error)]


# --- readers ---


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class _CocoAnnotation(BaseModel):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float] | None = None  # x, y, width, height
    segmentation: Any = None
    iscrowd: int = 0


class _CocoCategory(BaseModel):
    id: int | str
    name: str


class _CocoFile(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]
    categories: list[_CocoCategory]


def read_instances(path: Path, folder: Path) -> list[AnnotatedImage]:
    """Read a COCO instances file; masks stay encoded.

    Args:
        path: of the JSON file.
        folder: to which its file names are relative.

    Returns:
        All its images in file order, those without an instance included.

    Raises:
        DataError: the file is missing or no COCO file, an id or file name is listed twice, or an annotation refers to
            an image or category that does not exist. All such problems are listed.
    """
    return _read_coco(path, folder)[0]


def _read_coco(path: Path, folder: Path) -> tuple[list[AnnotatedImage], list[str]]:
    """Read a COCO instances file; return its images and the names of its categories."""
    coco = _parse_coco(path)
    names = {category.id: category.name for category in coco.categories}
    annotations: dict[int | str, list[_CocoAnnotation]] = {image.id: [] for image in coco.images}
    problems = [
        *_describe_repeated("category id", (category.id for category in coco.categories)),
        *_describe_repeated("image id", (image.id for image in coco.images)),
        *_describe_repeated("file name", (image.file_name for image in coco.images)),
    ]
    for index, annotation in enumerate(coco.annotations):
        if annotation.image_id not in annotations:
            problems.append(f"annotations.{index}: there is no image with id {annotation.image_id!r}")
        elif annotation.category_id not in names:
            problems.append(f"annotations.{index}: there is no category with id {annotation.category_id!r}")
        else:
            annotations[annotation.image_id].append(annotation)
    _raise_problems([f"{path}: {problem}" for problem in problems])
    images = [_annotated_image(image, annotations[image.id], names, folder) for image in coco.images]
    return images, list(names.values())


def _parse_coco(path: Path) -> _CocoFile:
    try:
        return _CocoFile.model_validate_json(_read_bytes(path))
    except ValidationError as error:
        located = [(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
        raise _ProblemsError([": ".join(filter(None, (str(path), *found))) for found in located]) from error


def _annotated_image(
    image: _CocoImage, annotations: Iterable[_CocoAnnotation], names: dict[int | str, str], folder: Path
) -> AnnotatedImage:
    instances = [annotation for annotation in annotations if not annotation.iscrowd]
    return AnnotatedImage(
        name=image.file_name,
        path=_image_path(folder, image.file_name),
        height=image.height,
        width=image.width,
        class_names=tuple(names[annotation.category_id] for annotation in instances),
        segmentations=tuple(annotation.segmentation for annotation in instances),
        has_valid_box=any(_is_valid(annotation) for annotation in instances),
    )


def _is_valid(annotation: _CocoAnnotation) -> bool:
    """Tell whether both sides of the box are longer than 1 px; an annotation without a box gets its mask's benefit."""
    return annotation.bbox is None or min(annotation.bbox[2:]) > _MIN_BOX_SIDE


def read_tags(path: Path, folder: Path) -> list[TaggedImage]:
    """Read the class names of images.

    JSON is ``{file: [class names]}``. CSV has one line per image: the file, then its class names in further columns, or
    several in one column with semicolons between them; a header line is recognised by its first cell (``file``,
    ``filename``, ``image``, ...).

    Args:
        path: of the file; ``.csv`` is CSV, everything else JSON.
        folder: to which its file names are relative.

    Returns:
        All its images in file order, those without a tag included.

    Raises:
        DataError: the file is missing, of another form, or lists an image twice.
    """
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    rows = _parse_csv_tags(text) if path.suffix.lower() == ".csv" else _parse_json_tags(text, path)
    _raise_problems([f"{path}: {problem}" for problem in _describe_repeated("file name", (name for name, _ in rows))])
    return [TaggedImage(name, _image_path(folder, name), frozenset(tags)) for name, tags in rows]


def _parse_json_tags(text: str, path: Path) -> list[tuple[str, list[str]]]:
    try:
        # Pairs rather than a dict: a file that is listed twice must not get lost.
        rows = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise DataError(f"{path}: expected one JSON object {{file: [class names]}}")
    _raise_problems(
        [
            f"{path}: '{name}': expected a list of class names, found {str(tags)[:60]!r}"
            for name, tags in rows
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags)
        ]
    )
    return rows


def _parse_csv_tags(text: str) -> list[tuple[str, list[str]]]:
    lines = [[cell.strip() for cell in line] for line in csv.reader(text.splitlines())]
    lines = [line for line in lines if line and line[0]]
    if lines and lines[0][0].lower() in _CSV_HEADERS:
        lines = lines[1:]
    return [(line[0], [tag.strip() for cell in line[1:] for tag in cell.split(";") if tag.strip()]) for line in lines]


def _describe_repeated(what: str, values: Iterable[int | str]) -> list[str]:
    return [f"{what} {value!r} is listed {count} times" for value, count in Counter(values).items() if count > 1]


def _image_path(folder: Path, name: str) -> Path:
    path = folder / name
    if PurePosixPath(name).parts[:1] == (folder.name,) and not path.exists():
        return folder.parent / name
    return path


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
