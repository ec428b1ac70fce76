"""Hooks of pytest for runs in several processes."""

from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a run needs that goes on where another one broke off."""
    parser.addoption("--note-passed", type=Path, help="write the tests that passed into this file")
    parser.addoption("--leave-out", type=Path, help="leave out the tests that this file names")


def pytest_configure(config: pytest.Config) -> None:
    """Note what passes, in the process that hears of all tests."""
    path = config.getoption("--note-passed")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(PassedTests(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before."""
    path = config.getoption("--leave-out")
    if path is not None:
        passed = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


class PassedTests:
    """Writes the tests that passed into a file, each at once, so that the file outlives the run.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        path.write_text("", encoding="utf-8")
        self._path = path
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test once its teardown has passed too."""
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Say how a test process died: pytest-xdist names the test it was running, but not the exit code or signal."""
    if error is not None:
        print(f"\n{node.gateway.id} ended with exit code {node.gateway._io.popen.wait(60)}; a negative one is a signal")
