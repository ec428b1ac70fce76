"""Results on disk: id maps with a sidecar, one COCO file for a run, overlays. Everything appears whole or not at all.

Every writer is a context manager with ``write(picture, instances)``. Leaving the context by an exception keeps the
files of single images, but no half COCO file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import DataError
from cl4wsis.folders import hold_folder
from cl4wsis.images import decode_image, encode_jpeg, encode_png, read_bytes, write_bytes_atomically
from cl4wsis.instances import Instances
from cl4wsis.steps import ClassInfo

IDS_FOLDER, OVERLAY_FOLDER, COCO_FILE = "ids", "overlay", "coco.json"
"""What a run writes into the folder of its results."""
_SIDECAR_FIELDS = {"image", "image_sha256", "instances", "model"}
_COCO_START = '{"annotations": ['


@dataclass(frozen=True)
class ImageFile:
    """An image file and what its results are called.

    Attributes:
        path: of the file.
        file_name: path relative to what all sources of a run have in common, with ``/``.
        name: the same without ending where that is unique in the run; results get this name.
    """

    path: Path
    file_name: str
    name: str


class Picture:
    """An image file that is read once: what is predicted, drawn and hashed is the same, whatever becomes of the file.

    Args:
        file: where it lies and what it is called.

    Attributes:
        file: as given.
    """

    def __init__(self, file: ImageFile) -> None:
        self.file = file
        self._content: bytes | None = None

    def read(self) -> NDArray[np.uint8]:
        """Return the pixels, (H, W, 3) uint8 RGB; they are decoded at each call, as they take far more memory.

        Raises:
            DataError: the file cannot be read or is no image.
        """
        return decode_image(self._bytes(), str(self.file.path))

    def sha256(self) -> str:
        """Return the hash of the file.

        Raises:
            DataError: the file cannot be read.
        """
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        if self._content is None:
            self._content = read_bytes(self.file.path)
        return self._content


class Writer(Protocol):
    """Takes the answers of a run, one image at a time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, picture: Picture, instances: Instances) -> None:
        """Write one answer.

        Args:
            picture: the source.
            instances: in pixels of the source image.

        Raises:
            DataError: a file cannot be written.
        """
        ...

    def has(self, image: ImageFile, since_ns: int) -> bool:
        """Tell whether the answer for an image is there already, written at that time or later."""
        ...


def result_folders(out: Path) -> list[Path]:
    """Find the folders of pictures that a run left in a folder; its id maps or COCO file show that there was one."""
    ids = out / IDS_FOLDER
    if any(_is_sidecar(path) for path in islice(ids.rglob(f"*{IdsWriter.ending}"), 1)):
        return [ids, out / OVERLAY_FOLDER]
    return [out / OVERLAY_FOLDER] if _is_ours(out / COCO_FILE) else []


def _is_sidecar(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()).keys() >= _SIDECAR_FIELDS)
    except (OSError, ValueError, AttributeError):
        return False


def _is_ours(path: Path) -> bool:
    """Tell a COCO file of ours by its first words."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(_COCO_START)) == _COCO_START
    except (OSError, ValueError):
        return False


@contextmanager
def locked_results(folder: Path) -> Iterator[None]:
    """Make a folder for results and keep other processes from writing theirs into it at the same time.

    Raises:
        DataError: another process does, or the folder cannot be made.
    """
    _make_folder(folder)
    sentence = f"{folder}: another process writes results there; wait for it, or choose another folder with --out"
    with hold_folder(folder, DataError(sentence)):
        yield


class _FolderWriter:
    """What writers of single files share: a folder, and nothing to close."""

    ending = ""
    """Of the file that is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, image: ImageFile, since_ns: int) -> bool:
        """Tell whether the files of an image are there already, written at that time (nanoseconds) or later."""
        return self.time_of(image) >= since_ns

    def time_of(self, image: ImageFile) -> int:
        """Return when the files of an image were written, nanoseconds; -1 if they were not."""
        try:
            return self._path(image, self.ending).stat().st_mtime_ns
        except OSError:
            return -1

    def _path(self, image: ImageFile, ending: str) -> Path:
        return self.folder / f"{image.name}{ending}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class IdsWriter(_FolderWriter):
    """Write ``<name>.png``, the id map, and ``<name>.json``, its rows. The sidecar comes last: where it is, both are.

    The map is 8-bit where ids allow it, else 16-bit; 0 is none and ``i`` is the row whose ``id`` is ``i``. The sidecar
    holds the hash of the image file, so that an answer is never taken for that of another image of the same name.

    Args:
        folder: where the files go.
        classes: of the model, in label order.
        model: what made the answers (for example the hash of the graph); written into every sidecar.
    """

    ending = ".json"

    def __init__(self, folder: Path, classes: Sequence[ClassInfo], model: dict[str, Any]) -> None:
        super().__init__(folder)
        self._names = [info.name for info in classes]
        self._model = model

    def write(self, picture: Picture, instances: Instances) -> None:
        """Write the id map and its sidecar."""
        image = picture.file
        ids = instances.instance_ids.astype(np.uint8 if len(instances) <= 255 else np.uint16)
        write_bytes_atomically(_prepare(self._path(image, ".png")), encode_png(ids))
        write_bytes_atomically(self._path(image, ".json"), _json_bytes(self._describe(picture, instances)))

    def read(self, picture: Picture) -> Instances | None:
        """Return an answer that an earlier run left here, if it is complete, of this image and of this model."""
        try:
            sidecar = json.loads(self._path(picture.file, ".json").read_bytes())
            if sidecar["model"] != self._model or sidecar["image_sha256"] != picture.sha256():
                return None
            ids = _read_ids(self._path(picture.file, ".png"))
            rows = sidecar["instances"]
            return Instances.from_ids(ids, [row["label"] for row in rows], [row["score"] for row in rows])
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None

    def _describe(self, picture: Picture, instances: Instances) -> dict[str, Any]:
        height, width = instances.instance_ids.shape
        columns = zip(
            instances.labels.tolist(),
            instances.scores.tolist(),
            instances.areas.tolist(),
            instances.boxes.tolist(),
            strict=True,
        )
        rows = [
            {"id": i, "label": label, "class": self._names[label], "score": round(score, 6), "area": area, "box": box}
            for i, (label, score, area, box) in enumerate(columns, start=1)
        ]
        return {
            "image": picture.file.file_name,
            "image_sha256": picture.sha256(),
            "height": height,
            "width": width,
            "box_format": "xyxy",
            "instances": rows,
            "model": self._model,
        }


class OverlayWriter(_FolderWriter):
    """Write ``<name>.jpg``, the image with what was found drawn over it.

    Args:
        folder: where the files go.
        classes: of the model, in label order.
    """

    ending = ".jpg"

    def __init__(self, folder: Path, classes: Sequence[ClassInfo]) -> None:
        super().__init__(folder)
        self._names = [info.name for info in classes]
        self._colors = [info.color for info in classes]

    def write(self, picture: Picture, instances: Instances) -> None:
        """Draw and write one overlay."""
        from cl4wsis_serve.draw import draw_overlay

        overlay = draw_overlay(picture.read(), instances, self._names, self._colors)
        write_bytes_atomically(_prepare(self._path(picture.file, self.ending)), encode_jpeg(overlay))


class CocoWriter:
    """Write one COCO file for a run: images, categories, and annotations with compressed RLE and a score.

    Annotations go to a temporary file as they come; only names and sizes of the images are kept in memory. The file
    gets its name when the run is complete.

    Args:
        path: of the file.
        classes: of the model, in label order; the category id is the label + 1.
    """

    def __init__(self, path: Path, classes: Sequence[ClassInfo]) -> None:
        self.path = path
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._num_annotations = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._temporary = _prepare(self.path).with_name(f".{self.path.name}.tmp")
        with self._explained():
            self._file = self._temporary.open("w", encoding="utf-8")
            self._file.write(_COCO_START)
        return self

    def write(self, picture: Picture, instances: Instances) -> None:
        """Append the instances of one image."""
        if self._file is None:
            raise ValueError("the writer is not open; use it in a 'with' statement")
        height, width = instances.instance_ids.shape
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": picture.file.file_name, "height": height, "width": width})
        with self._explained():
            for annotation, area in zip(instances.to_coco(image_id), instances.areas.tolist(), strict=True):
                self._num_annotations += 1
                self._file.write(",\n" if self._num_annotations > 1 else "\n")
                json.dump({"id": self._num_annotations, **annotation, "area": area, "iscrowd": 0}, self._file)

    def has(self, image: ImageFile, since_ns: int) -> bool:
        """Return False: the file is made anew in every run."""
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        if kind is not None:
            self._drop(file)
            return
        categories = [{"id": label + 1, "name": info.name} for label, info in enumerate(self._classes)]
        with self._explained(file):
            with file:
                file.write(f'\n],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps(categories)}}}\n')
            self._temporary.replace(self.path)

    @contextmanager
    def _explained(self, file: IO[str] | None = None) -> Iterator[None]:
        """Turn errors of the file system into a sentence, and leave nothing behind."""
        try:
            yield
        except OSError as error:
            self._drop(file or self._file)
            self._file = None
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _drop(self, file: IO[str] | None) -> None:
        """Close and remove the temporary file, even on a disk that has no room for what is still to be written."""
        with suppress(OSError):
            if file is not None:
                file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _prepare(path: Path) -> Path:
    """Make the folder of a file."""
    _make_folder(path.parent)
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be made: {error.strerror or error}") from error


def _json_bytes(content: Any) -> bytes:
    """Return JSON in UTF-8; bytes of a file name that are none, which Python holds as surrogates, become escapes."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "backslashreplace")


def _read_ids(path: Path) -> NDArray[np.int32]:
    import cv2

    ids = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if ids is None or ids.ndim != 2:
        raise DataError(f"{path}: is not an id map")
    return np.asarray(ids, np.int32)
