"""Directories that appear whole or not at all, and names in stored tensors."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from .files import make_all_durable, make_durable, raise_if_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "octavo.json"  # the manifest of a directory that octavo.save_quantized wrote
_TEMPORARY, _OLD = "tmp", "old"


@contextmanager
def new_directory(
    target: str | os.PathLike[str],
    overwrite: bool = False,
    marker: str = MANIFEST,
    needed: int = 0,
    known: Sequence[str] = ("*",),
) -> Iterator[Path]:
    """A directory to write into, which becomes `target` at once when the block ends, and never if it raises.

    What is in it is flushed to disk before that. A directory that is replaced changes places with the new one: at
    `target` is always one of the two. What an earlier call that was killed left beside `target` is removed.

    Args:
        target: must not exist, or be an empty directory. A symbolic link is followed. Into an empty directory that
            cannot be replaced, as the mount point of a container's volume, files are moved one by one, `marker` last.
        overwrite: `target` may also be a directory with the file `marker` in it; it is replaced at the end.
        marker: by default what `save_quantized` writes.
        needed: bytes that must be free on the disk.
        known: patterns of the entries that may be replaced; a directory with another is left alone.

    Raises:
        FileExistsError: it exists and may not be replaced. Nothing has been written then.
        FileNotFoundError: the directory that `target` is to be in does not exist.
        OSError: it cannot be written, or too little is free. What can be seen of it is seen before the block runs.
    """
    if not os.fspath(target):
        raise ValueError("the name of the directory to write is empty")
    target = Path(os.path.realpath(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")
    put_back(target)
    _sweep(target)
    _check_target(target, overwrite, marker, known)
    through = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    if through and any(target.iterdir()):
        why = "is a mount point" if os.path.ismount(target) else f"lies in {target.parent}, which cannot be written"
        raise FileExistsError(f"{target} {why}, so that it cannot be replaced: name a directory in it, or empty it")
    parent = target if through else target.parent
    if (free := shutil.disk_usage(parent).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free", str(target))
    temporary = parent / f".{target.name}.{secrets.token_hex(4)}.{_TEMPORARY}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot write {target}: {error.strerror}") from None
    lock = _lock(temporary)
    try:
        yield temporary
        make_all_durable(temporary)
        if through:
            _move_into(temporary, target, marker)
        else:
            _check_target(target, overwrite, marker, known)
            _take_place(temporary, target)
        make_durable(parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_if_full(error, target)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(temporary, ignore_errors=True)  # the old one, if there was one


def check_fillable(target: str | os.PathLike[str], names: Sequence[str], overwrite: bool) -> None:
    """Check, before the work, a directory for results whose files have these names; it need not be there yet.

    Raises:
        FileExistsError: it is no directory, or holds one of these files and `overwrite` is not given.
        OSError: it cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.stored import check_fillable
        >>> check_fillable("results", ["a.json"], overwrite=False)
        >>> Path("results").mkdir()
        >>> Path("results/a.json").touch()
        >>> check_fillable("results", ["a.json"], overwrite=False)
        Traceback (most recent call last):
        FileExistsError: results exists and holds a.json; pass overwrite=True to replace it
    """
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a directory")
    if not overwrite and (there := [name for name in names if (folder / name).exists()]):
        raise FileExistsError(f"{folder} exists and holds {there[0]}; pass overwrite=True to replace it")
    above = folder
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "cannot be written", str(above))


def _check_target(target: Path, overwrite: bool, marker: str, known: Sequence[str]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory")
    entries = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in entries if not any(fnmatchcase(name, pattern) for pattern in known)]
    if overwrite and marker in entries and foreign:
        raise FileExistsError(
            f"{target} also holds {foreign[0]}, which would be lost: move it, or name another directory"
        )
    if not entries or (overwrite and marker in entries):
        return
    if overwrite:
        raise FileExistsError(f"{target} was not written by octavo (it has no {marker}): it is not overwritten")
    raise FileExistsError(f"{target} exists and holds {len(entries)} entries; pass overwrite=True to replace it")


# ---- renames -------------------------------------------------------------------------------------------------------


def _take_place(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a directory that is there gets the name of `new`, or is gone if it was empty."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(new, target)
        return
    if _exchange(new, target):
        return
    # In between there is nothing at `target`: `put_back` mends that if the process ends there.
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{_OLD}")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change names in one step. False where the system cannot."""
    at_current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2 if sys.platform == "linux" else None
    except (OSError, AttributeError):
        renameat2 = None
    if renameat2 is None:
        return False
    if renameat2(at_current, os.fsencode(a), at_current, os.fsencode(b), exchange) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def _move_into(source: Path, target: Path, last: str) -> None:
    moved: list[Path] = []
    try:
        for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
            os.rename(entry, target / entry.name)
            moved.append(target / entry.name)
    except BaseException:
        for entry in reversed(moved):
            os.rename(entry, source / entry.name)
        raise


# ---- what a killed process left ------------------------------------------------------------------------------------


def put_back(target: Path) -> None:
    """Rename a directory back to `target` that was moved away to be replaced, if nothing is at `target`: the process
    was killed in between, on a file system where two directories cannot change places."""
    if os.path.lexists(target):
        return
    for old in _left(target, _OLD):
        os.rename(old, target)
        return


def _sweep(target: Path) -> None:
    """Remove what calls for `target` that were killed have left beside it or in it. Who still writes holds a lock."""
    for parent in (target.parent, target) if target.is_dir() else (target.parent,):
        for path in _left(parent / target.name, _TEMPORARY, _OLD):
            handle = _lock(path)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _left(target: Path, *ends: str) -> list[Path]:
    start = f".{target.name}."
    try:
        names = os.listdir(target.parent)
    except OSError:  # a directory that may be written, and not listed, or one that is not there
        return []
    return [
        target.with_name(name)
        for name in sorted(names)
        if name.startswith(start)
        and len(parts := name.removeprefix(start).split(".")) == 2
        and len(parts[0]) == 8
        and not parts[0].strip("0123456789abcdef")
        and parts[1] in ends
    ]


def _lock(path: Path) -> int | None:
    """A handle that holds the lock of a directory until it is closed; None if another has it, or there are none."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or a file system without locks
        os.close(handle)
        return None
    return handle


# ---- tied tensors --------------------------------------------------------------------------------------------------


def tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make tensors that were one before saving one object again."""
    for name, source in tied.items():
        owner, _, leaf = name.rpartition(".")
        source_owner, _, source_leaf = source.rpartition(".")
        module = model.get_submodule(source_owner)
        tensors = module._parameters if source_leaf in module._parameters else module._buffers
        setattr(model.get_submodule(owner), leaf, tensors[source_leaf])
