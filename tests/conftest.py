"""Hooks of pytest for runs in several processes."""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

NOTE_PASSED = "CL4WSIS_NOTE_PASSED"
"""Environment variable that names a file: the tests that pass are written into it."""
LEAVE_OUT = "CL4WSIS_LEAVE_OUT"
"""Environment variable that names such a file: its tests are left out, to go on where a run broke off."""


def pytest_configure(config: pytest.Config) -> None:
    """Note what passes, in the process that hears of all tests."""
    path = os.environ.get(NOTE_PASSED)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(PassedTests(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before."""
    path = os.environ.get(LEAVE_OUT)
    if path:
        passed = set(Path(path).read_text(encoding="utf-8").splitlines())
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
    if error is None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may live on, when pytest itself could not begin there
        code = node.gateway._io.popen.wait(10)
        print(f"\n{node.gateway.id} ended with exit code {code}; a negative one is a signal")
