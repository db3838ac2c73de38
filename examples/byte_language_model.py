"""A byte-level language model trained by torch's AdamW and by octavo's AdamW8bit, side by side.

The text comes with Python: its language reference (as pydoc carries it) and the modules of its standard library. The
model has 0.87 M parameters, whose matrices all have the 4096 elements from which on their states are kept in 8 bit.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Batch, MakeOptimizer, Schedule, Score, Task, console, parameters, train
from report import OUT, show, write
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Block, initialise

BYTES = 256


class ByteModel(nn.Module):
    """Its embeddings are plain ones by default, so that their states are in 8 bit too; octavo's StableEmbedding
    normalises them and keeps their states in 32 bit (arXiv 2110.02861, section 2.3)."""

    def __init__(self, width: int, layers: int, heads: int, context: int, embedding: type[nn.Embedding]) -> None:
        super().__init__()
        self.byte, self.place = embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)
        initialise(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.byte(ids) + self.place.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@lru_cache
def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to validate on: of the documents (chapters and modules), every tenth."""
    from pydoc_data.topics import topics

    documents = [chapter.encode() for _, chapter in sorted(topics.items())]
    documents += [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    held_out = documents[9::10]
    learned = [document for number, document in enumerate(documents) if number % 10 != 9]
    learned_bytes, held_out_bytes = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in (learned, held_out)
    )
    return learned_bytes, held_out_bytes


def windows(data: Tensor, starts: Tensor, context: int) -> Batch:
    """Of every start, `context` bytes and the byte that follows each of them."""
    ids = data[starts[:, None] + torch.arange(context + 1)].long()
    return ids[:, :-1], ids[:, 1:]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    ids, following = batch
    return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())


def make_task(
    batch: int = 6,
    context: int = 64,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    validation: int = 32768,
    embedding: type[nn.Embedding] = nn.Embedding,
    name: str = "byte language model",
) -> Task:
    """`validation`: bytes of held-out text, evenly spread; the curve sees an eighth of them."""
    learned, held_out = text()
    starts = torch.linspace(0, len(held_out) - context - 1, max(8, validation // context)).long()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield windows(learned, torch.randint(len(learned) - context, (batch,), generator=generator), context)

    def evaluate(model: nn.Module, full: bool) -> Score:
        chosen = starts if full else starts[::8]
        parts = [(len(some), loss(model, windows(held_out, some, context)).item()) for some in chosen.split(64)]
        return {"loss": sum(count * value for count, value in parts) / len(chosen)}

    def model() -> nn.Module:
        return ByteModel(width, layers, heads, context, embedding)

    return Task(name, model, loss, batches, evaluate)


# Options of the examples that compare these.
Beta1 = Annotated[float, typer.Option(help="Decay of the first moment, for all optimizers.")]
Beta2 = Annotated[float, typer.Option(help="Decay of the second moment, for all optimizers.")]
Lion = Annotated[bool, typer.Option("--lion", help="Lion, with 32- and 8-bit state; its own decays are 0.9 and 0.99.")]
Incumbent = Annotated[
    bool, typer.Option("--incumbent", help="Also the optimizer of bitsandbytes, which must be installed.")
]
Control = Annotated[
    bool, typer.Option("--control", help="Also AdamW8bit(bits=32): how much rounding alone changes a run.")
]


def contenders(
    beta2: float = 0.999, control: bool = False, beta1: float = 0.9, lion: bool = False, incumbent: bool = False
) -> Mapping[str, MakeOptimizer]:
    """The optimizers by name, the first the one that others are compared to."""
    from octavo import optim

    options: dict[str, Any] = {"betas": (beta1, beta2)}
    name = "Lion8bit" if lion else "AdamW8bit"
    low: Any = getattr(optim, name)
    made: dict[str, MakeOptimizer] = {}
    if lion:  # torch has none
        made["Lion"] = lambda model: low(model.parameters(), bits=32, **options)
    else:
        made["AdamW"] = lambda model: torch.optim.AdamW(model.parameters(), **options)
    made[name] = lambda model: low(model.parameters(), **options)
    if incumbent:
        try:
            import bitsandbytes
        except ImportError:
            raise typer.BadParameter("bitsandbytes is missing: pip install bitsandbytes") from None
        other: Any = getattr(bitsandbytes.optim, name)
        made[f"bitsandbytes {name}"] = lambda model: other(model.parameters(), **options)
    if control and not lion:  # the same arithmetic on 32-bit states: how far rounding alone drives two runs apart
        made["AdamW8bit, bits=32"] = lambda model: low(model.parameters(), bits=32, **options)
    return made


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 1200,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with its own weights and batches.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 6,
    context: Annotated[int, typer.Option(min=2, help="Bytes in a window.")] = 64,
    width: Annotated[int, typer.Option(help="Width of the model; 4 heads. Below 64, no matrix is in 8 bit.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate: warm-up of a tenth, then a cosine.")] = 2e-3,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    lion: Lion = False,
    incumbent: Incumbent = False,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients, for all optimizers; 0: any.")] = 1.0,
    validation: Annotated[int, typer.Option(help="Bytes of held-out text to judge by.")] = 32768,
    stable_embedding: Annotated[
        bool, typer.Option("--stable-embedding", help="octavo.nn.StableEmbedding for the bytes, for all optimizers.")
    ] = False,
    control: Control = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of octavo.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for byte_language_model.json and .png.")] = OUT,
) -> None:
    """Train a byte-level transformer with 32-bit AdamW and with octavo's AdamW8bit, on text that comes with Python.

    Both start from the same weights and see the same batches, so that their paired difference shows what 8-bit states
    change. It prints validation losses in nats per byte, and writes a JSON file and a plot. The defaults take some
    minutes on one core.
    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    embedding = nn.Embedding
    if stable_embedding:
        from octavo.nn import StableEmbedding as embedding
    task = make_task(batch, context, width, layers, validation=validation, embedding=embedding)
    console.print(f"{task.name}: {parameters(task):,} parameters, {len(text()[0]):,} bytes to learn from")
    begin = time.perf_counter()
    made = contenders(beta2, control, beta1, lion, incumbent)
    runs = train(task, made, Schedule(lr, steps // 10, steps), seeds, max(1, steps // 12), clip)
    show(task, runs, "nats per byte")
    write(task, runs, settings, time.perf_counter() - begin, out)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
app.command()(main)

if __name__ == "__main__":
    app()
