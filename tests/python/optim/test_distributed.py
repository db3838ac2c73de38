"""octavo.optim under DistributedDataParallel and FSDP2: two processes on the CPU (gloo), one thread each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import full, in_two_processes
from octavo import nn, optim
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


class Model(torch.nn.Module):
    """Weights whose rows are whole blocks, whose rows are not, whose rows are too short to shard in 8 bit, with fewer
    rows than processes, and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.StableEmbedding(50, 256)
        self.wide = torch.nn.Linear(256, 65)
        self.ragged = torch.nn.Linear(65, 300)
        self.short = torch.nn.Linear(300, 20)
        self.up = torch.nn.Linear(20, 401, bias=False)
        self.single = torch.nn.Parameter(torch.randn(1, 4096) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wide(self.embedding(ids)).relu()
        x = self.up(self.short(self.ragged(x).relu()))
        return x.square().mean() + (self.single * x.mean()).square().sum()


def batch(step: int, rank: int | None, world: int) -> Tensor:
    """This process's part of a step's ids; None: all of them."""
    ids = torch.randint(50, (8, 5), generator=torch.Generator().manual_seed(step))
    return ids if rank is None else ids.chunk(world)[rank]


def options(**changes: Any) -> dict[str, Any]:
    return {"lr": 1e-3, "min_8bit_size": 1024, **changes}


def alone(steps: int, kind: type[torch.optim.Optimizer] = optim.AdamW8bit, **changes: Any) -> Model:
    """One process, whole batches."""
    model = Model()
    optimizer = kind(model.parameters(), **changes)
    for step in range(steps):
        model(batch(step, None, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_near(model: torch.nn.Module, other: torch.nn.Module, bound: float = 0.1) -> None:
    """Parameters differ by a small part of the way that they went: 8-bit codes of sums in another order."""
    start = dict(Model().named_parameters())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        p, q, s = full(p), full(q), start[name.removeprefix("module.")].detach()
        assert float((p - q).norm()) <= bound * float((q - s).norm()) + 1e-7, name


def shard(world: int) -> Model:
    model = Model()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.embedding, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int, world: int) -> None:
    for step in steps:
        model(batch(step, rank, world)).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


def _ddp(rank: int, world: int, kind: str) -> None:
    model = torch.nn.parallel.DistributedDataParallel(Model())
    optimizer = getattr(optim, kind)(model.parameters(), **options(max_grad_norm=0.1))
    train(model, optimizer, range(4), rank, world)
    assert_near(model, alone(4, getattr(optim, kind), **options(max_grad_norm=0.1)))
    for p in model.parameters():  # the same on all processes, to the bit
        copies = [torch.empty_like(p) for _ in range(world)]
        dist.all_gather(copies, p.detach())
        assert torch.equal(*copies)


def _accumulate(rank: int, world: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(Model())
    optimizer = optim.SGD8bit(model.parameters(), **options(lr=0.1, momentum=0.9))
    for step in range(3):
        first, second = batch(step, rank, world).chunk(2)
        with model.no_sync():
            (model(first) / 2).backward()
        (model(second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = torch.nn.parallel.DistributedDataParallel(Model())
    train(whole, optim.SGD8bit(whole.parameters(), **options(lr=0.1, momentum=0.9)), range(3), rank, world)
    # The loss is a mean of squares and one more term, of which only the first adds up over parts.
    assert_near(model, whole)


@pytest.mark.parametrize("kind", ["AdamW8bit", "StableAdamW8bit"])
def test_ddp(kind: str):
    in_two_processes(_ddp, kind)


def test_gradient_accumulation():
    in_two_processes(_accumulate)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def _fsdp(rank: int, world: int, kind: str, changes: dict[str, Any]) -> None:
    model = shard(world)
    optimizer = getattr(optim, kind)(model.parameters(), **changes)
    train(model, optimizer, range(4), rank, world)
    assert_near(model, alone(4, getattr(optim, kind), **changes))
    if kind != "AdamW8bit" or changes.get("bits") == 32:
        return
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert states["embedding.weight"]["exp_avg"].dtype is torch.float32  # marked, as before sharding
    assert states["short.weight"]["exp_avg"].dtype is torch.uint8  # rows of 300
    assert states["up.weight"]["exp_avg"].dtype is torch.float32  # rows of 20
    assert tuple(states["ragged.weight"]["exp_avg_absmax"].shape) == (300, 1)
    assert tuple(states["wide.weight"]["exp_avg_absmax"].to_local().shape) == (33 if rank == 0 else 32, 1)
    assert states["single"]["exp_avg"].to_local().shape[0] == (1 if rank == 0 else 0)
    assert all(isinstance(v, DTensor) for s in states.values() for key, v in s.items() if key != "step")
    assert all(float(s["step"]) == 4 for s in states.values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("AdamW8bit", options()),
        ("AdamW8bit", options(bits=32, max_grad_norm=0.05)),
        ("SGD8bit", options(lr=0.1, momentum=0.9, max_grad_norm=0.05)),
        ("AdEMAMix8bit", options()),
        ("LAMB8bit", options(lr=1e-2)),
        ("LARS8bit", options(lr=0.1, weight_decay=0.1, trust_coefficient=0.1)),
        ("StableAdamW8bit", options()),
        ("StableAdamW", options(max_grad_norm=0.05)),
    ],
    ids=str,
)
def test_fsdp_is_one_process(kind: str, changes: dict[str, Any]):
    in_two_processes(_fsdp, kind, changes)


def _sums_of_shards(rank: int, world: int) -> None:
    """The same on all processes, and as in one: also of parameters of which a process has nothing, of those that are
    replicated, and of gradients that are 0 everywhere but in one process's part."""
    whole, generator = Model(), torch.Generator().manual_seed(2)
    optimizer = optim.StableAdamW(whole.parameters(), lr=1e-3)
    grads = [[torch.randn(p.shape, generator=generator) for p in whole.parameters()] for _ in range(3)]
    for p, g in zip(whole.parameters(), grads[2], strict=True):
        g *= 100
        g[: (len(p) + 1) // 2] = 0  # of the second process: another mean than that of the first
    meshes = [
        init_device_mesh("cpu", (world,)),
        init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")),
        init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard")),
    ]
    models = [Model() for _ in meshes]
    for model, mesh in zip(models, meshes, strict=True):
        fully_shard(model, mesh=mesh)
    others = [optim.StableAdamW(model.parameters(), lr=1e-3) for model in models]
    single = torch.nn.Parameter(torch.ones(500))  # beside them, of this process alone
    others[0].add_param_group({"params": [single]})
    for step in grads:
        single.grad = torch.full((500,), rank + 1.0)
        for model in (whole, *models):
            for p, g in zip(model.parameters(), step, strict=True):
                p.grad = g if model is whole else distribute_tensor(g, p.device_mesh, p.placements)
        for each in (optimizer, *others):
            each.step()
    wanted = torch.stack(optimizer.rms())
    assert float(wanted.max()) > 1.2
    for other in others:
        torch.testing.assert_close(torch.stack(other.rms()[: len(wanted)]), wanted, rtol=1e-6, atol=0.0)
        (_, sums), *_ = other._sums
        assert sums[:, 1].tolist() == [p.numel() for p in whole.parameters()]
    for model in models:
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=1e-6, atol=1e-7)


def test_sums_go_over_all_shards():
    in_two_processes(_sums_of_shards)


def _refuse_pages(rank: int, world: int) -> None:
    model = shard(world)
    for kind in (optim.LAMB8bit, optim.LARS8bit, optim.StableAdamW):
        with pytest.raises(ValueError, match=rf"parameter 0 is a DTensor .*{kind.__name__} sums over all shards"):
            kind(model.parameters(), paged=True)


def test_sums_over_shards_refuse_pages():
    in_two_processes(_refuse_pages)


def _paged(rank: int, world: int, folder: Path) -> None:
    """To the bit as without pages, also after a checkpoint; each process has a file of its own."""
    pair = []
    for paging in ({}, {"paged": True, "page_dir": folder, "device_budget": 0}):
        model = shard(world)
        optimizer = optim.AdamW8bit(model.parameters(), **options(**paging))
        train(model, optimizer, range(3), rank, world)
        saved = get_optimizer_state_dict(model, optimizer)
        optimizer = optim.AdamW8bit(model.parameters(), **options(**paging))
        set_optimizer_state_dict(model, optimizer, saved)
        train(model, optimizer, range(3, 5), rank, world)
        assert (optimizer.paged_bytes() > 0) == bool(paging)
        pair.append((model, optimizer))
    (plain, first), (model, second) = pair
    assert all(torch.equal(full(p), full(q)) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    states = [_states(*each) for each in pair]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert all(
            first.state[p][key].placements == v.placements for key, v in second.state[q].items() if key != "step"
        )
    entry = second.state[model.wide.weight]["exp_avg"]
    assert second._paging.page_of(model.wide.weight).place_of(entry.to_local()) is not None


def test_sharded_states_are_paged(tmp_path: Path):
    in_two_processes(_paged, tmp_path)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": full(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def _save(rank: int, world: int, folder: Path) -> None:
    model = shard(world)
    optimizer = optim.AdamW8bit(model.parameters(), **options())
    train(model, optimizer, range(3), rank, world)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "sharded"))
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    before = _states(model, optimizer)
    if rank == 0:
        torch.save((whole, before), folder / "whole.pt")
    dist.barrier()
    train(model, optimizer, range(3, 5), rank, world)
    if rank == 0:
        torch.save({name: full(p) for name, p in model.named_parameters()}, folder / "after.pt")
    else:
        for p in model.parameters():
            full(p)


def _load(rank: int, world: int, folder: Path, bit_for_bit: bool) -> None:
    model = shard(world)
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.5)
    weights, state = get_state_dict(model, optimizer)  # makes an empty state by a step with gradients of 0
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "sharded"))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["min_8bit_size"] == 1024
    _, before = torch.load(folder / "whole.pt", weights_only=False)
    loaded = _states(model, optimizer)
    assert set(loaded) == set(before)
    assert all(torch.equal(loaded[name], value) for name, value in before.items())
    train(model, optimizer, range(3, 5), rank, world)
    after = torch.load(folder / "after.pt")
    for name, p in model.named_parameters():
        if bit_for_bit:
            assert torch.equal(full(p), after[name])
        else:  # gradients are summed over other parts of the batch, and the dither counts the elements of a shard
            error = (full(p) - after[name]).abs()
            assert float(error.max()) < 1e-3 and float(error.mean()) < 2e-5


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path):
    in_two_processes(_save, tmp_path)
    in_two_processes(_load, tmp_path, True)
    in_two_processes(_load, tmp_path, False, world=1)
    # The whole state, into an optimizer that knows of no shards, and from there back into shards.
    model = Model()
    optimizer = optim.AdamW8bit(model.parameters())
    whole, before = torch.load(tmp_path / "whole.pt", weights_only=False)
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))
    loaded = _states(model, optimizer)
    for name in ("ragged.weight.exp_avg", "ragged.weight.exp_avg_absmax", "wide.weight.exp_avg_sq_root"):
        assert torch.equal(loaded[name], before[name])
    assert loaded["up.weight.exp_avg"].dtype is torch.uint8  # no shards, no need for 32 bit
    model(batch(3, None, 1)).backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    torch.save(state, tmp_path / "plain.pt")
    in_two_processes(_load_plain, tmp_path)


def _load_plain(rank: int, world: int, folder: Path) -> None:
    """States in 8 bit with blocks across rows are quantized again in rows."""
    model = shard(world)
    optimizer = optim.AdamW8bit(model.parameters())
    saved = torch.load(folder / "plain.pt", weights_only=False)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    loaded = _states(model, optimizer)
    assert torch.equal(loaded["wide.weight.exp_avg"], saved["state"]["wide.weight"]["exp_avg"])
    assert tuple(loaded["short.weight.exp_avg_absmax"].shape) == (20, 2)
    assert loaded["up.weight.exp_avg"].dtype is torch.float32
    train(model, optimizer, range(4, 5), rank, world)
