"""`octavo generate` as a user meets it: what it prints, its exit codes and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")

import octavo  # noqa: E402
from command import byte_tokenizer, tiny  # noqa: E402
from octavo import models  # noqa: E402
from octavo.cli import app  # noqa: E402
from octavo.core.method import layer_class, methods  # noqa: E402
from octavo.models import load_base  # noqa: E402
from octavo.nn import Int8Linear, LoRALinear  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

PROMPT = "A quarto is"

METHODS = [name for name, method in methods().items() if method.in_stream]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    yield
    torch.set_num_threads(threads)


def generate(*arguments, **options):
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)], **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and two adapters, under `a` and `b`."""
    folder = tmp_path_factory.mktemp("generate")
    tiny().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, name in ((1, "a"), (2, "b")):
        model = tiny()
        torch.manual_seed(seed)
        for layer in octavo.add_lora(model, 4, 64):
            model.get_submodule(layer).lora_B["default"].data.normal_(std=0.2)
        octavo.save_adapter(model, folder / name)
    return folder


def expected(files, adapter=None, method="none", tokens=6, prompt=PROMPT):
    model = load_base(models.find_source(files / "base"), method)
    if adapter:
        octavo.load_adapter(model, files / adapter)
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_answers_by_base_and_adapters(files, method):
    texts = {name: expected(files, name, method) for name in (None, "a", "b")}
    assert len(set(texts.values())) == 3
    arguments = (files / "base", "--prompt", PROMPT, "--max-tokens", 6, "--method", method, "--threads", 1)
    result = generate(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == texts[None] + "\n"
    result = generate(*arguments, "--adapter", files / "a")
    assert result.stdout == texts["a"] + "\n"
    order = ("--adapter", files / "b", "--adapter", f"other={files / 'a'}", "--adapter", "none")
    result = generate(*arguments, *order)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{h}\n{texts[n]}\n" for h, n in (("b", "b"), ("other", "a"), ("none", None)))


def test_bases_are_loaded_in_4_8_and_16_bit(files):
    source = models.find_source(files / "base")
    model = load_base(source, "none", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for method in METHODS:
        model = load_base(source, method)
        layers = [m for m in model.modules() if isinstance(m, layer_class(method))]
        assert len(layers) == 14
        octavo.load_adapter(model, files / "a")
        assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 14
        assert sum(isinstance(m, layer_class(method)) for m in model.modules()) == 14


def test_a_base_that_octavo_quantized(files, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(files / "base"), str(tmp_path / "int8")])
    assert result.exit_code == 0, result.output
    result = generate(tmp_path / "int8", "--prompt", PROMPT, "--max-tokens", 6, "--adapter", files / "a")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(files, "a", "int8") + "\n"
    result = generate(tmp_path / "int8", "--prompt", PROMPT, "--method", "int8")
    assert result.exit_code == 1
    assert "is quantized already (octavo); leave --method out" in result.output
    assert isinstance(load_base(models.find_source(tmp_path / "int8"), "none").model.layers[0].mlp.up_proj, Int8Linear)


def test_prompts_from_standard_input_and_chat(files):
    result = generate(files / "base", "--max-tokens", 6, input=PROMPT)
    assert result.stdout == expected(files) + "\n"
    result = generate(files / "base", "--max-tokens", 6, "--chat", input=PROMPT)  # this template is the text itself
    assert result.stdout == expected(files) + "\n"
    result = generate(files / "base", input=" \n")
    assert result.exit_code == 1
    assert "the prompt is empty: give --prompt" in result.output


def test_temperature_and_seed(files):
    arguments = (files / "base", "--prompt", PROMPT, "--max-tokens", 12, "--temperature", 2)
    texts = [generate(*arguments, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_conversation(files, monkeypatch):
    lines = iter([PROMPT, "/adapter b", PROMPT, "/adapter none", PROMPT, "/adapter c", "", "/quit", "never read"])
    asked = []

    def answer(prompt):
        asked.append(prompt)
        return next(lines)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    from octavo.cli.generate import _Session

    session = _Session(str(files / "base"), "none", "auto", [f"a={files / 'a'}", f"b={files / 'b'}"], False, 6, 0.0, 0)
    session.converse()
    assert asked == ["a> ", "a> ", "b> ", "b> ", "none> ", "none> ", "none> ", "none> "]


def test_a_conversation_prints_answers_and_errors(files, monkeypatch, capsys):
    lines = iter(["/adapter b", PROMPT, "/adapter c"])

    def answer(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    from octavo.cli.generate import _Session

    _Session(str(files / "base"), "none", "auto", [f"a={files / 'a'}", f"b={files / 'b'}"], False, 6, 0.0, 0).converse()
    printed = capsys.readouterr()
    assert printed.out == expected(files, "b") + "\n"
    assert "there is no adapter c; known: a, b, none" in printed.err


def test_help():
    result = generate("--help")
    assert result.exit_code == 0
    assert "octavo generate ./Llama-3.1-8B --adapter" in result.output
    for option in ("--adapter", "--prompt", "--max-tokens", "--method", "--chat"):
        assert option in result.output


def test_errors_say_what_to_do(files, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    config = json.loads((files / "a" / "adapter_config.json").read_text()) | {"use_dora": True}
    (bad / "adapter_config.json").write_text(json.dumps(config))
    base, prompt = files / "base", ("--prompt", PROMPT)
    for arguments, message in (
        ((tmp_path / "nothing", *prompt), "nothing does not exist"),
        ((base, *prompt, "--adapter", tmp_path / "nothing"), "nothing does not exist; give a directory with adapter_c"),
        ((base, *prompt, "--adapter", base), "base holds no adapter in PEFT's format: it has no adapter_config.json"),
        ((base, *prompt, "--adapter", files), "its directories a, b do: name one of them"),
        ((base, *prompt, "--adapter", bad), "use_dora = True, which octavo does not compute"),
        ((base, *prompt, *("--adapter", files / "a") * 2), "there is an adapter a already; give another name by NAME="),
        ((base, *prompt, "--adapter", f"items={files / 'a'}"), "'items' cannot be the name of an adapter"),
        ((base, *prompt, "--adapter", f"none={files / 'a'}"), "none is the base alone; give another name"),
        ((base, "--prompt", "x" * 1100), "the prompt has 1100 tokens, the model 1024 positions"),
    ):
        result = generate(*arguments)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split())
        assert result.output.count("octavo: error:") == 1
    result = generate(base, *prompt, "--method", "int3")
    assert result.exit_code == 2
    assert "unknown method 'int3' (did you mean int8?)" in " ".join(result.output.replace("│", " ").split())


def test_adapters_of_other_bases(files, tmp_path):
    config = tiny().config
    config.intermediate_size = 128
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    result = generate(tmp_path / "wide", "--prompt", PROMPT, "--adapter", files / "a")
    assert result.exit_code == 1
    message = (
        "does not fit this LlamaForCausalLM: it adapts model.layers.0.mlp.down_proj as a weight of [64, 96], which"
    )
    assert message in " ".join(result.output.split())


def test_a_base_without_a_chat_template(files, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    result = generate(tmp_path / "base", "--prompt", PROMPT, "--chat")
    assert result.exit_code == 1
    assert "has no chat template" in result.output


def test_answers_are_wrapped_between_words():
    from octavo.cli.generate import _Wrap

    wrap = _Wrap(10)
    assert "".join(map(wrap, ["one two ", "three four\n", "fiveisverylong ", "6 7"])) == (
        "one two \nthree four\nfiveisverylong \n6 7"
    )


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_input_that_is_no_text_or_is_closed(files, command):
    """In processes of their own: what pytest gives as standard input is neither."""
    words = [sys.executable, "-m", "octavo", command, str(files / "base"), "--max-tokens", "2", "--dtype", "fp32"]
    odd = subprocess.run(words, input=b"\377\376 odd\n", capture_output=True)
    assert odd.returncode == 0 and b"Traceback" not in odd.stderr, odd.stderr
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *words], capture_output=True)
    assert b"Traceback" not in closed.stderr, closed.stderr
    assert closed.returncode == (1 if command == "generate" else 0)
