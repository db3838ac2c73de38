"""The examples, for a few steps on tiny models: what they write, what they say of bad data, and what they do when a
training diverges. That 8-bit states train like 32-bit ones is shown by the examples themselves, see examples/README.md.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
from collections.abc import Iterator
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
TINY = ("--steps", "4", "--batch", "2", "--width", "64", "--layers", "1", "--threads", "2")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of examples/ by name, as running it would find its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run(module: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments])


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def read(folder: Path, name: str) -> dict[str, Any]:
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=no_constant)


def test_byte_language_model(example: Any, tmp_path: Path) -> None:
    module = example("byte_language_model")
    options = ("--seeds", 2, "--context", 64, "--validation", 1024, "--control", "--stable-embedding")
    result = run(module, *TINY, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = read(tmp_path, "byte_language_model")
    runs = {(r["optimizer"], r["seed"]): r for r in record["runs"]}
    assert len(runs) == 6
    for seed in (0, 1):
        exact, packed = runs["AdamW", seed], runs["AdamW8bit", seed]
        assert packed["train"][0] == exact["train"][0]  # same weights, same batch
        assert len(packed["train"]) == 4 and [step for step, _ in packed["valid"]] == [1, 2, 3, 4]
        assert 0 < packed["state_bytes_8bit"] < packed["state_bytes"] < 0.6 * exact["state_bytes"]
        assert runs["AdamW8bit, bits=32", seed]["state_bytes_8bit"] == exact["state_bytes_8bit"] == 0
    difference = runs["AdamW8bit", 1]["final"]["loss"] - runs["AdamW", 1]["final"]["loss"]
    assert record["paired"]["AdamW8bit - AdamW"]["loss"][1] == difference
    assert abs(difference) < 0.1
    assert f"{difference:+.4f}" in result.output
    assert record["settings"]["steps"] == 4 and record["machine"]["octavo"] == octavo.__version__


def test_slow_betas_and_lion(example: Any, tmp_path: Path) -> None:
    options = ("--seeds", 1, "--context", 64, "--validation", 1024, "--lion", "--beta2", 0.99, "--lr", 3e-4)
    result = run(example("byte_language_model"), *TINY, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    runs = {r["optimizer"]: r for r in read(tmp_path, "byte_language_model")["runs"]}
    assert [*runs] == ["Lion", "Lion8bit"]
    assert runs["Lion"]["state_bytes_8bit"] == 0 < runs["Lion8bit"]["state_bytes_8bit"]
    assert abs(runs["Lion8bit"]["final"]["loss"] - runs["Lion"]["final"]["loss"]) < 0.1


def test_language_model_text(example: Any) -> None:
    learned, held_out = example("byte_language_model").text()
    assert len(learned) > 1e6 and len(held_out) > 1e5
    assert bytes(held_out[:64].tolist()) not in bytes(learned.tolist())


def idx(folder: Path, name: str, tensor: torch.Tensor, packed: bool) -> None:
    head = bytes([0, 0, 8, tensor.dim()]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    content = head + bytes(tensor.flatten().tolist())
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(content) if packed else content)


def fashion(folder: Path, packed: bool) -> None:
    """Sixteen pictures to learn from and eight to judge by, in the files of Fashion-MNIST."""
    for part, count in (("train", 16), ("t10k", 8)):
        classes = torch.arange(count) % 10
        pictures = (classes[:, None, None] * 25).expand(count, 28, 28).clone()
        idx(folder, f"{part}-images-idx3-ubyte", pictures, packed)
        idx(folder, f"{part}-labels-idx1-ubyte", classes, packed)


@pytest.mark.parametrize("packed", [True, False])
def test_vision_transformer(example: Any, tmp_path: Path, packed: bool) -> None:
    fashion(tmp_path / "data", packed)
    result = run(
        example("vision_transformer"), *TINY, "--seeds", 1, "--data", tmp_path / "data", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    record = read(tmp_path / "out", "vision_transformer")
    exact, packed_run = record["runs"]
    assert packed_run["state_bytes_8bit"] > 0 and exact["state_bytes_8bit"] == 0
    assert 0 <= packed_run["final"]["accuracy"] <= 1
    assert abs(record["paired"]["AdamW8bit - AdamW"]["loss"][0]) < 0.1


def test_vision_transformer_names_what_is_missing(example: Any, tmp_path: Path) -> None:
    module = example("vision_transformer")
    result = run(module, "--data", tmp_path)
    assert result.exit_code == 1
    assert "train-images-idx3-ubyte" in result.output and "apt-get install dataset-fashion-mnist" in result.output
    fashion(tmp_path, packed=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    result = run(module, "--data", tmp_path)
    assert result.exit_code == 1 and path.name in result.output


def test_ablation(example: Any, tmp_path: Path) -> None:
    module = example("ablation")
    result = run(module, *TINY, "--context", 64, "--validation", 1024, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = read(tmp_path, "ablation")
    assert [r["optimizer"] for r in record["runs"]] == ["32 bit", *map(str, module.SCHEMES)]
    assert abs(record["paired"]["dynamic, blocks, sqrt(v), never 0 - 32 bit"]["loss"][0]) < 0.1


@pytest.mark.parametrize("signed", [True, False])
def test_ablation_rounds_as_octavo(example: Any, generator: torch.Generator, signed: bool) -> None:
    module = example("ablation")
    x = torch.randn(40, 200, generator=generator) ** 3
    x = x if signed else x.abs()
    ours = octavo.dequantize_blockwise(*octavo.quantize_blockwise(x, signed=signed), signed=signed)
    rounded = module.round_trip(x, module.Scheme(dynamic=True, blocksize=256), signed)
    assert (rounded != ours).sum() <= 2  # in the middle between two codes, x / absmax and x * (1 / absmax) may differ
    for scheme in module.SCHEMES:
        assert not module.round_trip(torch.zeros(3, 100), scheme, signed).any()


class Poison(torch.optim.SGD):
    """Makes the weights NaN in its third step."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps == 3:
            self.param_groups[0]["params"][0].data.fill_(math.nan)


def test_divergence_is_shown(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common, report = example("common"), example("report")

    def batches(seed: int) -> Iterator[Any]:
        while True:
            yield torch.ones(2, 3), torch.zeros(2, 1)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(model: nn.Module, full: bool) -> dict[str, float]:
        return {"loss": loss(model, next(batches(0))).item()}

    task = common.Task("a line", lambda: nn.Linear(3, 1), loss, batches, evaluate)
    contenders = {"steady": lambda m: torch.optim.SGD(m.parameters()), "poison": lambda m: Poison(m.parameters())}
    runs = common.train(task, contenders, common.Schedule(0.01, 1, 8), seeds=1, every=2)
    steady, poison = runs
    assert steady.diverged_at is None and len(steady.train) == 8
    assert poison.diverged_at == 4 and poison.final == {} and len(poison.valid) == 1
    report.show(task, runs, "squared")
    report.write(task, runs, {}, 0.0, tmp_path)
    assert "diverged" in capsys.readouterr().out
    record = read(tmp_path, "a_line")
    assert record["paired"] == {"poison - steady": {"loss": [None]}}
    assert record["runs"][1]["train"][3] is None
