"""The directory of a run: what it is, its losses, its checkpoints, and in the end its adapter.

``finetune.json`` says what the run is and, once it is finished, what came out; ``losses.jsonl`` has a line per step and
per perplexity; ``checkpoints/step-00000050`` holds an adapter in PEFT's format, ``training.pt`` (optimizer, random
numbers) and ``state.json``, with the hash of every other file. Checkpoints are written beside themselves, made durable
and renamed: one that has its name is whole, unless the disk lost it, which the hashes tell.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.checks import is_number
from ..core.files import inside, is_left_over, read_json, replace_file, sha256_of
from ..core.stored import new_directory
from ..lora.peft_format import FILES

FORMAT = 1
MANIFEST, LOSSES, CURVE, ADAPTER = "finetune.json", "losses.jsonl", "losses.png", "adapter"
_CHECKPOINTS, _STATE, _TRAINING = "checkpoints", "state.json", "training.pt"
_HASHED = (_TRAINING, *(f"{ADAPTER}/{name}" for name in FILES))  # at least
_NUMBERS = ("step", "lr", "loss", "grad_norm", "tokens", "seconds")  # of each step
# The errors that reading a file with arbitrary bytes may raise.
_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, EOFError,
    pickle.UnpicklingError,
)  # fmt: skip
_KEPT = 2  # checkpoints: the one before the last is what is left if the disk loses the last
_Mark = dict[str, Any]


@dataclass
class History:
    """The figures measured so far: one entry per step, in order, and perplexities by the number of steps before."""

    steps: list[dict[str, float]] = field(default_factory=list)
    perplexities: dict[int, float] = field(default_factory=dict)

    def lines(self) -> Iterator[dict[str, float]]:
        for step in range(len(self.steps) + 1):
            if step:
                yield self.steps[step - 1]
            if step in self.perplexities:
                yield {"step": step, "held_out_perplexity": self.perplexities[step]}


@dataclass
class Checkpoint:
    """A checkpoint on disk; `training` has been read already, the adapter is read from its directory when it is
    needed."""

    path: Path
    step: int
    threads: int
    history: History
    training: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER


class RunDirectory:
    """See `open_run`.

    Attributes:
        path: of the directory.
        replacing: whether the run that is there is as good as gone; `begin` removes it.
    """

    def __init__(self, path: Path, replacing: bool = False) -> None:
        self.path, self.replacing = path, replacing
        self._damaged: dict[Path, str] = {}

    # ---- what the run is ----

    def begin(self, mark: _Mark, about: Mapping[str, Any]) -> None:
        """Write the manifest of a new run.

        Args:
            mark: what must be the same for the run to go on: "settings", "model" and "data".
            about: what is of interest besides.
        """
        if self.replacing:
            # The old manifest goes last, so that whoever is killed here can begin anew.
            self.remove_checkpoints()
            shutil.rmtree(self.path / ADAPTER, ignore_errors=True)
            for name in (LOSSES, CURVE):
                (self.path / name).unlink(missing_ok=True)
        if self.replacing or not (self.path / MANIFEST).exists():
            self.write_manifest({"format": FORMAT, **mark, "finished": False, **about})
        self.replacing = False

    def check(self, mark: _Mark, defaults: Mapping[str, Any] | None = None) -> None:
        """ValueError if there is the manifest of another run; the message says what differs."""
        if self.replacing or not (self.path / MANIFEST).exists():
            return
        found = self._read_manifest()
        different = [name for name in ("model", "data") if found.get(name) != mark[name]]
        was, now = found.get("settings"), mark["settings"]
        if not isinstance(was, dict):
            different.append("settings")
        elif changed := [
            f"{key} {old!r} is now {now[key]!r}"
            for key in now
            if (old := was.get(key, (defaults or {}).get(key))) != now[key]
        ]:
            different.append(f"settings ({', '.join(changed)})")
        if different:
            raise ValueError(
                f"{self.path} holds another run; different are its {', '.join(different)}: use the same again, or "
                "another directory"
            )

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}: use another directory") from None
        if (written := found.get("format")) != FORMAT:
            problem = f"format {written!r}, this octavo writes {FORMAT}"
            raise ValueError(f"{path} is damaged or of another version ({problem}): use another directory")
        return found

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        replace_file(self.path / MANIFEST, lambda target: target.write_text(text, encoding="utf-8"))

    def update_manifest(self, content: Mapping[str, Any]) -> None:
        self.write_manifest({**self._read_manifest(), **content})

    def check_unfinished(self) -> None:
        """FileExistsError if the run in this directory is done."""
        if (self.path / MANIFEST).exists() and self._read_manifest().get("finished"):
            raise FileExistsError(
                f"{self.path} holds a run that is finished; name another directory, or pass overwrite=True to replace "
                "it"
            )

    # ---- losses ----

    def rewrite_losses(self, history: History) -> None:
        """Drop the figures that were measured after the checkpoint: the resumed run measures them again."""
        text = "".join(json.dumps(line) + "\n" for line in history.lines())
        replace_file(self.path / LOSSES, lambda target: target.write_text(text, encoding="utf-8"))

    def append_loss(self, line: Mapping[str, float]) -> None:
        with open(self.path / LOSSES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- checkpoints ----

    def save(self, history: History, training: Mapping[str, Any], save_adapter: Callable[[Path], None]) -> Path:
        """Write a checkpoint, and remove all but the last two.

        Raises:
            OSError: it cannot be written; those that there are stay.
        """
        step = len(history.steps)
        folder = self.path / _CHECKPOINTS
        target = folder / f"step-{step:08d}"
        try:
            folder.mkdir(exist_ok=True)
            # One of this step lacks at most its perplexity.
            with new_directory(target, target.exists(), _STATE) as path:
                save_adapter(path / ADAPTER)
                torch.save(dict(training), path / _TRAINING)
                files = sorted(file for file in path.rglob("*") if file.is_file())
                state = {
                    "format": FORMAT,
                    "step": step,
                    "threads": torch.get_num_threads(),
                    "steps": history.steps,
                    "perplexities": list(history.perplexities.items()),
                    "sha256": {file.relative_to(path).as_posix(): sha256_of(file) for file in files},
                }
                state["self"] = _own_hash(state)
                (path / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        except Exception as error:  # torch and safetensors each raise an error of their own for a full disk
            have = f"{shutil.disk_usage(self.path).free} bytes are free"
            last = self._steps()
            left = f"the last one is of step {last[-1]}" if last else "there is none before it"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"cannot write the checkpoint {target}: {reason}; {have}; {left}") from error
        for old in self._steps()[:-_KEPT]:
            self._remove(folder / f"step-{old:08d}")
        return target

    def latest(self) -> Checkpoint | None:
        """The newest one that is whole; None where there is none at all.

        Raises:
            ValueError: there are some, all damaged.
        """
        self._damaged = {}
        for step in reversed(self._steps()):
            path = self.path / _CHECKPOINTS / f"step-{step:08d}"
            try:
                state = read_json(path / _STATE)
                if state["format"] != FORMAT:
                    raise ValueError(f"format {state['format']!r}, this octavo reads {FORMAT}")
                if missing := [name for name in _HASHED if name not in state["sha256"]]:
                    raise ValueError(f"{_STATE} has no sha256 of {missing[0]}")
                if state.get("self", own := _own_hash(state)) != own:
                    raise ValueError(f"{_STATE} is not what was written")
                for name, sha256 in state["sha256"].items():
                    if sha256_of(inside(path, name, f"{_STATE}, sha256,")) != sha256:
                        raise ValueError(f"{name} is not what was written")
                history = _history(state)
                if not state["step"] == len(history.steps) == step:
                    raise ValueError(f"{_STATE} is of step {state['step']}, with {len(history.steps)} losses")
                training = torch.load(path / _TRAINING, map_location="cpu", weights_only=True)
                return Checkpoint(path, step, state["threads"], history, training)
            except _DAMAGE as error:
                reason = f"KeyError: {error}" if isinstance(error, KeyError) else error
                self._damaged[path] = f"{path} is damaged ({reason})"
        if self._damaged:
            raise ValueError(f"{'; '.join(self._damaged.values())}: remove {self.path} to begin anew")
        return None

    def remove_damaged(self) -> list[str]:
        """Remove what `latest` passed over. Returns what was wrong with each."""
        for path in self._damaged:
            self._remove(path)
        problems, self._damaged = list(self._damaged.values()), {}
        return problems

    def _steps(self) -> list[int]:
        names = (entry.name for entry in (self.path / _CHECKPOINTS).glob("step-*"))
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def last_step(self) -> int | None:
        """The step of the newest checkpoint; None without one."""
        return None if self.replacing else max(self._steps(), default=None)

    def _remove(self, path: Path) -> None:
        hidden = path.with_name(f".{path.name}.old")  # half of a checkpoint must not look like one
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.path / _CHECKPOINTS, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a run that was killed left half-written."""
        for folder in (self.path, self.path / _CHECKPOINTS):
            for entry in folder.glob(".*"):
                if entry.suffix in (".tmp", ".old"):
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


@contextmanager
def open_run(path: str | os.PathLike[str], resume: bool, overwrite: bool = False) -> Iterator[RunDirectory]:
    """The directory of a run, for this process alone.

    If the block raises before there is a manifest, the directory is as it was: it is gone if it was not there.

    Args:
        path: to be made, in a directory that exists; or empty; or with `resume`, of a run that is not finished.
        resume: go on with the run that is there, if there is one.
        overwrite: what a run left there, finished or not, is removed when the new one begins; other files stay.

    Raises:
        FileExistsError: there is something else.
        OSError: it cannot be made or written.
        BlockingIOError: another process trains there.
    """
    where = Path(path)
    new = not where.exists()
    if not new:
        if not where.is_dir():
            raise FileExistsError(f"{where} exists and is not a directory")
        entries = sorted(entry.name for entry in where.iterdir() if not is_left_over(entry.name))
        if entries and MANIFEST not in entries:
            raise FileExistsError(
                f"{where} exists, and holds {entries[0]} but no {MANIFEST}: it is no directory of a run; name another"
            )
        run = RunDirectory(where)
        if not overwrite:
            run.check_unfinished()
            if entries and not resume:
                raise FileExistsError(
                    f"{where} holds a run that is not finished: resume it, name another directory, or pass "
                    "overwrite=True to begin anew"
                )
    elif not where.parent.is_dir():
        raise FileNotFoundError(f"cannot write {where}: there is no directory {where.parent}")
    try:
        where.mkdir(exist_ok=True)
        probe = where / f".{os.getpid()}.tmp"
        probe.write_bytes(b"octavo")
        probe.unlink()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {where}: {error.strerror}") from None
    run = RunDirectory(where, replacing=overwrite and (where / MANIFEST).exists())
    try:
        with _locked(where):
            run.sweep()
            yield run
    except BaseException:
        if new and not any(where.iterdir()):
            where.rmdir()
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process trains in {path}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _history(state: Mapping[str, Any]) -> History:
    """Read the history from a checkpoint's state. ValueError unless every entry is what `RunDirectory.save` writes."""

    def check(valid: bool, what: str, value: object) -> None:
        if not valid:
            raise ValueError(f"{_STATE} has {what} = {value!r}")

    steps, perplexities, threads = state["steps"], state["perplexities"], state["threads"]
    check(type(threads) is int and threads > 0, "threads", threads)
    check(isinstance(steps, list), "steps", steps)
    for number, line in enumerate(steps, 1):
        check(isinstance(line, dict) and line.keys() == set(_NUMBERS), f"steps[{number - 1}]", line)
        for name, value in line.items():
            check(is_number(value) and math.isfinite(value), f"steps[{number - 1}] {name}", value)
        check(line["step"] == number, f"steps[{number - 1}] step", line["step"])
    check(isinstance(perplexities, list), "perplexities", perplexities)
    for entry in perplexities:
        pair = isinstance(entry, list) and len(entry) == 2
        check(pair and type(entry[0]) is int and 0 <= entry[0] <= len(steps), "perplexities", entry)
        check(is_number(entry[1]) and math.isfinite(entry[1]), "perplexities", entry)
    return History(steps, {at: float(value) for at, value in perplexities})


def _own_hash(state: Mapping[str, Any]) -> str:
    """The SHA-256 of what a state holds, but for itself; states of octavo 0.1.0 and before have none."""
    content = json.dumps({key: value for key, value in state.items() if key != "self"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
