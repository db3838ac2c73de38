"""`octavo finetune`: what it refuses, and what stops it."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil

import pytest
import torch
from command import TEXT, byte_tokenizer, tiny
from finetune_model import (
    SMALL,
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
from octavo.finetune import NonFiniteError, Watcher, finetune
from octavo.finetune.run import _Trainer
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    with plain_terminal(monkeypatch):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("finetune"))


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
        (model, tmp_path / "none.txt", {}, "out", "none.txt does not exist"),
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
        (model, text, {"init": "loftq"}, "out", "init 'loftq' is not one of residual, zero"),
        (model, text, {"method": "int8", "init": "residual"}, "out", "init residual is of methods nf4, fp4, not of"),
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
        # What an option cannot be is wrong usage, as what does not exist is.
        assert result.exit_code == (2 if "Invalid value" in result.output else 1), result.output
        assert message in " ".join(result.output.replace("│", " ").split())
        assert result.output.count("octavo: error:") == (result.exit_code == 1)
        assert contents(tmp_path) == before
    result = cli(model, "--text", text, "--out", tmp_path / "out", "--method", "nf5")
    assert result.exit_code == 2
    assert "unknown method 'nf5' (did you mean nf4?); known: none, int8, nf4, fp4" in result.output
    result = cli(model, "--text", text, "--out", tmp_path / "out", "--method", "int8", "--no-double-quant")
    assert result.exit_code == 1
    assert "--double-quant: int8 has no setting double_quant; it has threshold" in result.output
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None, "epochs": 1e308}, r"epochs 1e\+308 of 18\d windows are more than 1000000000 steps"),
        ({"steps": None, "epochs": 10**308}, "epochs 1000.* are more than"),
        ({"steps": 10**12}, "steps must be at most 1000000000, got 1000000000000"),
        *(({name: None}, f"{name} must be .*, got None") for name in ("batch", "save_every", "lr", "alpha", "seed")),
        *(({name: "x"}, f"{name} must .*, got 'x'") for name in ("lr", "epochs", "alpha", "warmup", "held_out")),
        *(({name: True}, f"{name} must .*, got True") for name in ("lr", "weight_decay", "seed", "rank", "dropout")),
        ({"seed": 0.5}, "seed must be a whole number of 63 bits, got 0.5"),
        ({"lr": 10**400}, "lr must be a positive number, got 1000"),
        ({"double_quant": "no"}, "double_quant must be True or False, got 'no'"),
        ({"gradient_checkpointing": None}, "gradient_checkpointing must be True or False, got None"),
        ({"device": 3}, "device must be cpu or cuda, got 3"),
        ({"page_dir": 3}, "page_dir must be a path, got 3"),
        ({"rank": 65}, "rank 65 is more than a linear layer of this model can have: 64"),
        ({"rank": 10**15}, "rank 1000000000000000 is more than a linear layer of this model can have: 64"),
    ],
    ids=str,
)
def test_settings_of_other_types_leave_nothing(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(files, tmp_path / "out", settings(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model(files, tmp_path):
    config = tiny().config
    config.vocab_size = config.eos_token_id = config.pad_token_id = 100
    config.eos_token_id = config.pad_token_id = None
    type(tiny())(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("~\xff" * 1000)
    with pytest.raises(ValueError, match=r"the tokenizer of .* gives id \d+, the model has 100 embeddings"):
        finetune(tmp_path / "model", tmp_path / "text.txt", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
