"""Printing: results go to stdout, everything else to stderr. rich is imported on first use."""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PIPE_WIDTH = 160
"""Columns when the output is no terminal; rich would wrap at 80."""


def results_console() -> "Console":
    """Return the console for results, on stdout. Text is printed as it stands: no markup in brackets, no highlights."""
    return _console(stderr=False)


def progress_console() -> "Console":
    """Return the console for progress, notes and errors, on stderr."""
    return _console(stderr=True)


def print_json(content: Any) -> None:
    """Print a result for machines: indented JSON on stdout."""
    print(json.dumps(content, indent=1, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of results. Where it is wider than the terminal, headings break at spaces and gaps shrink.

    Args:
        title: line above the table.
        columns: headings; one that ends in ``#`` is right-aligned, without the sign.
        rows: one value per column; ``None`` is shown as a dash.
    """
    from rich import box
    from rich.table import Table

    console = results_console()
    headings = [column.removesuffix("#") for column in columns]
    is_number = [column.endswith("#") for column in columns]
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    values = [[row[index] for row in cells] for index in range(len(columns))]
    if _width(headings, values, is_number, gap=3) > console.width:
        headings = [heading.replace(" ", "\n") for heading in headings]
    padding = int(_width(headings, values, is_number, gap=3) <= console.width)
    smallest = _width(headings, values, is_number, gap=1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, padding))
    if smallest > console.width:
        table.width = smallest  # the terminal breaks such lines, which loses nothing
    for heading, right in zip(headings, is_number, strict=True):
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)  # a table would break its title at its own width
    console.print(table, crop=False)


def _width(headings: Sequence[str], values: Sequence[Sequence[str]], is_number: Sequence[bool], gap: int) -> int:
    """Return the columns that a table needs if texts may break at spaces, and numbers and headings must not."""
    widths = [
        max(map(len, [*heading.splitlines(), *(column if right else " ".join(column).split())]), default=0)
        for heading, column, right in zip(headings, values, is_number, strict=True)
    ]
    return sum(widths) + gap * (len(widths) - 1) + 2


def print_fields(title: str, fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values below each other; a value of ``None`` is shown as a dash."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, "-" if value is None else str(value))
    console = results_console()
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    console.print()


def note(text: str) -> None:
    """Print one line for the person at the keyboard, on stderr."""
    progress_console().print(text, soft_wrap=True)


@functools.cache
def note_once(text: str) -> None:
    """Print such a line the first time it comes up."""
    note(text)


def progress_bar() -> "Progress":
    """Return a progress bar on stderr that vanishes when it is done, and shows nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = progress_console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show such a bar for one piece of work during a block, which calls what it is given with (done, total)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console(stderr: bool) -> "Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else _PIPE_WIDTH
    )
