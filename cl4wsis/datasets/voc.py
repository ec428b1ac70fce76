"""PASCAL VOC 2012 as it is unpacked, and with the larger training list that comes with SBD's masks.

    JPEGImages/<name>.jpg          images
    ImageSets/Segmentation/*.txt   lists of names
    SegmentationClass/<name>.png   class numbers 1 to 20, 0 background, 255 void
    SegmentationObject/<name>.png  object numbers, 0 background, 255 void
    Annotations/<name>.xml         boxes; their class names are the tags, difficult objects included

An object has the class that most of its pixels have. Void pixels are no instance and no background.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

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
from cl4wsis.errors import DataError
from cl4wsis.images import read_bytes, read_index_map
from cl4wsis.tasks import VocSource


@dataclass(frozen=True)
class VocImage(IndexedImage):
    """A VOC image and its two masks."""

    class_mask: Path
    object_mask: Path

    def read_map(self) -> NDArray[np.int32]:
        """Read the map of objects: (H, W) int32, 0 background, ``VOID_ID`` void.

        Raises:
            DataError: a mask is missing or damaged, or the two are not of one size.
        """
        return _read_masks(self.class_mask, self.object_mask)[1]


def list_voc_instances(source: VocSource) -> Listing[VocImage]:
    """Look through the masks of a list of images.

    Raises:
        DataError: the list cannot be read.
    """
    file = _list_file(source)

    def read(name: str) -> VocImage:
        class_mask, object_mask = (
            source.folder / folder / f"{name}.png" for folder in (source.class_masks, source.object_masks)
        )
        classes, objects = _read_masks(class_mask, object_mask)
        values, has_valid_box = measure_objects(objects)
        labels = _majority_labels(classes, objects, values)
        wrong = [label for label in labels if not 1 <= label <= len(VOC_CLASSES)]
        if wrong:
            raise DataError(
                f"{class_mask}: an object of {object_mask.name} lies on class {wrong[0]}; expected are classes 1 to 20"
            )
        names = tuple(VOC_CLASSES[label - 1] for label in labels)
        path = _image_path(source, name)
        return VocImage(
            name=path.name,
            path=path,
            height=objects.shape[0],
            width=objects.shape[1],
            class_names=tuple(source.rename.get(name, name) for name in names),
            values=tuple(values),
            has_valid_box=has_valid_box,
            class_mask=class_mask,
            object_mask=object_mask,
        )

    return list_all(file, read_name_list(file), read, source.rename)


def list_voc_tags(source: VocSource) -> Listing[TaggedImage]:
    """Read the classes of a list of images from XML annotations or a tags file; no mask is opened.

    Raises:
        DataError: the list or the tags file cannot be read.
    """
    file = _list_file(source)
    names = read_name_list(file)
    if source.tags is not None:
        return list_from_tags(source.tags, file, names, lambda name: _image_path(source, name), source.rename)

    def read(name: str) -> TaggedImage:
        path = _image_path(source, name)
        tags = _xml_classes(source.folder / "Annotations" / f"{name}.xml")
        return TaggedImage(path.name, path, frozenset(source.rename.get(tag, tag) for tag in tags))

    return list_all(file, names, read, source.rename)


def _list_file(source: VocSource) -> Path:
    return source.folder / "ImageSets" / "Segmentation" / f"{source.split}.txt"


def _image_path(source: VocSource, name: str) -> Path:
    return source.folder / "JPEGImages" / f"{name}.jpg"


def _read_masks(class_mask: Path, object_mask: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Read class numbers and object numbers, both with ``VOID_ID`` where one of them is void."""
    classes, objects = (read_index_map(path).astype(np.int32) for path in (class_mask, object_mask))
    if classes.shape != objects.shape:
        (height, width), (found_height, found_width) = classes.shape, objects.shape
        raise DataError(
            f"{object_mask}: is {found_width}x{found_height} px (width x height), but the class mask {class_mask} is "
            f"{width}x{height}"
        )
    void = (classes == VOID_VALUE) | (objects == VOID_VALUE)
    classes[void] = objects[void] = VOID_ID
    return classes, objects


def _majority_labels(classes: NDArray[np.int32], objects: NDArray[np.int32], values: list[int]) -> list[int]:
    """Return the most frequent class of each object, background aside; 0 where an object lies on background alone."""
    inside = (objects > 0) & (classes > 0)
    num_classes = VOID_VALUE + 1
    pairs = objects[inside] * num_classes + classes[inside]
    counts = np.bincount(pairs, minlength=(max(values, default=0) + 1) * num_classes).reshape(-1, num_classes)
    return [int(counts[value].argmax()) for value in values]


def _xml_classes(path: Path) -> set[str]:
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: is not valid XML: {error}") from error
    names = [element.findtext("name", "").strip() for element in root.findall("object")]
    if not all(names):
        raise DataError(f"{path}: an object has no name")
    return set(names)
