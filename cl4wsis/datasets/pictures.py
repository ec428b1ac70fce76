"""What a data set consists of: pictures, their instances, and the images a plan is measured on.

An id map may hold :data:`VOID_ID`: pixels of which nobody said what they show. They are VOC's void (255) and COCO's
crowd regions of a wanted class. Training on masks leaves them out of the loss; evaluation takes them for background, as
the publication's does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from cl4wsis.datasets.problems import raise_problems
from cl4wsis.errors import DataError
from cl4wsis.images import read_image
from cl4wsis.instances import Instances

VOID_ID = -1
"""Id of pixels that are neither an instance nor background."""

_MIN_BOX_SIDE = 1.0  # px; an annotation is valid if both sides of its box are longer (as published)


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

    @property
    def class_names(self) -> tuple[str, ...]:
        """(N,) class of each instance."""

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return instance_ids (H, W) int32 and labels (N,) int32; a label is a position in ``class_names``."""


PictureT = TypeVar("PictureT", bound=Picture, covariant=True)


@dataclass(frozen=True)
class Listing(Generic[PictureT]):
    """The pictures of a source, and what is wrong with those it should have as well.

    Attributes:
        pictures: that can be used.
        file: what was read, for messages.
        class_names: all classes the source can tell apart.
        problems: one line each.
    """

    pictures: Sequence[PictureT]
    file: Path
    class_names: tuple[str, ...]
    problems: list[str] = field(default_factory=list)

    def checked(self) -> Sequence[PictureT]:
        """Return the pictures if nothing is wrong.

        Raises:
            DataError: one line per problem.
        """
        raise_problems(self.problems)
        return self.pictures


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


@dataclass(frozen=True)
class MaskFinding:
    """Something about a mask that a person should know.

    Attributes:
        kind: ``unreadable mask``, ``empty mask`` or ``mask out of bounds``.
        message: names the image and the class.
    """

    kind: str
    message: str

    @property
    def is_broken(self) -> bool:
        """Whether training on it would fail."""
        return self.kind == "unreadable mask"


def read_of_size(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Read an image whose annotations are of a known size.

    Raises:
        DataError: the file is missing or damaged, or is of another size.
    """
    image = read_image(path)
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{path}: is {image.shape[1]}x{image.shape[0]} px (width x height), but annotated as "
            f"{width}x{height}; use the very file that was annotated, and store it without EXIF rotation"
        )
    return image


def is_valid_box(height: float, width: float) -> bool:
    """Tell whether both sides of a box are longer than 1 px; images need one such box to be trained on."""
    return min(height, width) > _MIN_BOX_SIDE


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

    def true_instances(self) -> Instances:
        """Return the objects in the form of predictions, with score 1."""
        return Instances.from_ids(self.instance_ids, self.labels, np.ones(len(self.labels), np.float32))


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
    """Drop void and instances without a visible pixel, and close the gaps in the ids."""
    instance_ids = np.maximum(instance_ids, 0)
    visible = np.bincount(instance_ids.reshape(-1), minlength=len(labels) + 1)[1:] > 0
    new_ids = np.zeros(len(labels) + 1, np.int32)
    new_ids[1:][visible] = np.arange(1, visible.sum() + 1, dtype=np.int32)
    return new_ids[instance_ids], labels[visible]


def occurring_classes(pictures: Iterable[Picture]) -> set[str]:
    """Return the classes of which at least one picture holds something."""
    return {name for picture in pictures for name in picture.tags}
