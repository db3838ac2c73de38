"""Paged optimizers with states in mapped files: the same bits as without, nothing left behind, states larger than
memory; what is refused, and that nothing is half done then. On a GPU: the same with pinned memory."""

from __future__ import annotations

import copy
import errno
import gc
import io
import mmap
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import optim
from octavo.optim import _paging, _schedule
from training import OPTIMIZERS, one, parameters, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
PAGED = [name for name in optim.__all__ if name.startswith("Paged")]
SHAPES = ((64, 300), (5000,), (16, 8, 3, 3), (7,), (), (0, 5), (4096,), (90, 70))


def many(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    return parameters(device, dtype, SHAPES)


def mapped(folder: Path) -> int:
    """How many files of the folder this process has mapped."""
    text = Path("/proc/self/maps").read_text()
    return len({line.split()[4] for line in text.splitlines() if f" {folder}/" in line})


def opened(folder: Path) -> int:
    found = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(name.startswith(f"{folder}/") for name in found)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: optim.Optimizer8bit, b: optim.Optimizer8bit) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and set(mine["state"]) == set(theirs["state"])
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    for number, entry in mine["state"].items():
        other = theirs["state"][number]
        assert set(entry) == set(other)
        for key, value in entry.items():
            same = torch.equal(value.cpu(), other[key].cpu())
            assert value.dtype is other[key].dtype and same, (number, key)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schedule, "PAGE_BYTES", 20_000)


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 32, "max_grad_norm": 0.5},
        {"rounding": "kahan"},
        {"rounding": "stochastic", "device_budget": 50_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_paged_steps_are_the_same(
    kind: type[optim.Optimizer8bit], options: dict[str, Any], tmp_path: Path, small_pages: None
):
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    ours, theirs = many(dtype), many(dtype)
    mine = kind(ours, lr=1e-2, paged=True, page_dir=tmp_path, **{"device_budget": 0, **options})
    other = kind(theirs, lr=1e-2, **{key: value for key, value in options.items() if key != "device_budget"})
    for seed in range(3):
        train(mine, ours, 1, seed)
        train(other, theirs, 1, seed)
    assert_same(mine, other)
    assert mine.nonfinite_count() == other.nonfinite_count() and mine.grad_norm == other.grad_norm
    tensors = [(p, k, v) for p, entry in mine.state.items() for k, v in entry.items() if k != "step" and v.numel()]
    taken = sum(_paging.aligned(v.nbytes) for _, _, v in tensors)
    if "device_budget" not in options:
        assert mine.paged_bytes() == taken
        assert mapped(tmp_path) == (taken > 0)
    else:
        assert mine.paged_bytes() == taken or taken - 50_000 <= mine.paged_bytes() < taken
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"bits": 32, "max_grad_norm": 0.5}, {"rounding": "kahan"}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_with_pinned_memory_are_the_same(kind: type[optim.Optimizer8bit], options: dict[str, Any], small_pages):
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    ours, theirs = many(dtype, "cuda"), many(dtype, "cuda")
    budget = 800_000 if "bits" in options else 200_000
    mine, other = kind(ours, paged=True, device_budget=budget, **options), kind(theirs, **options)
    for seed in range(4):
        train(mine, ours, 1, seed)
        train(other, theirs, 1, seed)
    assert_same(mine, other)
    fresh = kind(copy.deepcopy(ours), paged=True, device_budget=budget)
    fresh.load_state_dict(through_a_file(mine.state_dict()))
    train(fresh, fresh.param_groups[0]["params"], 1, 9)
    train(other, theirs, 1, 9)
    assert_same(fresh, other) if not options else None


@pytest.mark.parametrize("name", PAGED)
def test_classes(name: str, tmp_path: Path):
    """Each pages, in 8 bit or 32 as its name says, and runs on the CPU without a folder."""
    kind, options = getattr(optim, name), {"momentum": 0.9} if name in ("PagedSGD8bit",) else {}
    params = [one(), one(9000)]
    optimizer = kind(params, page_dir=str(tmp_path), device_budget=0, **options)
    train(optimizer, params, 1)
    assert optimizer.paged_bytes() > 0
    assert optimizer.param_groups[0]["bits"] == (8 if name.endswith("8bit") else 32)
    plain = kind(params, device_budget=0, **options)  # ordinary memory, whatever the budget
    train(plain, params, 1)
    assert plain.paged_bytes() == 0
    assert kind.__mro__[1].__name__ in (name.removeprefix("Paged"), name.removeprefix("Paged") + "8bit")


def test_the_next_page_is_read_ahead(tmp_path: Path, small_pages: None):
    params = many()
    optimizer = optim.AdamW8bit(params, paged=True, page_dir=tmp_path, device_budget=0)
    train(optimizer, params, 1)
    pages, log = optimizer._paging.pagers[torch.device("cpu")].pages, []

    class Mapping:
        def madvise(self, advice: int, begin: int, count: int) -> None:
            log.append((advice, begin, begin + count))

    for page in pages:
        page.source = Mapping()
    step = optimizer._launch
    optimizer._launch = lambda launch, *rest: (log.append(launch.page.number), step(launch, *rest))[1]
    train(optimizer, params, 1)
    assert len(pages) == 4
    order = [entry if isinstance(entry, int) else "ahead" for entry in log]
    assert order == ["ahead", "ahead", 0, "ahead", 1, "ahead", 2, 3]
    for page, (advice, begin, end) in zip(pages, [e for e in log if isinstance(e, tuple)], strict=True):
        assert advice == mmap.MADV_WILLNEED and begin % mmap.PAGESIZE == 0 and begin <= page.begin
        assert end == page.begin + page.memory.numel()


def test_parameters_that_come_later_and_states_that_move(tmp_path: Path, small_pages: None):
    """One file for all that come at once; also when their owner clears the state."""
    ours, theirs = many(), many()
    mine = optim.AdamW8bit(ours[:3], paged=True, page_dir=tmp_path, device_budget=20_000)
    other = optim.AdamW8bit(theirs[:3])
    for optimizer, params in ((mine, ours), (other, theirs)):
        train(optimizer, params[:2], 1)
        train(optimizer, params[:3], 1)
        optimizer.add_param_group({"params": params[3:]})
        train(optimizer, params, 1)
        optimizer.state[params[1]] = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
        train(optimizer, params, 1)
    assert_same(mine, other)
    paged = mine.paged_bytes()
    assert paged > 0 and mapped(tmp_path) == 2  # 20000 bytes stay; the second parameter has a page, later ones others
    mine.state.clear()
    other.state.clear()
    train(mine, ours, 1, 7)
    train(other, theirs, 1, 7)
    assert_same(mine, other)
    assert mapped(tmp_path) == 1 and mine.paged_bytes() == paged


def test_what_no_longer_has_to_be_paged_moves_to_memory(tmp_path: Path, small_pages: None):
    params = parameters(shapes=[(9000,), (9000,), (9000,)])
    optimizer = optim.AdamW8bit(params, paged=True, page_dir=tmp_path, device_budget=20_000)
    train(optimizer, params, 1)
    before = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
    assert optimizer._paging.page_of(params[0]) is None
    assert optimizer._paging.page_of(params[1]).place_of(optimizer.state[params[1]]["exp_avg"]) == 0
    del optimizer.state[params[0]], optimizer.state[params[2]]
    params[0].grad = params[1].grad = None
    optimizer.step()  # the third one's state is made again
    assert optimizer._paging.page_of(params[1]) is None and optimizer._paging.page_of(params[2]) is not None
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[params[1]].items())
    del before
    gc.collect()
    assert mapped(tmp_path) == 1  # nothing is left in the old file


# ---- lifetime --------------------------------------------------------------------------------------------------------


def test_everything_is_freed_with_the_optimizer(tmp_path: Path):
    params = many()
    optimizer = optim.PagedAdamW8bit(params, page_dir=tmp_path, device_budget=0)
    train(optimizer, params, 2)
    assert mapped(tmp_path) == 1 and opened(tmp_path) == 1 and list(tmp_path.iterdir()) == []
    optimizer.load_state_dict(optimizer.state_dict())
    assert mapped(tmp_path) == 1  # not the old one too
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None and mapped(tmp_path) == 0 and opened(tmp_path) == 0


def test_a_state_dict_outlives_the_optimizer(tmp_path: Path):
    params = many()
    optimizer = optim.PagedAdamW8bit(params, page_dir=tmp_path, device_budget=0)
    train(optimizer, params, 2)
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    state = optimizer.state_dict()
    del optimizer
    gc.collect()
    other = optim.AdamW8bit(params)
    other.load_state_dict(state)
    del state
    gc.collect()
    assert mapped(tmp_path) == 0
    assert len(expected) == len(params)
    for number, entry in expected.items():
        assert all(torch.equal(v, other.state[params[number]][k]) for k, v in entry.items())


def test_a_saved_state_is_not_larger(tmp_path: Path):
    """Each tensor has a storage of its own size, so that nothing else is saved with it."""
    params = many()
    optimizer = optim.PagedAdamW8bit(params, page_dir=tmp_path, device_budget=0)
    train(optimizer, params, 1)
    for entry in optimizer.state_dict()["state"].values():
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in entry.values())


def run_python(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


LARGE = """
    import gc, mmap, os, resource, sys
    import torch
    from octavo import optim

    count, number, budget = 1 << 19, 48, 64 << 20
    params = [torch.nn.Parameter(torch.ones(count)) for _ in range(number)]
    grad = torch.full((count,), 0.01)  # one for all

    def step(optimizer):
        for p in params:
            p.grad = grad
        optimizer.step()

    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optim.AdamW8bit([p]).step()  # imports what torch imports late
    # As small as the limit of data makes memory: shared mappings of files do not count.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    taken = int(status["VmData"].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (taken + budget, resource.RLIM_INFINITY))
    try:
        step(optim.AdamW8bit(params, bits=32))
        sys.exit("192 MiB of states went into 64 MiB")
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error), error
    gc.collect()
    optimizer = optim.PagedAdamW(params, lr=0.125, weight_decay=0.0, page_dir=sys.argv[1], device_budget=0)
    for _ in range(2):
        step(optimizer)
    assert optimizer.paged_bytes() == number * 8 * count > 2 * budget
    assert all(abs(float(p.detach().max()) - 0.75) < 1e-4 for p in params)
    torch.save(optimizer.state_dict(), sys.argv[2])
    step(optimizer)
    expected = [float(p.detach().sum()) for p in params]
    with torch.no_grad():
        for p in params:
            p.fill_(0.75)
    del optimizer
    gc.collect()
    resumed = optim.PagedAdamW(params, page_dir=sys.argv[1], device_budget=0)
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)  # a private mapping would count, as it may be written
    resumed.load_state_dict(torch.load(sys.argv[2], mmap=True))
    step(resumed)
    assert resumed.paged_bytes() == number * 8 * count and float(resumed.state[params[-1]]["step"]) == 3
    assert all(abs(float(p.detach().max()) - 0.625) < 1e-4 for p in params)
    os.kill(os.getpid(), 9)  # no cleaning up
"""


def test_states_larger_than_memory_train_and_resume(tmp_path: Path):
    (tmp_path / "pages").mkdir()
    done = run_python(LARGE, tmp_path / "pages", tmp_path / "state.pt")
    assert done.returncode == -9, done.stderr
    assert list((tmp_path / "pages").iterdir()) == []


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bits": 32}, {"rounding": "kahan"}], ids=str)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_resume_is_exact_and_stays_paged(before: bool, after: bool, options: dict[str, Any], tmp_path: Path):
    paging = {"paged": True, "page_dir": tmp_path, "device_budget": 0}
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    params = many(dtype)
    optimizer = optim.AdEMAMix8bit(params, **options, **(paging if before else {}))
    train(optimizer, params, 3)
    fresh = copy.deepcopy(params)
    resumed = optim.AdEMAMix8bit(fresh, **(paging if after else {}))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (resumed.paged_bytes() > 0) == after
    assert_same(optimizer, resumed)
    train(optimizer, params, 2, seed=5)
    train(resumed, fresh, 2, seed=5)
    assert_same(optimizer, resumed)


def test_states_of_torch_and_in_rows_are_paged(tmp_path: Path):
    params = many()
    theirs = torch.optim.AdamW(params)
    train(theirs, params, 2)
    optimizer = optim.PagedAdamW8bit(params, page_dir=tmp_path, device_budget=0)
    optimizer.load_state_dict(through_a_file(theirs.state_dict()))
    other = optim.AdamW8bit(copy.deepcopy(params))
    other.load_state_dict(theirs.state_dict())
    assert_same(optimizer, other) and optimizer.paged_bytes() > 0
    state = optimizer.state_dict()
    rows = torch.rand(90, 1) + 0.5  # one absmax per row of 70, as sharded states have it: more than 25 blocks
    for name in ("exp_avg", "exp_avg_sq_root"):
        state["state"][7] = {**state["state"][7], f"{name}_absmax": rows}
    optimizer.load_state_dict(state)
    entry = optimizer.state[params[7]]
    assert torch.equal(entry["exp_avg_absmax"], rows) and entry["exp_avg_absmax"] is not rows
    for p in params[:3]:
        assert optimizer._paging.page_of(p).place_of(optimizer.state[p]["exp_avg"]) is not None
    assert optimizer._paging.page_of(params[7]).place_of(entry["exp_avg_sq_root_absmax"]) is not None
    train(optimizer, params, 1)


def test_copies_and_pickles_are_paged_by_themselves(tmp_path: Path):
    params = many()
    optimizer = optim.PagedLion8bit(params, page_dir=tmp_path, device_budget=0)
    train(optimizer, params, 2)
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        other = duplicate(optimizer)
        assert other.paged_bytes() == optimizer.paged_bytes() and mapped(tmp_path) == 2
        theirs = other.param_groups[0]["params"]
        again = optim.Lion8bit(copy.deepcopy(params))
        again.load_state_dict(optimizer.state_dict())
        train(other, theirs, 2)
        train(again, again.param_groups[0]["params"], 2)
        assert_same(other, again)
        del other, theirs, again
        gc.collect()


# ---- what is refused -------------------------------------------------------------------------------------------------


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
