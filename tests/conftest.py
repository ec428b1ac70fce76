"""What a run of pytest in several processes says about one that died."""

import contextlib
import subprocess
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Say how a test process died: pytest-xdist names the test it was running, but not the exit code or signal."""
    if error is None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may live on, when pytest itself could not begin there
        code = node.gateway._io.popen.wait(10)
        print(f"\n{node.gateway.id} ended with exit code {code}; a negative one is a signal")
