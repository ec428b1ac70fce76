"""The Semantic Boundaries Dataset: VOC images with masks of more of them, and without void.

    img/<name>.jpg     images
    inst/<name>.mat    GTinst.Segmentation: object numbers, GTinst.Categories: their classes 1 to 20
    cls/<name>.mat     GTcls.CategoriesPresent: the classes of the image
    train.txt val.txt  lists of names

The masks may also come as COCO JSON. Its category ids are those of VOC, whatever its categories are called, and often
they have no names at all. Steps that learn from tags take class names alone out of these files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.datasets.coco import AnnotatedImage, list_instances
from cl4wsis.datasets.indexed import (
    VOC_CLASSES,
    VOID_VALUE,
    IndexedImage,
    list_all,
    list_from_tags,
    measure_objects,
    read_name_list,
)
from cl4wsis.datasets.pictures import VOID_ID, Listing, TaggedImage
from cl4wsis.errors import DataError, require
from cl4wsis.images import read_bytes
from cl4wsis.tasks import SbdSource


@dataclass(frozen=True)
class SbdImage(IndexedImage):
    """An SBD image and its instance file."""

    instance_file: Path

    def read_map(self) -> NDArray[np.int32]:
        """Read the map of objects: (H, W) int32, 0 background, ``VOID_ID`` void.

        Raises:
            DataError: the file is missing or damaged.
        """
        return _read_objects(self.instance_file)[0]


def list_sbd_instances(source: SbdSource) -> Listing[SbdImage] | Listing[AnnotatedImage]:
    """Look through the masks of a list of images.

    Raises:
        DataError: the list, or the COCO JSON, cannot be read.
        MissingExtraError: ``.mat`` files are to be read, and scipy is not installed.
    """
    if source.instances is not None:
        names_by_id: Mapping[int | str, str] = {label + 1: name for label, name in enumerate(VOC_CLASSES)}
        return list_instances(source.instances, source.folder / "img", source.rename, names_by_id)
    require("sbd")
    file = _list_file(source)

    def read(name: str) -> SbdImage:
        instance_file = source.folder / "inst" / f"{name}.mat"
        objects, categories = _read_objects(instance_file)
        values, has_valid_box = measure_objects(objects)
        names = _names_of([_category_of(value, categories, instance_file) for value in values], instance_file)
        path = _image_path(source, name)
        return SbdImage(
            name=path.name,
            path=path,
            height=objects.shape[0],
            width=objects.shape[1],
            class_names=tuple(source.rename.get(name, name) for name in names),
            values=tuple(values),
            has_valid_box=has_valid_box,
            instance_file=instance_file,
        )

    return list_all(file, read_name_list(file), read, source.rename)


def list_sbd_tags(source: SbdSource) -> Listing[TaggedImage]:
    """Read the classes of a list of images: from a tags file, the COCO JSON, or the class files.

    Raises:
        DataError: the list, the tags file or the COCO JSON cannot be read.
        MissingExtraError: ``.mat`` files are to be read, and scipy is not installed.
    """
    if source.tags is not None:
        file = _list_file(source)
        names = read_name_list(file)
        return list_from_tags(source.tags, file, names, lambda name: _image_path(source, name), source.rename)
    if source.instances is not None:
        listing = list_sbd_instances(source)
        images = [TaggedImage(image.name, image.path, image.tags) for image in listing.pictures]
        return Listing(images, listing.file, listing.class_names, listing.problems)
    require("sbd")
    file = _list_file(source)

    def read(name: str) -> TaggedImage:
        class_file = source.folder / "cls" / f"{name}.mat"
        categories = np.atleast_1d(_read_struct(class_file, "GTcls", "CategoriesPresent")[0]).reshape(-1)
        names = _names_of([int(category) for category in categories], class_file)
        path = _image_path(source, name)
        return TaggedImage(path.name, path, frozenset(source.rename.get(name, name) for name in names))

    return list_all(file, read_name_list(file), read, source.rename)


def _list_file(source: SbdSource) -> Path:
    return source.folder / f"{source.split}.txt"


def _image_path(source: SbdSource, name: str) -> Path:
    return source.folder / "img" / f"{name}.jpg"


def _names_of(categories: list[int], file: Path) -> list[str]:
    wrong = [category for category in categories if not 1 <= category <= len(VOC_CLASSES)]
    if wrong:
        raise DataError(f"{file}: names class {wrong[0]}; expected are classes 1 to 20")
    return [VOC_CLASSES[category - 1] for category in categories]


def _category_of(value: int, categories: NDArray[Any], file: Path) -> int:
    if value > len(categories):
        raise DataError(f"{file}: object {value} of the mask has no category; {len(categories)} are given")
    return int(categories[value - 1])


def _read_objects(file: Path) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Read the map of objects and the category of each."""
    segmentation, categories = _read_struct(file, "GTinst", "Segmentation", "Categories")
    objects = np.asarray(segmentation)
    if objects.ndim != 2 or objects.dtype.kind not in "iu":
        raise DataError(
            f"{file}: GTinst.Segmentation is {objects.shape} {objects.dtype}; expected whole numbers (H, W)"
        )
    categories = np.atleast_1d(categories).reshape(-1)
    objects = objects.astype(np.int32)
    if len(categories) < VOID_VALUE:
        objects[objects == VOID_VALUE] = VOID_ID
    return objects, categories


def _read_struct(file: Path, struct: str, *fields: str) -> list[Any]:
    """Read fields of a struct of a MATLAB file; such files hold arrays and text, and nothing that could run."""
    from io import BytesIO

    from scipy.io import loadmat

    content = read_bytes(file)
    try:
        found = loadmat(BytesIO(content), variable_names=[struct], simplify_cells=True)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise DataError(f"{file}: is no MATLAB file that can be read: {error}") from error
    values = found.get(struct)
    if not isinstance(values, dict) or any(field not in values for field in fields):
        raise DataError(f"{file}: has no {struct} with {' and '.join(fields)}; expected a file of SBD")
    return [values[field] for field in fields]
