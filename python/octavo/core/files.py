"""Files: read so that what is in them cannot mislead, and written so that a power cut loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ---- reading -------------------------------------------------------------------------------------------------------


def read_json(path: Path, foreign: bool = False) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: of a regular file; a device or a pipe would be read without end.
        foreign: of a file of another program, see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or of another kind; the message has the path.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import read_json
        >>> Path("numbers.json").write_text('{"one": 1, "one": 2}')
        20
        >>> read_json(Path("numbers.json"))
        Traceback (most recent call last):
        ValueError: numbers.json is not JSON: the key 'one' is there twice
    """
    check_regular(path)
    return parse_json(path.read_bytes(), path, foreign)


def parse_json(text: str | bytes, where: object, foreign: bool = False) -> dict[str, Any]:
    """Read the JSON object in `text`.

    Keys that are there twice, numbers outside of float64, NaN and Infinity are errors, since none is written here.

    Args:
        text: JSON, as UTF-8 if it is bytes.
        where: what the message of an error calls it.
        foreign: NaN, Infinity and numbers that become it are taken, as configurations of other programs may have them.

    Raises:
        ValueError: it is not JSON, nested too deeply to be read, or no object.

    Example:
        >>> from octavo.core.files import parse_json
        >>> parse_json('{"bits": 3}', "the manifest")
        {'bits': 3}
        >>> parse_json("[" * 100_000, "the manifest")
        Traceback (most recent call last):
        ValueError: the manifest is not JSON: it is nested too deeply
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        constant, real = (None, None) if foreign else (_refuse, _finite)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=real)
    except RecursionError:
        raise ValueError(f"{where} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold an object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value


def check_regular(path: Path) -> None:
    """ValueError if there is something else than a regular file at `path`, which might not end; OSError if nothing.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import check_regular
        >>> check_regular(Path("/dev/zero"))
        Traceback (most recent call last):
        ValueError: /dev/zero is not a regular file
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file")


def inside(directory: Path, name: object, where: object) -> Path:
    """The path of an entry that a file names, which must lie in `directory`.

    A symbolic link may lead out of it in one case: in a snapshot of the Hugging Face cache, to the blobs of the same
    repository, where that cache has all its files.

    Args:
        directory: which the name is relative to.
        name: what the file says: anything.
        where: the file and the entry in it, for the message of an error.

    Raises:
        ValueError: it is absolute, leads out of the directory, or is no name.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import inside
        >>> inside(Path("model"), "../secret", "model/index.json")
        Traceback (most recent call last):
        ValueError: model/index.json names '../secret', which is not in model
    """
    problem = ValueError(f"{where} names {name!r}, which is not in {directory}")
    if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise problem
    path, root = directory / name, os.path.realpath(directory)
    found = os.path.realpath(path)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(os.path.commonpath([found, place]) == place for place in allowed):
        raise problem
    return path


INDEX = "model.safetensors.index.json"


def indexed_files(directory: Path) -> list[Path]:
    """The safetensors files of a model in a directory: those that its index names, or all where it has none.

    Raises:
        FileNotFoundError: one that is named is missing.
        ValueError: the index is damaged or names something outside of the directory, or one is not a regular file.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import indexed_files
        >>> Path("indexed").mkdir()
        >>> Path("indexed/model.safetensors.index.json").write_text('{"weight_map": {"w": "/etc/passwd"}}')
        36
        >>> indexed_files(Path("indexed"))
        Traceback (most recent call last):
        ValueError: indexed/model.safetensors.index.json: weight_map 'w' names '/etc/passwd', which is not in indexed
    """
    index = directory / INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))  # links that nothing but their directory names are followed
    else:
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ValueError(f"{index} is not the index of a checkpoint: it has weight_map = {named!r}")
        files = sorted({inside(directory, name, f"{index}: weight_map {key!r}") for key, name in named.items()})
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; {index.name} names it")
        check_regular(file)
    return files


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import sha256_of
        >>> Path("empty").write_bytes(b"")
        0
        >>> sha256_of(Path("empty"))[:8]
        'e3b0c442'
    """
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- writing -------------------------------------------------------------------------------------------------------


def make_durable(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk, so that neither is only in the system's memory when
    something is renamed or removed.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import make_durable
        >>> make_durable(Path("."))
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has nothing to flush
            raise
    finally:
        os.close(handle)


def make_all_durable(path: Path) -> None:
    """`make_durable` for a directory and everything in it.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import make_all_durable
        >>> Path("written").mkdir()
        >>> make_all_durable(Path("written"))
    """
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            make_durable(Path(folder, name))
        make_durable(Path(folder))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside itself, make it durable and rename it: at `path` is always the old one or the new one, whole.

    Args:
        path: of the file, there or not.
        write: writes the file whose path it is given.

    Raises:
        OSError: it cannot be written; a full disk names `path`.

    Example:
        >>> from pathlib import Path
        >>> from octavo.core.files import replace_file
        >>> replace_file(Path("note.txt"), lambda path: path.write_text("new"))
        >>> Path("note.txt").read_text()
        'new'
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        make_durable(beside)
        os.replace(beside, path)
        make_durable(path.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        raise_if_full(error, path)
        raise


def is_left_over(name: str) -> bool:
    """Whether a file's name is that of what `replace_file` writes first: a process that was killed may leave one.

    Example:
        >>> from octavo.core.files import is_left_over
        >>> is_left_over(".note.txt.4711.tmp"), is_left_over("note.tmp")
        (True, False)
    """
    return name.startswith(".") and name.endswith(".tmp")


_FULL = ("No space left on device", "Disk quota exceeded", "os error 28", "PytorchStreamWriter failed")


def raise_if_full(error: BaseException, path: Path) -> None:
    """Raise OSError with the path if `error` came of a full disk: safetensors and torch.save have errors of their own
    for it, none of which names the file.

    Example:
        >>> import errno
        >>> from pathlib import Path
        >>> from octavo.core.files import raise_if_full
        >>> raise_if_full(OSError(errno.ENOSPC, "No space left on device"), Path("model"))
        Traceback (most recent call last):
        OSError: [Errno 28] no space left on the disk: 'model'
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, Exception) and any(mark in str(error) for mark in _FULL)):
        raise OSError(errno.ENOSPC, "no space left on the disk", str(path)) from error
