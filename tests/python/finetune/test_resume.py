"""`octavo finetune`: an interrupted run goes on as if it had not been; damaged directories are named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from command import TEXT, tiny
from finetune_model import (
    SMALL,
    Stopping,
    assert_same_run,
    cli,
    contents,
    make_files,
    measured,
    options,
    plain_terminal,
    settings,
    train,
)
from octavo import models
from octavo.finetune import Watcher, directory, finetune, residual
from octavo.finetune.directory import open_run
from octavo.finetune.run import _Trainer


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    with plain_terminal(monkeypatch):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("finetune"))


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


def test_a_run_that_died(files, runs, died, monkeypatch):
    monkeypatch.setattr(residual, "reconstruct", None)  # what adapters began with is not computed again
    assert sorted(p.name for p in (died / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert len([line for line in measured(died) if "loss" in line]) == 7  # one more than the checkpoint
    (died / "checkpoints" / ".step-00000008.0000.tmp").mkdir()  # it died while writing
    (died / ".finetune.json.1.tmp").write_text("{")
    assert train(files, died, DYING, resume=True).finished
    assert_same_run(died, runs / "whole")
    assert not [p for p in died.iterdir() if p.name.startswith(".")]


def test_a_run_that_died_before_it_had_a_manifest(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".finetune.json.4711.tmp").write_text("{")
    assert train(files, out, settings(steps=1)).finished
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


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


def test_a_state_with_other_entries_is_damaged(files, died):
    shutil.rmtree(died / "checkpoints" / "step-00000004")
    path = died / "checkpoints" / "step-00000006" / "state.json"
    whole = json.loads(path.read_text())
    steps = whole["steps"]
    for change, message in (
        ({"steps": [1, *steps[1:]]}, r"state\.json has steps\[0\] = 1"),
        ({"steps": [*steps[:5], {"step": 6}]}, r"steps\[5\] = \{'step': 6\}"),
        ({"steps": [steps[0] | {"loss": "x"}, *steps[1:]]}, r"steps\[0\] loss = 'x'"),
        ({"steps": [steps[0] | {"seconds": None}, *steps[1:]]}, r"steps\[0\] seconds = None"),
        ({"steps": [*steps[1:], steps[0]]}, r"steps\[0\] step = 2"),
        ({"steps": None}, "steps = None"),
        ({"perplexities": {"0": 1.0}}, "perplexities = "),
        ({"perplexities": [[0, "x"]]}, r"perplexities = \[0, 'x'\]"),
        ({"perplexities": [3]}, "perplexities = 3"),
        ({"threads": "1"}, "threads = '1'"),
        ({"threads": 1.5}, r"threads = 1\.5"),
        ({"sha256": {}}, r"has no sha256 of training\.pt"),
        ({"sha256": []}, r"has no sha256 of training\.pt"),
        ({"format": []}, r"format \[\]"),
        ({"step": 5}, "is of step 5, with 6 losses"),
    ):
        changed = whole | change
        path.write_text(json.dumps(changed | {"self": directory._own_hash(changed)}))
        with pytest.raises(ValueError, match=rf"step-00000006 is damaged \(.*{message}"):
            latest(died)
    path.write_text(json.dumps(whole))
    assert latest(died).step == 6
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "self"}))
    assert latest(died).step == 6  # octavo 0.1.0 wrote no hash of it
    path.write_text(json.dumps(whole | {"steps": [steps[0] | {"loss": 1.5}, *steps[1:]]}))
    with pytest.raises(ValueError, match=r"step-00000006 is damaged \(state\.json is not what was written"):
        latest(died)
    for name in ("../../../model/config.json", "/dev/zero"):
        changed = whole | {"sha256": whole["sha256"] | {name: "0"}}
        path.write_text(json.dumps(changed | {"self": directory._own_hash(changed)}))
        with pytest.raises(ValueError, match=rf"state\.json, sha256, names '{name}', which is not in"):
            latest(died)
    path.write_text("[" * 99999)
    with pytest.raises(ValueError, match="step-00000006 is damaged"):
        latest(died)


def latest(path):
    with open_run(path, True) as run:
        return run.latest()


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
        (*here, {"quantization": {"double_quant": False}}, r"its model, settings \(double_quant True is now False\)"),
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


def test_a_damaged_manifest(files, died):
    (died / "finetune.json").write_text("{")
    with pytest.raises(ValueError, match=r"finetune\.json is not JSON: .*: use another directory"):
        train(files, died, DYING, resume=True)
