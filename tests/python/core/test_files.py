"""Files that are read cannot mislead; files and directories that are written are whole, durable, never half there."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo.core import files, stored
from octavo.core.files import inside, make_durable, parse_json, read_json, replace_file
from octavo.core.stored import new_directory

# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1', "is not JSON: Expecting"),
        ("", "is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        (f'{{"a": {"9" * 5000}}}', "is not JSON"),
        ("[1, 2]", "must hold an object, got list"),
        ("null", "must hold an object, got NoneType"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8'"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str | bytes, words: str):
    path = tmp_path / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_numbers_of_other_programs():
    found = parse_json('{"a": NaN, "b": -Infinity, "c": 1e999}', "config", foreign=True)
    assert found["a"] != found["a"] and found["b"] == -found["c"] == -float("inf")


def test_devices_and_pipes_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        for read in (read_json, files.sha256_of):
            with pytest.raises(ValueError, match="is not a regular file"):
                read(path)


# ---- names in files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", 7, None, ["x"], "out", "out/x"])
def test_names_that_lead_out(tmp_path: Path, name: object):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (model / "out").symlink_to(tmp_path / "elsewhere")
    if name == ".":
        assert inside(model, name, "index") == model / "."
        return
    with pytest.raises(ValueError, match=r"index: w names .*, which is not in"):
        inside(model, name, "index: w")


def test_names_that_stay_inside(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    for name in ("a.safetensors", "sub/b", "link/c", "..a", "a..b"):
        assert inside(tmp_path, name, "index") == tmp_path / name


def test_snapshots_of_the_hubs_cache(tmp_path: Path):
    """There every file is a link to the repository's blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "other").symlink_to(tmp_path)
    assert inside(snapshot, "model.safetensors", "index").read_text() == "{}"
    with pytest.raises(ValueError, match="which is not in"):
        inside(snapshot, "other", "index")


def test_an_index(tmp_path: Path):
    index = tmp_path / files.INDEX
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in files.indexed_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "c.safetensors").symlink_to(Path(__file__))  # of the user's own making
    assert len(files.indexed_files(tmp_path)) == 3
    (tmp_path / "c.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"v": "b.safetensors", "w": "b.safetensors"}}))
    assert [path.name for path in files.indexed_files(tmp_path)] == ["b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"w": "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors is missing"):
        files.indexed_files(tmp_path)
    for wrong in ({"weight_map": ["a"]}, {}, {"weight_map": {"w": "../x"}}, {"weight_map": {"w": 3}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="weight_map"):
            files.indexed_files(tmp_path)
    (tmp_path / "zero").symlink_to("/dev/zero")
    index.write_text(json.dumps({"weight_map": {"w": "zero"}}))
    with pytest.raises(ValueError, match=r"names 'zero', which is not in"):
        files.indexed_files(tmp_path)


# ---- writing -------------------------------------------------------------------------------------------------------


class Watch:
    """What is flushed and renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        fsync, rename, replace, exchange = os.fsync, os.rename, os.replace, stored._exchange

        def flushed(handle: int) -> None:
            self.seen.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
            fsync(handle)

        def moved(move: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def call(a: Any, b: Any) -> Any:
                self.seen.append(("move", os.path.basename(b)))
                return move(a, b)

            return call

        monkeypatch.setattr(os, "fsync", flushed)
        monkeypatch.setattr(os, "rename", moved(rename))
        monkeypatch.setattr(os, "replace", moved(replace))
        monkeypatch.setattr(stored, "_exchange", moved(exchange))


def fill(path: Path, text: str) -> None:
    (path / "octavo.json").write_text(text)
    (path / "sub").mkdir()
    (path / "sub" / "tensors").write_text(text * 3)


def read(path: Path) -> str:
    text = (path / "octavo.json").read_text()
    assert (path / "sub" / "tensors").read_text() == text * 3
    return text


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_flushed_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
):
    target = tmp_path / "model"
    if overwrite:
        with new_directory(target) as path:
            fill(path, "old")
    watch = Watch(monkeypatch)
    with new_directory(target, overwrite) as path:
        fill(path, "new")
        temporary = path.name
    place = watch.seen.index(("move", "model"))
    assert {("flush", name) for name in ("octavo.json", "tensors", "sub", temporary)} <= set(watch.seen[:place])
    assert ("flush", tmp_path.name) in watch.seen[place:]
    assert read(target) == "new" and os.listdir(tmp_path) == ["model"]


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    watch = Watch(monkeypatch)
    replace_file(tmp_path / "note", lambda path: path.write_text("new"))
    assert [kind for kind, _ in watch.seen] == ["flush", "move", "flush"] and watch.seen[1] == ("move", "note")
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "note", lambda path: path.write_text(str(1 // 0)))
    assert os.listdir(tmp_path) == ["note"] and (tmp_path / "note").read_text() == "new"


def test_file_systems_that_cannot_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    make_durable(tmp_path)


# ---- destinations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path: Path, there: bool):
    real, link = tmp_path / "real", tmp_path / "link"
    if there:
        real.mkdir()
    link.symlink_to(real)
    for text in ("one", "two"):
        with new_directory(link, overwrite=True) as path:
            fill(path, text)
        assert link.is_symlink() and read(real) == text and sorted(os.listdir(tmp_path)) == ["link", "real"]


def mount(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Let `target` be what the mount point of a volume is to a rename."""
    rename = os.rename

    def busy(a: Any, b: Any) -> None:
        if str(b) == str(target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(a, b)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(target))


def test_an_empty_mount_point_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "volume"
    target.mkdir()
    mount(monkeypatch, target)
    watch = Watch(monkeypatch)
    with new_directory(target) as path:
        fill(path, "new")
    assert read(target) == "new" and sorted(os.listdir(target)) == ["octavo.json", "sub"]
    assert [name for kind, name in watch.seen if kind == "move"] == ["sub", "octavo.json"]  # the marker last
    refused = pytest.raises(FileExistsError, match="is a mount point, so that it cannot be replaced")
    with refused, new_directory(target, overwrite=True):
        raise AssertionError("the work was done")


def test_a_mount_point_that_fails_in_the_middle_is_empty_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "volume"
    target.mkdir()
    mount(monkeypatch, target)
    rename = os.rename

    def full(a: Any, b: Any) -> None:
        if os.path.basename(b) == "octavo.json":
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="Input/output"), new_directory(target) as path:
        fill(path, "new")
    assert os.listdir(target) == []


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *args, **kwargs)

    too_little = pytest.raises(OSError, match=r"needed, \d+ are free: .*model")
    with too_little, new_directory(tmp_path / "model", needed=1 << 62):
        raise AssertionError("the work was done")
    monkeypatch.setattr(Path, "mkdir", read_only)
    refused = pytest.raises(OSError, match=r"cannot write .*model: Read-only file system")
    with refused, new_directory(tmp_path / "model"):
        raise AssertionError("the work was done")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_names_the_path(tmp_path: Path, error: Exception):
    full = pytest.raises(OSError, match=r"no space left on the disk: .*model")
    with full as caught, new_directory(tmp_path / "model"):
        raise error
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []

    def write(path: Path) -> None:
        raise error

    with pytest.raises(OSError, match=r"no space left on the disk: .*note"):
        replace_file(tmp_path / "note", write)


# ---- processes that are killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_killed_at_every_call_there_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool):
    """A process that replaces a model dies at the first, second, ... call of the system: the old or the new one is
    there, whole, and the next one that saves leaves nothing else."""
    if not exchanges:
        monkeypatch.setattr(stored, "_exchange", lambda a, b: False)
    target, found = tmp_path / "model", set()
    with new_directory(target) as path:
        fill(path, "old")
    for call in range(1, 100):
        if (child := os.fork()) == 0:
            _die_at(call)
            with new_directory(target, overwrite=True) as path:
                fill(path, f"new {call}")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        stored.put_back(target)  # as a load does
        found.add(read(target).partition(" ")[0])
        with new_directory(target, overwrite=True) as path:
            fill(path, "old")
        assert os.listdir(tmp_path) == ["model"]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert call > 8 and found == {"old", "new"}


def _die_at(call: int) -> None:
    """Kill this process at a call of a function that changes the disk."""
    left = call

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))
    stored._exchange = wrap(stored._exchange)


def test_who_still_writes_is_left_alone(tmp_path: Path):
    with new_directory(tmp_path / "model") as path:
        fill(path, "slow")
        if (child := os.fork()) == 0:
            with new_directory(tmp_path / "model") as other:
                fill(other, "fast")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert read(path) == "slow" and read(tmp_path / "model") == "fast"
        for file in (tmp_path / "model").rglob("*"):
            file.unlink() if file.is_file() else None
        (tmp_path / "model" / "sub").rmdir()
    assert read(tmp_path / "model") == "slow"


def test_names_that_only_look_like_leftovers_stay(tmp_path: Path):
    names = [".model.old", ".model.12345678.txt", ".model.1234567g.tmp", ".models.12345678.tmp", "model.12345678.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".model.12345678.tmp").mkdir()
    with new_directory(tmp_path / "model") as path:
        fill(path, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model"])
