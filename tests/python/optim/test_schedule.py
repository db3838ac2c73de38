"""Pages of octavo.optim: which there are, in which order they are copied and stepped, on streams that run as late as
they may, in every order; and optimizers over such streams, without a GPU."""

from __future__ import annotations

import copy
import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import octavo
import pytest
import torch
from backends import Ops
from octavo import optim
from octavo.optim import _paging, _schedule
from octavo.optim._schedule import Op, pack, plan, run, schedule
from streams import ORDERS, STREAMS, FakeCuda, Machine
from training import OPTIMIZERS, parameters, train

# ---- plans -----------------------------------------------------------------------------------------------------------


def test_packs_in_order():
    assert pack([3, 3, 4, 1, 9, 1, 5, 5], 10) == [[0, 1, 2], [3, 4], [5, 6], [7]]
    assert pack([11, 1, 12], 10) == [[0], [1], [2]]
    assert pack([], 10) == []


@pytest.mark.parametrize(
    ("sizes", "budget", "options", "expected"),
    [
        ([10, 20, 30], 60, {}, ([0, 1, 2], [], 0)),  # all fit
        ([10, 20, 30], None, {}, ([0, 1, 2], [], 0)),
        ([10, 10, 10, 10], 20, {}, ([], [[0], [1], [2], [3]], 10)),
        ([10, 10, 10, 10], 30, {}, ([], [[0], [1], [2], [3]], 15)),  # larger buffers before more that stay
        ([100, 10, 10, 10, 10, 10], 120, {}, ([0], [[1], [2], [3], [4], [5]], 10)),  # the large one needs no buffer
        ([10, 10, 10, 10], 50, {"held": 30}, ([], [[0], [1], [2], [3]], 10)),
        ([10, 10, 10], 60, {"held": 30}, ([0, 1, 2], [], 0)),
        ([10, 10, 10], 50, {"held": 10, "buffer": 20}, ([], [[0, 1], [2]], 20)),  # buffers do not shrink
        ([10, 20, 30], 0, {"staged": False}, ([], [[0, 1, 2]], 0)),
        ([30, 20, 10], 45, {"staged": False}, ([0, 2], [[1]], 0)),
        ([], 0, {}, ([], [], 0)),
    ],
)
def test_plans(sizes: list[int], budget: int | None, options: dict[str, Any], expected: tuple[Any, ...]):
    assert plan(sizes, budget, **options) == expected


def test_a_default_budget_is_two_pages_or_what_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_schedule, "PAGE_BYTES", 100)
    assert plan([50] * 4, None) == ([0, 1, 2, 3], [], 0)
    assert plan([50] * 6, None) == ([], [[0, 1], [2, 3], [4, 5]], 100)
    assert plan([150] * 6, None) == ([], [[i] for i in range(6)], 150)
    assert plan([50] * 7, 350) == ([0, 1, 2, 3, 4, 5, 6], [], 0)
    assert plan([50] * 7, 349) == ([0, 1], [[2, 3], [4, 5], [6]], 100)  # no buffer is larger than a page
    assert plan([50] * 6, 0, staged=False) == ([], [[0, 1], [2, 3], [4, 5]], 0)


def test_plans_keep_to_their_budget():
    draw, refused = random.Random(0), 0
    for _ in range(500):
        sizes = [draw.choice([1, 5, 10, 100, 400]) for _ in range(draw.randrange(12))]
        budget, held, buffer = draw.randrange(1000), draw.choice([0, 50]), draw.choice([0, 20])
        try:
            stay, pages, size = plan(sizes, budget, held, buffer)
        except ValueError:
            refused += 1
            kept = itertools.accumulate(sorted(sizes, reverse=True), initial=0)
            rest = [*sorted(sizes, reverse=True), 0]
            assert all(held + k + 2 * max(r, buffer) > budget for k, r in zip(kept, rest, strict=True))
            continue
        assert sorted([*stay, *itertools.chain(*pages)]) == list(range(len(sizes)))
        assert list(itertools.chain(*pages)) == sorted(itertools.chain(*pages))
        assert all(sum(sizes[i] for i in page) <= size for page in pages) and size >= buffer
        assert held + sum(sizes[i] for i in stay) + 2 * size <= budget
    assert 50 < refused < 450


def test_a_budget_that_is_too_small_is_told_what_it_takes():
    with pytest.raises(ValueError, match="119 bytes are too few: the states need 120, 100 for those that stay and tw"):
        plan([10, 100, 10, 10], 119)


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_schedule_is_as_drawn():
    assert [(op.kind, op.position) for op in schedule([0, 1, 0, 1])] == [
        *(("load", 0), ("load", 1), ("step", 0), ("store", 0)),
        *(("load", 2), ("step", 1), ("store", 1)),
        *(("load", 3), ("step", 2), ("store", 2)),
        *(("step", 3), ("store", 3)),
    ]
    assert {op[:2]: op.after for op in schedule([0, 1, 0]) if op.after} == {
        ("step", 0): (("load", 0),),
        ("store", 0): (("step", 0),),
        ("load", 2): (("store", 0),),
        ("step", 1): (("load", 1),),
        ("store", 1): (("step", 1),),
        ("step", 2): (("load", 2),),
        ("store", 2): (("step", 2),),
    }
    # Pages in between without a gradient: the next one in the same buffer waits.
    assert [op.kind for op in schedule([1, 1])] == ["load", "step", "store", "load", "step", "store"]


class Toy:
    """Pages that are (number, steps); a step of another page's data, or of none, spoils it."""

    def __init__(self, order: tuple[str, ...] | int, count: int) -> None:
        self.machine = Machine(order)
        self.host: list[object] = [(i, 0) for i in range(count)]
        self.buffers: list[object] = [None, None]

    def buffer_of(self, page: int) -> int:
        return page % 2

    def load(self, page: int) -> None:
        self.machine.give("in", lambda: self.buffers.__setitem__(page % 2, self.host[page]))

    def store(self, page: int) -> None:
        self.machine.give("out", lambda: self.host.__setitem__(page, self.buffers[page % 2]))

    def step(self, work: Any) -> None:
        self.machine.give("compute", work)

    def record(self, stream: str) -> object:
        return self.machine.record(stream)

    def wait(self, stream: str, event: Any) -> None:
        self.machine.wait(stream, event)


def outcome(order: tuple[str, ...] | int, operations: list[Op] | None, linked: bool = True, pages: int = 5) -> bool:
    """Whether three steps, given out without waiting for any, leave every page stepped three times."""
    toy, previous = Toy(order, pages), None

    def work(position: int) -> None:
        found = toy.buffers[position % 2]
        right = isinstance(found, tuple) and found[0] == position
        toy.buffers[position % 2] = (position, found[1] + 1) if right else "spoiled"

    for _ in range(3):
        previous = run(toy, list(range(pages)), work, previous if linked else None, operations)
    toy.machine.advance()
    return toy.host == [(i, 3) for i in range(pages)]


@pytest.mark.parametrize("pages", [1, 2, 3, 6])
def test_every_order_gives_the_same(pages: int):
    assert all(outcome(order, None, pages=pages) for order in ORDERS)


def without_one_wait() -> Iterator[list[Op]]:
    operations = list(schedule([0, 1, 0, 1, 0]))
    for i, op in enumerate(operations):
        for needed in op.after:
            less = tuple(other for other in op.after if other != needed)
            yield [*operations[:i], op._replace(after=less), *operations[i + 1 :]]


def test_every_wait_is_needed():
    """Without any one of them, some order gives wrong data: so it would be seen if it were forgotten."""
    weakened = list(without_one_wait())
    assert len(weakened) == 13
    for operations in weakened:
        assert not all(outcome(order, operations) for order in ORDERS)
    assert not all(outcome(order, None, linked=False) for order in ORDERS)  # a step waits for the one before it


# ---- optimizers over such streams ------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Options by which parameters on the CPU are paged as if they were on a GPU."""
    monkeypatch.setattr(_paging, "Files", _paging.Pinned)
    monkeypatch.setattr(_paging, "Cuda", FakeCuda)
    monkeypatch.setattr(_schedule, "PAGE_BYTES", 20_000)
    monkeypatch.setattr(_paging, "PINNED_BLOCK", 50_000)
    FakeCuda.made = []
    yield {"paged": True, "page_dir": tmp_path, "device_budget": 60_000}
    FakeCuda.order = 0


SHAPES = ((64, 100), (5000,), (70, 70), (16, 8, 3, 3), (4200,), (7,), (0, 5), (90, 60), (4097,))


def many(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return parameters(dtype=dtype, shapes=SHAPES)


def assert_same(a: optim.Optimizer8bit, b: optim.Optimizer8bit) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and set(mine["state"]) == set(theirs["state"])
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    for number, entry in mine["state"].items():
        other = theirs["state"][number]
        assert set(entry) == set(other)
        for key, value in entry.items():
            assert value.dtype is other[key].dtype and torch.equal(value, other[key]), (number, key)


@pytest.mark.parametrize("order", [("in", "out", "compute"), ("compute", "out", "in"), 1], ids=str)
@pytest.mark.parametrize("options", [{}, {"bits": 32, "max_grad_norm": 0.5}, {"rounding": "kahan"}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_staged_steps_are_the_same(kind: type[optim.Optimizer8bit], options: dict[str, Any], order: Any, gpu: Any):
    FakeCuda.order = order
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    wide = kind is optim.StableAdamW or "bits" in options
    budget = {**gpu, "device_budget": 200_000 if wide else 70_000}
    ours, theirs = many(dtype), many(dtype)
    mine, other = kind(ours, lr=1e-2, **options, **budget), kind(theirs, lr=1e-2, **options)
    for seed in range(3):
        train(mine, ours, 1, seed)
        train(other, theirs, 1, seed)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    assert_same(mine, other)
    if kind in (optim.AdamW8bit, optim.AdEMAMix8bit):  # each page in and out in each step
        assert mine.paged_bytes() > 0 and FakeCuda.made[0].copied == 6 * mine.paged_bytes()


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.LAMB8bit, optim.StableAdamW8bit])
def test_staged_steps_on_every_machine(kind: type[optim.Optimizer8bit], ops: Ops, gpu: Any, monkeypatch: Any):
    """The CUDA kernels, too, where they run on the host: on buffers, with addresses of buffers in their tables."""
    if ops.backend == "cuda":
        pytest.skip("in test_optim_paged.py, with real streams")
    packets = getattr(torch.ops, ops.namespace)
    monkeypatch.setattr(octavo.ops, "optim_table", packets.optim_table)
    monkeypatch.setattr(octavo.ops, "optim_step", packets.optim_step)
    monkeypatch.setattr(octavo.ops, "optim_sums", packets.optim_sums)
    FakeCuda.order = ("compute", "out", "in")
    ours, theirs = many(), many()
    mine, other = kind(ours, max_grad_norm=1.0, **gpu), kind(theirs, max_grad_norm=1.0)
    train(mine, ours, 2)
    train(other, theirs, 2)
    assert mine.paged_bytes() > 0
    assert_same(mine, other)


def test_a_forgotten_wait_is_seen(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    """That is: these streams are strict enough for the tests above to mean something."""
    real = _schedule.schedule
    for kind in ("step", "load"):
        monkeypatch.setattr(
            _schedule,
            "schedule",
            lambda buffers, kind=kind: (op._replace(after=()) if op.kind == kind else op for op in real(buffers)),
        )
        same = []
        for order in ORDERS:
            FakeCuda.order = order
            ours, theirs = many(), many()
            mine, other = optim.AdamW8bit(ours, **gpu), optim.AdamW8bit(theirs)
            train(mine, ours, 2)
            train(other, theirs, 2)
            same.append(all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)))
        assert not all(same), kind


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_groups_and_gradients_that_come_and_go(order: Any, gpu: Any):
    """Pages with parameters of two groups, pages that are left out, states and buffers that are added later."""
    FakeCuda.order = order
    ours, theirs = [*many(), *many(torch.bfloat16)], [*many(), *many(torch.bfloat16)]
    ours.append(torch.nn.Parameter(torch.ones(9000, dtype=torch.bfloat16)))
    theirs.append(torch.nn.Parameter(torch.ones(9000, dtype=torch.bfloat16)))
    pair = []
    for params, options in ((ours, gpu | {"device_budget": 64_000}), (theirs, {})):
        generator, optimizer = torch.Generator().manual_seed(0), None
        groups = [{"params": params[:4]}, {"params": params[4:12], "lr": 1e-3, "rounding": "stochastic"}]
        optimizer = optim.AdamW8bit(groups, lr=1e-2, **options)
        for number, missing in enumerate([range(5, 12), range(3), range(4, 6), (), range(12), ()]):
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = None if i in missing else grad
            optimizer.step()
            if number == 2:
                optimizer.add_param_group({"params": params[12:]})
        pair.append(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert_same(*pair)
    buffers = pair[0]._paging.pagers[torch.device("cpu")].buffers
    names = {name for pointer, name in FakeCuda.made[-1].users if pointer == buffers[0].data_ptr()}
    assert len(buffers) == 2 and names == set(STREAMS)


def pager_of(optimizer: optim.Optimizer8bit) -> Any:
    return optimizer._paging.pagers[torch.device("cpu")]


@pytest.mark.parametrize("budget", [None, 50_000])
def test_larger_states_that_come_later(budget: int | None, gpu: Any):
    """Buffers grow where the budget lets them; where it does not, what was paged is placed again, after its copies."""
    FakeCuda.order = ("compute", "in", "out")
    ours, theirs = [parameters(shapes=[(3000,)] * 20 + [(15_000,)]) for _ in range(2)]
    pair = []
    for params, options in ((ours, {**gpu, "device_budget": budget}), (theirs, {})):
        optimizer = optim.AdamW8bit(params[:20], min_8bit_size=0, **options)
        train(optimizer, params[:20], 2)
        pair.append(optimizer)
        if options:
            pages, size = pager_of(optimizer).pages, pager_of(optimizer).buffers[0].numel()
            assert len(pages) > 4 and pager_of(optimizer).cuda.machine.queues["out"]
        optimizer.add_param_group({"params": params[20:]})
        train(optimizer, params, 2)
    assert_same(*pair)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    if budget is None:
        assert pager_of(pair[0]).pages is pages and pager_of(pair[0]).buffers[0].numel() > size
    else:
        assert pager_of(pair[0]).pages is not pages


def test_tables_are_made_once(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    """Also with more pages than tables are kept for a group: each page has its own."""
    params = parameters(shapes=[(3000,)] * 40)
    optimizer = optim.AdamW8bit(params, min_8bit_size=0, **gpu | {"device_budget": 14_000})
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    made = []
    table = octavo.ops.optim_table
    monkeypatch.setattr(octavo.ops, "optim_table", lambda *lists: made.append(1) or table(*lists))
    optimizer.step()
    assert not made and len(pager_of(optimizer).pages) > 16


def test_a_state_dict_waits_for_copies(gpu: Any):
    """The last pages are not stored yet when a step returns; who reads or copies the state gets them."""
    for duplicate in ("state_dict", "deepcopy"):
        FakeCuda.order = ("compute", "in", "out")
        ours, theirs = many(), many()
        mine, other = optim.AdamW8bit(ours, **gpu), optim.AdamW8bit(theirs)
        train(mine, ours, 2)
        train(other, theirs, 2)
        queue = mine._paging.pagers[torch.device("cpu")].cuda.machine.queues["out"]
        assert queue
        if duplicate == "state_dict":
            buffer = io.BytesIO()
            torch.save(mine.state_dict(), buffer)
            buffer.seek(0)
            fresh = optim.AdamW8bit(copy.deepcopy(ours), **gpu)
            fresh.load_state_dict(torch.load(buffer))
        else:
            fresh = copy.deepcopy(mine)
        assert not queue
        assert fresh.paged_bytes() > 0
        assert_same(fresh, other)
        train(fresh, fresh.param_groups[0]["params"], 2, 5)
        train(other, theirs, 2, 5)
        assert_same(fresh, other)


def test_capture_is_refused(gpu: Any):
    params = many()
    optimizer = optim.AdamW8bit(params, **gpu)
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    FakeCuda.made[0].in_graph = True
    with pytest.raises(RuntimeError, match=rf"cannot be captured in a CUDA graph: .* {optimizer.paged_bytes()} bytes"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 1
    fits = optim.AdamW8bit(params, **gpu | {"device_budget": 10**6})
    train(fits, params, 1)
    FakeCuda.made[1].in_graph = True
    train(fits, params, 1)
    assert fits.paged_bytes() == 0


def test_a_budget_that_is_too_small_changes_nothing(gpu: Any):
    params = many()
    before = [p.detach().clone() for p in params]
    optimizer = optim.AdamW8bit(params, **gpu | {"device_budget": 10_000})
    message = r"^AdamW8bit: device_budget on cpu: 10000 bytes are too few: the states need 2\d{4}, 0 for those that sta"
    with pytest.raises(ValueError, match=message):
        train(optimizer, params, 1)
    assert not any(optimizer.state.values()) and all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    whole = optim.AdamW8bit(params)
    train(whole, params, 1)
    with pytest.raises(ValueError, match="device_budget on cpu: 10000 bytes"):
        optimizer.load_state_dict(whole.state_dict())
    assert not any(optimizer.state.values())


def test_states_that_their_owner_replaces_are_used(gpu: Any):
    ours, theirs = many(), many()
    mine, other = optim.AdamW8bit(ours, **gpu), optim.AdamW8bit(theirs)
    for seed in range(3):
        train(mine, ours, 1, seed)
        train(other, theirs, 1, seed)
        if seed == 0:
            state = mine.state_dict()["state"][0]
            mine.state[ours[0]] = {key: value.clone() for key, value in state.items()}
    assert_same(mine, other)
