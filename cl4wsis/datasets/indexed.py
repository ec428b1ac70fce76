"""Instances stored as maps of numbers, one per pixel, as PASCAL VOC and SBD do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cl4wsis.cores import usable_cores
from cl4wsis.datasets.coco import describe_repeated
from cl4wsis.datasets.pictures import VOID_ID, Listing, MaskFinding, PictureT, TaggedImage, is_valid_box, read_of_size
from cl4wsis.datasets.problems import problems_of
from cl4wsis.datasets.tags import read_tag_rows
from cl4wsis.errors import DataError
from cl4wsis.images import IMAGE_SUFFIXES, read_bytes
from cl4wsis.instances import boxes_from_ids

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes of PASCAL VOC and SBD; their numbers in masks are 1 to 20 in this order."""

VOID_VALUE = 255
"""Value of pixels that belong to nothing: VOC leaves a band of them around every object."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class IndexedImage(ABC):
    """An image file and the objects of its map. The map is read again when it is asked for.

    Attributes:
        name: file name of the image.
        path: of the image.
        height: of the map, px.
        width: of the map, px.
        class_names: (N,) class of each object.
        values: (N,) value of each object in the map.
        has_valid_box: whether at least one object is larger than 1 px on both sides.
    """

    name: str
    path: Path
    height: int
    width: int
    class_names: tuple[str, ...]
    values: tuple[int, ...]
    has_valid_box: bool

    @property
    def tags(self) -> frozenset[str]:
        """Names of the classes of its objects."""
        return frozenset(self.class_names)

    def read(self) -> NDArray[np.uint8]:
        """Read the image as (H, W, 3) uint8 RGB.

        Raises:
            DataError: the file is missing or damaged, or is not of the map's size.
        """
        return read_of_size(self.path, self.height, self.width)

    @abstractmethod
    def read_map(self) -> NDArray[np.int32]:
        """Read the map of objects: (H, W) int32, 0 background, ``VOID_ID`` void."""

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the id map of the objects of some classes; objects cannot overlap.

        Args:
            class_names: the classes wanted; a label is the position in this list.

        Returns:
            instance_ids (H, W) int32, 0 none, ``VOID_ID`` void, and labels (N,) int32 of ids 1..N.

        Raises:
            DataError: the map cannot be read.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        kept = [row for row, name in enumerate(self.class_names) if name in label_of]
        values = self.read_map()
        new_ids = np.zeros(max(int(values.max(initial=0)), *self.values, 0) + 2, np.int32)
        new_ids[VOID_ID] = VOID_ID  # the last entry
        new_ids[[self.values[row] for row in kept]] = np.arange(1, len(kept) + 1, dtype=np.int32)
        return new_ids[values], np.array([label_of[self.class_names[row]] for row in kept], dtype=np.int32)

    def check_masks(self, class_names: Iterable[str]) -> list[MaskFinding]:
        """Tell what is odd about the masks of some classes: nothing, for each has been looked at in listing them."""
        return []


def measure_objects(values: NDArray[np.int32]) -> tuple[list[int], bool]:
    """Find the objects of a map.

    Args:
        values: (H, W) int32, 0 background, negative void.

    Returns:
        The values that occur, rising, and whether one of their boxes is valid.
    """
    boxes = boxes_from_ids(np.maximum(values, 0), int(values.max(initial=0)))
    sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
    present = [value for value, (width, _) in enumerate(sides, start=1) if width]
    return present, any(is_valid_box(height, width) for width, height in sides)


def read_name_list(path: Path) -> list[str]:
    """Read a list of images: one per line, of which the first word counts, without folder and image ending.

    Raises:
        DataError: the list is missing, empty or names an image twice.
    """
    words = [line.split()[0] for line in read_bytes(path).decode("utf-8-sig", "replace").splitlines() if line.strip()]
    names = [_bare_name(word) for word in words]
    repeated = describe_repeated("image", names)
    if repeated or not names:
        raise DataError(f"{path}: {repeated[0] if repeated else 'names no image'}")
    return names


def _bare_name(file: str) -> str:
    """Return a name without folder and image ending; ``img.v2`` has none, and stays as it is."""
    path = Path(file)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def list_all(
    file: Path, names: Sequence[str], read: Callable[[str], PictureT], rename: Mapping[str, str]
) -> Listing[PictureT]:
    """Read what is known of every image, on all cores.

    Args:
        file: the list of images, for messages.
        names: of the images.
        read: makes a picture of a name, or raises ``DataError``.
        rename: class names that the plan calls otherwise.
    """

    def attempt(name: str) -> PictureT | list[str]:
        try:
            return read(name)
        except DataError as error:
            return problems_of(error)

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(attempt, names))
    problems = [problem for item in found if isinstance(item, list) for problem in item]
    pictures = [item for item in found if not isinstance(item, list)]
    return Listing(pictures, file, tuple(rename.get(name, name) for name in VOC_CLASSES), problems)


def list_from_tags(
    tags: Path, file: Path, names: Sequence[str], path_of: Callable[[str], Path], rename: Mapping[str, str]
) -> Listing[TaggedImage]:
    """Give the images of a list the classes a tags file names, by file name without folder and image ending.

    Raises:
        DataError: the tags cannot be read.
    """
    rows = {_bare_name(name): found for name, found in read_tag_rows(tags)}
    known = sorted({tag for found in rows.values() for tag in found})

    def read(name: str) -> TaggedImage:
        if name not in rows:
            raise DataError(
                f"{tags}: has no entry for '{name}' of {file}; an image without any class gets an empty one"
            )
        path = path_of(name)
        return TaggedImage(path.name, path, frozenset(rename.get(tag, tag) for tag in rows[name]))

    listing = list_all(file, names, read, rename)
    return Listing(listing.pictures, tags, tuple(rename.get(tag, tag) for tag in known), listing.problems)
