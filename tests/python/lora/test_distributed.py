"""LoRA on frozen quantized layers under FSDP2: two processes on the CPU (gloo) train what one process trains."""

from __future__ import annotations

import contextlib
from pathlib import Path

import octavo
import pytest
import torch
import torch.distributed as dist
from distributed import full, in_two_processes
from lora_layers import BASES, base_layer
from octavo import optim
from octavo.core.method import stored_methods
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "AdamW8bit": lambda parameters: optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=256),
}


class Model(nn.Module):
    """Frozen layers of one kind, and LoRA on them; 65 rows do not divide by two processes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(base_layer(kind, 65, 64), nn.ReLU(), nn.Linear(65, 64), base_layer(kind, 64, 64, bias=False))
            for _ in range(2)
        )
        octavo.add_lora(self, 8, 16, 0.0, include=[f"blocks.{i}.{j}" for i in range(2) for j in (0, 3)])

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def batch(step: int, rank: int | None, world: int):
    ids = torch.randint(50, (8, 5), generator=torch.Generator().manual_seed(step))
    return ids if rank is None else ids.chunk(world)[rank]


def shard(model: Model, world: int, **options) -> Model:
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train(model: Model, optimizer: str, rank: int | None, world: int, steps: int = 5) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    made = OPTIMIZERS[optimizer](trained)
    losses = []
    for step in range(steps):
        loss = model(batch(step, rank, world))
        losses.append(float(loss.detach()))
        loss.backward()
        made.step()
        made.zero_grad()
    return losses


def _same(rank: int, world: int, kind: str, optimizer: str) -> None:
    alone, start = Model(kind), Model(kind)
    train(alone, optimizer, None, 1)
    model = shard(Model(kind), world)
    frozen = {name: full(p) for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    train(model, optimizer, rank, world)
    bound = 1e-4 if optimizer == "AdamW" else 0.1  # float sums in another order; 8-bit codes of them
    for (name, p), q, s in zip(model.named_parameters(), alone.parameters(), start.parameters(), strict=True):
        assert isinstance(p, DTensor), name
        if p.requires_grad:
            way = float((q - s).detach().norm())
            assert way > 1e-3 and float((full(p) - q.detach()).norm()) <= bound * way, name
        else:
            assert torch.equal(full(p), frozen[name]), name
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", BASES)
def test_two_processes_train_what_one_trains(kind, optimizer):
    in_two_processes(_same, kind, optimizer)


def _mixed(rank: int, world: int, kind: str) -> None:
    """A policy that casts parameters to bf16 leaves what is quantized as it is, scales too."""
    expected = Model(kind).bfloat16()(batch(0, None, 1))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(Model(kind), world, mp_policy=policy)
    assert torch.equal(model(batch(0, None, 1)), expected)
    train(model, "AdamW", rank, world, 2)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BASES)
def test_mixed_precision_leaves_the_base(kind):
    in_two_processes(_mixed, kind)


def _files(rank: int, world: int, kind: str, folder: Path) -> None:
    model = shard(Model(kind), world)
    train(model, "AdamW", rank, world)
    octavo.save_adapter(model, folder / "adapter")
    alone = Model(kind)
    octavo.lora.delete_adapter(alone, "default")
    octavo.load_adapter(alone, folder / "adapter", "default")
    wanted = {name: full(p) for name, p in model.named_parameters() if "lora_" in name}
    loaded = {name: p.detach() for name, p in alone.named_parameters() if "lora_" in name}
    assert wanted.keys() == loaded.keys() and len(wanted) == 8
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    dist.barrier()
    for call in (
        lambda: octavo.add_lora(model, 4, name="other"),
        lambda: octavo.load_adapter(model, folder / "adapter"),
        lambda: octavo.merge_adapter(model),
    ):
        with pytest.raises(ValueError, match="is sharded"):
            call()
    with pytest.raises(FileExistsError) if rank == 0 else contextlib.nullcontext():  # the other process does not hang
        octavo.save_adapter(model, folder / "adapter")


@pytest.mark.parametrize("kind", ["linear", next(iter(stored_methods()))])
def test_sharded_adapters_are_saved_whole(kind, tmp_path):
    in_two_processes(_files, kind, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
