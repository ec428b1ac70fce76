"""Printing: results go to stdout, everything else to stderr. rich is imported on first use."""

import json
import sys
from collections.abc import Iterable, Sequence
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
    """Print a table of results.

    Args:
        title: line above the table.
        columns: headings; one that ends in ``#`` is right-aligned, without the sign.
        rows: one value per column; ``None`` is shown as a dash.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    console = results_console()
    console.print(title, style="bold", soft_wrap=True)  # a table would break its title at its own width
    console.print(table)


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


def progress_bar() -> "Progress":
    """Return a progress bar on stderr that vanishes when it is done, and shows nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = progress_console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _console(stderr: bool) -> "Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else _PIPE_WIDTH
    )
