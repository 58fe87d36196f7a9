"""Output files: refused early, written under another name, synced, renamed: never half a file or an overwrite."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: str | os.PathLike[str], *, what: str = "path", force: bool = False) -> Path:
    """Raise the error that writing ``path`` would meet, before any work is spent on its content.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError: the place cannot be written. OSError: nor such a name.
        FileExistsError: something is there already and ``force`` is false, or it is no file.
    """
    target = Path(path)
    found = _found(target, what)
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = "the directory" if stat.S_ISDIR(found.st_mode) else "the device or pipe"
        error = IsADirectoryError if stat.S_ISDIR(found.st_mode) else FileExistsError
        raise error(f"{what}: expected a file to write, got {kind} {str(target)!r}")
    parent = _followed(target).parent
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


def reworded(error: OSError, text: str) -> OSError:
    """An error of the same class and errno that says ``text``."""
    again = type(error)(text)
    again.errno = error.errno  # in the constructor it would become a part of the text
    return again


TEMPORARY = ".void-ext-"  # what names of unfinished files begin with


@contextmanager
def replacing(path: str | os.PathLike[str], *, what: str = "path", force: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write to; it becomes ``path``, or goes if there was an error.

    A file that is replaced leaves its mode to the new one, and a symbolic link stays: what it points to is replaced.
    """
    target = check_output(path, what=what, force=force)
    place = _followed(target)
    # A name of its own, and short: with some of the target's it could be longer than the file system takes.
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=place.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        found = _found(target, what)
        if found is None:
            make_public(temporary)
        else:  # as private as it was
            temporary.chmod(stat.S_IMODE(found.st_mode))
        sync(temporary)
        if force:
            os.replace(temporary, place)
        else:
            _rename_new(temporary, place, what)
        sync(place.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _found(target: Path, what: str) -> os.stat_result | None:
    """What is there, behind any links; None for nothing yet."""
    try:
        return target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a name that is too long, links in a circle
        raise reworded(error, f"{what}: {str(target)!r} cannot be written: {error.strerror or error}") from None


def _followed(target: Path) -> Path:
    """Where a link points to; any other path as it is, relative ones too, for messages that name it."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


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
