"""Tables in terminals of every width."""

import pytest

from cl4wsis.cli import console
from cl4wsis.cli.console import print_table

COLUMNS = ["", "step", *(f"{name} {group}#" for name in ("AP50", "AP", "mIoU") for group in ("old", "new", "all"))]
VALUES = [f"{50 + 1.7 * index:.1f}" for index in range(9)]
ROWS = [("exported model", 2, *VALUES, "-12.3"), ("fine-tuned", 2, None, *VALUES[1:], "61.9")]


def lines_at(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Print the table of a demo and return its lines, without the title."""
    monkeypatch.setattr(console, "_PIPE_WIDTH", width)
    print_table("shapes, percent", [*COLUMNS, "forgotten#"], ROWS)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.parametrize("width", [160, 120, 80, 40])
def test_no_number_and_no_heading_is_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_at(width, monkeypatch, capsys)
    words = [line.split() for line in lines]
    [first] = [row for row in words if "-12.3" in row]
    assert first[-10:] == [*VALUES, "-12.3"]
    assert sum(row.count("mIoU") for row in words) == 3
    assert any("forgotten" in row for row in words)
    assert "…" not in "".join(lines)


def test_the_table_of_a_demo_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert max(map(len, lines_at(80, monkeypatch, capsys))) <= 80
    wide = lines_at(160, monkeypatch, capsys)
    assert "exported model   2          50.0       51.7" in "\n".join(wide)
