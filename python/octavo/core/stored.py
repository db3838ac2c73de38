"""Directories that appear whole or not at all, and names in stored tensors."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

MANIFEST = "octavo.json"  # the manifest of a directory that octavo.save_quantized wrote


@contextmanager
def new_directory(target: str | os.PathLike[str], overwrite: bool = False, marker: str = MANIFEST) -> Iterator[Path]:
    """A directory to write into, which becomes `target` in one rename when the block ends, and never if it raises.

    Args:
        target: must not exist, or be an empty directory.
        overwrite: `target` may also be a directory with the file `marker` in it; it is replaced at the end.
        marker: by default what `save_quantized` writes.

    Raises:
        FileExistsError: it exists and may not be replaced. Nothing has been written then.
        FileNotFoundError: the directory that `target` is to be in does not exist.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite, marker)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")
    temporary, old = (target.parent / f".{target.name}.{secrets.token_hex(4)}.{end}" for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _check_target(target, overwrite, marker)
        if overwrite and target.exists():
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_target(target: Path, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory")
    entries = sorted(entry.name for entry in target.iterdir())
    if not entries or (overwrite and marker in entries):
        return
    if overwrite:
        raise FileExistsError(f"{target} was not written by octavo (it has no {marker}): it is not overwritten")
    raise FileExistsError(f"{target} exists and holds {len(entries)} entries; pass overwrite=True to replace it")


def tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make tensors that were one before saving one object again."""
    for name, source in tied.items():
        owner, _, leaf = name.rpartition(".")
        source_owner, _, source_leaf = source.rpartition(".")
        setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(source_owner), source_leaf))
