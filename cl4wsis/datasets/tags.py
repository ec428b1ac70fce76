"""Class names of images, without masks: JSON or CSV."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cl4wsis.datasets.coco import describe_repeated, image_path
from cl4wsis.datasets.pictures import TaggedImage
from cl4wsis.datasets.problems import raise_problems
from cl4wsis.errors import DataError
from cl4wsis.images import read_bytes
from cl4wsis.tasks import class_name

_CSV_HEADERS = {"file", "file_name", "filename", "image", "image_name", "name", "path"}


def read_tags(path: Path, folder: Path, rename: Mapping[str, str] | None = None) -> list[TaggedImage]:
    """Read the class names of images.

    JSON is ``{file: [class names]}``. CSV has one line per image: the file, then its class names in further columns, or
    several in one column with semicolons between them; a header line is recognised by its first cell (``file``,
    ``filename``, ``image``, ...).

    Args:
        path: of the file; ``.csv`` is CSV, everything else JSON.
        folder: to which its file names are relative.
        rename: class names that the plan calls otherwise.

    Returns:
        All its images in file order, those without a tag included.

    Raises:
        DataError: the file is missing, of another form, or lists an image twice.
    """
    names = rename or {}
    return [
        TaggedImage(name, image_path(folder, name), frozenset(names.get(tag, tag) for tag in tags))
        for name, tags in read_tag_rows(path)
    ]


def read_tag_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Read a tags file as it stands: file names and their class names.

    Raises:
        DataError: the file is missing, of another form, or lists an image twice.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    found = _parse_csv_tags(text, path) if path.suffix.lower() == ".csv" else _parse_json_tags(text, path)
    rows = [(name, [class_name(tag) for tag in tags]) for name, tags in found]
    names = (str(PurePosixPath(name)) for name, _ in rows)  # ./a.jpg is a.jpg
    raise_problems([f"{path}: {problem}" for problem in describe_repeated("file name", names)])
    return rows


def _parse_json_tags(text: str, path: Path) -> list[tuple[str, list[str]]]:
    try:
        # Pairs rather than a dict: a file that is listed twice must not get lost.
        rows = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise DataError(f"{path}: expected one JSON object {{file: [class names]}}")
    raise_problems(
        [
            f"{path}: '{name}': expected a list of class names, found {str(tags)[:60]!r}"
            for name, tags in rows
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags)
        ]
    )
    return rows


def _parse_csv_tags(text: str, path: Path) -> list[tuple[str, list[str]]]:
    lines = [[cell.strip() for cell in line] for line in csv.reader(text.splitlines())]
    lines = [line for line in lines if line and line[0]]
    # Spreadsheet programs write such files in many countries; each line would be one long file name without a tag.
    uncommaed = [line[0] for line in lines if len(line) == 1 and (";" in line[0] or "\t" in line[0])]
    if uncommaed:
        raise DataError(
            f"{path}: line {uncommaed[0][:60]!r} has no comma; commas are expected between a file and its class names: "
            "save the table with commas instead of semicolons or tabs"
        )
    if lines and lines[0][0].lower() in _CSV_HEADERS:
        lines = lines[1:]
    return [(line[0], [tag.strip() for cell in line[1:] for tag in cell.split(";") if tag.strip()]) for line in lines]
