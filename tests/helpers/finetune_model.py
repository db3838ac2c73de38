"""A tiny model, a text, and runs of `octavo.finetune` on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from command import TEXT, byte_tokenizer, tiny
from octavo.cli import app
from octavo.finetune import Settings, Watcher, finetune
from safetensors.torch import load_file
from typer.testing import CliRunner

SMALL = Settings(context=32, batch=2, steps=6, rank=4, lr=5e-3, eval_every=2, eval_windows=2, save_every=3)


@contextmanager
def plain_terminal(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_files(folder):
    """A model, and a text of 208 windows of 32 tokens: 187 to train on, 20 held out."""
    tiny().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def settings(double_quant=None, **changes):
    given = {} if double_quant is None else {"quantization": {"double_quant": double_quant}}
    return dataclasses.replace(SMALL, **given, **changes)


def train(files, out, how=SMALL, **options):
    return finetune(files / "model", files / "text.txt", out, how, **options)


def cli(*arguments):
    return CliRunner().invoke(app, ["finetune", *(str(argument) for argument in arguments)])


def options(how):
    """The command's options for settings."""
    given = {k: v for k, v in dataclasses.asdict(how).items() if v != getattr(Settings(), k)}
    given |= given.pop("quantization", {})
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
