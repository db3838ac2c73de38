"""`octavo finetune`: that it learns, that an interrupted run goes on as if it had not been, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

import octavo  # noqa: E402
from octavo import evaluate, models  # noqa: E402
from octavo.cli import app  # noqa: E402
from octavo.finetune import (  # noqa: E402
    MemoryRow,
    NonFiniteError,
    Settings,
    Watcher,
    curve,
    finetune,
    memory_table,
)
from octavo.finetune.data import Text  # noqa: E402
from octavo.finetune.directory import open_run  # noqa: E402
from octavo.finetune.run import _Trainer  # noqa: E402
from octavo.nn import Int8Linear, LoRALinear, NF4Linear  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_cli import TEXT, byte_tokenizer, tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

SMALL = Settings(context=32, batch=2, steps=6, rank=4, lr=5e-3, eval_every=2, eval_windows=2, save_every=3)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and a text of 208 windows of 32 tokens: 187 to train on, 20 held out."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def settings(**changes):
    return dataclasses.replace(SMALL, **changes)


def train(files, out, how=SMALL, **options):
    return finetune(files / "model", files / "text.txt", out, how, **options)


def cli(*arguments):
    return CliRunner().invoke(app, ["finetune", *(str(argument) for argument in arguments)])


def options(how):
    """The command's options for settings."""
    given = {k: v for k, v in dataclasses.asdict(how).items() if v != getattr(Settings(), k)}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def measured(out):
    """What must not depend on interruptions: all lines of the file but for the time that steps took."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def contents(folder):
    """Every file with its hash, hidden ones, too."""
    found = {p.relative_to(folder): p for p in folder.rglob("*")}
    return {str(k): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for k, p in found.items()}


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_run(out, other):
    assert measured(out) == measured(other)
    a, b = adapter(out), adapter(other)
    assert a.keys() == b.keys() and len(a) == 28
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stopping(Watcher):
    """Stops after a step; `asked` is what `finetune` calls."""

    def __init__(self, after):
        self.after, self.steps = after, 0

    def begin(self, total, history):
        self.steps = len(history.steps)

    def step(self, line):
        self.steps = line["step"]

    def asked(self):
        return self.steps >= self.after


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_learns_and_writes_everything(files, tmp_path):
    how = settings(steps=30, eval_every=15, batch=4)
    arguments = [files / "model", "--text", files / "text.txt", "--out", tmp_path / "out", *options(how)]
    result = cli(*arguments, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "held-out perplexity" in result.output
    assert "QLoRA, nf4 double quant, paged_adamw8bit" in result.output
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
    model = models.load_model(models.find_source(files / "model"), torch.bfloat16)
    octavo.quantize_model(model, "nf4", progress=False, double_quant=True)
    assert evaluate.perplexity(model, text.held_out).perplexity == perplexities[0]
    octavo.load_adapter(model, tmp_path / "out" / "adapter", dtype=torch.float32)
    assert evaluate.perplexity(model, text.held_out).perplexity == perplexities[30]


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


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit", "lion8bit"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(files, tmp_path, optimizer):
    paging = {}
    if optimizer.startswith("paged_"):
        (tmp_path / "pages").mkdir()
        paging = {"page_dir": str(tmp_path / "pages"), "device_budget": 0}
    how = settings(optimizer=optimizer, dropout=0.2, rank=64, steps=5, **paging)  # and states in 8 bit
    train(files, tmp_path / "whole", how)
    for after in (1, 3):
        stopping = Stopping(after)
        result = train(files, tmp_path / "parts", how, resume=after > 1, watcher=stopping, stop=stopping.asked)
        assert not result.finished and result.steps == after and result.adapter is None
        assert (tmp_path / "parts" / "losses.png").exists()
        torch.manual_seed(after)  # what random numbers come next in this process is of no importance
    before = torch.get_rng_state()
    result = train(files, tmp_path / "parts", how, resume=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.finished and result.steps == 5
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_stopped_before_the_first_step_and_while_evaluating(files, tmp_path):
    train(files, tmp_path / "whole")
    calls = []

    def stop_at(number):
        calls.clear()

        def asked():
            calls.append(None)
            return len(calls) == number

        return asked

    # With 2 windows held out, `stop` is asked once in an evaluation and once before a step.
    done = [train(files, tmp_path / "parts", stop=stop_at(1)).steps]
    for number in (2, 3, 4):
        done.append(train(files, tmp_path / "parts", resume=True, stop=stop_at(number)).steps)
    assert done == [0, 0, 2, 4]
    final = Stopping(6)  # while the last perplexity is taken
    result = train(files, tmp_path / "parts", resume=True, watcher=final, stop=final.asked)
    assert not result.finished and result.steps == 6 and 6 not in result.perplexities
    assert train(files, tmp_path / "parts", resume=True).finished
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_sigterm_and_the_same_command_again(files, tmp_path):
    how = settings(dropout=0.2, steps=12, save_every=5)
    train(files, tmp_path / "whole", how)
    arguments = [files / "model", "--text", files / "text.txt", "--out", tmp_path / "parts", *options(how)]
    arguments = [str(argument) for argument in (*arguments, "--threads", 1)]
    program = """
import os, signal, sys
from octavo.cli import main
from octavo.finetune.run import _Trainer
step = _Trainer._step
def with_signal(trainer, number, total):
    if number == 7:
        os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the run, before the step is done
    step(trainer, number, total)
_Trainer._step = with_signal
sys.argv = ["octavo", "finetune", *sys.argv[1:]]
main()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 143, run.stderr
    assert "stopped by SIGTERM after step 8 of 12" in run.stderr
    assert "the same command with --resume" in run.stderr
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000008"]
    result = cli(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after step 8 of 12" in result.output
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_once_and_twice(files, tmp_path, monkeypatch, again):
    step = _Trainer._step
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def with_signal(trainer, number, total):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            if again:
                os.kill(os.getpid(), signal.SIGINT)
        step(trainer, number, total)

    monkeypatch.setattr(_Trainer, "_step", with_signal)
    arguments = [files / "model", "--text", files / "text.txt", "--out", tmp_path / "out", *options(SMALL)]
    result = cli(*arguments)
    assert result.exit_code == 130, result.output
    assert ("stopped by SIGINT after step 3 of 6" in result.output) is not again
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").exists() is not again
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_signal_before_training_leaves_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = cli(files / "model", "--text", files / "text.txt", "--out", tmp_path / "out", *options(SMALL))
    assert result.exit_code == 143
    assert list(tmp_path.iterdir()) == []


DYING = settings(steps=8, save_every=2, dropout=0.2)


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """`whole`, and `died`: the same until it died in step 8, with checkpoints after 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    train(files, folder / "whole", DYING)
    step = _Trainer._step

    def dying(trainer, at, total):
        if at == 7:
            raise KeyError
        step(trainer, at, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Trainer, "_step", dying)
        with pytest.raises(KeyError):
            train(files, folder / "died", DYING)
    return folder


@pytest.fixture
def died(runs, tmp_path):
    """A copy."""
    return shutil.copytree(runs / "died", tmp_path / "died")


def test_a_run_that_died(files, runs, died):
    assert sorted(p.name for p in (died / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert len([line for line in measured(died) if "loss" in line]) == 7  # one more than the checkpoint
    (died / "checkpoints" / ".step-00000008.0000.tmp").mkdir()  # it died while writing
    (died / ".finetune.json.1.tmp").write_text("{")
    assert train(files, died, DYING, resume=True).finished
    assert_same_run(died, runs / "whole")
    assert not [p for p in died.iterdir() if p.name.startswith(".")]


def test_resume_without_a_run_begins_one(files, tmp_path):
    assert train(files, tmp_path / "out", settings(steps=1), resume=True).finished


@pytest.mark.parametrize("name", ["training.pt", "state.json", "adapter/adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(files, runs, died, name):
    def damage(step):
        path = died / "checkpoints" / f"step-{step:08d}" / name
        path.write_bytes(path.read_bytes()[:-7])

    damage(6)
    notes = []
    watcher = Watcher()
    watcher.note = notes.append
    result = train(files, died, DYING, resume=True, watcher=watcher, stop=lambda: bool(notes))
    assert result.steps == 4
    assert len(notes) == 1 and "step-00000006 is damaged" in notes[0] and "going on from step 4" in notes[0]
    assert [p.name for p in (died / "checkpoints").iterdir()] == ["step-00000004"]
    damage(4)
    before = contents(died)
    with pytest.raises(ValueError, match=r"step-00000004 is damaged .*: remove .* to begin anew"):
        train(files, died, DYING, resume=True)
    assert contents(died) == before


def test_what_follows_a_damaged_checkpoint_is_the_same(files, runs, died):
    (died / "checkpoints" / "step-00000006" / "training.pt").unlink()
    assert train(files, died, DYING, resume=True).finished
    assert_same_run(died, runs / "whole")


def test_resuming_another_run_is_refused(files, died, tmp_path):
    before = contents(died)
    other = tmp_path / "model"
    shutil.copytree(files / "model", other)
    weights = tiny()
    weights.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1.0
    weights.save_pretrained(other)
    (tmp_path / "text.txt").write_text(TEXT * 19 + TEXT.replace("truth", "trust"))
    here = (files / "model", files / "text.txt")
    for model, text, changed, message in (
        (*here, {"lr": 1e-4}, r"settings \(lr 0.005 is now 0.0001\)"),
        (*here, {"rank": 8, "seed": 1}, r"settings \(rank 4 is now 8, seed 0 is now 1\)"),
        (*here, {"double_quant": False}, r"its model, settings \(double_quant True is now False\)"),
        (other, files / "text.txt", {}, "different are its model: use"),
        (files / "model", tmp_path / "text.txt", {}, "different are its data: use"),
    ):
        with pytest.raises(ValueError, match=rf"died holds another run; .*{message}"):
            finetune(model, text, died, dataclasses.replace(DYING, **changed), resume=True)
        assert contents(died) == before
    with pytest.raises(FileExistsError, match="holds a run that is not finished: resume it"):
        train(files, died, DYING)
    assert contents(died) == before
    free = dataclasses.replace(DYING, save_every=7, device_budget=1 << 20)  # changes no bit of a step
    assert train(files, died, free, resume=True).finished
    with pytest.raises(FileExistsError, match="holds a run that is finished; name another"):
        train(files, died, DYING, resume=True)


def test_one_process_at_a_time(files, tmp_path):
    with open_run(tmp_path / "out", False), pytest.raises(BlockingIOError, match="another process trains in"):
        train(files, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_number_of_threads_is_noted(files, died):
    torch.set_num_threads(2)
    notes = []
    watcher = Watcher()
    watcher.note = notes.append
    assert not train(files, died, DYING, resume=True, watcher=watcher, stop=lambda: True).finished
    assert notes == ["1 threads before, 2 now: losses may differ a little"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_it(files, tmp_path):
    how = settings(lr=1e30, warmup=0.0, save_every=1)
    message = (
        r"the (loss|norm of the gradients) of step 2 is (nan|inf): stopped, with lr 1e\+30, .*of step 1 is kept in"
    )
    for optimizer in ("adamw", "paged_adamw8bit"):
        with pytest.raises(NonFiniteError, match=message):
            train(files, tmp_path / optimizer, dataclasses.replace(how, optimizer=optimizer))
        saved = load_file(
            tmp_path / optimizer / "checkpoints" / "step-00000001" / "adapter" / "adapter_model.safetensors"
        )
        assert all(tensor.isfinite().all() for tensor in saved.values())
        assert [line["step"] for line in measured(tmp_path / optimizer)] == [0, 1]


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit"])
def test_gradients_that_are_not_finite_change_nothing(files, tmp_path, monkeypatch, optimizer):
    update = _Trainer._update

    def poisoned(trainer, step):
        before = [parameter.detach().clone() for parameter in trainer.trained]
        trainer.trained[3].grad[0, 0] = math.nan
        try:
            return update(trainer, step)
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True))

    monkeypatch.setattr(_Trainer, "_update", poisoned)
    with pytest.raises(NonFiniteError, match=r"the norm of the gradients of step 1 is nan: .*there is no checkpoint"):
        train(files, tmp_path / "out", settings(optimizer=optimizer))


def test_a_full_disk(files, tmp_path):
    """No file can grow beyond 6000 bytes from step 4 on, which an adapter does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Watcher):
        def step(self, line):
            if line["step"] == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))

    message = r"cannot write the checkpoint .*step-00000006: .*bytes are free; the last one is of step 3"
    how = settings(steps=8)
    try:
        with pytest.raises(OSError, match=message):
            train(files, tmp_path / "out", how, watcher=Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(files, tmp_path / "out", how, resume=True).finished
    train(files, tmp_path / "whole", how)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_too_little_space_is_said_before_training(files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12345))
    with pytest.raises(OSError, match=r"out has 12345 bytes free; three checkpoints and the adapter need about \d+"):
        train(files, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_errors_say_what_is_wrong_and_leave_nothing(files, tmp_path):
    (tmp_path / "short.txt").write_text("It is a truth")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + b"caf\xe9")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    (tmp_path / "int8").mkdir()
    config = json.loads((files / "model" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    model, text = files / "model", files / "text.txt"
    for source, words, changed, out, message in (
        (tmp_path / "none", text, {}, "out", "none does not exist"),
        (tmp_path / "int8", text, {}, "out", "is quantized already (awq); give the model that it was made from"),
        (model, tmp_path / "none.txt", {}, "out", "No such file or directory"),
        (
            model,
            tmp_path / "short.txt",
            {},
            "out",
            "short.txt has 13 tokens, of which 11 are to train on: fewer than 2 w",
        ),
        (model, tmp_path / "empty.txt", {}, "out", "empty.txt has 0 tokens"),
        (model, tmp_path / "latin.txt", {}, "out", "is not UTF-8 text: byte 335 is 0xe9"),
        (model, text, {"held_out": 0.001}, "out", "7 are to hold out: fewer than a window of 32"),
        (model, text, {"context": 1025, "batch": 1, "held_out": 0.4}, "out", "1025 is more than the 1024 positions of"),
        (model, text, {"context": 1}, "out", "context must be a whole number of 2 or more, got 1"),
        (model, text, {}, "file", "file exists and is not a directory"),
        (model, text, {}, "full", "holds notes.txt but no finetune.json: it is no directory of a run"),
        (model, text, {}, "a/b", "a/b: there is no directory"),
        (model, text, {}, "file/out", "there is no directory"),
        (model, text, {}, "/proc/octavo", "cannot write /proc/octavo: No such file or directory"),
        (model, text, {"method": "nf5"}, "out", "method 'nf5' is not one of nf4, fp4, int8, 16bit"),
        (
            model,
            text,
            {"optimizer": "sgd"},
            "out",
            "optimizer 'sgd' is not one of paged_adamw8bit, paged_adamw, adamw8",
        ),
        (model, text, {"dtype": "fp16"}, "out", "dtype 'fp16' is not one of bf16, fp32"),
        (model, text, {"rank": 0}, "out", "rank must be an integer of 1 or more, got 0"),
        (model, text, {"alpha": -1.0}, "out", "alpha must be a positive number, got -1.0"),
        (model, text, {"dropout": 1.0}, "out", "dropout must lie in [0, 1), got 1.0"),
        (model, text, {"lr": 0.0}, "out", "lr must be a positive number, got 0.0"),
        (model, text, {"lr": math.nan}, "out", "lr must be a positive number, got nan"),
        (model, text, {"warmup": 2.0}, "out", "warmup must lie in [0, 1], got 2.0"),
        (model, text, {"held_out": 0.0}, "out", "held_out must lie in (0, 1), got 0.0"),
        (model, text, {"steps": 0}, "out", "steps must be a whole number of 1 or more, got 0"),
        (model, text, {"epochs": 2.0}, "out", "give epochs or steps, not both: got 2.0 and 6"),
        (model, text, {"batch": 0}, "out", "batch must be a whole number of 1 or more, got 0"),
        (model, text, {"save_every": 0}, "out", "save_every must be a whole number of 1 or more, got 0"),
        (model, text, {"seed": -1}, "out", "seed must be a whole number of 63 bits, got -1"),
        (model, text, {"weight_decay": -0.1}, "out", "weight_decay must be 0 or positive, got -0.1"),
        (model, text, {"page_dir": str(tmp_path / "pages")}, "out", "cannot hold 0 bytes of states: No such file"),
        (model, text, {"page_dir": str(tmp_path / "file")}, "out", "cannot hold 0 bytes of states: Not a directory"),
        (
            model,
            text,
            {"device_budget": -1},
            "out",
            "device_budget must be None, 0 or a positive number of bytes, got -1",
        ),
        (
            model,
            text,
            {"optimizer": "adamw", "device_budget": 1},
            "out",
            "device_budget is of optimizers paged_adamw8bit",
        ),
        (model, text, {"device": "cuda:99"}, "out", "device cuda:99: "),
        (model, text, {"device": "tpu"}, "out", "device must be cpu or cuda, got 'tpu'"),
    ):
        result = cli(source, "--text", words, "--out", tmp_path / out, *options(settings(**changed)))
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split())
        assert result.output.count("octavo: error:") == 1
        assert contents(tmp_path) == before
    result = cli(model, "--text", text, "--out", tmp_path / "out", "--method", "int8", "--no-double-quant")
    assert result.exit_code == 1
    assert "double_quant is of methods nf4 and fp4, not of int8" in result.output
    assert contents(tmp_path) == before


def test_a_tokenizer_of_another_model(files, tmp_path):
    config = tiny().config
    config.vocab_size = config.eos_token_id = config.pad_token_id = 100
    config.eos_token_id = config.pad_token_id = None
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("~\xff" * 1000)
    with pytest.raises(ValueError, match=r"the tokenizer of .* gives id \d+, the model has 100 embeddings"):
        finetune(tmp_path / "model", tmp_path / "text.txt", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest(files, died):
    (died / "finetune.json").write_text("{")
    with pytest.raises(ValueError, match=r"finetune.json is damaged or of another version \(JSONDecodeError"):
        train(files, died, DYING, resume=True)


def test_help():
    result = cli("--help")
    assert result.exit_code == 0
    assert "octavo finetune smollm2 --text novel.txt" in result.output
    for name in ("--resume", "--page-dir", "--double-quant", "--gradient-checkpointing", "--max-grad-norm"):
        assert name in result.output
