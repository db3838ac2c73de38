"""What the tests of commands share: a tiny model with a tokenizer, the commands themselves, how they refuse."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")

from octavo.cli import app  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a text of some length is wanted here.\n" * 4


def octavo_(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny(tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=257,
    )
    return transformers.LlamaForCausalLM(config).eval()


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def shown_command(output):
    """The words of the command that is shown after "to try it:"."""
    shown = output.split("to try it:\n")[1]
    return shlex.split(re.match(r"(?:.*\\\n)*.*\n", shown)[0].replace("\\\n", " "))


def left_behind(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def refused(result, *messages):
    assert result.exit_code == 1
    assert result.stdout == "", result.stdout
    # What came before the error is progress; the sentence itself is wrapped.
    _, mark, said = result.stderr.partition("octavo: error:")
    assert mark and "octavo: error:" not in said, result.stderr
    assert "Traceback" not in result.stderr
    words = " ".join(said.split())
    for message in messages:
        assert message in words, f"{message!r} is not in {words!r}"


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
