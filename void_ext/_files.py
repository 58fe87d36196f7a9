"""Output files: refused early, written under another name, synced, renamed: never half a file or an overwrite."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: str | os.PathLike[str], *, what: str = "path", force: bool = False) -> Path:
    """Raise the error that writing ``path`` would meet, before any work is spent on its content.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError: the place cannot be written.
        FileExistsError: something is there already and ``force`` is false.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{what}: expected a file to write, got the directory {str(target)!r}")
    parent = target.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{what}: the directory {str(parent)!r} of {str(target)!r} does not exist")
    try:
        # Trying tells what permission bits do not: read-only and special file systems, root, quotas.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PermissionError(
            f"{what}: the directory {str(parent)!r} of {str(target)!r} is not writable: {reason}"
        ) from None
    if not force and os.path.lexists(target):
        raise FileExistsError(f"{what}: {str(target)!r} exists already; pass force (--force) to replace it")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], *, what: str = "path", force: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write to; it becomes ``path``, or goes if there was an error."""
    target = check_output(path, what=what, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        make_public(temporary)
        sync(temporary)
        if force:
            os.replace(temporary, target)
        else:
            _rename_new(temporary, target, what)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_public(path: Path) -> None:
    """Give a file the mode of an ordinary new file: mkstemp and safetensors make private ones."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Flush a file's (or a directory's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_new(temporary: Path, target: Path, what: str) -> None:
    # link() fails where the target exists, rename() would replace it: another process may have come first.
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise FileExistsError(f"{what}: {str(target)!r} exists already; pass force (--force) to replace it") from None
    except OSError:  # no hard links on this file system
        os.rename(temporary, target)
