"""Paged optimizers: what is refused, and that nothing is half done then."""

from __future__ import annotations

import copy
import errno
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import optim
from octavo.optim import _paging
from paging import many, mapped, run_python
from training import one, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paged": 1}, "^AdamW8bit: paged must be True or False, got 1"),
        ({"page_dir": "/tmp"}, "^AdamW8bit: page_dir='/tmp' needs paged=True"),
        ({"device_budget": 5}, "^AdamW8bit: device_budget=5 needs paged=True"),
        ({"paged": True, "device_budget": -1}, "device_budget must be None, 0 or a positive number of bytes, got -1"),
        ({"paged": True, "device_budget": 0.5}, "got 0.5"),
        ({"paged": True, "device_budget": True}, "got True"),
        ({"paged": True, "page_dir": b"/tmp"}, "page_dir must be a path, got b'/tmp'"),
        ({"paged": True, "page_dir": 3}, "^AdamW8bit: page_dir must be a path, got 3"),
        ({"paged": True, "page_dir": "\0bad"}, r"^AdamW8bit: page_dir '\\x00bad' cannot be a path: embedded null byte"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        optim.AdamW8bit([one()], **options)


def test_groups_have_no_paging_of_their_own():
    optimizer = optim.AdamW8bit([one()])
    with pytest.raises(ValueError, match="group 1: paged is an option of the optimizer, not of a group, got True"):
        optimizer.add_param_group({"params": [one()], "paged": True})
    assert len(optimizer.param_groups) == 1


def test_devices_that_cannot_be_paged(monkeypatch: pytest.MonkeyPatch):
    class Elsewhere:
        device, shape = torch.device("mps"), (3,)

    paging = _paging.Paging("AdamW8bit", None, None)
    with pytest.raises(ValueError, match="parameter 0 is on mps: paged=True is for parameters on the CPU and on CUD"):
        paging.check(Elsewhere(), "AdamW8bit: parameter 0")
    Elsewhere.device = torch.device("cuda:1")
    paging.check(Elsewhere(), "AdamW8bit: parameter 0")
    monkeypatch.setattr(_paging._state, "is_dtensor", lambda t: True)
    with pytest.raises(ValueError, match=r"parameter 0 is a DTensor of shape \[3\] on cuda:1: paged=True is for para"):
        paging.check(Elsewhere(), "AdamW8bit: parameter 0")


@pytest.mark.parametrize(
    ("folder", "error", "reason"),
    [
        ("missing", FileNotFoundError, "No such file or directory"),
        ("file", NotADirectoryError, "Not a directory"),
        ("/proc", OSError, ""),  # also for root, who may write everywhere else
    ],
)
def test_folders_that_cannot_be_written(folder: str, error: type[OSError], reason: str, tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / folder
    with pytest.raises(error, match=rf"AdamW8bit: page_dir '{path}' cannot hold 0 bytes of states: {reason}") as caught:
        optim.AdamW8bit([one()], paged=True, page_dir=path)
    assert "are free" not in str(caught.value)


def assert_nothing_changes(optimizer: optim.Optimizer8bit, params: list[torch.nn.Parameter], message: str) -> None:
    """A step and a load fail with that message, and leave all as it was."""
    before = copy.deepcopy([*params])
    states = copy.deepcopy(optimizer.state_dict())
    folder = Path(optimizer._paging.page_dir)
    files = mapped(folder)
    wide = optim.AdamW8bit(copy.deepcopy(params))
    train(wide, wide.param_groups[0]["params"], 1)
    saved = wide.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]}
    for act in (lambda: train(optimizer, params, 1), lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(OSError, match=message) as raised:
            act()
        assert raised.value.errno == errno.ENOSPC
        del raised
        gc.collect()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        after = optimizer.state_dict()
        assert {k for k, v in after["state"].items() if v} == set(states["state"])
        for number, entry in states["state"].items():
            assert all(torch.equal(value, after["state"][number][key]) for key, value in entry.items())
        assert mapped(folder) == files and list(folder.iterdir()) == []


@pytest.mark.parametrize("fails", ["counted", "taken"])
def test_a_folder_that_is_full(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether its free space says so, or taking it does."""
    params = many()
    optimizer = optim.AdamW8bit(params, paged=True, page_dir=tmp_path, device_budget=0)
    train(optimizer, params[:2], 1)
    real = _paging.shutil.disk_usage

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "anything")

    if fails == "counted":
        monkeypatch.setattr(_paging.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    else:
        monkeypatch.setattr(_paging.os, "posix_fallocate", full)
    free = "1000 bytes are free" if fails == "counted" else r"\d+ bytes are free"
    message = rf"AdamW8bit: page_dir '{tmp_path}' cannot hold \d{{5}} bytes of states: No space left on device, {free}"
    assert_nothing_changes(optimizer, params, message)
    monkeypatch.undo()
    train(optimizer, params, 1)


def test_space_is_taken_where_the_file_system_cannot_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By writing, so that a full disk is seen now and not at some write to the mapping, which would be a SIGBUS."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "cannot")

    for change in (lambda: None, lambda: monkeypatch.setattr(os, "posix_fallocate", refuse)):
        change()
        with (tmp_path / "x").open("wb", buffering=0) as file:
            _paging._take_space(file.fileno(), (3 << 20) + 5)
            status = os.fstat(file.fileno())
        assert status.st_size == (3 << 20) + 5 and status.st_blocks * 512 >= status.st_size
        assert not any((tmp_path / "x").read_bytes())
        (tmp_path / "x").unlink()


LIMITED = """
    import resource, sys
    import torch
    from octavo import optim

    p = torch.nn.Parameter(torch.ones(1 << 20))
    p.grad = torch.ones(1 << 20)
    optimizer = optim.PagedAdamW8bit([p], page_dir=sys.argv[1], device_budget=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        optimizer.step()
    except OSError as error:
        assert not any(optimizer.state.values()) and bool((p == 1).all())
        print(error)
"""


def test_files_that_must_not_grow_so_large(tmp_path: Path):
    done = run_python(LIMITED, tmp_path)
    assert f"PagedAdamW8bit: page_dir '{tmp_path}' cannot hold 2129920 bytes of states: File too large" in done.stdout
    assert done.returncode == 0, done.stderr
