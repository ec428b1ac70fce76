"""Tiny data sets in the very layouts of PASCAL VOC, SBD and COCO.

A picture is described by its objects: class name and box (left, top, right, bottom). Later objects hide earlier ones in
the maps of VOC and SBD; COCO keeps all masks whole.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cl4wsis.datasets import VOC_CLASSES

Box = tuple[int, int, int, int]
Objects = Sequence[tuple[str, Box]]
Split = Mapping[str, Objects]

HEIGHT, WIDTH = 48, 64


def index_png(values: np.ndarray, depth: int = 8, palette: bool = True) -> bytes:
    """Write an (H, W) map as a PNG of 1, 2, 4 or 8 bits per pixel, with the palette of VOC or as grayscale."""
    height, width = values.shape
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1  # (H, W, depth)
    rows = np.packbits(bits.reshape(height, width * depth).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, 3 if palette else 0, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if palette:
        # Colors say nothing: many are alike.
        chunks.append((b"PLTE", bytes((37 * index // 5) % 256 for index in range(2**depth) for _ in range(3))))
        chunks.append((b"tRNS", bytes([0] * 2)))
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_picture(path: Path, objects: Objects) -> None:
    """Write a JPEG in which every object has a color of its class, on noise that follows from the file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path.name).encode()))
    image = rng.integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, (left, top, right, bottom) in objects:
        image[top:bottom, left:right] = np.frombuffer(zlib.crc32(name.encode()).to_bytes(4, "big")[:3], np.uint8)
    cv2.imwrite(str(path), image)


def object_map(objects: Objects) -> np.ndarray:
    """Draw (H, W) object numbers 1..N."""
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number, (_, (left, top, right, bottom)) in enumerate(objects, start=1):
        values[top:bottom, left:right] = number
    return values


def class_map(objects: Objects) -> np.ndarray:
    """Draw (H, W) class numbers 1..20."""
    numbers = np.array([0, *(VOC_CLASSES.index(name) + 1 for name, _ in objects)], np.uint8)
    return numbers[object_map(objects)]


def with_void_border(values: np.ndarray) -> np.ndarray:
    """Replace background beside an object by 255, as VOC does."""
    grown = cv2.dilate((values > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(grown & (values == 0), np.uint8(255), values)


def write_voc(
    root: Path,
    splits: Mapping[str, Split],
    class_masks: str = "SegmentationClass",
    object_masks: str = "SegmentationObject",
    has_masks: bool = True,
) -> None:
    """Write a VOC folder with one list per split."""
    for folder in ("Annotations", "ImageSets/Segmentation", class_masks, object_masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))
        for name, objects in pictures.items():
            write_picture(root / "JPEGImages" / f"{name}.jpg", objects)
            (root / "Annotations" / f"{name}.xml").write_text(_xml(objects))
            if has_masks:
                for folder, values in ((class_masks, class_map(objects)), (object_masks, object_map(objects))):
                    (root / folder / f"{name}.png").write_bytes(index_png(with_void_border(values)))


def _xml(objects: Objects) -> str:
    part = "<part><name>head</name></part>"
    listed = "".join(f"<object><name>{name}</name><difficult>0</difficult>{part}</object>" for name, _ in objects)
    return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{listed}</annotation>"


def write_sbd(root: Path, splits: Mapping[str, Split]) -> None:
    """Write an SBD folder with one list per split; needs scipy."""
    from scipy.io import savemat

    for folder in ("cls", "inst"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))
        for name, objects in pictures.items():
            write_picture(root / "img" / f"{name}.jpg", objects)
            numbers = np.array([VOC_CLASSES.index(label) + 1 for label, _ in objects], np.uint8)
            classes = {"Segmentation": class_map(objects), "CategoriesPresent": np.unique(numbers)[:, None]}
            instances = {"Segmentation": object_map(objects), "Categories": numbers[:, None]}
            savemat(root / "cls" / f"{name}.mat", {"GTcls": classes}, do_compression=True)
            savemat(root / "inst" / f"{name}.mat", {"GTinst": instances}, do_compression=True)


def write_coco(
    images: Path, file: Path, pictures: Split, categories: Mapping[int, str | None], suffix: str = ".jpg"
) -> None:
    """Write images and a COCO instances file with polygons."""
    ids = {name: key for key, name in categories.items()}
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key} | ({"name": name} if name else {}) for key, name in categories.items()],
    }
    for image_id, (name, objects) in enumerate(pictures.items(), start=1):
        write_picture(images / f"{name}{suffix}", objects)
        coco["images"].append({"id": image_id, "file_name": f"{name}{suffix}", "height": HEIGHT, "width": WIDTH})
        for label, (left, top, right, bottom) in objects:
            coco["annotations"].append(
                {
                    "image_id": image_id,
                    "category_id": ids.get(label) or VOC_CLASSES.index(label) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    "iscrowd": 0,
                }
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco))
