"""COCO instances files, as of COCO itself, of many annotation tools, and of SBD's conversion for COCO readers.

Annotations are in pixels of the image as it is shown: upright, EXIF orientation applied.
"""

import codecs
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from cl4wsis.datasets.pictures import VOID_ID, Listing, MaskFinding, is_valid_box, read_of_size
from cl4wsis.datasets.problems import ProblemsError
from cl4wsis.errors import DataError
from cl4wsis.images import read_bytes
from cl4wsis.masks import mask_from_segmentation
from cl4wsis.tasks import class_name

_KEPT_LISTINGS = 4
_BORDER_TOLERANCE = 1.0  # px; tools write polygons that run along, or just beyond, the outer edge


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image file and its instances. Crowd regions are kept apart: they are neither instances nor tags."""

    name: str
    """File name as written in the annotations."""
    path: Path
    height: int
    width: int
    class_names: tuple[str, ...]
    """(N,) class of each instance, in file order."""
    segmentations: tuple[Any, ...]
    """(N,) COCO polygons, as arrays, or RLE; decoded on demand."""
    ids: tuple[int | str | None, ...]
    """(N,) annotation id of each instance, for messages."""
    crowd_names: tuple[str, ...]
    """Class of each crowd region."""
    crowd_segmentations: tuple[Any, ...]
    crowd_ids: tuple[int | str | None, ...]
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
        return read_of_size(self.path, self.height, self.width)

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Draw the id map of the instances of some classes; the smaller mask lies in front, the last of equal ones.

        Args:
            class_names: the classes wanted; a label is the position in this list.

        Returns:
            instance_ids (H, W) int32, 0 none, ``VOID_ID`` where a crowd of a wanted class is bare of instances, and
            labels (N,) int32 of ids 1..N. A hidden instance keeps its label.

        Raises:
            DataError: a mask cannot be decoded or has another size than the image.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        instance_ids = np.zeros((self.height, self.width), np.int32)
        for name, segmentation, number in zip(self.crowd_names, self.crowd_segmentations, self.crowd_ids, strict=True):
            if name in label_of:
                instance_ids[self._decode(self._call(name, number), segmentation)] = VOID_ID
        kept = [row for row, name in enumerate(self.class_names) if name in label_of]
        masks = [
            self._decode(self._call(self.class_names[row], self.ids[row]), self.segmentations[row]) for row in kept
        ]
        areas = [int(mask.sum()) for mask in masks]
        for index in sorted(range(len(masks)), key=lambda row: -areas[row]):
            instance_ids[masks[index]] = index + 1
        return instance_ids, np.array([label_of[self.class_names[row]] for row in kept], dtype=np.int32)

    def check_masks(self, class_names: Iterable[str]) -> list[MaskFinding]:
        """Decode the masks of some classes, crowds included, and tell what is odd about them."""
        wanted = set(class_names)
        names = (*self.class_names, *self.crowd_names)
        segmentations = (*self.segmentations, *self.crowd_segmentations)
        findings = []
        for name, segmentation, number in zip(names, segmentations, (*self.ids, *self.crowd_ids), strict=True):
            if name in wanted:
                findings += self._check_mask(self._call(name, number), segmentation)
        return findings

    def _call(self, name: str, number: int | str | None) -> str:
        """Name a mask so that it is found in the file."""
        return f"{self.name}: mask of '{name}'" + ("" if number is None else f" (annotation {number})")

    def _check_mask(self, where: str, segmentation: Any) -> list[MaskFinding]:
        try:
            mask = self._decode(where, segmentation)
        except DataError as error:
            return [MaskFinding("unreadable mask", str(error))]
        found = []
        if not mask.any():
            found.append(MaskFinding("empty mask", f"{where}: covers no pixel; the object is left out"))
        if isinstance(segmentation, list):
            points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in segmentation])
            outside = max(float((points - (self.width, self.height)).max()), float(-points.min()))
            if outside > _BORDER_TOLERANCE:
                text = f"{where}: reaches {outside:.0f} px beyond the image of {self.width}x{self.height} px; cut off"
                found.append(MaskFinding("mask out of bounds", text))
        return found

    def _decode(self, where: str, segmentation: Any) -> NDArray[np.bool_]:
        try:
            return mask_from_segmentation(segmentation, self.height, self.width)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: {error}") from error


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class _CocoAnnotation(BaseModel):
    id: int | str | None = None
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float] | None = None  # x, y, width, height
    segmentation: Any = None
    iscrowd: int = 0


class _CocoCategory(BaseModel):
    id: int | str
    name: str | None = None


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
    return list(list_instances(path, folder).checked())


def list_instances(
    path: Path,
    folder: Path,
    rename: Mapping[str, str] | None = None,
    names_by_id: Mapping[int | str, str] | None = None,
) -> Listing[AnnotatedImage]:
    """Read a COCO instances file with its contradictions; masks stay encoded.

    Checks, phases and the evaluation read the same files, and COCO's own takes half a minute. So the listings of the
    last few files are kept, until the file changes.

    Args:
        path: of the JSON file.
        folder: to which its file names are relative.
        rename: class names that the plan calls otherwise.
        names_by_id: class names by category id, instead of those in the file.

    Raises:
        DataError: the file is missing, or is no COCO file.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    names = tuple(sorted((rename or {}).items()))
    numbers = None if names_by_id is None else tuple(sorted(names_by_id.items()))
    return _list_instances(path, (state.st_mtime_ns, state.st_size), folder, names, numbers)


@functools.lru_cache(maxsize=_KEPT_LISTINGS)
def _list_instances(
    path: Path,
    _state: tuple[int, int],
    folder: Path,
    rename: tuple[tuple[str, str], ...],
    names_by_id: tuple[tuple[int | str, str], ...] | None,
) -> Listing[AnnotatedImage]:
    coco = _parse_coco(path)
    names, problems = _category_names(coco, None if names_by_id is None else dict(names_by_id), dict(rename))
    annotations: dict[int | str, list[_CocoAnnotation]] = {image.id: [] for image in coco.images}
    problems += [
        *describe_repeated("category id", (category.id for category in coco.categories)),
        *describe_repeated("image id", (image.id for image in coco.images)),
        *describe_repeated("file name", (str(PurePosixPath(image.file_name)) for image in coco.images)),
    ]
    of_image = Counter((found.id, found.image_id, found.category_id) for found in coco.annotations)
    problems += [
        f"annotation {number!r} of image {image!r} is listed {count} times"
        for (number, image, _), count in of_image.items()
        if count > 1 and number is not None
    ]
    for index, annotation in enumerate(coco.annotations):
        if annotation.image_id not in annotations:
            problems.append(f"annotations.{index}: there is no image with id {annotation.image_id!r}")
        elif annotation.category_id not in names:
            problems.append(f"annotations.{index}: there is no category with id {annotation.category_id!r}")
        else:
            annotations[annotation.image_id].append(annotation)
    images = tuple(_annotated_image(image, annotations[image.id], names, folder) for image in coco.images)
    return Listing(images, path, tuple(names.values()), [f"{path}: {problem}" for problem in problems])


def _category_names(
    coco: _CocoFile, names_by_id: Mapping[int | str, str] | None, rename: Mapping[str, str]
) -> tuple[dict[int | str, str], list[str]]:
    given = {category.id: category.name for category in coco.categories} if names_by_id is None else dict(names_by_id)
    known = {key: name and class_name(name) for key, name in given.items()}
    nameless = [key for key, name in known.items() if name is None]
    problems = [f"category {key!r} has no name; add one, or set kind = 'sbd' for SBD's file" for key in nameless]
    return {key: rename.get(name, name) for key, name in known.items() if name is not None}, problems


def _parse_coco(path: Path) -> _CocoFile:
    try:
        return _CocoFile.model_validate_json(read_bytes(path).removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        located = [(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
        raise ProblemsError([": ".join(filter(None, (str(path), *found))) for found in located]) from error


def _annotated_image(
    image: _CocoImage, annotations: Iterable[_CocoAnnotation], names: Mapping[int | str, str], folder: Path
) -> AnnotatedImage:
    annotations = list(annotations)
    instances = [annotation for annotation in annotations if not annotation.iscrowd]
    crowds = [annotation for annotation in annotations if annotation.iscrowd]
    return AnnotatedImage(
        name=image.file_name,
        path=image_path(folder, image.file_name),
        height=image.height,
        width=image.width,
        class_names=tuple(names[annotation.category_id] for annotation in instances),
        segmentations=tuple(_compact(annotation.segmentation) for annotation in instances),
        ids=tuple(annotation.id for annotation in instances),
        crowd_names=tuple(names[annotation.category_id] for annotation in crowds),
        crowd_segmentations=tuple(_compact(annotation.segmentation) for annotation in crowds),
        crowd_ids=tuple(annotation.id for annotation in crowds),
        has_valid_box=any(_is_valid(annotation) for annotation in instances),
    )


def _compact(segmentation: Any) -> Any:
    """Keep polygons as arrays, which take a third of the memory of lists; what is no polygon is refused in decoding."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        polygons = [np.array(polygon) for polygon in segmentation]
    except ValueError:
        return segmentation
    return polygons if all(polygon.dtype.kind in "iuf" for polygon in polygons) else segmentation


def _is_valid(annotation: _CocoAnnotation) -> bool:
    """Tell whether the box is valid; an annotation without a box gets its mask's benefit."""
    return annotation.bbox is None or is_valid_box(*annotation.bbox[2:])


def describe_repeated(what: str, values: Iterable[int | str]) -> list[str]:
    """Describe values that occur more than once."""
    return [f"{what} {value!r} is listed {count} times" for value, count in Counter(values).items() if count > 1]


def image_path(folder: Path, name: str) -> Path:
    """Find an image by a name that is relative to its folder, or begins with the folder's own name."""
    path = folder / name
    if PurePosixPath(name).parts[:1] == (folder.name,) and not path.exists():
        return folder.parent / name
    return path
