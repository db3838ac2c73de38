"""octavo.optim in the Hugging Face Trainer and under accelerate, on tiny random models."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from octavo import optim
from places import ROOT

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its first settings for the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "huggingface_trainer.py"
    if not path.exists():
        pytest.skip("no examples here")
    spec = importlib.util.spec_from_file_location("huggingface_trainer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trainer(example: ModuleType, tmp_path: Path):
    """Learns, saves, and continues from the checkpoint as if it had not stopped."""
    trainer = example.main(tmp_path / "whole", steps=6)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] < 6.0
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is optim.AdamW8bit and len(optimizer.param_groups) == 2  # with and without weight decay
    count = sum(p.numel() for p in trainer.model.parameters())
    assert example.state_bytes(trainer) < 2.2 * count
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    last = tmp_path / "whole" / "checkpoint-6"
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink()
    last.rmdir()
    resumed = example.main(tmp_path / "whole", steps=6)
    assert resumed.state.global_step == 6
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_trainer_with_paged_states(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As without, also when it continues from a checkpoint."""
    whole = example.main(tmp_path / "whole", steps=6)
    (tmp_path / "pages").mkdir()
    real = transformers.Trainer.__init__

    def patched(self, *, optimizer_cls_and_kwargs, **arguments):
        options = {**optimizer_cls_and_kwargs[1], "page_dir": str(tmp_path / "pages"), "device_budget": 0}
        real(self, optimizer_cls_and_kwargs=(optim.PagedAdamW8bit, options), **arguments)

    monkeypatch.setattr(transformers.Trainer, "__init__", patched)

    def train(steps: int):
        trainer = example.main(tmp_path / "paged", steps=steps)
        optimizer = trainer.optimizer.optimizer
        assert type(optimizer) is optim.PagedAdamW8bit and optimizer.paged_bytes() > 10_000
        return trainer

    for _ in range(2):
        trainer = train(6)
        shutil.rmtree(tmp_path / "paged" / "checkpoint-6")  # the next one continues at step 3
        assert trainer.state.global_step == 6
        for (name, p), q in zip(trainer.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path):
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    inner = optim.AdamW8bit(model.parameters(), lr=1e-2, rounding="stochastic")
    schedule = torch.optim.lr_scheduler.LinearLR(inner, 1.0, 0.1, 20)
    data = torch.utils.data.DataLoader(torch.randn(64, 64), batch_size=16)
    model, optimizer, data, schedule = accelerator.prepare(model, inner, data, schedule)
    losses = []
    for _ in range(3):
        for x in data:
            with accelerator.accumulate(model):
                loss = (model(x) - x).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and float(inner.state[next(iter(inner.state))]["step"]) == 12
    accelerator.save_state(str(tmp_path / "state"))
    before = {k: v.clone() for p in inner.state for k, v in inner.state[p].items()}
    inner.state.clear()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(value, before[k]) for k, value in inner.state[list(inner.state)[-1]].items())
