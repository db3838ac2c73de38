"""Files that were damaged: every reader either refuses them with a ValueError or OSError, or has read what was
written. Nothing ends the process, hangs, runs code, or reads a file outside of its directory."""

from __future__ import annotations

import json
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import octavo
import pytest
import spqr_files
import torch
from budget import MINUTES, numbers
from children import in_child
from octavo import models
from octavo.finetune.directory import History, RunDirectory
from octavo.integrations.bitsandbytes import load_bitsandbytes, to_bitsandbytes_state
from octavo.integrations.spqr import read_official
from octavo.spqr import SpQRConfig, quantize_weight
from octavo.spqr.engine.store import Store
from safetensors.torch import save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")

from command import byte_tokenizer, tiny  # noqa: E402

warnings.filterwarnings("ignore")


@dataclass
class Kind:
    """A kind of directory: how it is written, how it is read, and whether its hashes tell every change.

    Attributes:
        write: into a directory that is there.
        read: what was read, as tensors by their names.
        whole: what is read without an error must be what was written.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], dict[str, Tensor]]
    whole: bool = True
    cases: int = 60


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64))


def quantized() -> nn.Module:
    model = net()
    octavo.quantize_model(model, "int8", ["1"], progress=False, threshold=2.0)
    octavo.quantize_model(model, "nf4", [], progress=False, double_quant=True)
    return model


def state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


def saved(path: Path) -> None:
    octavo.save_quantized(quantized(), path / "model")


def saved_spqr(path: Path) -> None:
    model = net()
    octavo.quantize_model(model, "rtn", progress=False, bits=3, group_size=16)
    octavo.save_quantized(model, path / "model")


def saved_transformers(path: Path) -> None:
    model = tiny()
    octavo.quantize_model(model, "nf4", progress=False)
    octavo.save_quantized(model, path / "model")


def described(model: Any) -> dict[str, Tensor]:
    """The state, and what a model computes, which its configuration decides."""
    with torch.no_grad():
        return {**state(model), "logits": model(torch.arange(24).reshape(2, 12)).logits}


def checkpoint(path: Path) -> None:
    tiny().save_pretrained(path / "plain")
    byte_tokenizer().save_pretrained(path / "plain")
    models.quantize_to_directory(models.find_source(path / "plain"), path / "model", "int8")
    shutil.rmtree(path / "plain")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    return state(models.load_model(models.find_source(path / "model")))


def adapter(path: Path) -> None:
    octavo.save_adapter(adapted(), path / "model")


def adapted() -> nn.Module:
    model = net()
    octavo.add_lora(model, rank=4)
    return model


def read_adapter(path: Path) -> dict[str, Tensor]:
    model = net()
    octavo.load_adapter(model, path / "model")
    return state(model)


def bitsandbytes(path: Path) -> None:
    (path / "model").mkdir()
    tensors = {name: t.contiguous() for name, t in to_bitsandbytes_state(quantized()).items()}
    save_file(tensors, path / "model" / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def official(path: Path) -> None:
    (path / "model").mkdir()
    config = {"quantization_config": {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16}}
    (path / "model" / "config.json").write_text(json.dumps(config))
    parts = spqr_files.compressed(spqr_files.layer())
    tensors = {f"layer.{name}": t.contiguous() for name, t in parts.items()} | {"norm.weight": torch.ones(96)}
    save_file(tensors, path / "model" / "model.safetensors")


def official_pickles(path: Path) -> None:
    layers = path / "model" / "0"
    layers.mkdir(parents=True)
    torch.save({"wbits": 3, "qq_scale_bits": 3, "qq_zero_bits": 3}, path / "model" / "args.pt")
    torch.save({"norm.weight": torch.ones(96)}, path / "model" / "not_quantized_weights.pt")
    torch.save(spqr_files.layer(), layers / "self_attn.q_proj")


def read_spqr(path: Path) -> dict[str, Tensor]:
    found = read_official(path / "model")
    return {**found.tensors, **{name: w.dequantize(torch.float32) for name, w in found.layers.items()}}


def resumable(path: Path) -> None:
    codes = quantize_weight(torch.randn(32, 64), None, SpQRConfig.rtn(bits=3, group_size=16))
    Store(path / "model", {"format": 1, "settings": {}}).save("a.b", codes)


def read_resumable(path: Path) -> dict[str, Tensor]:
    codes = Store(path / "model", {"format": 1, "settings": {}}).load("a.b", 32, 64)
    return {} if codes is None else {"weight": codes.dequantize()}


def unfinished(path: Path) -> None:
    run = RunDirectory(path / "model")
    run.path.mkdir()
    run.begin({"settings": {"steps": 3}, "model": "m", "data": "d"}, {})
    numbers = {"lr": 0.1, "loss": 2.0, "grad_norm": 1.0, "tokens": 3.0, "seconds": 1.0}
    history = History([{"step": 1, **numbers}], {0: 9.0})
    run.save(history, {"x": torch.ones(3)}, lambda where: octavo.save_adapter(adapted(), where))


def read_unfinished(path: Path) -> dict[str, Tensor]:
    run = RunDirectory(path / "model")
    run.check({"settings": {"steps": 3}, "model": "m", "data": "d"})
    found = run.latest()
    return {} if found is None else {"x": found.training["x"], "loss": torch.tensor(found.history.steps[0]["loss"])}


def gguf(path: Path) -> None:
    from gguf import GGUFWriter

    model = tiny()
    config = model.config
    (path / "model").mkdir()
    writer = GGUFWriter(path / "model" / "tiny.gguf", "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q"}
    names |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "model.layers": "blk"}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> dict[str, Tensor]:
    return state(models.load_model(models.find_source(path / "model" / "tiny.gguf")))


KINDS = {
    "saved": Kind(saved, lambda path: state(octavo.load_quantized(path / "model", net()))),
    "saved spqr": Kind(saved_spqr, lambda path: state(octavo.load_quantized(path / "model", net()))),
    "saved transformers": Kind(saved_transformers, lambda path: described(octavo.load_quantized(path / "model"))),
    "checkpoint": Kind(checkpoint, read_checkpoint, False, 25),
    "adapter": Kind(adapter, read_adapter, False),
    "bitsandbytes": Kind(bitsandbytes, lambda path: state(load_bitsandbytes(path / "model", net())), False),
    "official": Kind(official, read_spqr, False),
    "official pickles": Kind(official_pickles, read_spqr, False),
    "resumable": Kind(resumable, read_resumable),
    "unfinished run": Kind(unfinished, read_unfinished),
    "gguf": Kind(gguf, read_gguf, False, 25),
}


# ---- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, draw: random.Random) -> str:
    """Change one file; returns what was done."""
    file = draw.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.6:
        how, changed = damaged_json(content, draw)
    else:
        how, changed = damaged_bytes(content, draw)
    if changed is None:
        file.unlink()
        if how == "a directory":
            file.mkdir()
        elif how == "a device":
            file.symlink_to("/dev/zero")
    else:
        file.write_bytes(changed)
    return f"{file.relative_to(path)}: {how}"


def damaged_bytes(content: bytes, draw: random.Random) -> tuple[str, bytes | None]:
    # Headers are at the beginning (of pickles and archives also at the end), and small beside tensors.
    head = min(len(content), draw.choice((16, 400, len(content))))
    at = draw.randrange(head) if head else 0
    at = len(content) - 1 - at if draw.random() < 0.2 and content else at
    kind = draw.choice(("bit", "bit", "byte", "zeros", "shorter", "longer", "cut out", "empty", "gone", "a directory",
                        "a device", "twice"))  # fmt: skip
    if kind in ("gone", "a directory", "a device"):
        return kind, None
    some = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 300))))
    made = {
        "bit": lambda: content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        "byte": lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
        "zeros": lambda: content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :],
        "shorter": lambda: content[:at],
        "longer": lambda: content + some,
        "cut out": lambda: content[:at] + content[at + len(some) :],
        "empty": lambda: b"",
        "twice": lambda: content + content,
    }
    return f"{kind} at {at} of {len(content)}", made[kind]() if content else b"x"


def damaged_json(content: bytes, draw: random.Random) -> tuple[str, bytes | None]:
    try:
        tree = json.loads(content)
    except ValueError:
        return damaged_bytes(content, draw)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(tree)
    if not places:
        return damaged_bytes(content, draw)
    node, key = draw.choice(places)
    value, kind = node[key], draw.choice(("other", "other", "other", "gone", "new", "deep", "twice"))
    if kind == "deep":
        mark = '"a mark that is nowhere else"'
        node[key] = json.loads(mark)
        return f"{key} nested", json.dumps(tree).replace(mark, "[" * 100_000 + "]" * 100_000).encode()
    if kind == "twice" and isinstance(node, dict):
        text = f"{{{json.dumps(str(key))}: 0, "
        return f"{key} twice", json.dumps(node).replace("{", text, 1).encode() if node is tree else b"{" + content
    if kind == "gone":
        del node[key]
    elif kind == "new" and isinstance(node, dict):
        node["some thing"] = value
    else:
        node[key] = draw.choice(
            (None, True, -1, 0, 1, 2**31, 2**70, 1.5, -1e300, "", "x", "../x", "/etc/passwd", [], {}, [[]],
             {"a": value}, [value], value + 1 if type(value) is int else str(value))
        )  # fmt: skip
        return f"{key} = {str(value)[:40]} is now {str(node[key])[:40]}", json.dumps(tree).encode()
    return f"{key} {kind}", json.dumps(tree).encode()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outcome(read: Callable[[Path], dict[str, Tensor]], path: Path) -> tuple[dict[str, Tensor], Exception | None]:
    try:
        return read(path), None
    except Exception as error:
        return {}, error


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, tmp_path: Path):
    kind, whole = KINDS[name], tmp_path / "whole"
    whole.mkdir()
    kind.write(whole)
    wanted = kind.read(whole)
    assert wanted

    def run(number: int) -> None:
        draw, path = random.Random(f"{name} {number}"), tmp_path / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        how = damage(path, draw)
        signal.alarm(60)
        found, problem = outcome(kind.read, path)
        signal.alarm(0)
        if problem is not None:
            assert isinstance(problem, (ValueError, OSError)), f"{how}: {type(problem).__name__}: {problem}"
            assert 0 < len(str(problem)) < 4000, how
        elif kind.whole and found:  # where files are gone, there may be nothing
            assert same(found, wanted), f"{how}: something else was read"

    problem, number = in_child(run, numbers(kind.cases, MINUTES * 60 * 0.3 / len(KINDS)))
    assert not problem, f"case {number}: {problem}"
