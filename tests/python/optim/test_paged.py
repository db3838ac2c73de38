"""Paged optimizers with states in mapped files: the same bits as without, nothing left behind, states larger than
memory; what is refused, and that nothing is half done then. On a GPU: the same with pinned memory."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import optim
from octavo.optim import _paging, _schedule
from paging import PAGED, assert_same, many, mapped, opened, run_python, through_a_file
from training import OPTIMIZERS, one, parameters, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


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
