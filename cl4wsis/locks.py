"""Locks on folders: held by a process, gone with it however it ends, and leaving no file behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock_folder(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder during a block.

    Args:
        folder: an existing folder.
        wait: until whoever holds the lock is done with it.

    Yields:
        Whether it is held; False where there are no such locks: on Windows, on some network file systems, and where
        the folder cannot be opened.

    Raises:
        BlockingIOError: it is held elsewhere, and ``wait`` is not set.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            is_held = False
        else:
            is_held = True
        yield is_held
    finally:
        os.close(handle)


@contextmanager
def lock_by_name(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder that bears a name, and not of one that was replaced while its lock was waited for."""
    while True:
        before = folder_identity(folder)
        with lock_folder(folder, wait=True):
            if folder_identity(folder) == before:
                yield
                return


def folder_identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a folder or file from its successor of the same name; None in the moment between the two."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
