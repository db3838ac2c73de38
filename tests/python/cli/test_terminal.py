"""A first session in a terminal of 80 columns: nothing is cut, nobody else speaks, and every end has its exit code."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")
pytest.importorskip("pyte")
if sys.platform == "win32":
    pytest.skip("no pseudo-terminals", allow_module_level=True)

from command import TEXT
from terminal import Session, Terminals, shown

FOREIGN = re.compile(
    r"[Ww]arning|deprecated|\[transformers\]|it/s|Loading|Converting|Writing model|Setting `pad|mxfp8|FutureWarning|"
    r"Traceback|Error\b"
)
SMALL = ["--context", "32", "--batch", "2", "--steps", "3", "--rank", "4", "--eval-windows", "1", "--save-every", "1"]


@pytest.fixture(scope="module")
def terminals():
    made = Terminals()
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "novel.txt").write_text(TEXT * 20)
    (folder / "model").symlink_to(source)
    endless = shutil.copytree(source, folder / "endless")  # whose answers do not end before a signal comes
    config = json.loads((endless / "config.json").read_text()) | {"max_position_embeddings": 1_000_000}
    (endless / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def at(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


def clean(session: Session, code: int = 0) -> str:
    """Nobody but octavo spoke, no word was cut, and no line was wrapped by the terminal."""
    assert session.code == code, session.raw
    assert not FOREIGN.search(session.text), session.text
    for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", session.raw).splitlines():
        assert len(line.split("\r")[-1]) <= 80, line
    assert "…" not in session.text, session.text
    return session.text


def test_a_first_session(terminals, at):
    said = clean(terminals.run("quantize", at / "model", at / "nf4", "--method", "nf4", "--dtype", "bf16"))
    assert "14 layers in nf4" in said and "in 16 bit" in said and "left alone: lm_head" in said
    assert f"  octavo chat {at / 'nf4'}" in said.replace(" \\\n     ", "")
    refusal = clean(terminals.run("quantize", at / "model", at / "nf4"), 1)
    assert "give --overwrite to" in " ".join(refusal.split()) and "overwrite=True" not in refusal
    clean(terminals.run("quantize", at / "model", at / "nf4", "--overwrite", "--method", "nf4", "--double-quant"))
    said = clean(terminals.run("eval", at / "nf4", "--text", at / "novel.txt", "--context", "64", "--windows", "2"))
    assert re.search(r"^perplexity \d+\.\d{3} \(126 tokens, windows of 64\)$", said, re.M)
    said = clean(terminals.run("generate", at / "nf4", "--prompt", "It is", "--max-tokens", "5"))
    said = clean(terminals.run("finetune", at / "model", "--text", at / "novel.txt", "--out", at / "run", *SMALL))
    assert "to try it:" in said and "held-out perplexity" in said
    command = re.sub(r" \\\n *", " ", said.split("to try it:\n")[1]).split()
    assert command[:2] == ["octavo", "generate"] and "--method" not in command  # the adapter records it
    clean(terminals.run(*command[1:], "--prompt", "It is", "--max-tokens", "5"))
    assert "give --overwrite" in clean(
        terminals.run("finetune", at / "model", "--text", at / "novel.txt", "--out", at / "run", *SMALL), 1
    )
    again = ("finetune", at / "model", "--text", at / "novel.txt", "--out", at / "run", *SMALL, "--overwrite")
    clean(terminals.run(*again))


def test_analyze(terminals, at):
    command = ["analyze", at / "model", "--text", at / "novel.txt", "--context", "64", "--windows", "2"]
    clean(terminals.run(*command, "--out", at / "analysis"))
    assert "give --overwrite" in clean(terminals.run(*command, "--out", at / "analysis"), 1)
    clean(terminals.run(*command, "--out", at / "analysis", "--overwrite"))


@pytest.mark.parametrize(
    "command", ["", "doctor", "quantize", "eval", "analyze", "bench", "demo", "generate", "chat", "finetune"]
)
def test_help(terminals, command):
    session = terminals.run(*command.split(), "--help")
    assert session.code == 0
    assert max(map(len, session.lines)) <= 80
    assert "Usage: octavo" in session.text
    if command:
        assert session.text.count(f"octavo {command}") >= 3  # the usage, and two examples
    for left, right in zip(session.lines, session.lines[1:], strict=False):
        assert "…" not in left + right
    assert clean(terminals.run("-V")).startswith("octavo ")


def test_doctor(terminals):
    clean(terminals.run("doctor"))


def test_the_same_words_for_what_is_missing(terminals, at):
    for command in (
        ["quantize", at / "gone", at / "x"], ["eval", at / "gone", "--text", at / "novel.txt"],
        ["analyze", at / "gone", "--text", at / "novel.txt"], ["generate", at / "gone", "--prompt", "It"],
        ["chat", at / "gone"], ["finetune", at / "gone", "--text", at / "novel.txt", "--out", at / "x"],
    ):  # fmt: skip
        assert f"{at / 'gone'} does not exist" in " ".join(clean(terminals.run(*command), 1).split())
    for command in (
        ["eval", at / "model"], ["analyze", at / "model"], ["finetune", at / "model", "--out", at / "x"],
        ["quantize", at / "model", at / "x", "--method", "spqr"],
    ):  # fmt: skip
        option = "--calibration" if command[0] == "quantize" else "--text"
        said = " ".join(clean(terminals.run(*command, option, at / "gone.txt"), 1).split())
        assert f"octavo: error: {at / 'gone.txt'} does not exist" in said
    assert not (at / "x").exists()


def test_wrong_options_are_wrong_usage(terminals, at):
    for option in ("--optimizer", "--method", "--dtype"):
        session = terminals.run("finetune", at / "model", "--text", at / "novel.txt", "--out", at / "x", option, "foo")
        assert session.code == 2 and "'foo'" in session.text and option in session.text
    both = ("--epochs", "2", "--steps", "3")
    session = terminals.run("finetune", at / "model", "--text", at / "novel.txt", "--out", at / "x", *both)
    assert session.code == 2 and "give epochs or steps" in session.text and "--give" not in session.text


def test_a_conversation(terminals, at):
    with_template = ["chat", at / "model", "--max-tokens", "8", "--dtype", "fp32"]
    keys = [(r"> $", "hello\r"), (r"> $", "/help\r"), (r"> $", "/clear\r"), (r"> $", "\r"), (r"> $", "/exit\r")]
    session = terminals.run(*with_template, keys=keys)
    said = clean(session)
    assert said.count("Ctrl-C stops an answer") == 2
    ended = terminals.run(*with_template, keys=[(r"> $", "\x04")])
    assert ended.code == 0


def test_ctrl_c_stops_the_answer_and_not_the_conversation(terminals, at):
    keys = [(r"> $", "hello\r"), (r"hello\r\n", "INT"), (r"> $", "/exit\r")]
    session = terminals.run("chat", at / "endless", "--max-tokens", "900000", "--dtype", "fp32", keys=keys)
    assert session.code == 0 and "Traceback" not in session.raw
    assert len(session.text) < 700_000  # of 900,000 tokens


@pytest.mark.parametrize(("key", "code"), [("INT", 130), ("TERM", 143)])
def test_signals(terminals, at, key, code):
    target = at / f"stopped-{key}"
    session = terminals.run("quantize", at / "model", target, keys=[(r"reading|quantizing", key)])
    assert session.code in (0, code) and "Traceback" not in session.raw
    assert target.exists() or session.code == code
    if target.exists():  # it may have been there, whole, when the signal came
        importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(target)
    assert not [path for path in at.iterdir() if path.name.startswith(".")]
    command = ["generate", at / "endless", "--prompt", "It is", "--max-tokens", "900000", "--dtype", "fp32"]
    session = terminals.run(*command, keys=[(r"reading", key)])  # while it is loaded, or answers
    assert session.code == code and "Traceback" not in session.raw
    out = at / f"run-{key}"
    command = ["finetune", at / "model", "--text", at / "novel.txt", "--out", out, *SMALL, "--steps", "400"]
    session = terminals.run(*command, keys=[(r"loss \d", key)])
    assert session.code == code and "a checkpoint is in" in " ".join(session.text.split()), session.text
    assert json.loads((out / "finetune.json").read_text())["finished"] is False


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_directory_that_an_ordinary_user_may_not_write(terminals, at, tmp_path):
    tmp_path.chmod(0o555)
    target = tmp_path / "x"
    for command in (
        ["quantize", at / "model", target],
        ["finetune", at / "model", "--text", at / "novel.txt", "--out", target, *SMALL],
        ["analyze", at / "model", "--text", at / "novel.txt", "--out", target],
    ):
        said = " ".join(clean(terminals.run(*command, ordinary=True), 1).split())
        assert "octavo: error:" in said and "cannot" in said and str(tmp_path) in said
    assert not target.exists()


def test_the_screen():
    assert shown("one\r\n\x1b[2Ktwo\rTWO\r\n") == ["one", "TWO"]
