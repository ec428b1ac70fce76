"""Hooks of pytest for runs in several processes."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Say how a test process died: pytest-xdist names the test it was running, but not the exit code or signal."""
    if error is not None:
        print(f"\n{node.gateway.id} ended with exit code {node.gateway._io.popen.wait(60)}; a negative one is a signal")
