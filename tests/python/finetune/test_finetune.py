"""`octavo finetune`: that it learns what it should, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math

import octavo
import pytest
import torch
from command import byte_tokenizer, shown_command, tiny
from finetune_model import (
    SMALL,
    Stopping,
    assert_same_run,
    cli,
    make_files,
    measured,
    options,
    plain_terminal,
    settings,
    train,
)
from octavo import models
from octavo.cli import app
from octavo.finetune import MemoryRow, curve, memory_table, residual
from octavo.finetune.data import Text
from octavo.finetune.run import _Trainer
from octavo.models import evaluate, load_base
from octavo.nn import Int8Linear, LoRALinear, NF4Linear
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    with plain_terminal(monkeypatch):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("finetune"))


def test_learns_and_writes_everything(files, tmp_path):
    how = settings(steps=30, eval_every=15, batch=4, init="zero")
    arguments = [files / "model", "--text", files / "text.txt", "--out", tmp_path / "out", *options(how)]
    result = cli(*arguments, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "held-out perplexity" in result.output
    assert "QLoRA, nf4" in result.output and "LoRA, 16-bit" in result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter",
        "finetune.json",
        "losses.jsonl",
        "losses.png",
    ]
    lines = measured(tmp_path / "out")
    losses = [line["loss"] for line in lines if "loss" in line]
    perplexities = {line["step"]: line["held_out_perplexity"] for line in lines if "loss" not in line}
    assert len(losses) == 30 and list(perplexities) == [0, 15, 30]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.4
    assert perplexities[30] < perplexities[15] < perplexities[0]
    assert perplexities[30] < 0.7 * perplexities[0]
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert manifest["finished"] and manifest["settings"]["rank"] == 4 and manifest["octavo"] == octavo.__version__
    assert manifest["results"]["perplexity_after"] == perplexities[30]
    assert [row["name"][:4] for row in manifest["results"]["memory"]] == ["fp32", "LoRA", "QLoR"]

    # The adapter, on the base as `octavo generate` makes it, has the perplexity that was reported.
    text = Text(files / "text.txt", byte_tokenizer(), how)
    model = load_base(models.find_source(files / "model"), "nf4", torch.bfloat16)
    assert evaluate.perplexity(model, text.held_out).perplexity == perplexities[0]
    octavo.load_adapter(model, tmp_path / "out" / "adapter", dtype=torch.float32)
    assert evaluate.perplexity(model, text.held_out).perplexity == perplexities[30]
    command = shown_command(result.output)[1:]
    where = [str(files / "model"), "--adapter", str(tmp_path / "out" / "adapter")]
    assert command == ["generate", *where, "--dtype", "bf16"]  # the adapter says the rest
    answers = [
        CliRunner().invoke(app, [*words, "--prompt", "It is", "--max-tokens", "5"])
        for words in (
            command,
            [*command, "--method", "nf4", "--double-quant"],
            [*command, "--method", "nf4", "--no-double-quant"],
        )
    ]
    assert [answer.exit_code for answer in answers] == [0, 0, 0], answers
    assert answers[0].stdout == answers[1].stdout and answers[0].stdout.strip()
    warned = "trained on a base whose quantization is nf4 double_quant; here it is nf4: answers may be worse"
    assert [warned in answer.stderr for answer in answers] == [False, False, True]


def test_peft_loads_the_adapter(files, tmp_path):
    peft = pytest.importorskip("peft")
    result = train(files, tmp_path / "out", settings(method="16bit", dtype="fp32"))
    model = peft.PeftModel.from_pretrained(tiny(), result.adapter)
    text = Text(files / "text.txt", byte_tokenizer(), SMALL)
    found = evaluate.perplexity(model, text.held_out).perplexity
    assert found == pytest.approx(result.perplexities[6], rel=1e-5)
    assert found < result.perplexities[0]


@pytest.mark.parametrize(
    ("method", "kind", "bits"),
    [("nf4", NF4Linear, 4.127), ("fp4", NF4Linear, 4.127), ("int8", Int8Linear, 8), ("16bit", torch.nn.Linear, 16)],
)
def test_methods(files, tmp_path, monkeypatch, method, kind, bits):
    seen = {}
    finish = _Trainer._finish

    def look(trainer):
        seen["model"] = trainer.model
        return finish(trainer)

    monkeypatch.setattr(_Trainer, "_finish", look)
    result = train(files, tmp_path / "out", settings(method=method, steps=2))
    layers = [module for module in seen["model"].modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 14 and {type(layer.base_layer) for layer in layers} == {kind}
    if kind is NF4Linear:
        assert {(layer.base_layer.quant_type, layer.base_layer.double_quant) for layer in layers} == {(method, True)}
    row = result.memory[-1]
    # Rows of 64 and 96 weights in blocks of 64 make for more than 4.127 and 8 bits a weight.
    assert bits <= 8 * sum(evaluate.model_bytes(layer.base_layer) for layer in layers) / _linear_weights() < bits + 0.7
    count = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    assert row.measured and row.adapters == row.gradients == 4 * count
    assert row.weights == evaluate.model_bytes(seen["model"]) - row.adapters


def _linear_weights():
    return sum(m.weight.numel() for n, m in tiny().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")


@pytest.mark.parametrize("shape", [(48, 96), (96, 64)])
def test_adapters_begin_with_the_closest_matrix_to_what_was_lost(shape):
    """No matrix of this rank is closer on these inputs: by the singular values, in float64, of ``(W - Q) R^(1/2)``."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    x = torch.randn(500, shape[1], generator=generator) * torch.logspace(-1, 1, shape[1])
    moment = x.T @ x / len(x)
    how = settings(rank=8, alpha=3.0, double_quant=False)
    a, b = residual.start_of(linear, residual.square_root(moment), how)
    lost = linear.weight.detach() - NF4Linear.from_linear(linear).dequantize().weight.detach()
    left = lost - 3.0 / 8 * b @ a
    values, vectors = torch.linalg.eigh(moment.double())
    singular = torch.linalg.svdvals(lost.double() @ (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T)
    least = float(singular[8:].square().sum())
    assert float(torch.trace(left.double() @ moment.double() @ left.double().T)) == pytest.approx(least, rel=0.02)
    assert least < 0.5 * float(singular.square().sum())
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-3)


def test_adapters_of_full_rank_begin_with_the_model_that_was_quantized(files, tmp_path):
    first = {}
    for name, changes in (("16bit", {"method": "16bit"}), ("residual", {"rank": 64}), ("zero", {"init": "zero"})):
        how = settings(dtype="fp32", steps=1, eval_windows=20, **changes)
        first[name] = train(files, tmp_path / name, how).perplexities[0]
    assert first["residual"] == pytest.approx(first["16bit"], rel=1e-5)
    assert abs(first["zero"] / first["16bit"] - 1.0) > 1e-4


def test_steps_are_those_of_a_plain_loop(files, tmp_path):
    """torch's AdamW and clip_grad_norm_ on the same windows: the schedule, clipping and accumulation are right."""
    how = settings(method="16bit", dtype="fp32", optimizer="adamw", dropout=0.0, accumulate=2, warmup=0.5)
    how = dataclasses.replace(how, weight_decay=0.1, seed=3)
    train(files, tmp_path / "a", how)
    lines = [line for line in measured(tmp_path / "a") if "loss" in line]
    text = Text(files / "text.txt", byte_tokenizer(), how)
    model = tiny().train()
    torch.manual_seed(3)
    octavo.add_lora(model, 4, 16, 0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1)
    for step, line in enumerate(lines):
        lr = 5e-3 * min(1.0, (step + 1) / 3)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        ids = text.batches(step).flatten(0, 1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        assert line["lr"] == lr
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["tokens"] == 4 * 32


def test_gradient_checkpointing_changes_no_loss(files, tmp_path):
    for checkpointing in (True, False):
        how = settings(dropout=0.2, steps=3, gradient_checkpointing=checkpointing)
        train(files, tmp_path / str(checkpointing), how)
    assert_same_run(tmp_path / "True", tmp_path / "False")


def test_epochs_go_through_all_windows_in_orders_of_the_seed(files):
    how = settings(steps=None, epochs=2.0, batch=3, accumulate=2)
    text = Text(files / "text.txt", byte_tokenizer(), how)
    count = len(text.train)
    assert text.total == math.ceil(2 * count / 6)
    seen = torch.cat([text.batches(step).flatten(0, 1) for step in range(text.total)])
    first, second = seen[:count], seen[count : 2 * count]
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, text.train.tolist()))
    again = Text(files / "text.txt", byte_tokenizer(), how)
    assert torch.equal(again.batches(50), text.batches(50))  # without those before
    other = Text(files / "text.txt", byte_tokenizer(), dataclasses.replace(how, seed=1))
    assert not torch.equal(other.batches(0), text.batches(0))


def test_the_end_of_the_text_is_held_out(files):
    tokens = models.tokens_of(byte_tokenizer(), files / "text.txt")
    text = Text(files / "text.txt", byte_tokenizer(), settings(held_out=0.25, eval_windows=1000))
    kept = len(tokens) - math.ceil(len(tokens) / 4)
    assert text.train.flatten().tolist() == tokens[: kept // 32 * 32]
    held_out = tokens[kept:]
    assert text.held_out.flatten().tolist() == held_out[: len(held_out) // 32 * 32]


def test_warmup():
    how = settings(lr=1.0, warmup=0.03)
    assert [how.lr_of(step, 100) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert settings(lr=1.0, warmup=0.0).lr_of(0, 100) == 1.0


def test_memory_table():
    run = MemoryRow("a run", 1, 2, 3, 4, measured=True)
    full, lora, last = memory_table(1000, 10, run)
    assert (full.weights, full.adapters, full.gradients, full.optimizer, full.total) == (4000, 0, 4000, 8000, 16000)
    assert (lora.weights, lora.adapters, lora.gradients, lora.optimizer, lora.total) == (2000, 40, 40, 80, 2160)
    assert last is run and run.total == 10


def test_states_in_8_bit_are_smaller_and_paged_ones_are_counted(files, tmp_path):
    rows = {}
    (tmp_path / "pages").mkdir()
    for optimizer in ("adamw", "adamw8bit", "paged_adamw"):
        paging = {"page_dir": str(tmp_path / "pages"), "device_budget": 0} if optimizer == "paged_adamw" else {}
        how = settings(optimizer=optimizer, rank=64, steps=1, **paging)  # from 4096 elements on states are in 8 bit
        rows[optimizer] = train(files, tmp_path / optimizer, how).memory[-1]
    assert rows["adamw"].optimizer == pytest.approx(2 * rows["adamw"].adapters, rel=0.01)
    assert rows["adamw8bit"].optimizer < 0.4 * rows["adamw"].optimizer  # B of k_proj is too small
    assert rows["adamw8bit"].paged == 0
    assert rows["paged_adamw"].paged >= 2 * rows["paged_adamw"].adapters
    assert list((tmp_path / "pages").iterdir()) == []


def test_the_curve_is_smoothed_without_bias():
    assert curve.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    assert curve.smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1.0 + 0.5 * 3.0) / 0.75])


def test_help():
    result = cli("--help")
    assert result.exit_code == 0
    assert "octavo finetune smollm2 --text novel.txt" in result.output
    for name in ("--resume", "--page-dir", "--double-quant", "--keep-activations", "--max-grad-norm"):
        assert name in result.output


@pytest.mark.parametrize("method", ["spqr", "gptq", "rtn", "none"])
def test_every_method_makes_a_base(files, tmp_path, method):
    """The command that finetune prints loads the base that it trained on: the adapter was made on the same one."""
    arguments = [files / "model", "--text", files / "text.txt", "--out", tmp_path / "out", "--method", method]
    arguments += [*options(settings(steps=2)), "--threads", 1]
    if method != "none":
        arguments += ["--bits", 4, "--group-size", 32]
    if method in ("spqr", "gptq"):
        refused = cli(*arguments)
        assert refused.exit_code == 2 and f"{method} needs calibration data" in refused.output
        arguments += ["--calibration", files / "text.txt"]
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    command = shown_command(result.output)
    answer = CliRunner().invoke(app, [*command[1:], "--prompt", "It is", "--max-tokens", "3"])
    assert answer.exit_code == 0, answer.output
    assert "warning" not in answer.output
    result = cli(*arguments, "--resume")
    assert result.exit_code == 1 and "a run that is finished" in result.output


def test_the_method_of_a_run_is_part_of_it(files, tmp_path):
    how = settings(method="rtn", quantization={"bits": 4, "group_size": 32})
    stopping = Stopping(2)
    assert not train(files, tmp_path / "out", how, watcher=stopping, stop=stopping.asked).finished
    other = settings(method="rtn", quantization={"bits": 3, "group_size": 32})
    with pytest.raises(ValueError, match=r"settings \(bits 4 is now 3\)"):
        train(files, tmp_path / "out", other, resume=True)
    assert train(files, tmp_path / "out", how, resume=True).finished


def test_defaults_that_are_spelled_out_are_the_same_run():
    plain, spelled = settings(), settings(quantization={"blocksize": 64, "double_quant": True})
    assert plain.binding() == spelled.binding()
    assert settings(method="int8").binding() != settings(method="int8", quantization={"threshold": 2.0}).binding()
    assert plain.binding_defaults().items() <= plain.binding().items()
