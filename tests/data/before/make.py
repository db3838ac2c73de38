"""Writes the files of this directory: ``python tests/data/before/make.py``.

Those that are kept were written by octavo 0.1.0 at commit b64c9c8, before the package had rooms and a registry.
``tests/python/models/test_before.py`` loads them: what was saved then must load to the same bits. The script is kept to
say how they came to be; to run it with a later octavo is of no use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import octavo
import torch
import transformers
from octavo import _C
from octavo.finetune import Settings, finetune
from octavo.integrations.transformers import OctavoConfig, mark_quantized
from octavo.optim import AdamW8bit
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

HERE = Path(__file__).parent
QUANTIZED = (octavo.nn.Int8Linear, octavo.nn.NF4Linear, octavo.nn.SpQRLinear)
TEXT = "It is a truth universally acknowledged, that a text of some length is wanted here.\n" * 4


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False)).eval()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def inputs():
    x = torch.randn(5, 64, generator=generator(1))
    x[:, 7] *= 8  # an outlier column
    return x


def batches():
    return [torch.randn(64, 64, generator=generator(2 + i)) for i in range(4)]


def quantize(net, kind):
    """A model of one kind."""
    if kind == "int8":
        given = {"threshold": 2.0, "keep_outliers": True, "calibration": [inputs()]}
        octavo.quantize_model(net, "int8", progress=False, **given)
    elif kind == "nf4":
        octavo.quantize_model(net, "nf4", progress=False, double_quant=True)
    elif kind == "fp4":
        octavo.quantize_model(net, "nf4", progress=False, quant_type="fp4", blocksize=128)
    elif kind == "spqr":
        octavo.quantize_model(net, "spqr", progress=False, bits=3, group_size=16, calibration=batches())
    elif kind == "mixed":
        octavo.quantize_model(net, "int8", ["2"], progress=False)
        octavo.quantize_model(net, "nf4", [], progress=False)
    return net


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def probe():
    """The hash of what torch alone makes of some products: where another machine rounds them in another way, outputs
    are near those of these files, and not equal to them."""
    x, w = torch.randn(12, 64, generator=generator(5)), torch.randn(64, 64, generator=generator(6))
    low = x.bfloat16() @ w.bfloat16()
    steps = (x @ w, nn.functional.gelu(x), torch.softmax(x @ w[:, :12], -1), low.float(), (x[:5] @ w[:, :2]) @ w[:2])
    return digest(torch.cat([step.flatten() for step in steps]))


def weights(net):
    """What every quantized layer multiplies by, in fp32: the hash of its bytes."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QUANTIZED)}
    return {name: digest(m.dequantize(torch.float32).weight.detach()) for name, m in layers.items()}


@torch.no_grad()
def write_expected(path, net, x):
    save_file({"x": x, "out": net(x)}, path, metadata=weights(net))


def write_saved():
    for kind in ("int8", "nf4", "fp4", "spqr", "mixed"):
        net = quantize(model(), kind)
        octavo.save_quantized(net, HERE / "saved" / kind)
        write_expected(HERE / "saved" / f"{kind}.safetensors", net, inputs())


def llama(hidden, layers, vocabulary, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def write_transformers():
    ids = torch.arange(12).reshape(2, 6)
    for kind in ("int8", "nf4", "spqr"):
        net = llama(64, 2, 32, torch.bfloat16)
        given = {"calibration": [torch.randint(0, 32, (4, 64), generator=generator(3))]} if kind == "spqr" else {}
        octavo.quantize_model(net, kind, progress=False, **given)
        options = next(m for m in net.modules() if isinstance(m, QUANTIZED))
        config = {
            "int8": lambda: OctavoConfig("int8"),
            "nf4": lambda: OctavoConfig("nf4"),
            "spqr": lambda options=options: OctavoConfig("spqr", **options.options._asdict()),
        }[kind]()
        mark_quantized(net, config)
        net.save_pretrained(HERE / "transformers" / kind)
        save_file({"out": net(ids).logits}, HERE / "transformers" / f"{kind}.safetensors", metadata=weights(net))


def write_adapters():
    for kind in ("int8", "nf4", "fp4"):
        net = octavo.load_quantized(HERE / "saved" / kind, model())
        torch.manual_seed(1)
        octavo.add_lora(net, rank=2, alpha=4, dropout=0.0, exclude=())
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            net(inputs()).square().mean().backward()
            optimizer.step()
        octavo.save_adapter(net, HERE / "adapters" / kind)
        with torch.no_grad():
            save_file({"x": inputs(), "out": net(inputs())}, HERE / "adapters" / f"{kind}.safetensors")


def steps(optimizer, params, first, last):
    """Steps with gradients that follow from their number."""
    for number in range(first, last):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator(100 + number))
        optimizer.step()


def write_optimizer():
    (HERE / "optimizer").mkdir()
    params = [nn.Parameter(torch.randn(shape, generator=generator(4))) for shape in ((64, 64), (64,))]
    optimizer = AdamW8bit(params, lr=1e-2, weight_decay=0.1)
    steps(optimizer, params, 0, 3)
    torch.save(optimizer.state_dict(), HERE / "optimizer" / "adamw8bit.pt")
    start = {str(i): p.detach().clone() for i, p in enumerate(params)}
    steps(optimizer, params, 3, 5)
    after = {str(i): digest(p.detach()) for i, p in enumerate(params)}
    save_file(start, HERE / "optimizer" / "params.safetensors", metadata=after)


def write_finetune():
    where = Path("finetune")  # a run keeps the paths that it is given
    where.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    llama(32, 1, 258, torch.bfloat16).save_pretrained(where / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(where / "model")
    (where / "text.txt").write_text(TEXT * 10)
    how = Settings(context=32, batch=2, steps=6, rank=2, lr=5e-3, eval_every=3, eval_windows=2, save_every=3)
    taken = []

    def stop():
        taken.append(None)
        lines = where / "run" / "losses.jsonl"
        return lines.exists() and sum('"loss"' in line for line in lines.read_text().splitlines()) >= 3

    result = finetune(where / "model", where / "text.txt", where / "run", how, stop=stop)
    assert not result.finished, result
    shutil.copytree(where / "run", where / "whole")
    result = finetune(where / "model", where / "text.txt", where / "whole", how, resume=True)
    assert result.finished
    shutil.copy(where / "whole" / "adapter" / "adapter_model.safetensors", where / "adapter.safetensors")
    lines = [json.loads(line) for line in (where / "whole" / "losses.jsonl").read_text().splitlines()]
    measured = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    (where / "losses.json").write_text(json.dumps(measured) + "\n")
    (where / "settings.json").write_text(json.dumps(dataclasses.asdict(how)) + "\n")
    shutil.rmtree(where / "whole")
    (where / "run" / "losses.png").unlink()
    manifest = json.loads((where / "run" / "finetune.json").read_text())
    manifest["machine"] = {}  # is only shown
    (where / "run" / "finetune.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write_schemas():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("octavo::")}
    lines = sorted(str(torch._C._get_schema(*name.partition(".")[::2])) for name in names)
    (HERE / "schemas.txt").write_text("\n".join(lines) + "\n")


def main():
    assert octavo.__version__ == "0.1.0"
    torch.set_num_threads(1)
    _C.set_isa("portable")
    os.chdir(HERE)
    for folder in ("saved", "transformers", "adapters", "optimizer", "finetune"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        if folder in ("saved", "transformers", "adapters"):
            (HERE / folder).mkdir()
    (HERE / "probe.txt").write_text(probe() + "\n")
    write_saved()
    write_transformers()
    write_adapters()
    write_optimizer()
    write_finetune()
    write_schemas()


if __name__ == "__main__":
    main()
