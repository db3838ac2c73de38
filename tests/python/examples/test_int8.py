"""The examples of arXiv 2304.13013, for a few steps on tiny models: what they write, what they say of bad options and
data, and what they make of losses that are known. What they show is in examples/README.md.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import octavo
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

pytest.importorskip("matplotlib")
from places import ROOT

EXAMPLES = ROOT / "examples"
TINY = ("--batch", "2", "--layers", "1", "--threads", "1", "--validation", "8")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of examples/ by name, as running it would find its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(module: ModuleType, *arguments: object) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(module.app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    finally:
        torch.set_num_threads(threads)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def read(folder: Path, name: str) -> dict[str, Any]:
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=no_constant)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures to learn from and eight to judge by, in the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in (("train", 16), ("t10k", 8)):
        classes = torch.arange(count) % 10
        for what, tensor in (("images", (classes[:, None, None] * 25).expand(count, 28, 28)), ("labels", classes)):
            head = bytes([0, 0, 8, tensor.dim()]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
            path = folder / f"{part}-{what}-idx{tensor.dim()}-ubyte.gz"
            path.write_bytes(gzip.compress(head + bytes(tensor.flatten().tolist())))
    return folder


@pytest.mark.parametrize("name", ["loss_spikes", "int8_training"])
def test_missing_data_are_named(example: Any, tmp_path: Path, name: str) -> None:
    result = run(example(name), "--data", tmp_path)
    assert result.exit_code == 1
    assert "train-images-idx3-ubyte" in result.output and "apt-get install dataset-fashion-mnist" in result.output


# ---- loss_spikes ---------------------------------------------------------------------------------------------------


def test_loss_spikes(example: Any, fashion: Path, tmp_path: Path) -> None:
    options = ("--steps", 16, "--change", 8, "--seeds", 2, "--width", 64, "--clip", 0.5, "--lr", 1e-3)
    result = run(example("loss_spikes"), *TINY, *options, "--data", fashion, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = read(tmp_path, "loss_spikes")
    names = ["AdamW", "AdamW, clip 0.5", "AdamW, beta2 0.95", "StableAdamW", "AdamW8bit", "StableAdamW8bit"]
    for rows in (record["runs"], record["spikes"]):
        assert [(row["optimizer"], row["seed"]) for row in rows] == [(n, seed) for seed in (0, 1) for n in names]
    for trained, spike in zip(record["runs"], record["spikes"], strict=True):
        assert trained["train"][0] == record["runs"][6 * trained["seed"]]["train"][0]  # same weights, same batch
        assert spike["largest"] == max(trained["train"][8:]) == trained["train"][8 + spike["at"]]
        assert spike["rise"] == pytest.approx(spike["largest"] - sum(trained["train"][:8]) / 8)
        assert len(spike["embedding_rms"]) == len(spike["gradient_norm"]) == 16
        assert spike["embedding_rms"][0] == pytest.approx(1, rel=0.05)  # u is g^2
        assert min(spike["gradient_norm"][8:]) > 5 * max(spike["gradient_norm"][:8])  # the weight of 0.01
        packed = trained["optimizer"].endswith("8bit")
        assert (trained["state_bytes_8bit"] > 0) == packed
        assert f"{spike['rise']:+.3f}" in result.output
    assert set(record["paired"]["StableAdamW - AdamW"]) == {"loss", "accuracy"}


def test_loss_spikes_wants_steps_after_the_change(example: Any) -> None:
    result = run(example("loss_spikes"), "--steps", 8, "--change", 8)
    assert result.exit_code == 2 and "--change" in result.output


class Line(nn.Module):
    """Its gradient is 1 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 1, bias=False)


def stepped(module: ModuleType, optimizer: torch.optim.Optimizer, model: Line, signal: Any, steps: int) -> Any:
    gauge = module.Gauge(signal, model.patch.weight)
    optimizer.register_step_pre_hook(gauge.before)
    optimizer.register_step_post_hook(gauge.after)
    for _ in range(steps):
        model.patch.weight.grad = torch.ones(1, 4)
        optimizer.step()
    return gauge


@pytest.mark.parametrize("kind", [torch.optim.AdamW, octavo.optim.AdamW8bit])
def test_rms_of_a_stale_second_moment(example: Any, kind: Any) -> None:
    module, model = example("loss_spikes"), Line()
    options = {} if kind is torch.optim.AdamW else {"min_8bit_size": 1}
    optimizer = kind(model.parameters(), betas=(0.9, 0.9), **options)
    gauge = stepped(module, optimizer, model, module.Signal(change=4, weight=0.1), 6)
    assert gauge.norm == pytest.approx([0.2] * 4 + [2.0] * 2)
    u, expected = 0.0, []
    for step, g in enumerate([0.1] * 4 + [1.0] * 2, 1):
        u = 0.9 * u + 0.1 * g * g
        expected.append(math.sqrt(g * g / (u / (1 - 0.9**step))))
    assert expected[4] > 1.9
    assert gauge.rms == pytest.approx(expected, rel=1e-4 if kind is torch.optim.AdamW else 0.05)
    assert bool(optimizer.state[model.patch.weight].get("exp_avg_sq_root") is None) == (kind is torch.optim.AdamW)


def test_rms_that_the_optimizer_tells(example: Any) -> None:
    module, model = example("loss_spikes"), Line()
    exact = stepped(module, torch.optim.AdamW(model.parameters()), model, module.Signal(4, 0.1), 6)
    stable = octavo.optim.StableAdamW(model.parameters(), betas=(0.9, 0.999))
    assert stepped(module, stable, model, module.Signal(4, 0.1), 6).rms == pytest.approx(exact.rms, rel=1e-4)


def test_clipping_is_of_the_weighted_gradients(example: Any) -> None:
    module, model = example("loss_spikes"), Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gauge = module.Gauge(module.Signal(change=1, weight=0.1, clip=1.0), model.patch.weight)
    optimizer.register_step_pre_hook(gauge.before)
    for norm in (0.2, 1.0):  # 2 * 0.1, and 2 clipped
        old = model.patch.weight.detach().clone()
        model.patch.weight.grad = torch.ones(1, 4)
        optimizer.step()
        assert (old - model.patch.weight).norm().item() == pytest.approx(norm, rel=1e-4)
    assert gauge.norm == pytest.approx([0.2, 2.0])


def test_spikes_of_known_losses(example: Any) -> None:
    module, common = example("loss_spikes"), example("common")
    gauge = module.Gauge(module.Signal(30, 1.0), torch.zeros(1), rms=[1.0] * 30 + [9.0] + [1.0] * 29)
    calm = [1.0, 1.2] * 15  # mean 1.1, standard deviation 0.1
    after = [1.1, 3.0, 2.0, 1.4, 1.43] + [1.1] * 25  # the last of 1.43 is above 1.1 + 0.32
    spike = module.spike(common.Run("a", 0, train=calm + after), gauge, 30, 60)
    assert (spike.mean, spike.std) == (pytest.approx(1.1), pytest.approx(0.1))
    assert (spike.largest, spike.at, spike.above) == (3.0, 1, 3)
    assert spike.rise == pytest.approx(1.9)
    assert spike.recovered == 3  # from 1.4 on: the means of ten before that hold 2.0
    assert (spike.rms_before, spike.rms_after) == (1.0, 9.0)
    steady = module.spike(common.Run("a", 0, train=calm + calm), gauge, 30, 60)
    assert (steady.above, steady.recovered) == (0, 0)
    risen = module.spike(common.Run("a", 0, train=calm + [2.0] * 30), gauge, 30, 60)
    assert (risen.above, risen.recovered) == (30, None)
    diverged = module.spike(common.Run("a", 0, train=[*calm, 1.1, math.nan], diverged_at=32), gauge, 30, 60)
    assert math.isnan(diverged.largest) and diverged.above == 1 and diverged.recovered is None
    before = module.spike(common.Run("a", 0, train=[1.0, math.nan], diverged_at=2), gauge, 30, 60)
    assert math.isnan(before.largest) and before.recovered is None


# ---- int8_training -------------------------------------------------------------------------------------------------


def test_int8_training(example: Any, fashion: Path, tmp_path: Path) -> None:
    module = example("int8_training")
    options = ("--steps", 4, "--seeds", 2, "--width", 32, "--control")
    result = run(module, *TINY, *options, "--data", fashion, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = read(tmp_path, "int8_training")
    names = ["16 bit", *module.VARIANTS, "32 bit"]
    runs = {(r["optimizer"], r["seed"]): r for r in record["runs"]}
    assert list(runs) == [(name, seed) for seed in (0, 1) for name in names]
    assert [row["layers"] for row in record["summary"]] == names
    for seed in (0, 1):
        first = {name: runs[name, seed]["train"][0] for name in names}  # same weights, same batch, other products
        assert len(set(first.values())) > 3 and max(first.values()) - min(first.values()) < 0.05
    row = record["summary"][1]
    difference = [runs["switchback", s]["final"]["loss"] - runs["16 bit", s]["final"]["loss"] for s in (0, 1)]
    assert row["loss"]["difference"] == difference == record["paired"]["switchback - 16 bit"]["loss"]
    assert max(map(abs, difference)) < 0.1
    assert row["loss"]["mean_difference"] == pytest.approx(sum(difference) / 2)
    assert f"{difference[1]:+.4f}" in result.output
    assert record["summary"][0]["loss"]["std"] > 0 and record["settings"]["variant"] is None


def test_int8_training_of_one_variant(example: Any, fashion: Path, tmp_path: Path) -> None:
    options = ("--steps", 2, "--seeds", 1, "--width", 32, "--variant", "vectorwise")
    result = run(example("int8_training"), *TINY, *options, "--data", fashion, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = read(tmp_path, "int8_training")
    assert [row["layers"] for row in record["summary"]] == ["16 bit", "vectorwise"]
    assert record["summary"][0]["accuracy"]["std"] is None


def test_int8_training_knows_its_variants(example: Any, fashion: Path) -> None:
    result = run(example("int8_training"), "--variant", "int7", "--data", fashion)
    assert result.exit_code == 2 and "int7" in result.output and "memory_efficient" in result.output


def test_divergence_in_the_summary(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, common = example("int8_training"), example("common")
    well = [common.Run("16 bit", s, final={"loss": 0.5 + s, "accuracy": 0.8}) for s in (0, 1)]
    runs = [*well, common.Run("fp8", 0, final={"loss": 0.75, "accuracy": 0.7}), common.Run("fp8", 1, diverged_at=3)]
    rows = module.summary(runs)
    assert rows[0]["loss"] == {"mean": 1.0, "std": pytest.approx(math.sqrt(0.5))}
    assert rows[1]["loss"]["difference"][0] == 0.25 and math.isnan(rows[1]["loss"]["difference"][1])
    module.show(rows, seeds=2)
    printed = capsys.readouterr().out
    assert "diverged" in printed and "+0.2500" in printed and "nan" not in printed
    rows = module.summary([well[0], common.Run("16 bit", 1, diverged_at=3)])
    assert math.isnan(rows[0]["loss"]["mean"]) and math.isnan(rows[0]["loss"]["std"])
