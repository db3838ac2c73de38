"""No command runs, or asks whether to run, code that comes with a model: configurations, tokenizers, pickles."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from command import octavo_, refused
from finetune_model import Stopping, make_files, settings, train
from octavo.core.files import sha256_of
from octavo.finetune import directory
from octavo.integrations.spqr import read_official


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What must not come into being. Whoever is asked at a prompt says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    yield tmp_path / "evil"
    assert not (tmp_path / "evil").exists()


def with_code(source, tmp_path, marker, file, **changes):
    folder = tmp_path / "with-code"
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return folder


def commands(folder, text, out):
    yield "quantize", folder, out
    yield "quantize", folder, out, "--method", "spqr", "--calibration", text
    yield "eval", folder, "--text", text
    yield "analyze", folder, "--text", text
    yield "generate", folder, "--prompt", "It is"
    yield "finetune", folder, "--text", text, "--out", out


@pytest.mark.parametrize("number", range(6))
def test_a_model_with_code(source, text, tmp_path, marker, number):
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    folder = with_code(source, tmp_path, marker, "config.json", auto_map=classes, model_type="evil")
    text.write_text(text.read_text() * 20)
    command = [*commands(folder, text, tmp_path / "out")][number]
    refused(octavo_(*command), str(folder), "code that comes with it", "octavo does not run")
    assert not (tmp_path / "out").exists()


def test_a_known_model_with_code_is_read_without_it(source, tmp_path, marker):
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    folder = with_code(source, tmp_path, marker, "config.json", auto_map=classes)
    assert octavo_("quantize", folder, tmp_path / "out").exit_code == 0


def test_a_tokenizer_with_code(source, text, tmp_path, marker):
    classes = {"AutoTokenizer": ["modeling_evil.Tokenizer", None]}
    changes = {"auto_map": classes, "tokenizer_class": "EvilTokenizer"}
    folder = with_code(source, tmp_path, marker, "tokenizer_config.json", **changes)
    result = octavo_("eval", folder, "--text", text)
    assert result.exit_code in (0, 1) and "Traceback" not in result.stderr


def test_weights_that_are_a_pickle(source, tmp_path, marker):
    folder = tmp_path / "pickled"
    shutil.copytree(source, folder)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": Evil(marker)}, file)
    refused(octavo_("quantize", folder, tmp_path / "out"), str(folder))
    torch.save({"model.norm.weight": Evil(marker)}, folder / "pytorch_model.bin")
    refused(octavo_("quantize", folder, tmp_path / "out"), str(folder))


def test_layers_of_the_spqr_authors_that_are_pickles(tmp_path, marker):
    layers = tmp_path / "layers"
    layers.mkdir()
    for name in ("args.pt", "not_quantized_weights.pt"):
        torch.save({"a": Evil(marker)}, layers / name)
    torch.save({"a": Evil(marker)}, tmp_path / "state.pt")
    for path in (layers, tmp_path / "state.pt"):
        with pytest.raises(ValueError, match=str(path)):
            read_official(path)


def test_the_state_of_a_run(tmp_path, marker):
    """Its hashes are right: whoever writes the pickle writes them, too."""
    files, out, stopping = make_files(tmp_path), tmp_path / "run", Stopping(2)
    train(files, out, settings(save_every=1), watcher=stopping, stop=stopping.asked)
    for folder in (out / "checkpoints").iterdir():
        torch.save({"optimizer": Evil(marker)}, folder / directory._TRAINING)
        state = json.loads((folder / directory._STATE).read_text())
        state["sha256"][directory._TRAINING] = sha256_of(folder / directory._TRAINING)
        state["self"] = directory._own_hash(state)
        (folder / directory._STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"is damaged \(Weights only load failed"):
        train(files, out, settings(save_every=1), resume=True)
