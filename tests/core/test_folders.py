"""Locks on folders: held elsewhere, held here, or unknown here are three different things."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cl4wsis.folders import lock_folder

pytest.importorskip("fcntl", reason="this system has no such locks")

HOLD = """
import sys
from pathlib import Path
from cl4wsis.folders import lock_folder
with lock_folder(Path(sys.argv[1])) as is_held:
    print(is_held, flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    with lock_folder(tmp_path) as is_held:
        assert is_held
        with pytest.raises(BlockingIOError), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path) as is_held:
        assert is_held
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with pytest.raises(BlockingIOError), lock_folder(tmp_path):
            pass
        process.kill()
    with lock_folder(tmp_path) as is_held:
        assert is_held


def test_waiting_ends_when_the_other_is_done(tmp_path: Path) -> None:
    log: list[str] = []

    def wait() -> None:
        with lock_folder(tmp_path, wait=True) as is_held:
            log.append(f"second: {is_held}")

    with lock_folder(tmp_path):
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.1)
        log.append("first")
    other.join(20)
    assert log == ["first", "second: True"]


@pytest.mark.parametrize("wait", [False, True])
def test_where_there_are_no_locks_none_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with lock_folder(tmp_path / "missing", wait) as is_held:
        assert not is_held
    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_folder(tmp_path, wait) as is_held:
        assert not is_held
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock_folder(tmp_path, wait) as is_held:
        assert not is_held
