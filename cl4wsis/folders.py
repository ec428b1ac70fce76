"""Files and folders that processes share: replaced as a whole, and locked.

A lock is held by a process, gone with it however it ends, and leaves no file behind.
"""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

_LONGEST_NAME = 250
"""Bytes of a file name that leave room for what a temporary one adds, where names may have 255."""


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
def hold_folder(folder: Path, held_elsewhere: Exception) -> Iterator[None]:
    """Hold the lock of a folder during a block, or raise an error where another process holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except BlockingIOError as error:
            raise held_elsewhere from error
        yield


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


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary file beside another, which it replaces when the block ends without an error.

    A reader sees the old file or the new one, never half of it. What a killed process left there is overwritten.

    Args:
        path: final name of the file; its folder exists, and no other process writes it at the same time.
    """
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= _LONGEST_NAME else sha256(name).hexdigest()
    temporary = path.with_name(f".{stem}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(destination: Path) -> Iterator[Path]:
    """Give a temporary folder beside the destination that takes its place when the block ends without an error.

    What a killed process left there is removed. Where the destination is a link, what it names is replaced.

    Args:
        destination: final name of the folder; its parent exists.
    """
    destination = destination.resolve()
    _remove_leftovers(destination)
    token = uuid.uuid4().hex[:8]
    temporary = destination.with_name(f".{destination.name}.{token}.tmp")
    old = destination.with_name(f".{destination.name}.{token}.old")
    temporary.mkdir()
    with lock_folder(temporary):  # so that no other process takes it for a leftover
        try:
            yield temporary
            with lock_by_name(destination):  # who changes the manifest ends first, or does so in the new folder
                try:
                    if destination.exists():
                        destination.rename(old)
                    temporary.rename(destination)
                except BaseException:
                    if old.exists() and not destination.exists():
                        old.rename(destination)
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if destination.exists():
                shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(destination: Path) -> None:
    """Remove what a killed process left beside the destination; a folder it had already put aside is put back."""
    for temporary in destination.parent.glob(f".{glob.escape(destination.name)}.*.tmp"):
        with suppress(BlockingIOError), lock_folder(temporary) as is_held:
            if is_held:  # else nobody knows whether its process lives, and it stays under its hidden name
                shutil.rmtree(temporary, ignore_errors=True)
    for old in destination.parent.glob(f".{glob.escape(destination.name)}.*.old"):
        if old.with_suffix(".tmp").exists():
            continue  # its process lives and is about to put the new folder into this place
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(destination)
