"""Image files in, result files out, however many there are: one batch is in memory at a time."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl4wsis.bundle import is_bundle
from cl4wsis.errors import Cl4wsisError, DataError
from cl4wsis.images import IMAGE_SUFFIXES
from cl4wsis.instances import Instances
from cl4wsis_serve.predictor import Predictor
from cl4wsis_serve.writers import IdsWriter, ImageFile, Picture, Writer, result_folders


@dataclass(frozen=True)
class Outcome:
    """What became of one image: instances in its pixels, or the reason why there are none."""

    image: ImageFile
    result: Instances | Cl4wsisError


def find_images(sources: Sequence[str], skip: Sequence[Path] = ()) -> list[ImageFile]:
    """Resolve files, folders and glob patterns.

    Folders are searched recursively, behind links too, but for bundles and for what earlier runs left in them.

    Args:
        sources: paths and patterns, in any mixture.
        skip: folders whose contents are left out, those of the results, where they lie within a source.

    Returns:
        The images, each once, in the order of the sources and by name within a folder.

    Raises:
        DataError: a source does not exist or holds no image, or a folder in it cannot be read.
    """
    found: dict[str, Path] = {}
    roots: list[Path] = []
    for source in sources:
        root, paths = _resolve(source, skip)
        roots.append(root)
        for path in paths:
            found.setdefault(os.path.abspath(path), path)  # noqa: PTH100 (keeps links as they are)
    common = Path(os.path.commonpath([os.path.abspath(root) for root in roots]))  # noqa: PTH100 (keeps links as they are)
    return _with_names(list(found.values()), common)


def predict_files(
    predictor: Predictor,
    images: Sequence[ImageFile],
    writers: Sequence[Writer],
    batch_size: int = 1,
    min_score: float = 0.0,
    finished: IdsWriter | None = None,
) -> Iterator[Outcome]:
    """Predict images and write the results, giving each outcome as it comes.

    Args:
        predictor: an open model.
        images: as found by :func:`find_images`.
        writers: open writers; each gets every answer.
        batch_size: images per run of the graph.
        min_score: instances with a lower score are dropped.
        finished: results of an earlier run to be taken over where they are complete, and where the model is the same.

    Raises:
        DataError: a result cannot be written. An image that cannot be read is an outcome, not an error.
        BackendError: the runtime failed.
    """
    pending = []
    for image in images:
        picture = Picture(image)
        earlier = finished.read(picture) if finished else None
        if earlier is None:
            pending.append(image)
        else:
            since = finished.time_of(image) if finished else 0  # an older overlay shows what stood there before
            yield _write(picture, earlier, [writer for writer in writers if not writer.has(image, since)])
    for picture, result in predictor.stream(map(Picture, pending), batch_size):
        if isinstance(result, Cl4wsisError):
            yield Outcome(picture.file, result)
        else:
            yield _write(picture, result.select(result.scores >= min_score), writers)


def _write(picture: Picture, instances: Instances, writers: Sequence[Writer]) -> Outcome:
    for writer in writers:
        writer.write(picture, instances)
    return Outcome(picture.file, instances)


def _resolve(source: str, skip: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Return the folder to which names of a source relate, and its image files."""
    path = Path(source)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, _search_folder(path, skip)
    if glob.has_magic(source):
        matches = sorted(Path(match) for match in glob.glob(source, recursive=True))  # noqa: PTH207 (absolute patterns)
        files = [match for match in matches if _is_image(match)]
        if files:
            return _fixed_part(path), files
        raise DataError(f"{source}: the pattern matches no image; folders are searched without a pattern")
    raise DataError(f"{source}: there is no such file or folder")


def _search_folder(folder: Path, skip: Sequence[Path]) -> list[Path]:
    within = folder.resolve()
    skipped = [path.resolve() for path in skip if path.exists() and not within.is_relative_to(path.resolve())]
    files = sorted(_images_below(folder, skipped, ()))
    if not files:
        raise DataError(f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _images_below(folder: Path, skipped: Sequence[Path], above: tuple[Path, ...]) -> Iterator[Path]:
    """Find the images of a folder and of those below it, behind links too.

    Args:
        folder: to be searched.
        skipped: real paths of folders to leave out.
        above: real paths of the folders it lies in; a link back to one of them leads round in circles.
    """
    real = folder.resolve()
    if real in above or any(real.is_relative_to(path) for path in skipped):
        return
    try:
        if above and is_bundle(folder):
            return  # its images are the golden inputs
        results = result_folders(folder)
        for path in folder.iterdir():
            if path.is_dir():
                if path not in results:
                    yield from _images_below(path, skipped, (*above, real))
            elif _is_image(path) and not path.name.startswith("."):
                yield path
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read: {error.strerror or error}; allow it, or give the folders that can be read "
            "one by one"
        ) from error


def _is_image(path: Path) -> bool:
    """Tell whether a path is taken for an image; one behind a broken link is, so that it is reported as missing."""
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or (path.is_symlink() and not path.exists()))


def _fixed_part(pattern: Path) -> Path:
    """Return the folders of a pattern before its first wildcard."""
    fixed = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _with_names(paths: Sequence[Path], root: Path) -> list[ImageFile]:
    """Name images by their path below the root; where that would be a name of another image, it keeps its ending."""
    relative = [Path(os.path.abspath(path)).relative_to(root) for path in paths]  # noqa: PTH100
    counts = Counter(path.with_suffix("") for path in relative) + Counter(relative)
    return [
        ImageFile(path, full.as_posix(), (short if counts[short] == 1 else full).as_posix())
        for path, full, short in ((p, r, r.with_suffix("")) for p, r in zip(paths, relative, strict=True))
    ]
