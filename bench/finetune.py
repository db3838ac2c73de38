"""Memory of fine-tuning, measured: all weights in fp32, LoRA on a 16-bit base, and QLoRA.

    python -m octavo.bench.finetune smollm2 --text emma.txt --threads 1

Each way takes two steps in a process of its own, with gradient checkpointing. Bytes of weights, adapters, gradients and
optimizer states are those of the tensors; the peak is that of the process in the steps, with activations and with the
libraries of Python and torch, or on a GPU that of the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from octavo import models
from octavo.finetune import MemoryRow, Settings, finetune
from octavo.finetune.data import Text
from octavo.finetune.memory import Peak, as_table, measure
from rich.console import Console

WAYS = {
    "full": Settings(method="16bit", dtype="fp32", optimizer="adamw"),
    "lora": Settings(method="16bit", optimizer="adamw"),
    "qlora": Settings(method="nf4", optimizer="paged_adamw8bit"),
}


def run(way: str, model: str, text: Path, context: int, batch: int) -> MemoryRow:
    """Two steps of one way, in this process."""
    changes = {"context": context, "batch": batch, "steps": 2, "eval_windows": 1}
    settings = Settings(**{**asdict(WAYS[way]), **changes})
    if way != "full":
        with tempfile.TemporaryDirectory() as folder:
            return finetune(model, text, Path(folder) / "out", settings).memory[-1]
    source = models.resolve(model)
    data = Text(text, models.load_tokenizer(source), settings)
    network = models.load_model(source, torch.float32).to(settings.chosen_device()).train()
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    optimizer = settings.make_optimizer(network.parameters())
    peak = Peak(settings.chosen_device())
    for step in range(2):
        optimizer.zero_grad()
        (ids,) = data.batches(step).to(network.device)
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
    row = measure("fp32, all weights, adamw", network, optimizer, peak.bytes())
    return MemoryRow(**{**asdict(row), "weights": row.adapters, "adapters": 0})  # what is trained are the weights


def main(arguments: list[str] | None = None) -> list[MemoryRow]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="as of octavo finetune")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in this process, for the others
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.way:
        row = run(given.way, given.model, given.text, given.context, given.batch)
        print(json.dumps(asdict(row)))
        return [row]
    rows = []
    for way in WAYS:
        command = [sys.executable, "-m", "octavo.bench.finetune", *(arguments or sys.argv[1:]), "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(MemoryRow(**json.loads(done.stdout.splitlines()[-1])))
    Console(highlight=False).print(as_table(rows))
    return rows


if __name__ == "__main__":
    main()
